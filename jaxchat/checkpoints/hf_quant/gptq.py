"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it: codes along the input, words of 32 bits.

Layout: GPTQModel's `BaseQuantLinear`. `gptq` (version 1) stores zero points less 1, `gptq_v2` as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxchat.checkpoints.hf_quant import bits as packing
from jaxchat.checkpoints.hf_quant.patterns import compiled
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
    ordered,
)
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig
from jaxchat.visible import shown

_BITS = (2, 3, 4, 8)
_COLUMNS = 256  # put in order at a time
_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` -> what stored zero points are less than they should be."""


class GptqWeight(Weight):
    """One layer; `sym` is checked when the zero points are read."""

    by_rows = False

    def __init__(self, found: Found, settings: HfConfig, offset: int):
        self.found, self._offset = found, offset
        self._bits = _bits(settings)
        columns = found.shape[1]
        self._group = group_of(_group_size(settings), columns)
        self._groups = count(self._group, columns)
        self._symmetric = settings.flag("sym", True)
        self._at_symmetric = settings.at("sym")
        self._order, regular = self._read_order(settings)
        middle, scale = 1 << (self._bits - 1), DTYPE_NAMES.get(found.dtype("scales"), "float32")
        most = (1 << self._bits) - 1
        codes = Codes(
            bits=self._bits,
            span=(-middle, middle - 1) if self._symmetric else (-most - offset, most),
            group=self._group,
            affine=not self._symmetric,
            scale=scale,
            reordered=self._order is not None,
        )
        self.codes = codes if regular else None
        each = {"float32": 32}.get(scale, 16) + self._bits
        self.bits = self._bits + each * self._groups / columns

    def _read_order(self, settings: HfConfig) -> tuple[np.ndarray | None, bool]:
        """See `ordered`."""
        if self.found.tensors.get("g_idx") != ("I32", (self.found.shape[1],)) or not self._group:
            if settings.flag("desc_act", False) and "g_idx" not in self.found.tensors and self._group:
                raise self.found.fail(".g_idx is missing, which desc_act needs")
            return None, True
        return ordered(self.found.get("g_idx"), self._group, self._groups, self.found, "g_idx")

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        return {
            "qweight": Part(("I32",), ((packing.words(columns, self._bits), rows),)),
            "qzeros": Part(("I32",), ((self._groups, packing.words(rows, self._bits)),)),
            "scales": Part(FLOATS, ((self._groups, rows),)),
            "g_idx": Part(("I32",), ((columns,),), required=False),
        }

    def rows(self, rows: slice) -> Grid | np.ndarray:
        """See `Weight`."""
        _, columns = self.found.shape
        stored = self.found.get("qweight")[:, rows]
        scales = np.ascontiguousarray(self.found.get("scales")[:, rows].T)
        zeros = np.ascontiguousarray(self._zeros()[:, rows].T)
        middle = 1 << (self._bits - 1)
        if self._symmetric and (zeros != middle).any():
            raise self.found.fail(
                f".qzeros holds zero points of {zeros.min()} to {zeros.max()}, but {self._at_symmetric} says "
                f"that all are {middle}",
                "set it to false",
            )
        known = middle if self._symmetric else zeros
        if self.codes is None:
            words = np.ascontiguousarray(stored.T)
            codes = packing.unpacked(words, self._bits, columns).astype(np.float32)
            groups = self.found.get("g_idx")
            return (codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]
        packed = self._bits == 4 and columns % 8 == 0
        if packed and self._order is not None:
            codes = _pairs(stored, self._order)
        else:
            words = np.ascontiguousarray(stored.T)
            codes = words.view(np.uint8) if packed else packing.unpacked(words, self._bits, columns)
            codes = codes if packed or self._order is None else codes[:, self._order]
        return Grid(
            codes=codes, scales=scales, zeros=known, group=self._group, order=self._order, packed=packed
        )

    def _zeros(self) -> np.ndarray:
        """[groups, O]. The 1 is added to whole words, as it was taken from them: a 0 has borrowed."""
        outputs = self.found.shape[0]
        words = self.found.get("qzeros")
        if self._offset and self._bits != 3:
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, self._bits)))
            return packing.unpacked((words.view(np.uint32) + ones).view(np.int32), self._bits, outputs)
        stored = packing.unpacked(words, self._bits, outputs)
        return stored + np.uint8(self._offset) & np.uint8((1 << self._bits) - 1)


def _pairs(stored: np.ndarray, order: np.ndarray) -> np.ndarray:
    """4-bit codes uint8 [O, I/2] of words [I/8, O], the columns in this order, some at a time."""
    words = np.ascontiguousarray(stored).view(np.uint32)
    out = np.empty((len(order) // 2, stored.shape[1]), np.uint8)
    for start in range(0, len(order), _COLUMNS):
        columns = order[start : start + _COLUMNS]
        shifts = (4 * (columns % 8)).astype(np.uint32)[:, None]
        own = (words[columns // 8] >> shifts).astype(np.uint8) & np.uint8(15)
        out[start // 2 : (start + _COLUMNS) // 2] = own[0::2] | own[1::2] << np.uint8(4)
    return np.ascontiguousarray(out.T)


def _bits(settings: HfConfig) -> int:
    found = settings.integer("bits")
    if found not in _BITS:
        raise JaxchatError(f"{settings.at('bits')} is {found}; readable: {', '.join(map(str, _BITS))}")
    return found


def _group_size(settings: HfConfig) -> int:
    """`group_size`, -1 for a row."""
    found = settings.read("group_size", int, 128)
    if found != -1 and found < 1:
        raise JaxchatError(f"{settings.at('group_size')} is {found}; expected -1 (a row) or at least 1")
    return found


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""
    key = "checkpoint_format" if settings.has("checkpoint_format") else "format"
    version = settings.read(key, str, "gptq")
    if version not in _VERSIONS:
        raise JaxchatError(
            f"{settings.at(key)} is {shown(version)}; readable: {', '.join(_VERSIONS)}; take the model "
            "in one of these"
        )
    _bits(settings), _group_size(settings)
    dynamic = settings.read("dynamic", dict[str, dict[str, Any]], {})
    rules = [
        (compiled(pattern.removeprefix("+:").removeprefix("-:"), settings.at("dynamic")), pattern, changes)
        for pattern, changes in dynamic.items()
    ]

    def weight(found: Found) -> Weight:
        """By the first rule that matches, as GPTQModel's `dynamic_get`."""
        for compiled_rule, pattern, changes in rules:
            if compiled_rule.match(found.name):
                where = f"{settings.at('dynamic')}: {shown(pattern)}"
                own = HfConfig({**settings.values, **changes}, where)
                return GptqWeight(found, own, _VERSIONS[version])
        return GptqWeight(found, settings, _VERSIONS[version])

    return weight


METHOD = Method(
    name="gptq",
    marks=("qweight", "qzeros", "g_idx"),
    reader=reader,
    label=lambda settings: f"gptq {_bits(settings)}-bit",
)
