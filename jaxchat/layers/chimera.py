"""Chimera, a trained draft for speculative decoding (Zeng et al. 2024, arXiv:2402.15758): its network.

From the base model's own hidden states and the tokens it has so far, it guesses the tokens after the next:
a trigram encoder, one decoder layer over the whole context, and a head for each token ahead. Here are pure
functions over its parameters, in the form that trains (`teacher_forced`) and in the form that drafts
(`remember`, `first`, `deeper`). What is drafted, and what becomes of it, is decided in `engine/drafts/`.

Which row says what. h_r is the base's hidden state, after its last norm, at the token x_r; its head predicts
x_{r+1}. With the tokens up to x_{r+k+1} known or guessed, f^{k+1}_r stands for h_{r+k+1}, and head k
(k = 0 .. K-1), of [h_r ; f^{k+1}_r], predicts x_{r+k+2}.

  g_p      the trigram at position p: of the embeddings of x_{p-2}, x_{p-1} and x_p
  f^d_r    the layer's output at g_{r+d}, at that position, which sees h_0 .. h_r, its own f^1_r .. f^{d-1}_r
           (at positions r+1 .. r+d-1) and g_d .. g_{r+d}
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxchat.config import GLOBAL_WINDOW, ModelConfig
from jaxchat.families import parameter_table
from jaxchat.layers import attention
from jaxchat.layers.block import ARRANGEMENTS, add_to, read
from jaxchat.layers.cache import Fresh, KVCache, empty_cache
from jaxchat.layers.chimera_heads import HEADS
from jaxchat.layers.ends import embedded
from jaxchat.layers.mlp import MLPS
from jaxchat.layers.rope import rope_cos_sin
from jaxchat.layers.step import Params, SlotIndex, Step
from jaxchat.pallas.cache_attention import QuantizedRows, Rows
from jaxchat.pallas.storage import widen

_MASKED = -1e30
_KEY_BLOCK = 256
"""Rows of the cache read at a time: the unused end of it is not."""

HIDDEN, TRIGRAMS = 0, 1
"""The slots of Chimera's cache: row p of one is of h_p, of the other of g_p."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChimeraConfig:
    """What a Chimera is, beside the sizes that it has from its base. Hashable.

    Attributes:
      kind: of the heads, by its name in `layers/chimera_heads.py`.
      heads: K, how many tokens ahead it guesses.
      rank: of heads that have one.
    """

    kind: str = "shared"
    heads: int = 4
    rank: int = 64


def layer_config(base: ModelConfig) -> ModelConfig:
    """The one layer: as the last of the base's that sees the whole context, or else as its last."""
    whole = [i for i, window in enumerate(base.layer_windows) if window == GLOBAL_WINDOW]
    layer = whole[-1] if whole else base.num_layers - 1
    block = base.layer_blocks[layer] if base.layer_blocks else 0
    rope = base.ropes[base.layer_ropes[layer] if base.layer_ropes else 0] if base.ropes else None
    return dataclasses.replace(
        base,
        num_layers=1,
        blocks=(base.blocks[block],),
        layer_blocks=(),
        ropes=() if rope is None else (rope,),
        layer_ropes=() if rope is None else (0,),
        layer_windows=(GLOBAL_WINDOW,),
        layer_attn_scales=(base.layer_attn_scales[layer],),
        layer_rows=(),
    )


