"""Plain XLA definition of cache attention: blockwise over the cache with an online softmax."""

import jax
import jax.numpy as jnp
from jax import lax

_KEY_BLOCK = 256
"""Cache rows read at a time; bounds the score matrix and skips the unused end of the cache."""

_MASKED = -1e30
"""Finite, so that a block without a single visible key gives weights of 0 and not NaN."""


def write_rows(
    cache: jax.Array, rows: jax.Array, slot: jax.Array, lengths: jax.Array, new: jax.Array
) -> jax.Array:
    """Writes each sequence's new keys (or values) behind those it has, in place when donated.

    Args:
      cache: [P, B, K, S, H].
      rows: [B, T, K, H].
      slot: int scalar.
      lengths: int [B], rows each sequence already has.
      new: int [B], how many of the T rows are real; padding is not written.
    """
    b, t, k, _ = rows.shape
    step = jnp.arange(t)
    # Rows out of range are dropped: padding is sent there.
    position = jnp.where(step < new[:, None], lengths[:, None] + step, cache.shape[3])  # [B, T]
    rows = rows.astype(cache.dtype)
    index = jnp.arange(b)[:, None, None], jnp.arange(k)[None, None], position[:, :, None]
    return cache.at[(slot, *index)].set(rows, mode="drop")


def attend(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slot: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array,
    window: jax.Array,
    softcap: float,
) -> jax.Array:
    """Causal grouped-query attention of T new tokens over one slot of the cache, their own rows included.

    Args:
      q: [B, T, N, H].
      k_cache, v_cache: [P, B, K, S, H]; query head n reads key/value head n // (N / K).
      slot: int scalar, which of the P slots.
      lengths: int [B], rows before the first new token; query t is at position lengths + t.
      scale: float scalar, multiplies the scores.
      window: int scalar; a query sees the last `window` positions, its own included; 0 is all.
      softcap: static; scores become `softcap * tanh(score / softcap)` unless it is 0 (Gemma 2).

    Returns:
      float32 [B, T, N, H].
    """
    b, t, n, h = q.shape
    _, _, kv, s, _ = k_cache.shape
    block = min(s, _KEY_BLOCK)
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    position = lengths[:, None] + jnp.arange(t)  # [B, T]
    oldest = jnp.where(window > 0, position - window, -1)  # keys up to here are out of the window

    def body(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = state
        # The last block is moved back to end at the last row; keys it repeats are masked.
        start = jnp.minimum(i * block, s - block)
        k, v = (
            lax.dynamic_slice(c, (slot, 0, 0, start, 0), (1, b, kv, block, h))[0] for c in (k_cache, v_cache)
        )
        scores = jnp.einsum(
            "bkgth,bksh->bkgts", grouped, k.astype(q.dtype), precision=precision,
            preferred_element_type=jnp.float32,
        ) * scale  # fmt: skip
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        key = start + jnp.arange(block)
        visible = (key <= position[..., None]) & (key > oldest[..., None]) & (key >= i * block)  # [B, T, S]
        scores = jnp.where(visible[:, None, None], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        decay = jnp.exp(top - new_top)
        mixed = jnp.einsum(
            "bkgts,bksh->bkgth", weights.astype(q.dtype), v.astype(q.dtype), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return new_top, total * decay + weights.sum(-1), out * decay[..., None] + mixed

    shape = grouped.shape[:-1]
    state = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape))
    first = jnp.where(window > 0, jnp.maximum(jnp.min(lengths) - window + 1, 0), 0) // block
    last = -(-jnp.minimum(jnp.max(lengths) + t, s) // block)
    _, total, out = lax.fori_loop(first, last, body, state)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
