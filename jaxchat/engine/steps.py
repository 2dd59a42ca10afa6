"""What the engine compiles: the model's steps, the draw of the next tokens, changes of the cache.

The draw is no part of a step: it takes as long to compile as the rest, and once is enough for all steps.
When each is run, and on which rows, is the session's part; what a step runs on is a `Step`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxchat import model
from jaxchat.config import ModelConfig
from jaxchat.engine import sampling
from jaxchat.engine.sampling import SamplingParams
from jaxchat.layers.cache import KVCache, empty_cache
from jaxchat.layers.step import Step


@functools.partial(jax.jit, donate_argnums=1)
def prefill(step: Step, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Appends the step's tokens [B, T]; float32 [B, V] logits after the last real one, and the cache."""
    hidden, cache = model.forward(step, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(step.new - 1, 0)[:, None, None], axis=1)[:, 0]
    return model.logits(step, last), cache


@functools.partial(jax.jit, donate_argnums=1)
def prefill_seen(step: Step, cache: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
    """`prefill`, and between the two the normed hidden states, float32 [B, T, D], for a draft to see."""
    hidden, cache = model.forward(step, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(step.new - 1, 0)[:, None, None], axis=1)[:, 0]
    return model.logits(step, last), hidden, cache


@functools.partial(jax.jit, donate_argnums=1)
def verify(step: Step, cache: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
    """Appends a tree of tokens; the logits [B, T, V] and hidden states [B, T, D] after each, float32."""
    hidden, cache = model.forward(step, cache)
    return model.logits(step, hidden), hidden, cache


@functools.partial(jax.jit, donate_argnums=0)
def gather(cache: KVCache, lengths: jax.Array, path: jax.Array, count: jax.Array) -> KVCache:
    """See `KVCache.gathered`."""
    return cache.gathered(lengths, path, count)


@functools.partial(jax.jit, donate_argnums=1)
def decode(step: Step, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Appends one token a sequence, here int32 [B]; the float32 [B, V] logits after them, and the cache."""
    step = dataclasses.replace(step, tokens=step.tokens[:, None])
    hidden, cache = model.forward(step, cache)
    return model.logits(step, hidden[:, 0]), cache


@functools.partial(jax.jit, donate_argnums=1)
def fill(step: Step, cache: KVCache) -> KVCache:
    """Appends the step's tokens; nobody asks what comes after them."""
    return model.forward(step, cache)[1]


@functools.partial(jax.jit, donate_argnums=1)
def hidden(step: Step, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Appends the step's tokens; the normed hidden states after each, float32 [B, T, D], and the cache."""
    return model.forward(step, cache)


@functools.partial(jax.jit, donate_argnums=1)
def score(step: Step, cache: KVCache, targets: jax.Array) -> tuple[tuple[jax.Array, jax.Array], KVCache]:
    """Appends the step's tokens; of the `targets` after each, [B, T]: how probable they are; and the cache.

    It is float32 log-probabilities, and bool, whether nothing is more probable.
    """
    hidden, cache = model.forward(step, cache)
    logits = model.logits(step, hidden)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (sampling.log_probability(logits, targets), chosen >= logits.max(-1)), cache


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


@functools.partial(jax.jit, donate_argnums=0)
def count(counts: jax.Array, tokens: jax.Array, active: jax.Array) -> jax.Array:
    """`counts` int32 [B, V] of generated tokens, with `tokens` [B] of the `active` sequences added."""
    return counts.at[jnp.arange(tokens.shape[0]), tokens].add(active)


@functools.partial(jax.jit, donate_argnums=0)
def count_several(counts: jax.Array, tokens: jax.Array, number: jax.Array) -> jax.Array:
    """`counts` int32 [B, V], with the first `number` [B] of each sequence's `tokens` [B, A] added."""
    row, place = jnp.arange(tokens.shape[0])[:, None], jnp.arange(tokens.shape[1])
    return counts.at[row, tokens].add((place < number[:, None]).astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def grow(cache: KVCache, slots: int, capacity: int) -> KVCache:
    """See `KVCache.grown`."""
    return cache.grown(slots, capacity)


def allocate(
    config: ModelConfig,
    *,
    slots: int,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding | None,
) -> KVCache:
    """`empty_cache` where it is to live, without ever being anywhere else."""
    sizes = ("slots", "batch", "capacity", "dtype")
    make = jax.jit(empty_cache, static_argnums=0, static_argnames=sizes, out_shardings=sharding)
    return make(config, slots=slots, batch=batch, capacity=capacity, dtype=dtype)


def put_rows(
    cache: KVCache, rows: KVCache, sequence: int, *, sharding: jax.sharding.Sharding | None
) -> KVCache:
    """`KVCache.with_rows`, in place."""
    return jax.jit(KVCache.with_rows, donate_argnums=0, out_shardings=sharding)(cache, rows, sequence)