def shapes(chimera: ChimeraConfig, base: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters and their sizes: `trigram.*`, `layers.*` (of one layer, stacked), `heads.*`."""
    d, layer = base.hidden_size, layer_config(base)
    found: dict[str, tuple[int, ...]] = {
        "trigram.w1.weight": (1, 3 * d, 3 * d),
        "trigram.w1.bias": (3 * d,),
        "trigram.w2.weight": (1, d, 3 * d),
    }
    found |= {p.name: p.stacked_shape(layer) for p in parameter_table(layer) if p.per_layer}
    return found | HEADS[chimera.kind].shapes(chimera, base)


def initial_params(
    chimera: ChimeraConfig, base_config: ModelConfig, base_params: Params, key: jax.Array
) -> Params:
    """What training begins with, float32: heads that say what the base's does of h_r and of f together.

    Args:
      chimera: what is made.
      base_config: of the model that it is for.
      base_params: of that model, as they are loaded.
      key: of the random numbers.
    """
    wide = 3 * base_config.hidden_size
    bound = wide**-0.5  # as PyTorch begins a linear map
    layer, keys = layer_config(base_config), jax.random.split(key, 4)
    params: Params = {
        "trigram.w1.weight": jnp.zeros((1, wide, wide)),
        "trigram.w1.bias": jax.random.uniform(keys[0], (wide,), minval=-bound, maxval=bound),
        "trigram.w2.weight": jax.random.uniform(keys[1], (1, wide // 3, wide), minval=-bound, maxval=bound),
    }
    table = [param for param in parameter_table(layer) if param.per_layer]
    for param, own in zip(table, jax.random.split(keys[2], len(table)), strict=True):
        shape = param.stacked_shape(layer)
        if param.init == "normal":
            params[param.name] = 0.02 * jax.random.normal(own, shape, jnp.float32)
        else:
            params[param.name] = jnp.full(shape, float(param.init == "ones"), jnp.float32)
    return params | HEADS[chimera.kind].initial(chimera, base_config, base_params, keys[3])


# --- the form that trains


class Depth(NamedTuple):
    """What is guessed at a depth k."""

    hidden: jax.Array  # float32 [B, T, D], f^{k+1}: row r stands for the base's hidden state at r + k + 1
    logits: jax.Array  # float32 [B, T, V], row r of the token at r + k + 2


def teacher_forced(
    chimera: ChimeraConfig,
    params: Params,
    step: Step,
    tokens: Int[Array, "B U"],
    hidden: Float[Array, "B T D"],
    *,
    starts: Int[Array, "B T"] | None = None,
) -> list[Depth]:
    """All depths over whole sequences at once, with the trigrams of the text itself; to be differentiated.

    Row r of depth k is of the text up to x_{r+k+1}. Where that is beyond the tokens given, the last of them
    is repeated, as a trigram: such rows teach nothing, and are to weigh nothing in a loss.

    Args:
      chimera: static.
      params: as `initial_params` makes them.
      step: of the base, whose embedding and output head are used; its own tokens are not.
      tokens: int32, from position 0; T of them, or one more.
      hidden: h, of the first T.
      starts: where the text of each token begins, in rows that hold several texts: each sees itself only, and
        its positions count from 0. Tokens are T then. If not given, those of the step, if it has some.

    Returns:
      One entry a head. Gradients reach no drafted state and no trigram at depths beyond the first, as
      what goes into those is taken as it comes.
    """
    states = drafted_states(chimera, params, step, tokens, hidden, starts=starts)
    return [Depth(f, head_logits(chimera, params, step, k, hidden, f)) for k, f in enumerate(states)]


def head_logits(
    chimera: ChimeraConfig,
    params: Params,
    step: Step,
    k: int,
    hidden: Float[Array, "*lead D"],
    drafted: Float[Array, "*lead D"],
) -> Float32[Array, "*lead V"]:
    """Head k of [h ; f], float32."""
    return HEADS[chimera.kind].logits(params, step, k, hidden, drafted)


def drafted_states(
    chimera: ChimeraConfig,
    params: Params,
    step: Step,
    tokens: Int[Array, "B U"],
    hidden: Float[Array, "B T D"],
    *,
    starts: Int[Array, "B T"] | None = None,
) -> list[Float32[Array, "B T D"]]:
    """The hidden states of `teacher_forced` alone: logits can be made of them a head at a time."""
    layer, (b, t) = _layer_step(params, step), hidden.shape[:2]
    starts = step.starts if starts is None else starts
    places = jnp.arange(tokens.shape[1])
    begin = jnp.zeros((b, t), jnp.int32) if starts is None else starts
    positions = places - begin[:, jnp.minimum(places, t - 1)]
    e = embedded(step, tokens, positions)
    before = jnp.pad(e, ((0, 0), (2, 0), (0, 0)))
    g = trigram(layer, before[:, :-2], before[:, 1:-1], e, positions)
    # Beyond the tokens the last trigram is repeated.
    g = g[:, jnp.minimum(jnp.arange(t + chimera.heads), tokens.shape[1] - 1)]
    positions = positions[:, :t]

    of_h = _project(layer, hidden.astype(layer.dtype), positions)
    row = jnp.arange(t)
    causal = (row <= row[:, None]) & (row >= begin[:, :, None])  # [B, T, T]
    of_f: list[Fresh] = []
    states: list[jax.Array] = []
    for depth in range(1, chimera.heads + 1):
        if depth > 1:
            states_in = lax.stop_gradient(states[-1]).astype(layer.dtype)
            of_f.append(_project(layer, states_in, positions + depth - 1))
        newest = (g if depth == 1 else lax.stop_gradient(g))[:, depth : depth + t]
        of_g = _project(layer, newest, positions + depth)
        shared = [(of_h.k, of_h.v, causal), (of_g.k, of_g.v, causal)]
        own = [jnp.stack([getattr(f, name) for f in of_f], 2) for name in ("k", "v")] if of_f else None
        mixed = _mix(layer, of_g.q, shared, own)
        states.append(_finish(layer, newest, mixed))
    return states


def _mix(
    step: Step,
    q: Float[Array, "B T N H"],
    shared: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    own: Sequence[jax.Array] | None,
) -> Float32[Array, "B T NH"]:
    """Attention of T queries over keys and values that all may see, by mask, and over some of their own.

    Args:
      step: of the layer.
      q: the queries.
      shared: keys and values [B, S, K, H], and bool [B, T, S].
      own: keys and values [B, T, M, K, H]; None is none.
    """
    matrices = _matrices(step, q)
    b, t, n, h = q.shape
    kv, group = matrices.shape[1], n // matrices.shape[1]
    scores = []
    for k, _, mask in shared:
        found = _scores(step, "bkqh,bskh->bkqs", matrices, k).reshape(b, kv, group, t, -1)
        scores.append(jnp.where(mask[:, None, None], found, _MASKED))
    if own is not None:
        # Products of one query with a few keys: as matrices they would be slow.
        of_heads = q.reshape(b, t, 1, kv, group, h).astype(jnp.float32)
        found = jnp.sum(of_heads * own[0][:, :, :, :, None], -1)  # [B, T, M, K, G]
        scores.append(jnp.transpose(_scaled(step, found), (0, 3, 4, 1, 2)))
    weights = jax.nn.softmax(jnp.concatenate(scores, -1), axis=-1)
    parts = jnp.split(weights, np.cumsum([part.shape[-1] for part in scores])[:-1], axis=-1)
    out = jnp.zeros((b, kv, group, t, h))
    for part, (_, v, _) in zip(parts, shared, strict=False):
        flat = part.reshape(b, kv, group * t, -1).astype(q.dtype)
        out = out + _product(step, "bkqs,bskh->bkqh", flat, v).reshape(out.shape)
    out = jnp.transpose(out, (0, 3, 1, 2, 4))  # [B, T, K, G, H]
    if own is not None:
        weight = jnp.transpose(parts[-1], (0, 3, 4, 1, 2))[..., None]  # [B, T, M, K, G, 1]
        out = out + jnp.sum(weight * own[1][:, :, :, :, None].astype(jnp.float32), 2)
    return out.reshape(b, t, n * h)


# --- the form that drafts


class Known(NamedTuple):
    """What is known of each sequence at a step, and what all its guesses begin with.

    The cache holds h and g of the positions [begin, end); the tokens are those of the last two of them, and
    the one behind them, which is the first that has no hidden state yet: r is end - 1.
    """

    cache: KVCache  # [2, B, K, S, H], see `HIDDEN`
    begin: jax.Array  # int32 [B]
    end: jax.Array  # int32 [B]
    tokens: jax.Array  # int32 [B, 3], x_{r-1}, x_r and x_{r+1}; of a position before 0 anything
    hidden: jax.Array  # float32 [B, D], h_r


class Guess(NamedTuple):
    """Nodes of one depth of a tree: tokens that follow x_r, each with what it has come from."""

    hidden: jax.Array  # float32 [B, n, D], f^d at each
    last: jax.Array  # [B, n, 2, D], the embeddings of its own token and of the one before
    k: jax.Array  # [B, n, 2 d - 1, K, H], the keys and values of the f and g on its path
    v: jax.Array


def empty(base: ModelConfig, *, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache."""
    return empty_cache(layer_config(base), slots=2, batch=batch, capacity=capacity, dtype=dtype)


def remember(
    params: Params,
    step: Step,
    cache: KVCache,
    before: Int[Array, "B 2"],
    tokens: Int[Array, "B T"],
    hidden: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    new: Int[Array, " B"],
) -> KVCache:
    """The cache with what the base has computed since; donate it.

    Args:
      params: of Chimera.
      step: of the base.
      cache: see `HIDDEN`.
      before: the two tokens before the first; of a position before 0 anything.
      tokens: what it has computed, `new` of them in each sequence.
      hidden: their hidden states.
      lengths: the position of the first.
      new: how many.
    """
    layer = _layer_step(params, step)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])
    e = embedded(
        step, jnp.concatenate([before, tokens], 1), lengths[:, None] - 2 + jnp.arange(2 + tokens.shape[1])
    )
    g = trigram(layer, e[:, :-2], e[:, 1:-1], e[:, 2:], positions)
    for slot, x in ((HIDDEN, hidden.astype(layer.dtype)), (TRIGRAMS, g)):
        cache = cache.append(step.kernels, _project(layer, x, positions), jnp.int32(slot), lengths, new)
    return cache


