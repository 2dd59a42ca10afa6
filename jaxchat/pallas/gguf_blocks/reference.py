"""GGUF's blocks of quantized weights <-> `QuantizedTensor`, exactly: codes, scales and minimums, bit for bit.

A block is some bytes that stand for 32 or 256 weights of a row; layouts are those of ggml's ggml-common.h and
`dequantize_row_*` in ggml-quants.c. Which types a file has, and what others stand for, is in `gguf_types.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxchat import packing
from jaxchat.quant import QuantFormat, QuantizedTensor, unpack_codes

Blocks = np.ndarray  # uint8 [rows, blocks of a row, bytes of a block]


class Layout(NamedTuple):
    """How a type's blocks lie.

    Attributes:
      format: what its weights are here.
      elements, bytes: of a block.
      read: its blocks -> what `_tensor` takes.
      write: the inverse, into zeroed blocks.
    """

    format: QuantFormat
    elements: int
    bytes: int
    read: Callable[[Blocks], "_Parts"]
    write: Callable[["_Parts", Blocks], None]


class _Parts(NamedTuple):
    """A row's blocks taken apart, each array [rows, blocks, ...]: unsigned codes, scales, minimums."""

    codes: np.ndarray  # uint8 [..., elements]; at 8 bits int8
    scales: np.ndarray  # float16 [...] or, of two levels, int8 [..., groups]
    mins: np.ndarray | None = None
    super_scales: np.ndarray | None = None
    super_mins: np.ndarray | None = None


def tensor_of(name: str, raw: np.ndarray) -> QuantizedTensor:
    """The weights of rows of blocks.

    Args:
      name: of the type, as in `LAYOUTS`.
      raw: uint8 [O, bytes of a row], whole blocks.

    Returns:
      [O, I] in numpy arrays of their own.
    """
    layout = LAYOUTS[name]
    parts = layout.read(raw.reshape(len(raw), -1, layout.bytes))
    fmt, rows = layout.format, len(raw)
    codes = np.ascontiguousarray(parts.codes.reshape(rows, -1))
    high = None
    if fmt.bits < 8:
        if fmt.bits == 4 and not fmt.affine:
            codes = codes ^ np.uint8(8)  # two's complement
        codes, high = packing.pack(codes, fmt.bits)

    def flat(part: np.ndarray | None) -> np.ndarray | None:
        return None if part is None else np.ascontiguousarray(part.reshape(rows, -1))

    scales = flat(parts.scales)
    assert scales is not None
    return QuantizedTensor(
        codes=codes,
        scales=scales,
        mins=flat(parts.mins),
        high=high,
        super_scales=flat(parts.super_scales),
        super_mins=flat(parts.super_mins),
        bits=fmt.bits,
        group=fmt.group,
        columns=raw.shape[-1] // layout.bytes * layout.elements,
    )


def blocks_of(name: str, q: QuantizedTensor) -> np.ndarray:
    """The rows of blocks that stand for weights [O, I] of a type's own format: the inverse of `tensor_of`."""
    layout = LAYOUTS[name]
    fmt, rows = layout.format, len(q.codes)
    codes = unpack_codes(q)
    if fmt.bits < 8:
        codes = (codes - np.int8(fmt.code_range[0])).astype(np.uint8)

    def split(part: Any, inner: bool = False) -> np.ndarray | None:
        if part is None:
            return None
        return part.reshape(rows, blocks, -1) if inner else part.reshape(rows, blocks)

    blocks = q.columns // layout.elements
    out = np.zeros((rows, blocks, layout.bytes), np.uint8)
    scales = split(np.asarray(q.scales), fmt.two_level)
    assert scales is not None
    parts = _Parts(
        codes.reshape(rows, blocks, -1),
        scales,
        split(q.mins, fmt.two_level),
        split(q.super_scales),
        split(q.super_mins),
    )
    layout.write(parts, out)
    return out.reshape(rows, -1)


# --- blocks of 32: a float16 scale, maybe a float16 minimum, fifth bits, nibbles of j and j + 16


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """The float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _put_half(blocks: Blocks, at: int, values: np.ndarray) -> None:
    blocks[..., at : at + 2] = np.ascontiguousarray(values, "<f2")[..., None].view(np.uint8)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Low nibbles, then high ones."""
    return np.concatenate([data & 15, data >> np.uint8(4)], -1)


def _put_nibbles(codes: np.ndarray) -> np.ndarray:
    half = codes.shape[-1] // 2
    return (codes[..., :half] & 15) | (codes[..., half:] << np.uint8(4))


def _simple(bits: int, affine: bool) -> tuple[Callable[[Blocks], _Parts], Callable[[_Parts, Blocks], None]]:
    """Q4_0, Q4_1, Q5_0, Q5_1."""
    fifth = 4 if affine else 2  # where the fifth bits begin, if there are any
    start = fifth + (4 if bits == 5 else 0)

    def read(blocks: Blocks) -> _Parts:
        codes = _nibbles(blocks[..., start:])
        if bits == 5:
            codes |= np.unpackbits(blocks[..., fifth:start], axis=-1, bitorder="little") << np.uint8(4)
        return _Parts(codes, _half(blocks, 0), _half(blocks, 2) if affine else None)

    def write(parts: _Parts, blocks: Blocks) -> None:
        _put_half(blocks, 0, parts.scales)
        if parts.mins is not None:
            _put_half(blocks, 2, parts.mins)
        if bits == 5:
            blocks[..., fifth:start] = np.packbits(parts.codes >> np.uint8(4), axis=-1, bitorder="little")
        blocks[..., start:] = _put_nibbles(parts.codes)

    return read, write


