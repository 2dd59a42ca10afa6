"""AWQ, as AutoAWQ writes it: 4 bits with zero points, in the layouts of its three kernels.

Layouts: AutoAWQ's `WQLinear_GEMM`, `WQLinear_GEMV` and `gemv_fast`'s `WQLinear` (llm-awq's version 2).
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxchat.checkpoints.hf_quant import bits as packing
from jaxchat.checkpoints.hf_quant.weight import (
    DTYPE_NAMES,
    FLOATS,
    Codes,
    Found,
    Grid,
    Method,
    Part,
    Weight,
    count,
    group_of,
    nibbles,
)
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig
from jaxchat.visible import shown

_READING_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which nibble of a word, lowest first, holds each of eight codes of `gemm`."""


class _AwqWeight(Weight):
    """What the layouts share."""

    half_mins = False
    by_rows = False

    def __init__(self, found: Found, group_size: int):
        _, columns = found.shape
        self.found = found
        self._group = group_of(group_size, columns)
        self._groups = count(self._group, columns)
        scale = DTYPE_NAMES.get(found.dtype("scales"), "float32")
        self.codes = Codes(
            bits=4, span=(-15, 15), group=self._group, affine=True, scale=scale, half_mins=self.half_mins
        )
        each = 32 if self.half_mins else 20
        self.bits = 4 + each * self._groups / columns


class GemmWeight(_AwqWeight):
    """Words along the output, their nibbles shuffled."""

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        return {
            "qweight": Part(("I32",), ((columns, rows // 8),)),
            "qzeros": Part(("I32",), ((self._groups, rows // 8),)),
            "scales": Part(FLOATS, ((self._groups, rows),)),
        }

    def rows(self, rows: slice) -> Grid:
        """See `Weight`."""
        return Grid(
            codes=self._pairs()[rows],
            packed=True,
            scales=np.ascontiguousarray(self.found.get("scales")[:, rows].T),
            zeros=np.ascontiguousarray(self._nibbles("qzeros")[:, rows].T),
            group=self._group,
        )

    def _pairs(self) -> np.ndarray:
        """The codes uint8 [O, I/2], of two neighbours in a row each; of eight rows at a time."""
        rows, columns = self.found.shape
        words = np.ascontiguousarray(self.found.get("qweight").view(np.uint32).T)
        out = np.empty((rows // 8, 8, columns // 2), np.uint8)

        def take(row: int) -> None:
            own = (words >> np.uint32(4 * _READING_ORDER[row])).astype(np.uint8) & np.uint8(15)
            np.bitwise_or(own[:, 0::2], own[:, 1::2] << np.uint8(4), out=out[:, row])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(take, range(8)))
        return out.reshape(rows, columns // 2)

    def _nibbles(self, suffix: str) -> np.ndarray:
        stored = nibbles(np.ascontiguousarray(self.found.get(suffix)).view(np.uint8))
        return stored.reshape(len(stored), -1, 8)[..., _READING_ORDER].reshape(stored.shape)


class GemvWeight(_AwqWeight):
    """Words along the input; scales and zero points padded."""

    @property
    def _width(self) -> int:
        """Words of the zero points of a row."""
        return _padded_groups(self.found.shape[1], self._group)

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        return {
            "qweight": Part(("I32",), ((rows, columns // 8),)),
            "qzeros": Part(("I32",), ((rows, self._width),)),
            "scales": Part(FLOATS, ((rows, self._width * 8),)),
        }

    def rows(self, rows: slice) -> Grid:
        """See `Weight`."""
        return Grid(
            codes=np.ascontiguousarray(self.found.get("qweight", rows)).view(np.uint8),
            scales=self.found.get("scales", rows)[:, : self._groups],
            zeros=packing.unpacked(self.found.get("qzeros", rows), 4, self._groups),
            group=self._group,
            packed=True,
        )


class GemvFastWeight(_AwqWeight):
    """16-bit words of four rows' codes, and offsets instead of zero points."""

    half_mins = True

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        groups = _padded_groups(columns, self._group) * 8
        return {
            "qweight": Part(("I16",), ((rows // 4, columns),)),
            "scales": Part(("F16",), ((groups, rows),)),
            "scaled_zeros": Part(("F16",), ((groups, rows),)),
        }

    def rows(self, rows: slice) -> Grid:
        """See `Weight`; undoes AutoAWQ's `pack_intweight`."""
        outputs, columns = self.found.shape
        words = self.found.get("qweight").view(np.uint16)
        four = np.stack([words >> np.uint16(4 * row) & np.uint16(15) for row in range(4)], axis=-1)
        blocks = four.reshape(outputs // 4, columns // 64, 4, 64).swapaxes(1, 2)  # rows, blocks of columns
        pairs = blocks.reshape(outputs, columns // 32, 4, 2, 4).swapaxes(-1, -2)  # 0 2 4 6 1 3 5 7
        shuffled = pairs.reshape(outputs, columns // 32, 4, 4, 2).swapaxes(-2, -3)  # 0 1 8 9 16 17 ...
        codes = shuffled.reshape(outputs, columns).astype(np.uint8)
        scales, mins = (self.found.get(part)[: self._groups, rows].T for part in ("scales", "scaled_zeros"))
        return Grid(codes=codes[rows], scales=scales, mins=mins, group=self._group)


def _padded_groups(columns: int, group: int) -> int:
    """AutoAWQ's `calculate_zeros_width`."""
    unit = {64: 2, 32: 4}.get(group, 1)
    words = -(-(columns // (group or columns)) // 8)
    return -(-words // unit) * unit


_VERSIONS: dict[str, tuple[type[_AwqWeight], tuple[int, int]]] = {
    "gemm": (GemmWeight, (8, 2)),
    "gemv": (GemvWeight, (8, 8)),
    "gemv_fast": (GemvFastWeight, (4, 64)),
}
"""`version` -> what reads it, and what outputs and inputs are multiples of."""


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""
    version = settings.read("version", str, "gemm").lower()
    if version not in _VERSIONS:
        raise JaxchatError(
            f"{settings.at('version')} is {shown(version)}; readable: {', '.join(_VERSIONS)}; take the model "
            "in one of these"
        )
    bits = "bits" if settings.has("bits") else "w_bit"
    if settings.integer(bits, 4) != 4:
        raise JaxchatError(f"{settings.at(bits)} is {settings.integer(bits)}; AWQ has 4")
    key = "group_size" if settings.has("group_size") else "q_group_size"
    group_size = settings.read(key, int, 128)
    if group_size != -1 and group_size < 1:
        raise JaxchatError(f"{settings.at(key)} is {group_size}; expected -1 (a row) or at least 1")
    kind, units = _VERSIONS[version]

    def weight(found: Found) -> Weight:
        for what, size, unit in zip(("outputs", "inputs"), found.shape, units, strict=True):
            if size % unit:
                raise found.fail(f" has {size} {what}; {version} has a multiple of {unit}")
        return kind(found, group_size)

    return weight


METHOD = Method(
    name="awq",
    marks=("qweight", "qzeros", "scaled_zeros"),
    reader=reader,
    label=lambda settings: f"awq {settings.read('version', str, 'gemm').lower()} 4-bit",
)