def first(params: Params, step: Step, known: Known) -> Guess:
    """f^1 at x_{r+1}."""
    layer = _layer_step(params, step)
    position = known.end[:, None]
    e = embedded(step, known.tokens, position + jnp.arange(-2, 1))
    x = trigram(layer, e[:, :1], e[:, 1:2], e[:, 2:], position)
    fresh = _project(layer, x, position)
    path = fresh.k[:, :, None], fresh.v[:, :, None]
    mixed = _mix_known(layer, known, fresh.q, 1, *path)
    return Guess(_finish(layer, x, mixed), e[:, None, :0:-1], *path)


def deeper(
    params: Params,
    step: Step,
    known: Known,
    guess: Guess,
    parents: Sequence[int],
    tokens: Int[Array, "B n"],
    depth: int,
) -> Guess:
    """f^depth at tokens that follow nodes of the depth before.

    Args:
      params: of Chimera.
      step: of the base.
      known: see `Known`.
      guess: the nodes before.
      parents: which of them each token follows.
      tokens: what was guessed there.
      depth: 2 or more.
    """
    layer = _layer_step(params, step)
    of = np.asarray(parents)
    position = jnp.broadcast_to(known.end[:, None] + (depth - 1), tokens.shape)
    e, last = embedded(step, tokens, position), guess.last[:, of]
    x = trigram(layer, last[:, :, 1], last[:, :, 0], e, position)
    of_f = _project(layer, guess.hidden[:, of].astype(layer.dtype), position - 1)
    of_g = _project(layer, x, position)
    k, v = (
        jnp.concatenate([path[:, of], f[:, :, None], g[:, :, None]], 2)
        for path, f, g in ((guess.k, of_f.k, of_g.k), (guess.v, of_f.v, of_g.v))
    )
    mixed = _mix_known(layer, known, of_g.q, depth, k, v)
    return Guess(_finish(layer, x, mixed), jnp.stack([e, last[:, :, 0]], 2), k, v)


