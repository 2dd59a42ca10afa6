"""The decoder as pure functions: embed -> run the layer plan -> norm -> logits, over a slot-stacked KV cache.

One alphabet of dimensions, here and everywhere:

  L stacked source layers   P plan slots              B batch        T query tokens   S cache length
  D model width             N query heads             K key/value heads               H head size
  F feed-forward width      V vocabulary              G quantization group

The plan is traced data: `plan.layer[p]` picks the weights and every per-layer constant, the slot p picks the
rows of the KV cache. One compiled executable serves every plan that fits the cache's P slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.config import ModelConfig
from jaxchat.layer_plan import PlanArrays
from jaxchat.layers.rope import rope_cos_sin, rotate
from jaxchat.pallas.backends import DIFFERENTIABLE, REFERENCE, Kernels
from jaxchat.pallas.cache_attention import QuantizedRows, Rows
from jaxchat.pallas.stacked_matmul import embedding_rows, widen

Params = dict[str, Any]
"""The parameter pytree: `Param.name` -> jax.Array or QuantizedTensor; `layers.*` are stacked [L, ...]."""


class KVCache(NamedTuple):
    """Keys and values of every slot of a plan.

    Rows beyond a sequence's length are stale. Their weight is 0, so they must be finite: all that a working
    model writes is, and the engine drops a cache after non-finite logits.
    """

    k: Rows  # [P, B, K, S, H]
    v: Rows  # [P, B, K, S, H]


def init_cache(config: ModelConfig, *, slots: int, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for plans of up to `slots` slots and contexts of up to `capacity` tokens.

    Args:
      config: the model.
      slots, batch, capacity: P, B and S.
      dtype: a float type; uint16, which is bfloat16 as its bits; or int8, for `QuantizedRows`.
    """
    shape = (slots, batch, config.num_kv_heads, capacity, config.head_dim)

    def zeros() -> Rows:
        codes = jnp.zeros(shape, dtype)
        return QuantizedRows(codes, jnp.zeros(shape[:-1], jnp.float32)) if dtype == jnp.int8 else codes

    return KVCache(zeros(), zeros())


class _Layers(NamedTuple):
    """Per-layer constants, indexed by source layer: what makes a stack heterogeneous."""

    window: jax.Array  # int32 [L]
    rope: jax.Array  # int32 [L]
    scale: jax.Array  # float32 [L]


def _layer_constants(config: ModelConfig) -> _Layers:
    return _Layers(
        jnp.asarray(config.layer_windows, jnp.int32),
        jnp.asarray(config.layer_ropes or (0,) * config.num_layers, jnp.int32),
        jnp.asarray(config.layer_attn_scales, jnp.float32),
    )


