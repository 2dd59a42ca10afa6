"""HQQ: codes with scales and zero points that are floating-point numbers; each layer says how it is packed.

Layout: hqq's `HQQLinear.state_dict` and `BitPack`. A row of `W_q`, unpacked, is a group (axis 1).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

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
)
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig

_PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Bits -> rows that share an element of `W_q`, the first in its highest bits."""

_FACTS = {
    "group_size": ("I32", "I64"),
    "nbits": ("I32", "I64"),
    "axis": ("I32", "I64"),
    "shape": ("I32", "I64"),
    **dict.fromkeys(("quant_zero", "quant_scale", "view_as_float"), ("U8",)),
}
_UNUSED = (
    "channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "packing",
    "round_zero", "stores_quant_config", "unpack_view_dtype",
)  # fmt: skip


class HqqWeight(Weight):
    """One layer. Groups along the other axis are no groups of ours."""

    by_rows = False

    def __init__(self, found: Found, settings: HfConfig):
        self.found = found
        rows, columns = found.shape
        self._bits = self._fact("nbits", settings.integer("nbits", 4))
        size = self._fact("group_size", settings.integer("group_size", 64))
        self._axis = self._fact("axis", settings.integer("axis", 1))
        for key in ("quant_zero", "quant_scale", "view_as_float"):
            if self._fact(key, 0):
                raise found.fail(f".{key} is set, which is not read", "save the model without it")
        if self._bits not in _PARTS or self._axis not in (0, 1):
            raise found.fail(
                f" has {self._bits} bits along axis {self._axis}; readable: 8, 4, 3, 2, 1 along 0, 1"
            )
        across = rows if self._axis == 0 else columns
        self._size = size if 1 <= size < across else across
        if math.prod(found.shape) % self._size or (self._axis == 1 and columns % self._size):
            raise found.fail(f" has {rows} rows of {columns} weights; expected a multiple of {self._size}")
        self._groups = math.prod(found.shape) // self._size
        scale = DTYPE_NAMES.get(found.dtype("scale"), "float32")
        if self._axis == 1:
            most = (1 << self._bits) - 1
            group = group_of(self._size, columns)
            # Zero points are no whole numbers, so no codes without offsets can be as good.
            wide = (-(1 << 15), most)
            self.codes = Codes(bits=self._bits, span=wide, group=group, affine=True, scale=scale)
        self.bits = self._bits + 2 * {"float32": 32}.get(scale, 16) / self._size

    def _fact(self, suffix: str, default: int) -> int:
        """A number that is stored as a tensor."""
        if suffix not in self.found.tensors:
            return default
        dtype, shape = self.found.tensors[suffix]
        if dtype not in _FACTS[suffix] or math.prod(shape) != 1:
            raise self.found.fail(f".{suffix} is {dtype} {list(shape)}; expected one whole number")
        return int(self.found.get(suffix).reshape(-1)[0])

    def _packed(self) -> tuple[int, int]:
        """The shape of the codes before they are packed."""
        return (self._groups, self._size) if self._axis == 1 else (self._size, self._groups)

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        height, width = self._packed()
        scales = (height, 1) if self._axis == 1 else (1, width)
        facts = {
            suffix: Part(dtypes, ((2,),) if suffix == "shape" else ((), (1,)), required=False)
            for suffix, dtypes in _FACTS.items()
        }
        return {
            "W_q": Part(
                ("I32",) if self._bits == 3 else ("U8",), ((-(-height // _PARTS[self._bits]), width),)
            ),
            "scale": Part(FLOATS, (scales,)),
            "zero": Part(FLOATS, (scales,)),
            **facts,
        }

    def rows(self, rows: slice) -> Grid | np.ndarray:
        """See `Weight`."""
        outputs, columns = self.found.shape
        if "shape" in self.found.tensors and tuple(self.found.get("shape")) != self.found.shape:
            raise self.found.fail(
                f".shape says {self.found.get('shape').tolist()}; expected {list(self.found.shape)}"
            )
        height, _ = self._packed()
        step = _PARTS[self._bits]
        words = self.found.get("W_q")
        words = words.view(np.uint32) if self._bits == 3 else words
        mask = words.dtype.type((1 << self._bits) - 1)
        shifts = (words.dtype.type(self._bits * part) for part in reversed(range(step)))
        codes = np.concatenate([(words >> shift & mask).astype(np.uint8) for shift in shifts])[:height]
        scale, zero = (self.found.get(part).astype(np.float32) for part in ("scale", "zero"))
        if self._axis == 0:
            return ((codes - zero) * scale).reshape(outputs, columns)[rows]
        groups = count(group_of(self._size, columns), columns)
        scale, zero = (part.reshape(outputs, groups)[rows] for part in (scale, zero))
        codes = codes.reshape(outputs, columns)[rows]
        return Grid(codes=codes, scales=scale, mins=-zero * scale, group=group_of(self._size, columns))


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""
    own = settings.section("quant_config") or settings
    weights = own.section("weight_quant_params") or own
    for key in ("scale_quant_params", "zero_quant_params"):
        if own.values.get(key):
            raise JaxchatError(f"{own.at(key)}: quantized scales and zero points are not read; save without")
    return lambda found: HqqWeight(found, weights)


METHOD = Method(
    name="hqq",
    marks=("W_q",),
    reader=reader,
    label=lambda settings: "hqq",
    ignored=_UNUSED,
)
