"""Weights of 8-bit and 4-bit floating point, with scales for a tensor, for rows or for blocks.

Formats: OCP 8-bit and Microscaling (MX) specifications; NVFP4 as compressed-tensors writes it.
"""

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxchat.checkpoints.hf_quant.weight import Codes, Found, Grid, Part, Shape, Weight, nibbles, spread
from jaxchat.errors import JaxchatError

FLOAT8 = ("F8_E4M3",)
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
MX_GROUP, NV_GROUP = 32, 16

TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""What the 16 codes of 4-bit floats stand for, times 2."""


class Float8Weight(Weight):
    """One layer of E4M3 numbers: w = weight * scale."""

    def __init__(self, found: Found, scale: str, block: tuple[int, int] | None):
        """Args: scale: the suffix of the scales. block: [rows, columns] that share one, if they may."""
        self.found, self._scale, self._block = found, scale, block
        self.bits = 8.0

    def _shapes(self) -> tuple[Shape, ...]:
        rows, columns = self.found.shape
        shapes: tuple[Shape, ...] = ((rows, 1), (rows,), (1, 1), (1,), ())
        if self._block is None:
            return shapes
        return (-(-rows // self._block[0]), -(-columns // self._block[1])), *shapes

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        return {"weight": Part(FLOAT8, (self.found.shape,)), self._scale: Part(SCALES, self._shapes())}

    def rows(self, rows: slice) -> np.ndarray:
        """See `Weight`."""
        values = self.found.get("weight", rows).astype(np.float32)
        scales = self.found.get(self._scale).astype(np.float32)
        if scales.size == 1:
            return values * scales.reshape(())
        if scales.shape[0] == self.found.shape[0] and scales.size == scales.shape[0]:
            return values * scales.reshape(-1, 1)[rows]
        assert self._block is not None  # the shape was checked
        own = scales[np.arange(rows.start, rows.stop) // self._block[0]]
        return values * spread(own, self._block[1], values.shape[1])


class MxFloat8Weight(Weight):
    """One layer of E4M3 numbers with a power of two for each 32 of a row: MXFP8."""

    def __init__(self, found: Found):
        self.found = found
        self.bits = 8 + 8 / MX_GROUP

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        return {
            "weight": Part(FLOAT8, (self.found.shape,)),
            "weight_scale": Part(("U8", "F8_E8M0"), ((rows, -(-columns // MX_GROUP)),)),
        }

    def rows(self, rows: slice) -> np.ndarray:
        """See `Weight`."""
        values = self.found.get("weight", rows).astype(np.float32)
        scales = powers(self.found.get("weight_scale", rows), self.found)
        return values * spread(scales, MX_GROUP, values.shape[1])


class MxFloat4Weight(Weight):
    """One layer of E2M1 numbers with a power of two for each 32 of a row: MXFP4, low nibble first."""

    def __init__(self, found: Found, codes: str, scales: str, *, blocks: bool = False):
        """Args: codes, scales: their suffixes. blocks: the codes are [out, in/32, 16], as in gpt-oss."""
        self.found, self._codes, self._scales, self._blocks = found, codes, scales, blocks
        self.codes = Codes(bits=5, span=(-12, 12), group=MX_GROUP, affine=False, scale="power")
        self.bits = 4 + 8 / MX_GROUP

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        groups = columns // MX_GROUP
        packed = (rows, groups, MX_GROUP // 2) if self._blocks else (rows, columns // 2)
        return {
            self._codes: Part(("U8",), (packed,)),
            self._scales: Part(("U8", "F8_E8M0"), ((rows, groups),)),
        }

    def rows(self, rows: slice) -> Grid:
        """See `Weight`."""
        packed = self.found.get(self._codes, rows)
        codes = TWICE_E2M1[nibbles(packed.reshape(len(packed), -1))]
        scales = powers(self.found.get(self._scales, rows), self.found) / np.float32(2)
        return Grid(codes=codes, scales=scales, group=MX_GROUP)


class NvFloat4Weight(Weight):
    """One layer of E2M1 numbers with an E4M3 scale for each 16 of a row, and one for all to divide by."""

    def __init__(self, found: Found):
        self.found = found
        self.bits = 4 + 8 / NV_GROUP

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        return {
            "weight_packed": Part(("U8",), ((rows, columns // 2),)),
            "weight_scale": Part(FLOAT8, ((rows, columns // NV_GROUP),)),
            "weight_global_scale": Part(("F32",), ((1,), ())),
        }

    def rows(self, rows: slice) -> np.ndarray:
        """See `Weight`."""
        codes = TWICE_E2M1[nibbles(self.found.get("weight_packed", rows))]
        whole = self.found.get("weight_global_scale").reshape(())
        if not np.isfinite(whole) or whole == 0:
            raise self.found.fail(f".weight_global_scale is {whole}, by which nothing can be divided")
        scales = self.found.get("weight_scale", rows).astype(np.float32) / whole
        return codes * (spread(scales, NV_GROUP, codes.shape[1]) / np.float32(2))


def powers(exponents: np.ndarray, found: Found) -> np.ndarray:
    """2 ** (e - 127), float32; 255 is not a number."""
    stored = exponents.view(np.uint8)
    if (stored == 255).any():
        raise found.fail(" has scales that are not numbers")
    return stored.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def whole_groups(found: Found, group: int) -> None:
    """Refuses rows that are no whole groups."""
    if found.shape[1] % group:
        raise found.fail(f" has {found.shape[1]} inputs; expected a multiple of {group}")


def block_of(values: object, where: str) -> tuple[int, int] | None:
    """`[rows, columns]` that share a scale, as a configuration has it, or "128x128"."""
    if values is None:
        return None
    if isinstance(values, str) and (sides := re.fullmatch(r"(\d{1,9})x(\d{1,9})", values)):
        values = [int(side) for side in sides.groups()]
    if (
        isinstance(values, list)
        and len(values) == 2
        and all(type(n) is int and 0 < n < 1 << 31 for n in values)
    ):
        return values[0], values[1]
    raise JaxchatError(f"{where} is no list of two sizes, rows and columns; download the file again")
