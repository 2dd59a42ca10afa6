"""What the engine compiles: the model's steps, the draw of the next tokens, and changes of the cache's shape.

The draw is no part of a step: it takes as long to compile as the rest, and once is enough for all steps.
Configuration, dtype and kernels are static; all that changes between calls is traced. When each is run, and
on which rows, is the engine's part. `new` int32 [B] of `tokens` are real, `lengths` [B] are cached before,
and `context` [B] is the length of the whole sequence.
"""

import functools

import jax
import jax.numpy as jnp

from jaxchat import model
from jaxchat.config import ModelConfig
from jaxchat.engine import sampling
from jaxchat.engine.sampling import SamplingParams
from jaxchat.layer_plan import PlanArrays
from jaxchat.model import KVCache, Params
from jaxchat.pallas import Kernels


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def prefill(
    config: ModelConfig,
    dtype: jnp.dtype,
    kernels: Kernels,
    params: Params,
    cache: KVCache,
    plan: PlanArrays,
    tokens: jax.Array,
    lengths: jax.Array,
    new: jax.Array,
    context: jax.Array,
    write_from: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Appends `tokens` [B, T]; float32 [B, V] logits after the last real one, and the cache.

    The first `write_from` [B] slots hold the keys and values already.
    """
    hidden, cache = model.forward(
        config, params, cache, plan, tokens, lengths, new, context,
        dtype=dtype, kernels=kernels, write_from=write_from,
    )  # fmt: skip
    last = jnp.take_along_axis(hidden, jnp.maximum(new - 1, 0)[:, None, None], axis=1)[:, 0]
    return model.logits(config, params, last, dtype=dtype, kernels=kernels), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def decode(
    config: ModelConfig,
    dtype: jnp.dtype,
    kernels: Kernels,
    params: Params,
    cache: KVCache,
    plan: PlanArrays,
    tokens: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Appends `tokens` [B] to the `active` sequences; the float32 [B, V] logits after them, and the cache."""
    hidden, cache = model.forward(
        config, params, cache, plan, tokens[:, None], lengths, active, lengths + 1,
        dtype=dtype, kernels=kernels,
    )  # fmt: skip
    return model.logits(config, params, hidden[:, 0], dtype=dtype, kernels=kernels), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def score(
    config: ModelConfig,
    dtype: jnp.dtype,
    kernels: Kernels,
    params: Params,
    cache: KVCache,
    plan: PlanArrays,
    tokens: jax.Array,
    lengths: jax.Array,
    new: jax.Array,
    context: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Appends `tokens` [B, T]; float32 [B, T] log-probabilities of the `targets` after each, the cache."""
    hidden, cache = model.forward(
        config, params, cache, plan, tokens, lengths, new, context, dtype=dtype, kernels=kernels
    )
    logits = model.logits(config, params, hidden, dtype=dtype, kernels=kernels)
    return sampling.log_probability(logits, targets), cache


@jax.jit
def sample(
    logits: jax.Array,
    params: SamplingParams,
    seeds: jax.Array,
    positions: jax.Array,
    prompt_mask: jax.Array,
    counts: jax.Array,
    allowed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Draws among the `allowed` bool [B, V]; the tokens, and their logprobs [B] among all.

    A draw depends on the sequence's own seed (uint32 [B]) and position only: not on neighbours, nor on how it
    got here.
    """
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        seeds, positions
    )
    among = jnp.where(allowed, logits, -jnp.inf)
    tokens, _ = sampling.sample(keys, among, params, prompt_mask, counts)
    return tokens, sampling.log_probability(logits, tokens)


@functools.partial(jax.jit, donate_argnums=(0,))
def count(counts: jax.Array, tokens: jax.Array, active: jax.Array) -> jax.Array:
    """`counts` int32 [B, V] of generated tokens, with `tokens` [B] of the `active` sequences added."""
    return counts.at[jnp.arange(tokens.shape[0]), tokens].add(active)


@functools.partial(jax.jit, static_argnums=(1, 2))
def grow(cache: KVCache, slots: int, capacity: int) -> KVCache:
    """The cache with room for more slots, and for `capacity` rows in each."""

    def pad(part: jax.Array) -> jax.Array:
        more = slots - part.shape[0], 0, 0, capacity - part.shape[3]
        return jnp.pad(part, [(0, n) for n in more] + [(0, 0)] * (part.ndim - 4))

    return jax.tree.map(pad, cache)


def put_rows(cache: KVCache, rows: KVCache, row: jax.Array) -> KVCache:
    """Writes one sequence's first rows of the first slots, each part [P, K, S, ...], into the cache."""

    def put(part: jax.Array, new: jax.Array) -> jax.Array:
        start = (0, row) + (0,) * (part.ndim - 2)
        return jax.lax.dynamic_update_slice(part, new[:, None], start)

    return jax.tree.map(put, cache, rows)
