"""How codes of 4, 5 and 6 bits lie in bytes: low halves two to a byte, what is above them beside.

Numpy in, numpy out, otherwise traceable. What codes stand for is in `quant.py`.

Element 2j of a row is the low half of byte j, 2j + 1 the high one. Bits above the fourth are packed per 32
elements so that shifts bring them where kernels want them, four or more bytes at a time: element
c = 8 v + 2 k + i (k < 4, i < 2) has field n = 2 v + i of byte k. Of 5-bit codes a field is one bit, and 32
elements take 4 bytes; of 6-bit codes it is two bits, and fields 4 to 7 are in the bytes four further on.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

RUN = 32
"""Elements whose high bits are packed together: rows of 5- and 6-bit codes have a multiple of these."""


def high_bytes(bits: int, columns: int) -> int:
    """Bytes of what is above the fourth bit, for a row of so many codes."""
    return columns * (bits - 4) // 8


def pack(codes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Unsigned codes uint8 [..., I] as low halves [..., I/2] and, above 4 bits, the rest, or None."""
    low = (codes[..., 0::2] & 15) | (codes[..., 1::2] << np.uint8(4))
    if bits == 4:
        return low, None
    wide = bits - 4
    fields = _in_fields(codes >> np.uint8(4), bits)
    shifts = (np.arange(8 // wide, dtype=np.uint8) * np.uint8(wide))[:, None]
    high = np.bitwise_or.reduce(fields << shifts, axis=-2)
    return low, high.reshape(*codes.shape[:-1], high_bytes(bits, codes.shape[-1]))


def unpack(low: Any, high: Any, bits: int) -> Any:
    """The inverse of `pack`: unsigned codes, uint8 [..., I]."""
    xp = np if isinstance(low, np.ndarray) else jnp
    nibbles = xp.stack([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    nibbles = nibbles.reshape(*low.shape[:-1], 2 * low.shape[-1])
    return nibbles if high is None else nibbles | (unpack_high(high, bits) << np.uint8(4))


def unpack_high(high: Any, bits: int) -> Any:
    """What is above the fourth bit of each code: uint8 [..., I]."""
    xp = np if isinstance(high, np.ndarray) else jnp
    wide = bits - 4
    shifts = (np.arange(8 // wide, dtype=np.uint8) * np.uint8(wide))[:, None]
    runs = high.reshape(*high.shape[:-1], -1, wide, 1, 4)
    fields = (runs >> shifts) & np.uint8((1 << wide) - 1)  # [..., run, word, field, k]
    return _from_fields(xp, fields).reshape(*high.shape[:-1], -1)


def _in_fields(above: np.ndarray, bits: int) -> np.ndarray:
    """[..., I] as [..., run, word, field of a byte, k]: v is (word, upper field), i the lower field."""
    words = bits - 4
    shaped = above.reshape(*above.shape[:-1], -1, words, 4 // words, 4, 2)  # [..., run, word, v, k, i]
    return np.swapaxes(shaped, -1, -2).reshape(*above.shape[:-1], -1, words, 8 // words, 4)


def _from_fields(xp: Any, fields: Any) -> Any:
    """The inverse of `_in_fields`, but for the last reshape."""
    *lead, words, count, four = fields.shape
    return xp.swapaxes(fields.reshape(*lead, words, count // 2, 2, four), -1, -2)
