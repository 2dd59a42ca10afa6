"""Chimera as a draft: a tree of the likeliest tokens. Its network is in `layers/chimera.py`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import demo, memory
from jaxchat.checkpoints.chimera import read_chimera
from jaxchat.config import ModelConfig
from jaxchat.draft_use import TREE_25, DraftUse, TreeShape
from jaxchat.errors import UsageError, option
from jaxchat.layers import chimera
from jaxchat.layers.cache import KVCache, cache_bytes, cache_sharding
from jaxchat.layers.chimera import ChimeraConfig, Known
from jaxchat.layers.step import Params, Step
from jaxchat.pallas.storage import as_bits, stored_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class ChimeraDraft:
    """A Chimera, loaded for a base.

    Attributes:
      config: what it is.
      shape: of its trees, no deeper than it has heads.
      params: its parameters, in numpy.
    """

    config: ChimeraConfig
    shape: TreeShape
    params: Params

    def drafting(self, engine: Any, batch: int) -> "ChimeraDrafting":
        """See `drafts.Draft`."""
        return ChimeraDrafting(self, engine, batch)


def load(use: DraftUse, config: ModelConfig, params: Params) -> ChimeraDraft:
    """Reads a Chimera for a base, and sees that the shape fits.

    Raises:
      UsageError, JaxchatError: see `read_chimera`; or it has fewer heads than the chain tokens.
    """
    files = read_chimera(demo.heads(use.path), config, params)
    heads = files.config.heads
    shape = (use.shape or TREE_25).cut(heads if use.shape is None else use.shape.depth)
    if shape.depth > heads:
        raise UsageError(
            f"{option('draft_tree')} asks for {shape.depth} tokens one after the other; {use.path} has "
            f"{heads} heads: choose chain:{heads} at most"
        )
    widest = max(map(len, shape.children))
    if widest > config.vocab_size:
        raise UsageError(
            f"{option('draft_tree')} has {widest} tokens side by side, the vocabulary only "
            f"{config.vocab_size}: choose chain:{heads}"
        )
    return ChimeraDraft(files.config, shape, files.params)


class ChimeraDrafting:
    """A session's: a cache of its own, valid for a stretch of each text that ends where the base's does.

    The stretch need not begin with the text: of what was computed elsewhere (a chat that was loaded) no
    hidden states are known, and the draft then sees only what comes after.
    """

    def __init__(self, draft: ChimeraDraft, engine: Any, batch: int):
        self._draft, self._engine, self._batch = draft, engine, batch
        self._params = _on_device(draft.params, engine)
        self._reset()

    def _reset(self) -> None:
        """Knows nothing of any sequence."""
        self._begin, self._end = np.zeros((2, self._batch), np.int32)
        self._cache: KVCache | None = None
        nothing = np.zeros((self._batch, self._engine.config.hidden_size), np.float32)
        self._last = jax.device_put(nothing, self._engine.placement)

    def observe(self, step: Step, before: np.ndarray, hidden: jax.Array, capacity: int) -> None:
        """See `drafts.Drafting`."""
        self._reserve(capacity)
        assert self._cache is not None
        starts, new = np.asarray(step.lengths), np.asarray(step.new)
        apart = (starts > self._end) | (starts < self._begin)
        self._begin = np.where((new > 0) & apart, starts, self._begin)
        self._end = np.where(new > 0, starts + new, self._end)
        self._cache, self._last = _observed(
            self._params, step, self._cache, self._last, jnp.asarray(before), hidden
        )

    def ready(self, row: int, length: int) -> bool:
        """See `drafts.Drafting`."""
        return bool(self._end[row] == length) and length > 0

    def propose(self, step: Step, tokens: np.ndarray) -> jax.Array:
        """See `drafts.Drafting`."""
        assert self._cache is not None  # it has observed something
        known = Known(self._cache, self._begin, self._end, tokens, self._last)  # type: ignore[arg-type]
        return _proposed(self._draft.config, self._draft.shape, self._params, step, known)

    def forget(self, row: int) -> None:
        """See `drafts.Drafting`."""
        self._begin[row] = self._end[row] = 0

    def _reserve(self, capacity: int) -> None:
        engine = self._engine
        if any(part.is_deleted() for part in jax.tree.leaves((self._cache, self._last))):
            self._reset()  # a call was interrupted, see `Session`
        if self._cache is not None and self._cache.capacity >= capacity:
            return
        layer = chimera.layer_config(engine.config)
        sizes: dict[str, Any] = {
            "batch": self._batch,
            "capacity": capacity,
            "dtype": stored_dtype(engine.dtype, engine.platform),
        }
        memory.require(
            cache_bytes(layer, slots=2, **sizes),
            engine.devices,
            what=f"the draft's KV cache of {self._batch} x {capacity} tokens",
            advice="choose a shorter context, or do without the draft",
        )
        if self._cache is not None:
            self._cache = _grown(self._cache, capacity)
            return
        sharding = engine.placement
        if engine.mesh is not None:
            sharding = cache_sharding(layer, engine.mesh, self._batch)
        make = jax.jit(chimera.empty, static_argnums=0, static_argnames=tuple(sizes), out_shardings=sharding)
        self._cache = make(engine.config, **sizes)


def _on_device(params: Params, engine: Any) -> Params:
    """The parameters as the engine's kernels read them."""
    roles = {name: "weight" if values.ndim == 3 else "norm" for name, values in params.items()}
    held: Params = {}
    for name, values in params.items():
        if engine.platform == "cpu":
            values = as_bits(values)
        elif values.dtype == np.float32 and roles[name] == "weight":
            values = values.astype(engine.dtype)
        placed = jax.device_put(values, engine.placement)
        held[name] = engine.kernels.prepared(placed, roles[name], False)
    return held


