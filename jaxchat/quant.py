"""Quantized weights: the `QuantizedTensor` pytree, its formats, quantize (numpy), dequantize (numpy and jax).

A weight [..., O, I] becomes integer codes and one scale (affine formats: and one offset) per group of G
neighbours along I. The kernels that multiply with it are in `jaxchat/pallas`, how codes are packed into bytes
in `packing.py`; no I/O here.
"""

import abc
import dataclasses
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxchat import packing
from jaxchat.config import Param
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.visible import shown

Array = jax.Array | np.ndarray
T = TypeVar("T", bound="QuantizedTensor | Reordered")

GROUPS = (32, 64, 128)
"""The group sizes; 0 in a `QuantFormat` stands for one group a row."""

SUPER_GROUP = 256
"""Weights that share the outer scale of a two-level format: ggml's QK_K."""

_ALIGNMENT = 32
"""Rows with one group are padded to a multiple of this, so that kernels never see a ragged row."""

_BLOCK_ELEMENTS = 1 << 16
"""Weights quantized at a time: their float32 values and one temporary stay in a core's second-level cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """How a weight is quantized. `parse` reads and `str` prints it.

    Attributes:
      bits: 8, 6, 5 or 4.
      group: G, weights that share a scale: 32, 64 or 128, or 0 for a whole row (per output channel); 16 at
        6 bits.
      affine: a group has an offset beside its scale, for weights that are not centred on zero.
      search: whether each group's scale minimises its squared error; otherwise it just spans the group,
        computed like ggml's reference, so that q8_0, q4_0 and q4_1 are llama.cpp's bit for bit.
      scale_dtype: `float16` or `float32`, of scales and offsets.
      two_level: scales and offsets are integers of 6 to 8 bits themselves, times a float16 for 256 weights:
        ggml's K-quants. Of each number of bits there is one such format.
      reordered: the columns are in another order (`Reordered`), which a weight brings: nothing is quantized
        to such a format here.
    """

    bits: int
    group: int = 32
    affine: bool = False
    search: bool = True
    scale_dtype: str = "float16"
    two_level: bool = False
    reordered: bool = False

    @classmethod
    def parse(cls, text: str) -> "QuantFormat | None":
        """Reads `int8`, `int4:64`, `int8:channel`, `int4:32:affine`, `q4_0`, `q4_k`, ...; `none` is None.

        Raises:
          UsageError: anything else; the message lists the forms.
        """
        if text == "none":
            return None
        if text in _GGUF_NAMES:
            return _GGUF_NAMES[text]
        kind, *options = text.split(":")
        if kind not in _BITS:
            raise _unknown_format(text)
        fields: dict[str, Any] = {}
        for option in options:
            if option not in _OPTIONS or fields.keys() & _OPTIONS[option].keys():
                raise _unknown_format(text)
            fields |= _OPTIONS[option]
        return cls(bits=_BITS[kind], **fields)

    def __str__(self) -> str:
        for name, fmt in _GGUF_NAMES.items():
            if self == fmt:
                return name
        group = [] if self.group == 32 else [str(self.group or "channel")]
        affine = ["affine"] if self.affine else []
        plain = [] if self.search else ["plain"]
        wide = ["f32"] if self.scale_dtype == "float32" else []
        order = ["reordered"] if self.reordered else []
        return ":".join([f"int{self.bits}", *group, *affine, *plain, *wide, *order])

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. Symmetric 8 bits leave -128 out, so that every code can be negated."""
        if self.bits == 8:
            return (-128, 127) if self.affine else (-127, 127)
        codes = 1 << self.bits
        return (0, codes - 1) if self.affine else (-codes // 2, codes // 2 - 1)

    def group_size(self, columns: int) -> int:
        """G for rows of I = `columns` weights."""
        return self.group or -(-columns // _ALIGNMENT) * _ALIGNMENT

    def padded(self, columns: int) -> int:
        """Ip for rows of I = `columns` weights."""
        unit = SUPER_GROUP if self.two_level else self.group_size(columns)
        return -(-columns // unit) * unit


_BITS = {"int8": 8, "int5": 5, "int4": 4}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{str(group): {"group": group} for group in GROUPS},
    "channel": {"group": 0},
    "affine": {"affine": True},
    "plain": {"search": False},
    "f32": {"scale_dtype": "float32"},
    "reordered": {"reordered": True},
}
_GGUF_NAMES = {
    "q8_0": QuantFormat(bits=8, search=False),
    "q4_0": QuantFormat(bits=4, search=False),
    "q4_1": QuantFormat(bits=4, affine=True, search=False),
    "q5_0": QuantFormat(bits=5, search=False),
    "q5_1": QuantFormat(bits=5, affine=True, search=False),
    "q4_k": QuantFormat(bits=4, affine=True, two_level=True),
    "q5_k": QuantFormat(bits=5, affine=True, two_level=True),
    "q6_k": QuantFormat(bits=6, group=16, two_level=True),
}


def _unknown_format(text: str) -> UsageError:
    return UsageError(
        f"unknown quantization {shown(text)}; use none, {', '.join(_GGUF_NAMES)}, or int8, int5 or int4, "
        "optionally with a group :32 :64 :128 :channel and with :affine :plain :f32, for example int4:64"
    )


def format_for(param: Param, fmt: QuantFormat | None) -> QuantFormat | None:
    """The format of one parameter under a model-wide `fmt`; None keeps it as it is.

    Norms, biases and position tables are never quantized. Under 4 or 5 bits the token embedding and the
    output head get 8, or 6 of two levels: they are few of the bytes and much of the damage (llama.cpp keeps
    its head at 6 bits, too).
    """
    if fmt is None or not param.quantizable:
        return None
    if fmt.bits < 8 and param.role in ("embedding", "head"):
        return _GGUF_NAMES["q6_k"] if fmt.two_level else dataclasses.replace(fmt, bits=8, affine=False)
    return fmt


class InParts(abc.ABC):
    """A weight whose numbers lie in several arrays: what it answers as an array would, from its `shape`."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, of all parts; several codes may share one."""
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor(InParts):
    """A weight [..., O, I] as codes with a scale per group: `w[..., o, i] ~ code * scale (+ min)`.

    Ip is I rounded up to a multiple of G, of two-level scales to one of 256. The padding's codes are 0;
    multiply it with zeros or cut it off.

    Attributes:
      codes: 8 bits: int8 [..., O, Ip], -127..127, affine ones -128..127. Fewer: uint8 [..., O, Ip/2], the
        low 4 bits, element 2j in the low nibble of byte j and 2j+1 in the high one (`jnp.int4`'s memory
        order). Affine codes are unsigned, 0..15, 0..31; others at 4 bits two's complement, -8..7, at 5 and 6
        bits in excess of half their range: 0..31 is -16..15, 0..63 is -32..31.
      scales: float16 or float32 [..., O, Ip/G]; scales may be negative, a group of zeros has scale 0. Of two
        levels: int8, to be multiplied by `super_scales`.
      mins: None, or like `scales`: the value of code 0, which is a group's smallest value below 8 bits and
        near its middle at 8.
      high: None, or at 5 and 6 bits what is above the low 4: uint8 [..., O, Ip/8] or [..., O, Ip/4], in the
        order of `packing`.
      super_scales: None, or float16 [..., O, Ip/256].
      super_mins: None, or like `super_scales`.
      bits: 8, 6, 5 or 4, static.
      group: G, static.
      columns: I, static.
    """

    codes: Array
    scales: Array
    mins: Array | None = None
    high: Array | None = None
    super_scales: Array | None = None
    super_mins: Array | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""
        return (*self.codes.shape[:-1], self.columns)

    @property
    def affine(self) -> bool:
        """Whether groups have an offset."""
        return self.mins is not None

    @property
    def zero_code(self) -> int:
        """What stands for code 0 where codes are unsigned: at 4 to 6 bits, but for 4 that are not affine."""
        return 0 if self.affine else 1 << (self.bits - 1)

    @property
    def padded_columns(self) -> int:
        """Ip: I rounded up to whole groups."""
        return self.codes.shape[-1] * (1 if self.bits == 8 else 2)

    @property
    def two_level(self) -> bool:
        """Whether scales are integers times an outer scale."""
        return self.super_scales is not None

    @property
    def format_name(self) -> str:
        """How it is stored, in `--quant`'s words: `int4`, `int4:64:affine`, `int8:channel`, `q4_k`."""
        if self.two_level:
            return str(QuantFormat(bits=self.bits, group=self.group, affine=self.affine, two_level=True))
        group = self.group if self.group in GROUPS else 0
        wide = str(np.dtype(self.scales.dtype))
        return str(QuantFormat(bits=self.bits, group=group, affine=self.affine, scale_dtype=wide))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reordered(InParts):
    """A quantized weight whose columns are in another order, so that those of a group are neighbours.

    Who multiplies with it puts the activations in the same order: GPTQ's `desc_act`.

    Attributes:
      weight: [..., O, I], in its own order; a `QuantizedTensor`, or what a backend makes of one.
      order: int32 [..., I]: column j of `weight` is column `order[j]` of what this stands for.
    """

    weight: Any
    order: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""
        return tuple(self.weight.shape)

    @property
    def columns(self) -> int:
        """I."""
        return self.shape[-1]

    @property
    def format_name(self) -> str:
        """See `QuantizedTensor`."""
        return f"{self.weight.format_name}:reordered"


Quantized = QuantizedTensor | Reordered
"""A quantized weight, of one format."""


def empty_like(shape: tuple[int, ...], fmt: QuantFormat) -> Quantized:
    """`empty`, with an order of columns if the format has one."""
    tensor = empty(shape, fmt)
    if not fmt.reordered:
        return tensor
    return Reordered(weight=tensor, order=np.empty((*shape[:-2], shape[-1]), np.int32))


def empty(shape: tuple[int, ...], fmt: QuantFormat) -> QuantizedTensor:
    """Uninitialised numpy arrays for weights of `shape` [..., O, I], for `quantize(..., out=)` to fill."""
    *lead, columns = shape
    group, padded = fmt.group_size(columns), fmt.padded(columns)
    code_type, width = (np.int8, padded) if fmt.bits == 8 else (np.uint8, padded // 2)
    scales = np.empty((*lead, padded // group), np.int8 if fmt.two_level else fmt.scale_dtype)
    outer = np.empty((*lead, padded // SUPER_GROUP), np.float16) if fmt.two_level else None
    between = fmt.bits in (5, 6)
    return QuantizedTensor(
        codes=np.empty((*lead, width), code_type),
        scales=scales,
        mins=np.empty_like(scales) if fmt.affine else None,
        high=np.empty((*lead, packing.high_bytes(fmt.bits, padded)), np.uint8) if between else None,
        super_scales=outer,
        super_mins=np.empty_like(outer) if outer is not None and fmt.affine else None,
        bits=fmt.bits,
        group=group,
        columns=columns,
    )


def quantize(
    w: np.ndarray,
    fmt: QuantFormat,
    *,
    name: str,
    bfloat16_bits: bool = False,
    out: QuantizedTensor | None = None,
    threads: int | None = None,
) -> QuantizedTensor:
    """Quantizes a weight, a block of rows at a time: beside the output it takes a few megabytes.

    Args:
      w: [..., O, I], any float type; may be a memory map or a transposed view.
      fmt: see `QuantFormat`.
      name: of the tensor, for error messages.
      bfloat16_bits: `w` is uint16, the bits of bfloat16 values.
      out: where to write the result, such as `layer_slice(empty(stack_shape, fmt), layer)`.
      threads: default: one a core. The result does not depend on it.

    Returns:
      `out`, or a new tensor of numpy arrays.

    Raises:
      JaxchatError: a weight is NaN or infinite, a scale does not fit its type, or `w` is no float matrix.
    """
    _check_input(w, name, bfloat16_bits)
    if out is None:
        out = empty(w.shape, fmt)
    if out.shape != w.shape:
        raise ValueError(f"{name}: out has shape {out.shape}, the weight {w.shape}")

    def work(block: tuple[Any, ...]) -> None:
        part = jax.tree.map(lambda array: array[block], out)
        _quantize_rows(_to_float32(w[block]), fmt, part, name)

    blocks = _row_blocks(w.shape)
    threads = threads or available_cores()
    if threads == 1 or w.size <= _BLOCK_ELEMENTS:
        for block in blocks:
            work(block)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, blocks):
                pass
    return out


def dequantize(q: Quantized) -> Any:
    """The weights a tensor stands for: float32 [..., O, I]; numpy in, numpy out, otherwise traceable."""
    if isinstance(q, Reordered):
        xp: Any = np if isinstance(q.order, np.ndarray) else jnp
        back = xp.argsort(q.order, axis=-1)[..., None, :]
        return xp.take_along_axis(dequantize(q.weight), back, axis=-1)
    codes = unpack_codes(q)
    groups = codes.reshape(*codes.shape[:-1], -1, q.group).astype(np.float32)
    w = groups * group_scales(q)[..., None]
    mins = group_mins(q)
    if mins is not None:
        w = w + mins[..., None]
    return w.reshape(codes.shape)[..., : q.columns]


def group_scales(q: QuantizedTensor) -> Any:
    """The scale of each group, float32 [..., O, Ip/G]: of two levels, their product."""
    return _both_levels(q.scales, q.super_scales)


def group_mins(q: QuantizedTensor) -> Any:
    """The offset of each group, likewise; None of formats that are not affine."""
    return None if q.mins is None else _both_levels(q.mins, q.super_mins)


def _both_levels(inner: Any, outer: Any) -> Any:
    if outer is None:
        return inner.astype(np.float32)
    shaped = inner.reshape(*outer.shape, -1).astype(np.float32)
    return (shaped * outer.astype(np.float32)[..., None]).reshape(inner.shape)


def unpack_codes(q: QuantizedTensor) -> Any:
    """The codes, one a byte: int8 [..., O, Ip]; numpy in, numpy out, otherwise traceable."""
    if q.bits == 8:
        return q.codes
    codes = packing.unpack(q.codes, q.high, q.bits).astype(np.int8)
    if q.affine:
        return codes
    if q.bits == 4:
        return (codes ^ np.int8(8)) - np.int8(8)  # sign extension: 0..15 -> 0..7, -8..-1
    return codes - np.int8(1 << (q.bits - 1))


def row_slice(q: Quantized, rows: slice) -> Quantized:
    """Some rows [o, I] of a weight [O, I]: a view."""
    if isinstance(q, Reordered):
        return dataclasses.replace(q, weight=row_slice(q.weight, rows))
    return jax.tree.map(lambda array: array[rows], q)


def layer_slice(q: T, layer: int | jax.Array) -> T:
    """One layer [O, I] of a stack [L, O, I]; `layer` may be traced. Of numpy arrays it is a view."""

    def pick(array: Array) -> Array:
        if isinstance(array, np.ndarray) and isinstance(layer, int | np.integer):
            return array[layer]
        return lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)

    return jax.tree.map(pick, q)


def rows(q: QuantizedTensor, ids: Array) -> Any:
    """Rows `ids` [...] of a quantized embedding [V, D], float32 [..., D]; only those rows are dequantized."""
    return dequantize(jax.tree.map(lambda array: array[ids], q))


def available_cores() -> int:
    """The processors that this process may use."""
    # Only Linux says which cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_input(w: np.ndarray, name: str, bfloat16_bits: bool) -> None:
    if w.ndim < 2 or w.shape[-1] == 0:
        raise JaxchatError(f"{name}: only matrices can be quantized, found shape {list(w.shape)}")
    expected = "uint16, the bits of bfloat16" if bfloat16_bits else "a float type"
    right = w.dtype == np.uint16 if bfloat16_bits else jnp.issubdtype(w.dtype, jnp.floating)
    if not right:
        raise JaxchatError(f"{name}: cannot quantize {w.dtype} values, expected {expected}")


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices that cut [..., O, I] into blocks of rows [o, I], without flattening what may be a view."""
    *lead, height, width = shape
    step = max(1, _BLOCK_ELEMENTS // width)
    for index in np.ndindex(*lead):
        for start in range(0, height, step):
            yield (*index, slice(start, start + step))


def _to_float32(w: np.ndarray) -> np.ndarray:
    """Rows as contiguous float32; bfloat16 by its bits, the upper half of a float32's, which is faster."""
    if w.dtype in (np.uint16, ml_dtypes.bfloat16):
        bits = np.ascontiguousarray(w).view(np.uint16)
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return np.ascontiguousarray(w, np.float32)


def _quantize_rows(x: np.ndarray, fmt: QuantFormat, out: QuantizedTensor, name: str) -> None:
    """Quantizes rows x [o, I] into `out`. A last group cut short by the end of the row is fitted as it is."""
    if not np.isfinite(np.max(np.abs(x), initial=0.0)):
        raise JaxchatError(
            f"{name}: holds NaN or infinite weights, which cannot be quantized; the checkpoint is damaged: "
            "download it again, or do without --quant"
        )
    if fmt.two_level:
        _quantize_two_levels(x, fmt, out)
        return _check_scales(out.super_scales, out.super_mins, name)
    group, full = out.group, x.shape[1] // out.group
    pieces = [(slice(0, full), x[:, : full * group])] if full else []
    if x.shape[1] > full * group:
        pieces.append((slice(full, full + 1), x[:, full * group :]))
    for where, piece in pieces:
        size = piece.shape[1] // (where.stop - where.start)
        codes, grid = _quantize_groups(piece.reshape(-1, size), fmt)
        _put_codes(out, where, codes)
        out.scales[:, where] = grid.scale.reshape(len(x), -1)
        if out.mins is not None:
            out.mins[:, where] = grid.min.reshape(len(x), -1)
    _check_scales(out.scales, out.mins, name)


def _check_scales(scales: Any, mins: Any, name: str) -> None:
    if not np.isfinite(scales).all() or not (mins is None or np.isfinite(mins).all()):
        raise JaxchatError(f"{name}: weights too large for float16 scales; append :f32 to the format")


def _put_codes(out: QuantizedTensor, groups: slice, codes: np.ndarray) -> None:
    """Writes codes as `_quantize_groups` gives them to some groups of each row, zeros behind."""
    between = out.bits in (5, 6)
    size = out.group if between else out.codes.shape[-1] // out.scales.shape[-1]
    padded = np.full((len(codes), size), out.zero_code if between else 0, codes.dtype)
    padded[:, : codes.shape[1]] = codes
    low, high = packing.pack(padded.view(np.uint8), out.bits) if between else (padded, None)
    for whole, part in ((out.codes, low), (out.high, high)):
        if whole is not None and part is not None:
            width = whole.shape[-1] // out.scales.shape[-1]
            target = whole[:, groups.start * width : groups.stop * width]
            target[...] = part.reshape(target.shape)


def _quantize_two_levels(x: np.ndarray, fmt: QuantFormat, out: QuantizedTensor) -> None:
    """Fits each group on its own, then outer scales to theirs, then codes to what those have become."""
    rows = np.zeros((len(x), out.padded_columns), np.float32)
    rows[:, : x.shape[1]] = x
    w = np.ascontiguousarray(rows.reshape(-1, out.group).T)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        _, grid = _searched(w, fmt, 0)
        scale = _put_levels(grid.scale, out.scales, out.super_scales, affine=fmt.affine)
        low = np.zeros_like(scale)
        if fmt.affine:
            low = _put_levels(grid.min, out.mins, out.super_mins, affine=True)
        codes = _nearest(w, _Grid(scale, low), fmt) - np.float32(fmt.code_range[0])
    unsigned = np.ascontiguousarray(codes.astype(np.uint8).T).reshape(rows.shape)
    unsigned[:, x.shape[1] :] = out.zero_code
    out.codes[...], high = packing.pack(unsigned, fmt.bits)
    if out.high is not None:
        out.high[...] = high


def _put_levels(values: np.ndarray, inner: Any, outer: Any, *, affine: bool) -> np.ndarray:
    """Writes scales (or offsets) [1, n] as integers and outer scales, as K-quants do; returns the products.

    Those of affine formats have one sign and 6 bits, others both signs and 8: the extreme one becomes -128.
    """
    shaped = values.reshape(*outer.shape, -1)
    extreme = np.take_along_axis(shaped, np.abs(shaped).argmax(-1, keepdims=True), -1)
    outer[...] = extreme[..., 0] / np.float32(63 if affine else -128)
    step = outer.astype(np.float32)[..., None]
    limits = (0, 63) if affine else (-128, 127)
    integers = np.rint(shaped * _inverse(step)).clip(*limits)
    inner[...] = integers.reshape(inner.shape)
    return (integers * step).reshape(1, -1)


class _Grid(NamedTuple):
    """The values a group's weights are rounded to, `code * scale + min`, all float32."""

    scale: np.ndarray  # [1, n] or [n, 1]
    min: np.ndarray  # likewise; 0 for symmetric formats


def _quantize_groups(groups: np.ndarray, fmt: QuantFormat) -> tuple[np.ndarray, _Grid]:
    """Quantizes groups [n, g], each on its own, to codes int8 [n, g], of 4 bits packed: uint8 [n, ceil(g/2)].

    Those of 5 bits are unsigned.
    """
    # Numpy's inner loop runs over the last axis. Short groups are laid out [g, n], which keeps it long.
    axis = 0 if groups.shape[1] <= max(GROUPS) else 1
    w = np.ascontiguousarray(groups.T) if axis == 0 else groups
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        codes, grid = _searched(w, fmt, axis) if fmt.search else _plain(w, fmt, axis)
    if fmt.bits == 5:
        codes = codes - np.float32(fmt.code_range[0])
    packed = codes.astype(np.int8)
    if fmt.bits == 4:
        packed = _pack_nibbles(packed, axis)
    return (packed.T if axis == 0 else packed), grid


def _pack_nibbles(codes: np.ndarray, axis: int) -> np.ndarray:
    """Pairs of 4-bit codes along `axis` as bytes, the first of a pair in the low nibble."""
    if codes.shape[axis] % 2:
        codes = np.pad(codes, [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)])
    nibbles = codes.view(np.uint8)
    low, high = (nibbles[0::2], nibbles[1::2]) if axis == 0 else (nibbles[:, 0::2], nibbles[:, 1::2])
    return (low & 15) | (high << 4)


def _spanning_grid(w: np.ndarray, fmt: QuantFormat, axis: int) -> _Grid:
    """The grid that just spans each group, as ggml's quantize_row_q8_0_ref, q4_0_ref and q4_1_ref."""
    low, high = fmt.code_range
    if fmt.affine:
        smallest, largest = w.min(axis, keepdims=True), w.max(axis, keepdims=True)
        if fmt.two_level:
            smallest = np.minimum(smallest, 0)
        scale = (largest - smallest) / np.float32(high - low)
        return _Grid(scale, smallest - scale * np.float32(low))
    if fmt.bits == 8:
        scale = np.abs(w).max(axis, keepdims=True) / np.float32(high)
    else:
        # The value of largest magnitude becomes -8 (-16, -32), whichever its sign: all codes are of use.
        extreme = np.abs(w).argmax(axis, keepdims=True)
        scale = np.take_along_axis(w, extreme, axis) / np.float32(low)
    return _Grid(scale, np.zeros_like(scale))


def _plain(w: np.ndarray, fmt: QuantFormat, axis: int) -> tuple[np.ndarray, _Grid]:
    """Codes on the spanning grid, rounded before the scale is narrowed, in ggml's order of operations."""
    low, high = fmt.code_range
    grid = _spanning_grid(w, fmt, axis)
    inverse = _inverse(grid.scale)
    if fmt.affine:
        codes = np.trunc((w - w.min(axis, keepdims=True)) * inverse + np.float32(0.5)) + np.float32(low)
    elif fmt.bits < 8:
        codes = np.trunc(w * inverse + np.float32(0.5 - low)) + np.float32(low)
    else:
        codes = w * inverse
        codes = np.copysign(np.floor(np.abs(codes) + np.float32(0.5)), codes)  # half away from zero
    return codes.clip(low, high), grid


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where that is infinite: a group of zeros, or of values too small to matter."""
    inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _searched(w: np.ndarray, fmt: QuantFormat, axis: int) -> tuple[np.ndarray, _Grid]:
    """Nearest codes on the grid of least squared error among the spanning one, stretched ones and refits."""
    span = _spanning_grid(w, fmt, axis)
    best = _narrowed(span, fmt)
    error = _squared_error(w, best, fmt, axis)
    middle = span.min + span.scale * np.float32(sum(fmt.code_range) / 2) if fmt.affine else np.float32(0)
    for stretch in _STRETCHES[fmt.bits]:
        factor = np.float32(stretch)
        grid = _Grid(span.scale * factor, middle + (span.min - middle) * factor)
        best, error = _better(w, _narrowed(grid, fmt), best, error, fmt, axis)
    for _ in range(_REFITS):
        grid = _narrowed(_refit(w, best, fmt, axis), fmt)
        best, error = _better(w, grid, best, error, fmt, axis)
    return _nearest(w, best, fmt), best


_STRETCHES = {
    5: (0.75, 0.82, 0.88, 0.92, 0.96, 0.98, 1.02, 1.04, 1.08),
    6: (0.85, 0.9, 0.94, 0.97, 0.985, 1.015, 1.03),
    4: (0.65, 0.75, 0.82, 0.88, 0.92, 0.96, 1.04, 1.08, 1.12),
    8: (0.98, 0.99, 0.995, 1.005, 1.01, 1.015, 1.02),
}
"""Scales tried, relative to the spanning one: below 1 clip, above 1 leave outer codes unused.

Measured on normal weights, groups of 32: with the refits, within 0.02 dB (4 bits) and 0.1 dB (8 bits) of a
grid of sixty or more, and five times as fast.
"""

_REFITS = 2


def _narrowed(grid: _Grid, fmt: QuantFormat) -> _Grid:
    """The grid as it will be stored, so that errors are measured on what a reader gets.

    Of two levels that is known only when all groups are; but their offsets are never above zero.
    """
    if fmt.two_level:
        return _Grid(grid.scale, np.minimum(grid.min, 0) if fmt.affine else grid.min)
    if fmt.scale_dtype == "float32":
        return grid
    return _Grid(*(part.astype(np.float16).astype(np.float32) for part in grid))


def _nearest(w: np.ndarray, grid: _Grid, fmt: QuantFormat) -> np.ndarray:
    """The code nearest to each weight, float32."""
    low, high = fmt.code_range
    codes = (w - grid.min) * _inverse(grid.scale) if fmt.affine else w * _inverse(grid.scale)
    np.rint(codes, out=codes)
    return np.clip(codes, np.float32(low), np.float32(high), out=codes)


def _squared_error(w: np.ndarray, grid: _Grid, fmt: QuantFormat, axis: int) -> np.ndarray:
    """Sum of squared rounding errors of each group."""
    difference = _nearest(w, grid, fmt)
    difference *= grid.scale
    if fmt.affine:
        difference += grid.min
    difference -= w
    return _sum_of_products(difference, difference, axis)


def _sum_of_products(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.expand_dims(np.einsum("gn,gn->n" if axis == 0 else "ng,ng->n", a, b), axis)


def _better(
    w: np.ndarray, grid: _Grid, best: _Grid, error: np.ndarray, fmt: QuantFormat, axis: int
) -> tuple[_Grid, np.ndarray]:
    """Group by group the one of two grids with the smaller error, and that error."""
    new = _squared_error(w, grid, fmt, axis)
    wins = new < error
    picked = _Grid(*(np.where(wins, mine, theirs) for mine, theirs in zip(grid, best, strict=True)))
    return picked, np.where(wins, new, error)


def _refit(w: np.ndarray, grid: _Grid, fmt: QuantFormat, axis: int) -> _Grid:
    """Least squares: the scale (and offset) that fit the weights best, given the codes on `grid`."""
    codes = _nearest(w, grid, fmt)
    if not fmt.affine:
        scale = _sum_of_products(w, codes, axis) / _sum_of_products(codes, codes, axis)
        return _Grid(scale, grid.min)
    code_mean, w_mean = codes.mean(axis, keepdims=True), w.mean(axis, keepdims=True)
    codes -= code_mean
    scale = _sum_of_products(w, codes, axis) / _sum_of_products(codes, codes, axis)
    return _Grid(scale, w_mean - scale * code_mean)
