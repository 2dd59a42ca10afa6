"""Quantized weights on TPU: the layout that the kernels read, and what they make of a block of it.

Checked against the reference in interpret mode, and compiled ahead of time; not run on hardware yet.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from jaxchat import packing
from jaxchat.pallas.tpu_layout import (
    LANES,
    laid_out,
    pad_end,
    pad_parts,
    padded_columns,
    turned_scales,
    turned_spec,
)
from jaxchat.quant import SUPER_GROUP, InParts, QuantizedTensor

Array = jax.Array

BLOCK = 256
"""Columns whose bits above the fourth, or whose two levels of scales, lie together: 8 sublanes of each."""

Span = Callable[[int], Any]
"""Of a part of the contraction axis: its slice along an axis where so many weights share an entry."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel knows of a prepared weight when it is compiled, and how it reads a part of a block.

    Attributes:
      bits, affine: as in `PreparedTensor`.
      group: G; the whole of the contraction axis, if it shares a scale.
      parts: the names of the arrays, in the order of the kernel's operands.
    """

    bits: int
    group: int
    affine: bool
    parts: tuple[str, ...]

    @property
    def two_level(self) -> bool:
        """Whether scales are integers times an outer scale."""
        return "supers" in self.parts

    def codes(self, refs: Mapping[str, Any], span: Span) -> Array:
        """Integers [C, bo]: int8, int4 (affine ones minus 8), or as float32 those of 5 and 6 bits."""
        if self.bits == 8:
            return refs["codes"][span(1), :]
        low = pltpu.bitcast(refs["codes"][span(2), :], jnp.int4)
        if self.bits == 4:
            return low
        wide = self.bits - 4
        words = refs["high"][span(32 // wide), :]
        shape = (words.shape[0] // (8 * wide), 32 // wide, 8 * wide, words.shape[1])
        shifts = wide * lax.broadcasted_iota(jnp.int32, shape, 1)
        above = (words.reshape(shape[0], 1, *shape[2:]) >> shifts) & ((1 << wide) - 1)
        zero = 0 if self.affine else 1 << (self.bits - 1)
        above = 16 * above.reshape(low.shape) + (8 - zero)  # the low half is stored minus 8
        return low.astype(jnp.float32) + above.astype(jnp.float32)

    def scales(self, refs: Mapping[str, Any], span: Span) -> tuple[Array, Array | None]:
        """Scales and minimums of the groups, float32 [C/G, bo], for the codes as `codes` gives them."""
        if self.two_level:
            scales, mins = self._both_levels(refs, span)
        else:
            scales = widen_scales(refs["scales"][span(self.group), :])
            mins = widen_scales(refs["mins"][span(self.group), :]) if self.affine else None
        if mins is not None and self.bits == 4:
            mins += 8 * scales
        return scales, mins

    def _both_levels(self, refs: Mapping[str, Any], span: Span) -> tuple[Array, Array | None]:
        """Of one block."""
        pairs = refs["scales"][span(32), :].astype(jnp.int32)
        first, second = (((pairs << shift) >> 24).astype(jnp.float32) for shift in (24, 16))
        supers = refs["supers"][span(SUPER_GROUP), :]
        outer = widen_scales(supers & 0xFFFF)
        if self.affine:
            return first * outer, second * widen_scales((supers >> 16) & 0xFFFF)
        return jnp.concatenate([first, second]) * outer, None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTensor(InParts):
    """A quantized weight [..., O, I] as the TPU kernels read it: the contraction axis first.

    Ip is I rounded up to a multiple of G and of 128, or of 256 at 5 and 6 bits and with two levels of scales;
    Op is O rounded up to one of 128 (on each device), Gp the number of groups rounded up to one of 8: whole
    tiles. XLA keeps an array that is not made of whole tiles in another order of its axes, if that is
    smaller, and copies it whenever a kernel reads it. The padding is 0.

    Attributes:
      codes: 8 bits: int8 [..., Ip, Op]. Fewer: the low 4, uint8 [..., Ip/2, Op], rows 2j and 2j+1 in the low
        and high nibble of byte j, two's complement: what `pltpu.bitcast` turns into int4 [Ip, Op] in the
        kernel. Codes that are unsigned (affine ones, and those of 5 and 6 bits) have 8 taken off them.
      scales: float32, or the bits of float16 as uint16 (Mosaic has no float16), [..., Gp, Op]; one row if
        the whole row of weights shares a scale. Of two levels: uint16 [..., Ip/32, Op], two int8 each, the
        first in the low byte: a group's scale and minimum, or, in groups of 16, the scales of groups r and
        r + 8 of a block of 256.
      mins: None, or like `scales`.
      high: None, or at 5 and 6 bits what is above the low 4: int32 [..., Ip/32, Op] or [..., Ip/16, Op]. Of a
        block of 256 rows, row R k + r has field k of word r, R being the block's number of words, 8 or 16.
      supers: None, or of two levels the float16 of a block of 256: int32 [..., Sp, Op], the scale's bits
        below the minimum's; Sp is Ip/256 rounded up to a multiple of 8.
      bits: 8, 6, 5 or 4, static.
      group: G, static.
      affine: whether groups have an offset, static.
      rows, columns: O and I, static.
      axes: static, the mesh axes that O and I are split over.
    """

    codes: Array
    scales: Array
    mins: Array | None = None
    high: Array | None = None
    supers: Array | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    affine: bool = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    axes: tuple[str | None, str | None] = dataclasses.field(default=(None, None), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""
        return (*self.codes.shape[:-2], self.rows, self.columns)

    @property
    def padded_columns(self) -> int:
        """Ip."""
        return self.codes.shape[-2] * (1 if self.bits == 8 else 2)

    @property
    def parts(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        names = ("codes", "scales", "mins", "high", "supers")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def form(self) -> Form:
        """Of this device's part of it, where it is split."""
        group = self.padded_columns if self.scales.shape[-2] == 1 else self.group
        return Form(self.bits, group, self.affine, tuple(self.parts))