def forward(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    plan: PlanArrays,
    tokens: jax.Array,
    lengths: jax.Array,
    new: jax.Array,
    context_length: jax.Array,
    *,
    dtype: jnp.dtype,
    kernels: Kernels = REFERENCE,
    write_from: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs new tokens through the plan and appends their keys and values to the cache.

    Args:
      config: static.
      params: see `Params`.
      cache: donate it, and it is updated in place.
      plan: traced; slots beyond `plan.length` are not executed.
      tokens: int32 [B, T]; entries from `new` on are padding.
      lengths: int32 [B], tokens each sequence already has in the cache.
      new: int32 [B], how many of the T tokens are real; 0 leaves a sequence untouched.
      context_length: int32 [B], tokens of the whole context this call belongs to, at least lengths + new;
        only models whose RoPE depends on the length use it.
      dtype: of the activations; sums, norms, softmax and rotations are float32.
      kernels: static, the implementations to use.
      write_from: int32 [B], the first slot that does not have these tokens' keys and values yet; slots before
        it leave their cache alone. Default 0.

    Returns:
      The normed hidden state, float32 [B, T, D], and the cache. `logits` turns the former into logits.
    """
    x = embed(config, params, tokens, lengths[:, None] + jnp.arange(tokens.shape[1]), dtype=dtype)
    x, cache = run_plan(
        config, params, cache, plan, x, lengths, new, context_length,
        dtype=dtype, kernels=kernels, write_from=write_from,
    )  # fmt: skip
    return final_norm(config, params, x), cache


def embed(
    config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """The residual stream before the first slot, [B, T, D] in `dtype`; tokens and positions: int32 [B, T]."""
    with jax.named_scope("embed"):
        x = embedding_rows(params["embed.weight"], tokens) * np.float32(config.embedding_scale)
        if config.learned_positions:
            # Padding may run beyond the table; its positions are clipped, its output is never read.
            x = x + embedding_rows(params["positions.weight"], positions)
    return x.astype(dtype)


def run_plan(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    plan: PlanArrays,
    x: jax.Array,
    lengths: jax.Array,
    new: jax.Array,
    context_length: jax.Array,
    *,
    dtype: jnp.dtype,
    kernels: Kernels = REFERENCE,
    start: jax.Array | int = 0,
    write_from: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs the slots [start, plan.length) of a plan on a residual stream.

    Args:
      x: [B, T, D] in `dtype`, the residual stream before slot `start`.
      start: traced; an earlier end is `plan._replace(length=stop)`.
      others: as in `forward`.

    Returns:
      The residual stream after the last of these slots, like `x`, and the cache with their rows written.
    """
    positions = lengths[:, None] + jnp.arange(x.shape[1])
    run_slot = _slot_function(
        config, params, positions, lengths, new, context_length, dtype, kernels, write_from,
        _layer_constants(config),
    )  # fmt: skip

    def body(p: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        slot = (p, plan.layer[p], plan.attn_scale[p], plan.mlp_scale[p])
        return run_slot(slot, carry)

    return lax.fori_loop(start, plan.length, body, (x, cache))


def final_norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """The normed hidden state, float32 [..., D], of a residual stream after its last slot."""
    return _norm(config, params, "norm", x)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    dtype: jnp.dtype,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """All layers once, in order, over whole sequences: `forward` in a form that can be differentiated.

    The layers are a scan's inputs, so that each step's gradient is one layer and no stack is carried.

    Args:
      config: static.
      params: see `Params`; plain floating-point arrays where gradients are wanted.
      tokens: int32 [B, T], from position 0; what follows a token does not change its output.
      dtype: of the activations.
      dropout: static; the rate at which elements of what the embedding and each layer add to the residual
        stream are zeroed (Srivastava et al. 2014).
      key: of the random numbers for dropout; without one nothing is dropped.

    Returns:
      The normed hidden state, float32 [B, T, D].
    """
    b, t = tokens.shape
    zero, one = jnp.int32(0), jnp.float32(1)
    nothing, whole = jnp.zeros(b, jnp.int32), jnp.full(b, t, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    alone = dataclasses.replace(config, layer_rows=())
    stacks = {
        name: jax.tree.map(lambda a, n=name: a[row_of(config, n, jnp.arange(config.num_layers))], stack)
        if name in dict(config.layer_rows)
        else stack
        for name, stack in params.items()
        if name.startswith("layers.")
    }

    def add(x: jax.Array, y: jax.Array, index: jax.Array) -> jax.Array:
        """The residual stream y with what was added to x dropped in places."""
        if key is None:
            return y
        bits = jax.random.bits(jax.random.fold_in(key, index), x.shape, jnp.uint8)
        zeroed = round(dropout * 256)
        return (x + jnp.where(bits >= zeroed, (y - x) * (256 / (256 - zeroed)), 0)).astype(dtype)

    def body(x: jax.Array, xs: tuple[jax.Array, _Layers, Params]) -> tuple[jax.Array, None]:
        index, *own = xs
        constants, layer = jax.tree.map(lambda a: a[None], own)
        run_slot = _slot_function(
            alone, layer, positions, nothing, whole, whole, dtype, DIFFERENTIABLE, None, constants
        )
        cache = init_cache(config, slots=1, batch=b, capacity=t, dtype=dtype)
        y, _ = run_slot((zero, zero, one, one), (x, cache))
        return add(x, y, index), None

    x = embed(config, params, tokens, positions, dtype=dtype)
    x = add(jnp.zeros_like(x), x, jnp.int32(config.num_layers))
    layers = (jnp.arange(config.num_layers), _layer_constants(config), stacks)
    # Of a layer only its input is kept; on CPU computing the rest anew takes less time than storing it, too.
    x, _ = lax.scan(jax.checkpoint(body, prevent_cse=False), x, layers)
    return final_norm(config, params, x)


def logits(
    config: ModelConfig, params: Params, hidden: jax.Array, *, dtype: jnp.dtype, kernels: Kernels = REFERENCE
) -> jax.Array:
    """Output head: normed hidden states [..., D] -> float32 logits [..., V]."""
    head = params["embed.weight" if config.tied_embeddings else "lm_head.weight"]
    with jax.named_scope("lm_head"):
        stack = jax.tree.map(lambda array: array[None], head)  # one layer of its own
        out = kernels.stacked_matmul(hidden.astype(dtype), stack, jnp.int32(0))
    if config.final_softcap:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


Slot = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""(slot, source layer, attention scale, MLP scale), scalars."""


def _slot_function(
    config: ModelConfig,
    params: Params,
    positions: jax.Array,
    lengths: jax.Array,
    new: jax.Array,
    context_length: jax.Array,
    dtype: jnp.dtype,
    kernels: Kernels,
    write_from: jax.Array | None,
    constants: _Layers,
) -> Callable[[Slot, tuple[jax.Array, KVCache]], tuple[jax.Array, KVCache]]:
    """One decoder layer as a function of its slot: the body of the loop over the plan."""
    cos_sin = rope_cos_sin(config.ropes, positions, context_length) if config.ropes else None
    attend = kernels.decode_attention if positions.shape[1] == 1 else kernels.prefill_attention

    def linear(names: str, layer: jax.Array, x: jax.Array) -> list[jax.Array]:
        """The projections of x with these names: what reads the same x is multiplied in one call."""
        weights = [f"layers.{name}.weight" for name in names.split()]
        biases = [f"layers.{name}.bias" for name in names.split()]
        rows = [row_of(config, weight, layer) for weight in weights]
        ys = kernels.matmuls(x, [params[weight] for weight in weights], rows)
        return [
            y + widen(params[bias][row_of(config, bias, layer)]).astype(jnp.float32) if bias in params else y
            for y, bias in zip(ys, biases, strict=True)
        ]

    def heads(name: str, layer: jax.Array, y: jax.Array, count: int) -> jax.Array:
        y = y.reshape(*y.shape[:2], count, config.head_dim)
        if config.qk_norm and name != "v":
            norm = f"layers.{name}_norm.weight"
            y = _rms_norm(config, y, params[norm][row_of(config, norm, layer)])
        if cos_sin is not None and name != "v":
            y = rotate(y, *(part[constants.rope[layer]] for part in cos_sin))
        return y.astype(dtype)

    def projections(slot: Slot, x: jax.Array, fresh: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys and values of x; keys and values are zeros where none are fresh."""
        layer = slot[1]
        h = _norm(config, params, "layers.attn_norm", x, layer).astype(dtype)
        if write_from is None:
            q, k, v = linear("q k v", layer, h)
        else:
            (q,) = linear("q", layer, h)
            zeros = jnp.zeros((*h.shape[:2], config.num_kv_heads * config.head_dim), jnp.float32)
            k, v = lax.cond(
                jnp.any(fresh > 0), lambda h: tuple(linear("k v", layer, h)), lambda h: (zeros, zeros), h
            )
        k, v = (heads(name, layer, y, config.num_kv_heads) for name, y in (("k", k), ("v", v)))
        return heads("q", layer, q, config.num_heads), k, v

    def no_projections(x: jax.Array) -> tuple[jax.Array, ...]:
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return tuple(jnp.zeros((*x.shape[:2], count, config.head_dim), dtype) for count in counts)

    def attention(slot: Slot, x: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        # No branch returns the cache: XLA would copy it on GPU.
        p, layer, scale, _ = slot
        fresh = jnp.where(scale != 0, new, 0)
        if write_from is not None:
            fresh = jnp.where(p >= write_from, fresh, 0)
        q, k, v = lax.cond(scale != 0, lambda x: projections(slot, x, fresh), no_projections, x)
        cache = KVCache(
            kernels.write_rows(cache.k, k, p, lengths, fresh),
            kernels.write_rows(cache.v, v, p, lengths, fresh),
        )

        def attended(x: jax.Array) -> jax.Array:
            mixed = attend(
                q, cache.k, cache.v, p, lengths,
                scale=constants.scale[layer], window=constants.window[layer], softcap=config.attn_softcap,
            )  # fmt: skip
            (y,) = linear("o", layer, mixed.reshape(*x.shape[:2], -1).astype(dtype))
            return _residual("layers.attn_post_norm", layer, x, y * scale)

        return lax.cond(scale != 0, attended, lambda x: x, x), cache

    def mlp(slot: Slot, x: jax.Array) -> jax.Array:
        _, layer, _, scale = slot
        h = _norm(config, params, "layers.mlp_norm", x, layer).astype(dtype)
        act = _ACTIVATIONS[config.activation]
        if config.gated_mlp:
            gate, up = linear("gate up", layer, h)
            up = act(gate) * up
        else:
            up = act(linear("up", layer, h)[0])
        (y,) = linear("down", layer, up.astype(dtype))
        return _residual("layers.mlp_post_norm", layer, x, y * scale)

    def _residual(post_norm: str, layer: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        if config.post_norms:
            y = _norm(config, params, post_norm, y, layer)
        return (x.astype(jnp.float32) + y).astype(dtype)

    def run(slot: Slot, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        # A half scaled by 0 adds nothing to the residual stream, so its weights are not read.
        with jax.named_scope("attention"):
            x, cache = attention(slot, *carry)
        with jax.named_scope("mlp"):
            x = lax.cond(slot[3] != 0, lambda x: mlp(slot, x), lambda x: x, x)
        return x, cache

    return run


def row_of(config: ModelConfig, parameter: str, layer: jax.Array) -> jax.Array:
    """The row of a parameter's stack that holds a stacked layer's tensor: see `ModelConfig.layer_rows`."""
    rows = dict(config.layer_rows).get(parameter)
    return layer if rows is None else jnp.asarray(rows, jnp.int32)[layer]


def _norm(
    config: ModelConfig, params: Params, name: str, x: jax.Array, layer: jax.Array | None = None
) -> jax.Array:
    """RMSNorm or LayerNorm over D, float32; `layer` picks from a stacked weight."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if layer is not None:
        weight = weight[row_of(config, f"{name}.weight", layer)]
        bias = None if bias is None else bias[row_of(config, f"{name}.bias", layer)]
    if config.norm == "rmsnorm":
        return _rms_norm(config, x, weight)
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
    x = x * widen(weight).astype(jnp.float32)
    return x if bias is None else x + widen(bias).astype(jnp.float32)


def _rms_norm(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Zhang and Sennrich 2019, over the last axis, float32; Gemma's weights are stored minus 1."""
    x = x.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
    return x * (widen(weight).astype(jnp.float32) + config.norm_offset)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
