"""The layout of quantized weights on TPU: what products and embeddings share.

XLA keeps an array that is not made of whole tiles, 8 by 128, in another order of its axes, if that is
smaller, and copies it whenever a kernel reads it: so sizes are rounded up to whole tiles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxchat import quant
from jaxchat.quant import QuantizedTensor

Array = jax.Array

LANES = 128


def laid_out(q: QuantizedTensor, relayout: Callable[[QuantizedTensor], Any], shardings: Any) -> Any:
    """The prepared tensor in its shardings; abstract if `q` is."""
    if not isinstance(q.codes, jax.ShapeDtypeStruct):
        return jax.jit(relayout, out_shardings=shardings)(q)
    return jax.tree.map(
        lambda part, sharding: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding),
        jax.eval_shape(relayout, q),
        shardings,
    )


def turned_scales(part: quant.Array, group: int, padded: int, parts: tuple[int, int]) -> Array:
    """Scales (or mins) [..., O, Ip/G] as [..., Gp, Op]; `padded`: Ip rounded up to whole tiles."""
    turned = jnp.swapaxes(_without_float16(part), -1, -2)
    if turned.shape[-2] > 1:
        turned = pad_parts(pad_end(turned, -2, padded // group), -2, parts[1], 8)
    return pad_parts(turned, -1, parts[0], LANES)


def padded_columns(q: QuantizedTensor, unit: int = LANES) -> int:
    """Ip, rounded up to whole tiles, or to another unit."""
    return -(-q.padded_columns // unit) * unit


def pad_end(array: Array, axis: int, size: int) -> Array:
    """Pads an axis to a size, with zeros behind."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, pads)


def pad_parts(array: Array, axis: int, parts: int, multiple: int) -> Array:
    """Pads each of the equal parts of an axis to a multiple."""
    axis %= array.ndim
    size = array.shape[axis] // parts
    if size % multiple == 0:
        return array
    split_up = array.reshape(*array.shape[:axis], parts, size, *array.shape[axis + 1 :])
    padded = pad_end(split_up, axis + 1, -(-size // multiple) * multiple)
    return padded.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


def _without_float16(part: quant.Array) -> Array:
    part = jnp.asarray(part)
    return lax.bitcast_convert_type(part, jnp.uint16) if part.dtype == jnp.float16 else part


def turned_spec(part: Any, axes: tuple[str | None, str | None]) -> PartitionSpec:
    """How an array [..., I, O], or the scales of one, is split, O and I being split over `axes`."""
    outputs, inner = axes
    lead = (None,) * (part.ndim - 2)
    # A single row of scales serves every part of a split contraction.
    return PartitionSpec(*lead, inner if part.shape[-2] > 1 else None, outputs)