def prepare_tensor(q: QuantizedTensor) -> PreparedTensor:
    """A weight laid out anew, in jax arrays or, to compile ahead of time, ShapeDtypeStructs."""
    sharding = getattr(q.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return laid_out(q, relayout, jax.tree.map(lambda part: sharding, jax.eval_shape(relayout, q)))
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (q.ndim - len(sharding.spec)))
    parts = [mesh.shape[axis] if axis else 1 for axis in spec[-2:]]
    # The contraction axis is split between groups and tiles only, else it is whole on every device.
    if _padded(q) % (parts[1] * max(_unit(q), q.group if q.scales.shape[-1] > 1 else 1)):
        spec, parts = (*spec[:-1], None), [parts[0], 1]
    axes = (spec[-2], spec[-1])
    change = functools.partial(relayout, axes=axes, parts=(parts[0], parts[1]))
    specs = specs_of(jax.eval_shape(change, q))
    return laid_out(q, change, jax.tree.map(lambda part: NamedSharding(mesh, part), specs))


def specs_of(w: PreparedTensor) -> Any:
    """How each part, or each part of a stack of them, is split."""
    return jax.tree.map(lambda part: turned_spec(part, w.axes), w)


def relayout(
    q: QuantizedTensor,
    *,
    axes: tuple[str | None, str | None] = (None, None),
    parts: tuple[int, int] = (1, 1),
) -> PreparedTensor:
    """Turns, flips and pads; `axes` and `parts`: the mesh axes O and I are split over, and into how many."""
    padded = _padded(q)
    codes = jnp.swapaxes(q.codes, -1, -2)
    if q.bits < 8 and (q.affine or q.bits > 4):
        codes = codes ^ jnp.uint8(0x88)
    codes = pad_end(codes, -2, padded if q.bits == 8 else padded // 2)
    if q.two_level:
        scales, mins, supers = _turned(_pairs(q), parts, 1), None, _turned(_supers(q), parts, 8)
    else:
        scales = turned_scales(q.scales, q.group, padded, parts)
        mins = None if q.mins is None else turned_scales(q.mins, q.group, padded, parts)
        supers = None
    return PreparedTensor(
        codes=pad_parts(codes, -1, parts[0], LANES),
        scales=scales,
        mins=mins,
        high=None if q.high is None else pad_parts(_high_words(q, padded), -1, parts[0], LANES),
        supers=supers,
        bits=q.bits,
        group=q.group if q.scales.shape[-1] > 1 else padded,
        affine=q.affine,
        rows=q.shape[-2],
        columns=q.columns,
        axes=axes,
    )


def _unit(q: QuantizedTensor) -> int:
    return BLOCK if q.bits in (5, 6) or q.two_level else LANES


def _padded(q: QuantizedTensor) -> int:
    return padded_columns(q, _unit(q))


def _high_words(q: QuantizedTensor, padded: int) -> Array:
    """`PreparedTensor.high`, but for the padding of O; one matrix at a time, for it is spread out."""
    wide = q.bits - 4

    def words(high: Array) -> Array:
        fields = jnp.swapaxes(pad_end(packing.unpack_high(high, q.bits), -1, padded), -1, -2)
        fields = fields.reshape(padded // BLOCK, 32 // wide, 8 * wide, -1).astype(jnp.int32)
        shifted = fields << (wide * lax.broadcasted_iota(jnp.int32, fields.shape, 1))
        return shifted.sum(1).reshape(padded * wide // 32, -1)  # no two have a bit in common

    high = jnp.asarray(q.high)
    turned = lax.map(words, high.reshape(-1, *high.shape[-2:]))
    return turned.reshape(*high.shape[:-2], *turned.shape[-2:])


def _pairs(q: QuantizedTensor) -> Array:
    """`PreparedTensor.scales` of two levels, not turned: [..., O, Ip/32]."""
    scales = jnp.asarray(q.scales)
    if q.mins is not None:
        return _word(scales, jnp.asarray(q.mins), jnp.uint8, jnp.uint16)
    halves = scales.reshape(*scales.shape[:-1], -1, 2, 8)
    pairs = _word(halves[..., 0, :], halves[..., 1, :], jnp.uint8, jnp.uint16)
    return pairs.reshape(*scales.shape[:-1], -1)


def _supers(q: QuantizedTensor) -> Array:
    """`PreparedTensor.supers`, not turned: [..., O, Ip/256]."""
    scales = jnp.asarray(q.super_scales)
    mins = jnp.zeros_like(scales) if q.super_mins is None else jnp.asarray(q.super_mins)
    return lax.bitcast_convert_type(_word(scales, mins, jnp.uint16, jnp.uint32), jnp.int32)


def _word(low: Array, high: Array, half: Any, whole: Any) -> Array:
    """Two numbers side by side in one of twice their size."""
    low, high = (lax.bitcast_convert_type(part, half).astype(whole) for part in (low, high))
    return low | (high << (8 * jnp.dtype(half).itemsize))


def _turned(part: Array, parts: tuple[int, int], multiple: int) -> Array:
    """[..., O, R] as [..., Rp, Op], R rounded up to a multiple."""
    turned = pad_parts(jnp.swapaxes(part, -1, -2), -2, parts[1], multiple)
    return pad_parts(turned, -1, parts[0], LANES)


def widen_scales(bits: Array) -> Array:
    """float32 values of float16 bits (IEEE 754 binary16, finite ones), by arithmetic; float32 as is."""
    if bits.dtype == jnp.float32:
        return bits
    wide = bits.astype(jnp.int32)
    magnitude = wide & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * jnp.float32(2**-24)
    value = jnp.where(magnitude < 0x400, subnormal, normal)
    return jnp.where(wide > 0x7FFF, -value, value)


def dequantized(codes: Array, scales: Array, mins: Array | None, group: int) -> Array:
    """Weights, float32 [C, bo]: codes [C, bo] with scales and minimums [C/G, bo]."""
    cols, out = codes.shape
    w = codes.astype(jnp.float32).reshape(cols // group, group, out) * scales[:, None, :]
    if mins is not None:
        w += mins[:, None, :]
    return w.reshape(cols, out)


def for_chunks(length: int, chunk: int, add: Callable[[Span, int], None]) -> None:
    """Calls `add(span, size)` over [0, length): a loop over whole chunks, then what is left."""
    whole = length // chunk

    def static(start: int, size: int) -> None:
        add(lambda per: pl.ds(start // per, size // per), size)

    def body(i: Array, _: None) -> None:
        add(lambda per: pl.ds(pl.multiple_of(i * (chunk // per), chunk // per), chunk // per), chunk)

    if whole == 1:
        static(0, chunk)
    elif whole:
        lax.fori_loop(0, whole, body, None)
    if length % chunk:
        static(whole * chunk, length % chunk)
