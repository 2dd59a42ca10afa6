"""Plain XLA definition of the matrix products over stacked weights. Accumulation is float32 throughout."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.pallas.storage import widen
from jaxchat.quant import QuantizedTensor

Weight = jax.Array | QuantizedTensor

_BLOCK_ELEMENTS = 1 << 20
"""On CPU weights are multiplied in blocks of rows of about this size.

XLA copies (and widens) what it slices off a stack before it multiplies. A copy of a whole layer's weight goes
through memory, one of 4 MB stays in the cache. On two cores at 2048x5632, stored bytes a second at batch 1:
bfloat16 7 -> 22 to 26 GB/s, float32 8 -> 15; the products of 64 and 256 rows gain too. Below half of this
size XLA copies on one thread only.
"""


def stacked_matmul(x: jax.Array, w: Weight, layer: jax.Array | int) -> jax.Array:
    """`x @ w[layer].T`.

    Args:
      x: [..., I] activations.
      w: [L, O, I] weights, a float type, bfloat16 bits as uint16 or quantized (see `widen`).
      layer: int scalar, traced.

    Returns:
      float32 [..., O].
    """
    return lax.platform_dependent(x, w, layer, cpu=_dot_in_blocks, default=dot_whole)


def dot_whole(x: jax.Array, w: Weight, layer: jax.Array | int) -> jax.Array:
    """The same in one piece: what reverse-mode differentiation goes through without keeping the weights."""
    return _dot(x, jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), w))


def _dot_in_blocks(x: jax.Array, w: Weight, layer: jax.Array | int) -> jax.Array:
    _, rows, inner = w.shape
    count = -(-rows * inner // _BLOCK_ELEMENTS)
    if count <= 1:
        return dot_whole(x, w, layer)
    block = -(-rows // count)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        # The last block is moved back to end at the last row: it recomputes a few rows, to the same values.
        start = jnp.minimum(i * block, rows - block)
        y = _dot(x, jax.tree.map(lambda a: _rows(a, layer, start, block), w))
        return lax.dynamic_update_slice_in_dim(out, y, start, out.ndim - 1)

    out = jnp.zeros((*x.shape[:-1], rows), jnp.float32)
    return lax.fori_loop(0, -(-rows // block), body, out)


def _rows(array: jax.Array, layer: jax.Array | int, start: jax.Array, count: int) -> jax.Array:
    return lax.dynamic_slice(array, (layer, start, 0), (1, count, array.shape[-1]))[0]


def _dot(x: jax.Array, w: Weight) -> jax.Array:
    w = widen(w).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