def _read_q8_0(blocks: Blocks) -> _Parts:
    return _Parts(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _half(blocks, 0))


def _write_q8_0(parts: _Parts, blocks: Blocks) -> None:
    _put_half(blocks, 0, parts.scales)
    blocks[..., 2:] = parts.codes.view(np.uint8)


# --- blocks of 256, of two levels


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minimums out of 12 bytes: ggml's `get_scale_min_k4`."""
    a, b, c = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> np.uint8(6)) << np.uint8(4))], -1)
    mins = np.concatenate([b & 63, (c >> np.uint8(4)) | ((b >> np.uint8(6)) << np.uint8(4))], -1)
    return scales.astype(np.int8), mins.astype(np.int8)


def _put_six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    scales, mins = scales.astype(np.uint8), mins.astype(np.uint8)

    def first(values: np.ndarray) -> np.ndarray:
        return (values[..., :4] & 63) | ((values[..., 4:] >> np.uint8(4)) << np.uint8(6))

    last = (scales[..., 4:] & 15) | (mins[..., 4:] << np.uint8(4))
    return np.concatenate([first(scales), first(mins), last], -1)


def _affine_k(bits: int) -> tuple[Callable[[Blocks], _Parts], Callable[[_Parts, Blocks], None]]:
    """Q4_K and Q5_K: 32 bytes of nibbles have 64 weights; their fifth bits are 2 c, 2 c + 1 of 32 bytes."""
    start = 48 if bits == 5 else 16
    order = np.arange(8, dtype=np.uint8)[:, None]

    def read(blocks: Blocks) -> _Parts:
        nibbles = _nibbles(blocks[..., start:].reshape(*blocks.shape[:-1], 4, 32))
        codes = nibbles.reshape(*blocks.shape[:-1], 8, 32)
        if bits == 5:
            codes = codes | (((blocks[..., None, 16:48] >> order) & 1) << np.uint8(4))
        scales, mins = _six_bits(blocks[..., 4:16])
        return _Parts(
            codes.reshape(*blocks.shape[:-1], 256), scales, mins, _half(blocks, 0), -_half(blocks, 2)
        )

    def write(parts: _Parts, blocks: Blocks) -> None:
        assert parts.mins is not None
        assert parts.super_scales is not None
        assert parts.super_mins is not None
        _put_half(blocks, 0, parts.super_scales)
        _put_half(blocks, 2, -parts.super_mins)
        blocks[..., 4:16] = _put_six_bits(parts.scales, parts.mins)
        codes = parts.codes.reshape(*blocks.shape[:-1], 8, 32)
        if bits == 5:
            blocks[..., 16:48] = np.bitwise_or.reduce((codes >> np.uint8(4)) << order, axis=-2)
        packed = _put_nibbles(codes.reshape(*blocks.shape[:-1], 4, 64))
        blocks[..., start:] = packed.reshape(*blocks.shape[:-1], 128)

    return read, write


_Q6_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def _read_q6_k(blocks: Blocks) -> _Parts:
    """Each half: 64 bytes of nibbles, 32 of high bits; a quarter q of 32 weights has bits 2 q and 2 q + 1."""
    lead = blocks.shape[:-1]
    low = _nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    high = (blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> _Q6_SHIFTS) & 3
    codes = (low | (high << np.uint8(4))).reshape(*lead, 256)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return _Parts(codes, scales, super_scales=_half(blocks, 208))


def _write_q6_k(parts: _Parts, blocks: Blocks) -> None:
    lead = blocks.shape[:-1]
    codes = parts.codes.reshape(*lead, 2, 4, 32)
    blocks[..., :128] = _put_nibbles(codes.reshape(*lead, 2, 128)).reshape(*lead, 128)
    high = np.bitwise_or.reduce((codes >> np.uint8(4)) << _Q6_SHIFTS, axis=-2)
    blocks[..., 128:192] = high.reshape(*lead, 64)
    blocks[..., 192:208] = parts.scales.view(np.uint8)
    assert parts.super_scales is not None
    _put_half(blocks, 208, parts.super_scales)


def _named(name: str) -> QuantFormat:
    fmt = QuantFormat.parse(name)
    assert fmt is not None
    return fmt


LAYOUTS = {
    "Q4_0": Layout(_named("q4_0"), 32, 18, *_simple(4, False)),
    "Q4_1": Layout(_named("q4_1"), 32, 20, *_simple(4, True)),
    "Q5_0": Layout(_named("q5_0"), 32, 22, *_simple(5, False)),
    "Q5_1": Layout(_named("q5_1"), 32, 24, *_simple(5, True)),
    "Q8_0": Layout(_named("q8_0"), 32, 34, _read_q8_0, _write_q8_0),
    "Q4_K": Layout(_named("q4_k"), 256, 144, *_affine_k(4)),
    "Q5_K": Layout(_named("q5_k"), 256, 176, *_affine_k(5)),
    "Q6_K": Layout(_named("q6_k"), 256, 210, _read_q6_k, _write_q6_k),
}
"""The types whose weights keep their bits here, by ggml's names."""
