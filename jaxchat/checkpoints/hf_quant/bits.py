"""Integers packed into the bits of 32-bit words, lowest bits first, and the words of others' layouts."""

import numpy as np

from jaxchat.checkpoints.hf_quant.weight import nibbles


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Codes uint8 [o, I] from rows of words int32 [o, ...]; a code may lie in two words."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw[:, :columns]
    if bits == 4:
        return nibbles(raw)[:, :columns]
    if bits == 2:
        quarters = [raw >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)]
        return np.stack(quarters, axis=-1).reshape(len(raw), -1)[:, :columns]
    out = np.empty((len(raw), columns), np.uint8)
    starts = np.arange(columns) * bits
    first, shift = starts // 8, (starts % 8).astype(np.uint16)
    for row, source in zip(out, np.pad(raw, ((0, 0), (0, 1))), strict=True):  # rows: few megabytes at a time
        pair = source[first] | source[first + 1].astype(np.uint16) << np.uint16(8)
        row[:] = pair >> shift & np.uint16((1 << bits) - 1)
    return out


def words(count: int, bits: int) -> int:
    """32-bit words that hold so many codes."""
    return -(-count * bits // 32)
