"""Plain XLA definition of cache attention: blockwise over the cache with an online softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.pallas.cache_attention.tree import MOST, Tree
from jaxchat.pallas.storage import stored, widen

_KEY_BLOCK = 256
"""Cache rows read at a time; bounds the score matrix and skips the unused end of the cache."""

_MASKED = -1e30
"""Finite, so that a block without a single visible key gives weights of 0 and not NaN."""


class QuantizedRows(NamedTuple):
    """Keys (or values) in 8 bits: every row of every head is `codes * scale`.

    The scale is the largest magnitude of the row over 127, the codes are rounded to nearest: no element is
    off by more than half a scale, 1/254 of the row's largest.
    """

    codes: jax.Array  # int8 [P, B, K, S, H], -127 to 127
    scale: jax.Array  # float32 [P, B, K, S]

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, B, K, S, H]."""
        return self.codes.shape


Rows = jax.Array | QuantizedRows
"""Keys or values of a cache, [P, B, K, S, H]: float, bfloat16 as bits in uint16 (see `widen`), or 8 bits."""


def quantize_rows(rows: jax.Array) -> QuantizedRows:
    """Float rows [..., H] in 8 bits; a row that is not finite gets a scale that is not either."""
    rows = rows.astype(jnp.float32)
    scale = jnp.abs(rows).max(-1) * np.float32(1 / 127)
    codes = jnp.round(rows / jnp.where(scale > 0, scale, 1)[..., None])
    return QuantizedRows(codes.astype(jnp.int8), scale)


def write_rows(cache: Rows, rows: jax.Array, slot: jax.Array, lengths: jax.Array, new: jax.Array) -> Rows:
    """Writes each sequence's new keys (or values) behind those it has, in place when donated.

    Args:
      cache: [P, B, K, S, H]; `QuantizedRows` are quantized here.
      rows: [B, T, K, H].
      slot: int scalar.
      lengths: int [B], rows each sequence already has.
      new: int [B], how many of the T rows are real; padding is not written.
    """
    b, t, k, _ = rows.shape
    step = jnp.arange(t)
    # Rows out of range are dropped: padding is sent there.
    position = jnp.where(step < new[:, None], lengths[:, None] + step, cache.shape[3])  # [B, T]
    index = slot, jnp.arange(b)[:, None, None], jnp.arange(k)[None, None], position[:, :, None]
    if not isinstance(cache, QuantizedRows):
        return cache.at[index].set(stored(rows, cache.dtype), mode="drop")
    parts = zip(cache, quantize_rows(rows), strict=True)
    return QuantizedRows(*(part.at[index].set(added, mode="drop") for part, added in parts))


def attend(
    q: jax.Array,
    k_cache: Rows,
    v_cache: Rows,
    slot: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array,
    window: jax.Array,
    softcap: float,
    tree: Tree | None = None,
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
      tree: of the new tokens, where they are not one after the other: query t is at position lengths + its
        depth then, and of the new keys sees those that lead to it.

    Returns:
      float32 [B, T, N, H].
    """
    b, t, n, h = q.shape
    _, _, kv, s, _ = k_cache.shape
    block = min(s, _KEY_BLOCK)
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    position = lengths[:, None] + (jnp.arange(t) if tree is None else tree.depths)  # [B, T]
    words = None if tree is None else tree.within(window).ancestors
    oldest = jnp.where(window > 0, position - window, -1)  # keys up to here are out of the window

    def body(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = state
        # The last block is moved back to end at the last row; keys it repeats are masked.
        start = jnp.minimum(i * block, s - block)
        k, v = (_block(c, slot, start, block).astype(q.dtype) for c in (k_cache, v_cache))
        # Codes enter the products as they are; scales multiply the scores and the weights.
        k_scale, v_scale = (_block_scale(c, slot, start, block) for c in (k_cache, v_cache))
        scores = jnp.einsum(
            "bkgth,bksh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
        ) * (scale * k_scale)  # fmt: skip
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        key = start + jnp.arange(block)
        visible = (key <= position[..., None]) & (key > oldest[..., None])  # [B, T, S]
        if words is not None:
            visible = _in_tree(visible, words, lengths, key)
        visible &= key >= i * block
        scores = jnp.where(visible[:, None, None], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        decay = jnp.exp(top - new_top)
        mixed = jnp.einsum(
            "bkgts,bksh->bkgth", (weights * v_scale).astype(q.dtype), v, precision=precision,
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


def _in_tree(visible: jax.Array, words: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
    """`visible` [B, T, S] of keys [S], but of the new ones, which are those of each query's word [B, T]."""
    number = (key - lengths[:, None])[:, None]  # [B, 1, S], of a new key
    leads = lax.shift_right_logical(words[..., None], jnp.clip(number, 0, MOST - 1)) & 1 == 1
    return jnp.where(number < 0, visible, leads & (number < MOST))


def _block(cache: Rows, slot: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Some rows of a slot, [B, K, count, H], as floats or 8-bit codes."""
    part = cache.codes if isinstance(cache, QuantizedRows) else cache
    _, b, kv, _, h = part.shape
    return widen(lax.dynamic_slice(part, (slot, 0, 0, start, 0), (1, b, kv, count, h))[0])


def _block_scale(cache: Rows, slot: jax.Array, start: jax.Array, count: int) -> jax.Array | float:
    """What those rows are multiplied by, to be applied to scores: [B, K, 1, 1, count], or 1."""
    if not isinstance(cache, QuantizedRows):
        return 1.0
    _, b, kv, _ = cache.scale.shape
    return lax.dynamic_slice(cache.scale, (slot, 0, 0, start), (1, b, kv, count))[0, :, :, None, None]
