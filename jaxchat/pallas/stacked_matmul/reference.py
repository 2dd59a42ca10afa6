"""Plain XLA definition of the matrix products over stacked weights. Accumulation is float32 throughout."""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK_ELEMENTS = 1 << 22
"""Unstacked weights above this size are widened in blocks of rows, which bounds the temporary."""


def stacked_matmul(x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    """`x @ w[layer].T`.

    Args:
      x: [..., I] activations.
      w: [L, O, I] weights, a float type or bfloat16 bits as uint16 (see `widen`).
      layer: int scalar, traced.

    Returns:
      float32 [..., O].
    """
    return _dot(x, lax.dynamic_index_in_dim(w, layer, 0, keepdims=False))


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` for one unstacked weight [O, I], float32 [..., O]."""
    rows, inner = w.shape
    if w.dtype == x.dtype or w.size <= _BLOCK_ELEMENTS:
        return _dot(x, w)
    block = max(1, _BLOCK_ELEMENTS // inner)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        # The last block is moved back to end at the last row: it recomputes a few rows, to the same values.
        start = jnp.minimum(i * block, rows - block)
        y = _dot(x, lax.dynamic_slice_in_dim(w, start, block, 0))
        return lax.dynamic_update_slice_in_dim(out, y, start, out.ndim - 1)

    out = jnp.zeros((*x.shape[:-1], rows), jnp.float32)
    return lax.fori_loop(0, -(-rows // block), body, out)


def embedding_rows(w: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [...] of an embedding [V, D], float32 [..., D]."""
    return widen(w[ids]).astype(jnp.float32)


def widen(w: jax.Array) -> jax.Array:
    """Weights as a float type; uint16 holds the bits of a bfloat16.

    On CPU a bfloat16 stack is stored as uint16: XLA would otherwise convert the whole stack to float32
    outside the layer loop, on every call. The bits are the upper half of the float32.
    """
    if w.dtype == jnp.uint16:
        return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    w = widen(w).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
