"""Plain XLA definition of low-rank deltas over stacked weights. Accumulation is float32 throughout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.pallas.storage import widen


def add_deltas(
    x: jax.Array,
    ys: Sequence[jax.Array],
    downs: Sequence[jax.Array],
    ups: Sequence[jax.Array],
    layer: jax.Array,
    scales: jax.Array,
) -> list[jax.Array]:
    """`y + ((x @ down[layer].T) * scales) @ up[layer]`, for each y and its delta.

    Args:
      x: [B, ..., I] activations.
      ys: float32 [B, ..., O], what the weights make of x.
      downs: [L, R, I], a float type; all of one.
      ups: [L, R, O], of the same.
      layer: int scalar, traced.
      scales: float32 [B, R]; 0 leaves a column out.

    Returns:
      float32 [B, ..., O], one a y.
    """
    along = scales.reshape(scales.shape[0], *(1,) * (x.ndim - 2), scales.shape[1])
    out = []
    for y, down, up in zip(ys, downs, ups, strict=True):
        low = _dot(x, down, layer, axis=1) * along
        out.append(y + _dot(low.astype(x.dtype), up, layer, axis=0))
    return out


def _dot(x: jax.Array, stack: jax.Array, layer: jax.Array, *, axis: int) -> jax.Array:
    w = widen(lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
