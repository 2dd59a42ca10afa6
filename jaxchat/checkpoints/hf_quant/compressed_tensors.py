"""compressed-tensors (vLLM, llm-compressor): packed or plain integers and floats, by groups of layers.

Layouts: compressed-tensors' `compressors/`. Activations are not quantized here, whatever the scheme says.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxchat.checkpoints.hf_quant import bits as packing
from jaxchat.checkpoints.hf_quant.floats import (
    MX_GROUP,
    NV_GROUP,
    Float8Weight,
    MxFloat4Weight,
    MxFloat8Weight,
    NvFloat4Weight,
    block_of,
    whole_groups,
)
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
    spread,
)
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig
from jaxchat.visible import shown


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """How the weights of a group of layers are quantized.

    Attributes:
      targets: which layers: names, `re:` patterns, or classes.
      format: the compressor's name.
      bits: of a number.
      group: that share a scale in a row; 0 is the row.
      symmetric: whether there are no zero points.
      block: rows and columns that share a scale, if they do.
    """

    targets: tuple[str, ...]
    format: str
    bits: int
    group: int
    symmetric: bool
    block: tuple[int, int] | None


class IntegerWeight(Weight):
    """One layer of integers, packed into words of 32 bits or bytes of their own."""

    def __init__(self, found: Found, scheme: _Scheme, *, packed: bool):
        self.found, self._scheme, self._packed = found, scheme, packed
        columns = found.shape[1]
        self._group = group_of(scheme.group, columns)
        self._groups = count(self._group, columns)
        self._order, regular = self._read_order()
        middle, most = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
        scale = DTYPE_NAMES.get(found.dtype("weight_scale"), "float32")
        codes = Codes(
            bits=scheme.bits,
            span=(-middle, middle - 1) if scheme.symmetric else (-most, most),
            group=self._group,
            affine=not scheme.symmetric,
            scale=scale,
            reordered=self._order is not None,
        )
        self.codes = codes if regular else None
        stored = scheme.bits if packed else 8
        each = {"float32": 32}.get(scale, 16) + (0 if scheme.symmetric else stored)
        self.bits = stored + each * self._groups / columns

    def _read_order(self) -> tuple[np.ndarray | None, bool]:
        """As of GPTQ: the columns in the order of their groups, and whether all groups are full."""
        if "weight_g_idx" not in self.found.tensors or not self._group:
            return None, True
        columns = self.found.shape[1]
        if self.found.tensors["weight_g_idx"] != ("I32", (columns,)):
            return None, True  # told with the other parts
        groups = self.found.get("weight_g_idx")
        if (groups == -1).all():  # a layer that was not reordered
            return None, True
        return ordered(groups, self._group, self._groups, self.found, "weight_g_idx")

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        bits = self._scheme.bits
        scales = ((rows, self._groups),) if self._group else ((rows, 1), (rows,), (1,), ())
        parts = {"weight_scale": Part(FLOATS, scales)}
        if self._packed:
            parts["weight_packed"] = Part(("I32",), ((rows, packing.words(columns, bits)),))
            parts["weight_shape"] = Part(("I64", "I32"), ((2,),), required=False)
        else:
            parts["weight"] = Part(("I8",), (self.found.shape,))
        if not self._scheme.symmetric:
            packed = ((packing.words(rows, bits), self._groups),)
            plain = ((rows, self._groups), *(scales if not self._group else ()))
            parts["weight_zero_point"] = (
                Part(("I32",), packed) if self._packed else Part(("I8", "I32", "I64"), plain)
            )
        elif "weight_zero_point" in self.found.tensors:  # zeros that some versions store
            shape = self.found.tensors["weight_zero_point"][1]
            parts["weight_zero_point"] = Part(("I8", "I32", "I64"), (shape,))
        if self._group:
            parts["weight_g_idx"] = Part(("I32",), ((columns,),), required=False)
        return parts

    def rows(self, rows: slice) -> Grid | np.ndarray:
        """See `Weight`."""
        columns = self.found.shape[1]
        if "weight_shape" in self.found.tensors and tuple(self.found.get("weight_shape")) != self.found.shape:
            said = self.found.get("weight_shape").tolist()
            raise self.found.fail(f".weight_shape says {said}; expected {list(self.found.shape)}")
        scales = self._by_row("weight_scale", rows)
        zeros: np.ndarray | int = self._zeros(rows)
        packed = False
        if not self._packed:
            codes = self.found.get("weight", rows)
        elif self._scheme.bits == 4 and columns % 8 == 0 and self.codes is not None and self._order is None:
            codes = np.ascontiguousarray(self.found.get("weight_packed", rows)).view(np.uint8)
            packed = True
        else:
            codes = packing.unpacked(self.found.get("weight_packed", rows), self._scheme.bits, columns)
        if self._packed:  # unsigned; zero points, too
            zeros = zeros + (1 << (self._scheme.bits - 1))
        if self.codes is None:
            groups = self.found.get("weight_g_idx")
            each = zeros[:, groups] if isinstance(zeros, np.ndarray) else zeros
            return (codes.astype(np.float32) - each) * scales.astype(np.float32)[:, groups]
        if self._order is not None:
            codes = codes[:, self._order]
        return Grid(
            codes=codes, scales=scales, zeros=zeros, group=self._group, order=self._order, packed=packed
        )

    def _by_row(self, suffix: str, rows: slice) -> np.ndarray:
        """[o, groups]; of one for the whole tensor as well."""
        values = self.found.get(suffix)
        outputs = self.found.shape[0]
        if values.size == 1:
            return np.broadcast_to(values.reshape(1, 1), (outputs, 1))[rows]
        return values.reshape(outputs, -1)[rows]

    def _zeros(self, rows: slice) -> np.ndarray | int:
        """The code of zero, signed."""
        outputs, bits = self.found.shape[0], self._scheme.bits
        if "weight_zero_point" not in self.found.tensors:
            return 0
        if self._scheme.symmetric:
            if self.found.get("weight_zero_point").any():
                raise self.found.fail(".weight_zero_point is not 0, in a symmetric scheme")
            return 0
        if not self._packed:
            return self._by_row("weight_zero_point", rows).astype(np.int16)
        words = np.ascontiguousarray(self.found.get("weight_zero_point").T)
        codes = packing.unpacked(words, bits, outputs).T[rows].astype(np.int16)
        return codes - np.int16(1 << (bits - 1))


class _GroupedFloat8Weight(Weight):
    """One layer of E4M3 numbers with a scale for each group of a row."""

    def __init__(self, found: Found, group: int):
        self.found, self._group = found, group
        self.bits = 8.0

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        rows, columns = self.found.shape
        scales = Part(FLOATS, ((rows, count(self._group, columns)),))
        return {"weight": Part(("F8_E4M3",), (self.found.shape,)), "weight_scale": scales}

    def rows(self, rows: slice) -> np.ndarray:
        """See `Weight`."""
        values = self.found.get("weight", rows).astype(np.float32)
        scales = self.found.get("weight_scale", rows).astype(np.float32)
        return values * spread(scales, self._group, values.shape[1])


def _floats(found: Found, scheme: _Scheme) -> Weight:
    group = group_of(scheme.group, found.shape[1])
    if group and scheme.block is None:
        return _GroupedFloat8Weight(found, group)
    return Float8Weight(found, "weight_scale", scheme.block)


def _plain(found: Found, scheme: _Scheme) -> Weight:
    """`naive-quantized`: each number in the smallest type that holds it."""
    if found.dtype("weight", "I8") == "F8_E4M3":
        return _floats(found, scheme)
    return IntegerWeight(found, scheme, packed=False)


def _mx4(found: Found, scheme: _Scheme) -> Weight:
    whole_groups(found, MX_GROUP)
    return MxFloat4Weight(found, "weight_packed", "weight_scale")


def _nv4(found: Found, scheme: _Scheme) -> Weight:
    whole_groups(found, NV_GROUP)
    return NvFloat4Weight(found)


_FORMATS: Mapping[str, Callable[[Found, _Scheme], Weight]] = {
    "pack-quantized": lambda found, scheme: IntegerWeight(found, scheme, packed=True),
    "int-quantized": lambda found, scheme: IntegerWeight(found, scheme, packed=False),
    "naive-quantized": _plain,
    "float-quantized": _floats,
    "mxfp8-quantized": lambda found, scheme: MxFloat8Weight(found),
    "mxfp4-pack-quantized": _mx4,
    "nvfp4-pack-quantized": _nv4,
}
"""`format` -> what reads it."""

_DENSE, _MIXED = "dense", "mixed-precision"


def _schemes(settings: HfConfig) -> list[_Scheme]:
    groups = settings.read("config_groups", dict[str, dict[str, Any]], {})
    found = [
        _scheme(HfConfig(values, f"{settings.at('config_groups')}.{name[:40]}"), settings)
        for name, values in groups.items()
    ]
    return [scheme for scheme in found if scheme is not None]


def _scheme(group: HfConfig, settings: HfConfig) -> _Scheme | None:
    weights = group.section("weights")
    if weights is None:  # of activations only
        return None
    name = group.read("format", str, "") or settings.read("format", str, "")
    if name not in _FORMATS:
        where = group.at("format") if group.values.get("format") else settings.at("format")
        raise JaxchatError(
            f"{where} is {shown(name)}; readable: {', '.join(_FORMATS)}; take the model in one of these"
        )
    bits = weights.integer("num_bits", 8)
    if not 1 <= bits <= 8:
        raise JaxchatError(f"{weights.at('num_bits')} is {bits}; expected 1 to 8")
    strategy = weights.read("strategy", str, "tensor")
    size = weights.read("group_size", int, -1)
    if "group" in strategy and size < 1 and size != -1:
        raise JaxchatError(f"{weights.at('group_size')} is {size}; expected -1 (a row) or at least 1")
    return _Scheme(
        targets=tuple(group.read("targets", list[str], [])),
        format=name,
        bits=bits,
        group=size if "group" in strategy else 0,
        symmetric=weights.flag("symmetric", True),
        block=block_of(weights.values.get("block_structure"), weights.at("block_structure")),
    )


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""
    for key in ("transform_config", "sparsity_config"):
        values = settings.values.get(key)
        idle = isinstance(values, dict) and (not values or values.get("format") == _DENSE)
        if values and not idle:
            raise JaxchatError(
                f"{settings.at(key)}: such transforms of the weights are not read; take the original model"
            )
    schemes = _schemes(settings)
    where = settings.at("config_groups")
    patterns = {
        target: compiled(target.removeprefix("re:"), where)
        for scheme in schemes
        for target in scheme.targets
        if target.startswith("re:")
    }

    def rank(scheme: _Scheme, name: str) -> int:
        """How exactly a layer is meant: by its name, a pattern, or its class."""
        if name in scheme.targets:
            return 3
        if any(target in patterns and patterns[target].match(name) for target in scheme.targets):
            return 2
        return int(bool({"Linear", "Embedding"} & set(scheme.targets)))

    def weight(found: Found) -> Weight:
        ranks = [rank(scheme, found.name) for scheme in schemes]
        best = max(ranks, default=0)
        if not best:
            raise found.fail(f" is quantized, but no group of {where} has it as a target")
        scheme = schemes[ranks.index(best)]
        return _FORMATS[scheme.format](found, scheme)

    return weight


def _label(settings: HfConfig) -> str:
    formats = {scheme.format for scheme in _schemes(settings)}
    bits = {scheme.bits for scheme in _schemes(settings)}
    named = formats.pop() if len(formats) == 1 else _MIXED
    return f"compressed-tensors {named}" + (f" {bits.pop()}-bit" if len(bits) == 1 else "")


METHOD = Method(
    name="compressed-tensors",
    marks=(
        "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape",
        "weight_g_idx",
    ),
    reader=reader,
    label=_label,
    ignored=(
        "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
        "k_scale", "v_scale", "q_scale",
    ),
)  # fmt: skip