@functools.partial(jax.jit, donate_argnums=(2, 3))
def _observed(
    params: Params, step: Step, cache: KVCache, last: jax.Array, before: jax.Array, hidden: jax.Array
) -> tuple[KVCache, jax.Array]:
    """The cache with what is new, and the last hidden state [B, D] of each sequence."""
    cache = chimera.remember(params, step, cache, before, step.tokens, hidden, step.lengths, step.new)
    newest = jnp.take_along_axis(hidden, jnp.maximum(step.new - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(step.new[:, None] > 0, newest, last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _proposed(config: ChimeraConfig, shape: TreeShape, params: Params, step: Step, known: Known) -> jax.Array:
    """int32 [B, T]: the token that the tree follows, and of each place in it the likeliest."""
    tokens: dict[int, jax.Array] = {0: known.tokens[:, 2]}
    guess, nodes = chimera.first(params, step, known), [0]
    for depth in range(1, shape.depth + 1):
        hidden = jnp.broadcast_to(known.hidden[:, None], guess.hidden.shape)
        logits = chimera.head_logits(config, params, step, depth - 1, hidden, guess.hidden)
        # Behind the barrier XLA's own selection stays one; on CPU it would sort the vocabulary instead.
        found = jax.lax.top_k(logits, max(len(shape.children[node]) for node in nodes))
        _, likeliest = jax.lax.optimization_barrier(found)
        for number, node in enumerate(nodes):
            tokens |= {child: likeliest[:, number, rank] for rank, child in enumerate(shape.children[node])}
        parents = {node: number for number, node in enumerate(nodes)}
        nodes = [child for node in nodes for child in shape.children[node] if shape.children[child]]
        if not nodes:
            break
        of = [parents[shape.parents[node]] for node in nodes]
        drafted = jnp.stack([tokens[node] for node in nodes], 1)
        guess = chimera.deeper(params, step, known, guess, of, drafted, depth + 1)
    return jnp.stack([tokens[token] for token in range(len(shape.parents))], 1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _grown(cache: KVCache, capacity: int) -> KVCache:
    return cache.grown(2, capacity)
