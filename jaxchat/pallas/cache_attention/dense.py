"""Attention in one piece, which reverse-mode differentiation goes through: for training, no cache needed.

The reference's loop has a traced trip count, and XLA scatters rows into a cache slowly on CPU.
"""

import jax
import jax.numpy as jnp

from jaxchat.pallas.cache_attention.reference import QuantizedRows, Rows
from jaxchat.pallas.cache_attention.tree import Tree


def write_rows(cache: Rows, rows: jax.Array, slot: jax.Array, lengths: jax.Array, new: jax.Array) -> Rows:
    """The cache of one slot that a whole sequence makes, [1, B, K, T, H], where nothing was cached before.

    Args:
      cache: float [1, B, K, T, H], replaced.
      rows: [B, T, K, H].
      slot, lengths: 0.
      new: the rows of padding come after these, where no causal query sees them.
    """
    assert not isinstance(cache, QuantizedRows)  # training caches nothing
    return rows.transpose(0, 2, 1, 3)[None].astype(cache.dtype)


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
    """`reference.attend` with all scores [B, N, T, T] at once, of queries from position 0 on.

    Args:
      q: [B, T, N, H].
      k_cache, v_cache: float [1, B, K, T, H].
      slot: 0.
      lengths: int32 [B], all 0; or [B, T], the first key that each query sees, of rows with several texts.
      scale, window, softcap: as in `reference.attend`.
      tree: None.

    Returns:
      float32 [B, T, N, H].
    """
    assert not isinstance(k_cache, QuantizedRows)
    assert not isinstance(v_cache, QuantizedRows)
    assert tree is None
    b, t, n, h = q.shape
    kv = k_cache.shape[2]
    # The queries of one key/value head are one matrix, [G*T, H]: products in groups are slow on CPU.
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, n // kv * t, h)
    scores = jnp.einsum("bkth,bksh->bkts", grouped, k_cache[0], preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    query, key = jnp.arange(t)[:, None], jnp.arange(t)
    visible = (key <= query) & ((window == 0) | (key > query - window))
    if lengths.ndim == 2:
        visible = visible & (key >= lengths[:, None, None, :, None])
    scores = jnp.where(visible, scores.reshape(b, kv, n // kv, t, t), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, kv, n // kv * t, t).astype(q.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v_cache[0], preferred_element_type=jnp.float32)
    return mixed.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