def _mix_known(
    step: Step, known: Known, q: Float[Array, "B n N H"], depth: int, k: jax.Array, v: jax.Array
) -> Float32[Array, "B n NH"]:
    """Attention of some nodes over the cache, as far as it is known, and over the paths that lead to them.

    Args:
      step: of the layer.
      known: see `Known`.
      q: the queries.
      depth: of the nodes; the first trigrams that they see are at that position.
      k, v: [B, n, M, K, H], of the paths: of g_{r+1}, f^1, g_{r+2}, f^2 and so on.
    """
    matrices, (b, n, heads, h), cache = _matrices(step, q), q.shape, known.cache
    kv, rows = matrices.shape[1:3]
    block = min(cache.capacity, _KEY_BLOCK)
    begins = known.begin, jnp.maximum(known.begin, depth)

    def add(
        state: tuple[jax.Array, ...], keys: jax.Array, values: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, ...]:
        """One more part of an online softmax: keys and values [B, K, S, H], seen [B, 1 or n, S]."""
        top, total, out = state
        scores = _scores(step, "bkqh,bksh->bkqs", matrices, keys).reshape(b, kv, rows // n, n, -1)
        scores = jnp.where(seen[:, None, None], scores, _MASKED).reshape(b, kv, rows, -1)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(scores > _MASKED, jnp.exp(scores - new_top[..., None]), 0.0)
        decay = jnp.exp(top - new_top)
        mixed = _product(step, "bkqs,bksh->bkqh", weights.astype(q.dtype), values)
        return new_top, total * decay + weights.sum(-1), out * decay[..., None] + mixed

    def body(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last block is moved back to end at the last row; keys that it repeats are masked.
        start = jnp.minimum(i * block, cache.capacity - block)
        place = start + jnp.arange(block)
        for slot, begin in enumerate(begins):
            keys, values = (_rows(part, slot, start, block).astype(q.dtype) for part in (cache.k, cache.v))
            seen = (place >= begin[:, None]) & (place < known.end[:, None]) & (place >= i * block)  # [B, S]
            state = add(state, keys, values, seen[:, None])
        return state

    # The paths of all nodes are one set of keys, of which each sees its own.
    number, count = np.arange(n), k.shape[2]
    own = np.repeat(number, count) == number[:, None]  # [n, n * M]
    seen = own & jnp.tile(_is_seen(known, depth, count), n)[:, None]
    keys, values = (part.reshape(b, n * count, kv, h).transpose(0, 2, 1, 3) for part in (k, v))
    state: tuple[jax.Array, ...] = (
        jnp.full((b, kv, rows), _MASKED),
        jnp.zeros((b, kv, rows)),
        jnp.zeros((b, kv, rows, h)),
    )
    state = add(state, keys, values, seen)
    last = -(-jnp.max(known.end) // block)
    _, total, out = lax.fori_loop(jnp.min(known.begin) // block, last, body, state)
    out = (out / total[..., None]).reshape(b, kv, rows // n, n, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, n, heads * h)


def _is_seen(known: Known, depth: int, count: int) -> Bool[Array, "B M"]:
    """Which keys of a path a node at its end sees: trigrams, the even ones, from position `depth` on."""
    number = np.arange(count)
    return (number % 2 == 1) | (known.end[:, None] + number // 2 >= depth)


def _rows(part: Rows, slot: int, start: jax.Array, count: int) -> jax.Array:
    """Rows of a cache, [B, K, count, H]."""
    assert not isinstance(part, QuantizedRows)  # `empty` makes none
    _, b, kv, _, h = part.shape
    return widen(lax.dynamic_slice(part, (slot, 0, 0, start, 0), (1, b, kv, count, h))[0])


# --- what both are made of


def trigram(
    step: Step,
    oldest: Float[Array, "B T D"],
    older: Float[Array, "B T D"],
    own: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """g: W2 (t + SiLU(W1 t + b1)) of the three embeddings in a row, in the step's dtype.

    At position 0 they are [e0; e0; e0], at position 1 [e0; e1; e1].
    """
    at = positions[..., None]
    first = jnp.where(at == 0, own, jnp.where(at == 1, older, oldest))
    second = jnp.where(at <= 1, own, older)
    t = jnp.concatenate([first, second, own], -1).astype(step.dtype)
    (y,) = step.kernels.matmuls(t, [step.params["trigram.w1.weight"]], [jnp.int32(0)])
    t = (t + jax.nn.silu(y + widen(step.params["trigram.w1.bias"]).astype(jnp.float32))).astype(step.dtype)
    (g,) = step.kernels.matmuls(t, [step.params["trigram.w2.weight"]], [jnp.int32(0)])
    return g.astype(step.dtype)


def _layer_step(params: Params, step: Step) -> Step:
    """A step of the layer, as the base's computes."""
    return dataclasses.replace(step, config=layer_config(step.config), params=params, adapters=None)


def _slot() -> SlotIndex:
    """The only one."""
    return SlotIndex(jnp.int32(0), jnp.int32(0), jnp.float32(1), jnp.float32(1))


def _project(step: Step, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Fresh:
    """Queries, keys and values of what goes into the layer."""
    config = step.config
    rotations = rope_cos_sin(config.ropes, positions, step.context) if config.ropes else None
    shared = attention.Shared(
        rotations, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.asarray(config.layer_attn_scales)
    )
    h = read(step, config.block, "attn_norm", _slot(), x)
    return attention.project(step, config.block, shared, jnp.int32(0), h)


def _finish(step: Step, x: Float[Array, "B T D"], mixed: Float32[Array, "B T NH"]) -> Float32[Array, "B T D"]:
    """The layer's output for what went in and what attention made of it."""
    block, slot = step.config.block, _slot()
    y = attention.output(step, slot.layer, mixed)
    after = add_to(step, block, "attn_post_norm", slot, x, y)
    h = read(step, block, "mlp_norm", slot, ARRANGEMENTS[block.arrangement](x, after))
    y = MLPS[block.mlp](step, block, slot.layer, h)
    return add_to(step, block, "mlp_post_norm", slot, after, y).astype(jnp.float32)


def _matrices(step: Step, q: Float[Array, "B T N H"]) -> Float[Array, "B K Q H"]:
    """The queries of a key/value head as one matrix, of G*T rows: products in groups are slow on CPU."""
    (b, t, n, h), kv = q.shape, step.config.num_kv_heads
    return q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, n // kv * t, h)


def _scores(step: Step, product: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return _scaled(step, _product(step, product, q, k))


def _scaled(step: Step, scores: jax.Array) -> jax.Array:
    scores = scores * np.float32(step.config.layer_attn_scales[0])
    cap = step.config.block.softcap
    return cap * jnp.tanh(scores / cap) if cap else scores


def _product(step: Step, product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if step.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(product, a, b, precision=precision, preferred_element_type=jnp.float32)
