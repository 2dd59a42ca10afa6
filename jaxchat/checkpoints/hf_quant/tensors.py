"""Foreign weights as ours: integers in groups into a `QuantizedTensor`, code by code."""

from collections.abc import Callable

import numpy as np

from jaxchat import packing
from jaxchat.checkpoints.hf_quant.weight import Grid, spread
from jaxchat.errors import JaxchatError, option
from jaxchat.quant import QuantFormat, Quantized, QuantizedTensor, Reordered

_NARROW = 1 << 22  # weights at a time, so that temporary arrays stay small


def tensor_of(
    grid: Grid, fmt: QuantFormat, columns: int, name: str, rounded: Callable[[], None] = lambda: None
) -> Quantized:
    """The same weights [o, I] in a format of ours that can hold them.

    Args:
      grid: the codes, of all columns.
      fmt: with groups that divide those of `grid`.
      columns: I.
      name: for messages.
      rounded: called where a scale or an offset is not exactly what float16 can hold.

    Raises:
      JaxchatError: a code or a scale does not fit, against what the configuration says.
    """
    group, padded = fmt.group_size(columns), fmt.padded(columns)
    scales = _by_group(grid.scales.astype(np.float32), grid.group, fmt, padded)
    low, high = _codes(grid, fmt, padded, name)
    tensor = QuantizedTensor(
        codes=low,
        high=high,
        scales=_narrowed(scales, fmt, name, rounded),
        mins=_narrowed(_mins(grid, scales, fmt, padded), fmt, name, rounded) if fmt.affine else None,
        bits=fmt.bits,
        group=group,
        columns=columns,
    )
    return Reordered(weight=tensor, order=grid.order) if grid.order is not None else tensor


def _by_group(values: np.ndarray, group: int, fmt: QuantFormat, padded: int) -> np.ndarray:
    """[o, theirs] as [o, ours]: a scale of theirs serves several groups of ours."""
    count = padded // fmt.group_size(padded)
    if values.shape[1] == 1:
        return np.repeat(values, count, axis=1)
    return np.repeat(values, group // fmt.group, axis=1)[:, :count]


def _mins(grid: Grid, scales: np.ndarray, fmt: QuantFormat, padded: int) -> np.ndarray:
    """The value of code 0 of ours, [o, groups]."""
    shift = np.float32(_shift(grid, fmt))
    if grid.mins is not None:
        return _by_group(grid.mins.astype(np.float32), grid.group, fmt, padded) + shift * scales
    zeros = np.asarray(grid.zeros, np.float32)
    if isinstance(grid.zeros, np.ndarray):
        zeros = _by_group(zeros, grid.group, fmt, padded)
    return (shift - zeros) * scales


def _shift(grid: Grid, fmt: QuantFormat) -> int:
    """What an unsigned code is more than ours of 8 bits."""
    return 128 if fmt.bits == 8 and (grid.packed or grid.codes.dtype.kind == "u") else 0


def _narrowed(values: np.ndarray, fmt: QuantFormat, name: str, rounded: Callable[[], None]) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = values.astype(fmt.scale_dtype)
    if not np.isfinite(out).all():
        advice = option("keep", "exact") if np.isfinite(values).all() else "download the files again"
        raise JaxchatError(f"{name}: has scales that are no numbers, or too large for float16; use {advice}")
    if (out.astype(np.float32) != values).any():
        rounded()
    return out


def _codes(grid: Grid, fmt: QuantFormat, padded: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The codes in bytes, and what is above their fourth bit."""
    if grid.packed and fmt.bits == 4 and padded == 2 * grid.codes.shape[1]:
        if fmt.affine:
            return np.ascontiguousarray(grid.codes), None
        if isinstance(grid.zeros, int) and grid.zeros == 8:
            return grid.codes ^ np.uint8(0x88), None  # 0..15, 8 being zero, as two's complement
    codes = grid.unpacked()
    rows, columns = codes.shape
    out = np.full((rows, padded), 0 if fmt.affine or fmt.bits in (4, 8) else 1 << (fmt.bits - 1), np.uint8)
    step = max(1, _NARROW // max(1, columns))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        out[some, :columns] = _shifted(codes[some], grid, some, fmt, name).view(np.uint8)
    if fmt.bits == 8:
        return out.view(np.int8), None
    return packing.pack(out, fmt.bits)


def _shifted(codes: np.ndarray, grid: Grid, rows: slice, fmt: QuantFormat, name: str) -> np.ndarray:
    """Some codes as ours are before they are packed, int8 or uint8."""
    wide = codes.astype(np.int16)
    if fmt.affine:
        low, high, add = 0, (1 << fmt.bits) - 1, -_shift(grid, fmt)
        if codes.dtype.kind == "i":
            low, high = -128, 127
    else:
        zeros = grid.zeros
        if isinstance(zeros, np.ndarray):
            zeros = spread(zeros[rows].astype(np.int16), grid.group, codes.shape[1])
        wide = wide - np.int16(zeros) if isinstance(zeros, int) else wide - zeros
        half = 1 << (fmt.bits - 1)
        low, high, add = -half, half - 1, half if fmt.bits == 5 else 0
    if wide.size and not low <= wide.min() <= wide.max() <= high:
        raise JaxchatError(
            f"{name}: holds codes from {wide.min()} to {wide.max()}, expected {low} to {high} as the "
            "configuration says; download the files again"
        )
    return (wide + np.int16(add)).astype(np.int8 if add <= 0 and fmt.bits == 8 else np.uint8)
