"""The types of tensors in GGUF files, a row each, and the numbers that their blocks of bytes stand for.

Layouts: ggml/src/ggml-common.h. Most are read by the library `gguf`; here are those that it lacks. The file
format is in `gguf_file.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.errors import JaxchatError


@dataclasses.dataclass(frozen=True)
class GgufType:
    """A type of tensors.

    Attributes:
      id: its number in a file.
      name: as ggml calls it.
      elements, size: of a block: so many numbers are in so many bytes.
      dtype: of plain numbers (blocks of one), in little endian; None of what has to be unpacked.
      words: (first byte, bytes of one, how many) of the numbers in a block of more than one byte each, which
        a big-endian file has turned around; None where ggml itself leaves open which those are.
    """

    id: int
    name: str
    elements: int
    size: int
    dtype: np.dtype | None = None
    words: tuple[tuple[int, int, int], ...] | None = ()


def _plain(number: int, name: str, dtype: Any) -> GgufType:
    found = np.dtype(dtype)
    return GgufType(number, name, 1, found.itemsize, found, ((0, found.itemsize, 1),))


_HALF, _TWO_HALVES = ((0, 2, 1),), ((0, 2, 2),)

TYPES: Mapping[int, GgufType] = {
    row.id: row
    for row in (
        _plain(0, "F32", "<f4"),
        _plain(1, "F16", "<f2"),
        GgufType(2, "Q4_0", 32, 18, words=_HALF),
        GgufType(3, "Q4_1", 32, 20, words=_TWO_HALVES),
        GgufType(6, "Q5_0", 32, 22, words=_HALF),
        GgufType(7, "Q5_1", 32, 24, words=_TWO_HALVES),
        GgufType(8, "Q8_0", 32, 34, words=_HALF),
        GgufType(9, "Q8_1", 32, 36, words=_TWO_HALVES),
        GgufType(10, "Q2_K", 256, 84, words=((80, 2, 2),)),
        GgufType(11, "Q3_K", 256, 110, words=((108, 2, 1),)),
        GgufType(12, "Q4_K", 256, 144, words=_TWO_HALVES),
        GgufType(13, "Q5_K", 256, 176, words=_TWO_HALVES),
        GgufType(14, "Q6_K", 256, 210, words=((208, 2, 1),)),
        GgufType(15, "Q8_K", 256, 292, words=((0, 4, 1), (260, 2, 16))),
        GgufType(16, "IQ2_XXS", 256, 66, words=None),
        GgufType(17, "IQ2_XS", 256, 74, words=((0, 2, 33),)),
        GgufType(18, "IQ3_XXS", 256, 98, words=None),
        GgufType(19, "IQ1_S", 256, 50, words=((0, 2, 1), (34, 2, 8))),
        GgufType(20, "IQ4_NL", 32, 18, words=_HALF),
        GgufType(21, "IQ3_S", 256, 110, words=_HALF),
        GgufType(22, "IQ2_S", 256, 82, words=_HALF),
        GgufType(23, "IQ4_XS", 256, 136, words=_TWO_HALVES),
        _plain(24, "I8", "i1"),
        _plain(25, "I16", "<i2"),
        _plain(26, "I32", "<i4"),
        _plain(27, "I64", "<i8"),
        _plain(28, "F64", "<f8"),
        GgufType(29, "IQ1_M", 256, 56, words=None),
        _plain(30, "BF16", ml_dtypes.bfloat16),
        GgufType(34, "TQ1_0", 256, 54, words=((52, 2, 1),)),
        GgufType(35, "TQ2_0", 256, 66, words=((64, 2, 1),)),
        GgufType(39, "MXFP4", 32, 17),
        GgufType(40, "NVFP4", 64, 36),
        GgufType(41, "Q1_0", 128, 18, words=_HALF),
        GgufType(42, "Q2_0", 64, 18, words=_HALF),
    )
}
"""Number in a file -> type."""

REMOVED: Mapping[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that ggml itself no longer reads."""


def dequantize(type: GgufType, raw: np.ndarray) -> np.ndarray:
    """The numbers that blocks stand for.

    Args:
      type: of the blocks.
      raw: uint8 [..., bytes of a row], little endian; any rows of a tensor.

    Returns:
      float32 [..., elements of a row].

    Raises:
      JaxchatError: the installed library `gguf` does not know the type.
    """
    if type.dtype is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(raw).view(type.dtype).astype(np.float32)
    shape = (*raw.shape[:-1], raw.shape[-1] // type.size * type.elements)
    if raw.size == 0:
        return np.empty(shape, np.float32)
    if (own := _OWN.get(type.name)) is not None:
        return own(np.ascontiguousarray(raw).reshape(-1, type.size)).reshape(shape)
    from gguf import GGMLQuantizationType, quants  # a tenth of a second

    try:
        known = GGMLQuantizationType(type.id)
    except ValueError:
        raise JaxchatError(
            f"the installed library gguf does not know the tensor type {type.name}; install a newer one: "
            "pip install --upgrade gguf"
        ) from None
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, known)


def _scales(blocks: np.ndarray, dtype: str, first: int = 0) -> np.ndarray:
    """The one number [n, 1] that stands so many bytes into each block, float32."""
    size = np.dtype(dtype).itemsize
    return blocks[:, first : first + size].copy().view(dtype).astype(np.float32)


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    """Codes of `width` bits, the lowest of a byte first: uint8 [n, bytes] -> [n, codes]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & ((1 << width) - 1)).reshape(len(packed), -1)


def _q1_0(blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_q1_0`: a bit is the sign of the block's number, +1 where it is set."""
    scale = _scales(blocks, "<f2")
    return np.where(_bits(blocks[:, 2:], 1) == 1, scale, -scale)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_q2_0`: -1, 0, 1 or 2 times the block's number."""
    with np.errstate(all="ignore"):
        return (_bits(blocks[:, 2:], 2).astype(np.float32) - 1) * _scales(blocks, "<f2")


def _q8(scale: str, first: int, elements: int) -> Callable[[np.ndarray], np.ndarray]:
    """ggml's types of activations: a number, and int8 codes; the sums of those are left out."""

    def read(blocks: np.ndarray) -> np.ndarray:
        codes = blocks[:, first : first + elements].view(np.int8).astype(np.float32)
        with np.errstate(all="ignore"):
            return codes * _scales(blocks, scale)

    return read


_OWN: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_1": _q8("<f2", 4, 32),
    "Q8_K": _q8("<f4", 4, 256),
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}
"""Blocks [n, bytes] -> numbers [n, elements], of the types that `gguf` does not unpack."""


def to_little_endian(type: GgufType, raw: np.ndarray) -> np.ndarray:
    """Blocks of a big-endian file, uint8 [..., bytes of a row], turned around in place."""
    assert type.words is not None  # refused when the file is opened
    blocks = raw.reshape(-1, type.size)
    for first, size, count in type.words:
        part = blocks[:, first : first + size * count].reshape(len(blocks), count, size)
        blocks[:, first : first + size * count] = part[:, :, ::-1].reshape(len(blocks), size * count)
    return raw
