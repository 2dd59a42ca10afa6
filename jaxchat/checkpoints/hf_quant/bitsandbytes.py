"""bitsandbytes: blocks of 4-bit codes that stand for the 16 numbers of a table (NF4, FP4), and 8-bit rows.

Layouts: bitsandbytes' `QuantState.as_dict` and `Int8Params`. Blocks run through the matrix row by row.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
import numpy as np

from jaxchat.checkpoints.hf_quant.weight import Codes, Found, Grid, Method, Part, Shape, Weight
from jaxchat.families.hf_config import HfConfig
from jaxchat.typed import checked
from jaxchat.visible import shown

_STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
_MOST_STATE = 1 << 16
_SIZES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Types that 4-bit codes are put into (`bnb_4bit_quant_storage`), and their bytes."""

_Block = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _State(msgspec.Struct):
    """What a layer says of its codes."""

    quant_type: str
    blocksize: _Block
    shape: list[int]
    nested_blocksize: _Block | None = None
    nested_offset: float = 0.0


class Table4Weight(Weight):
    """One layer of NF4 or FP4: a table of 16 numbers, times the largest of a block."""

    def __init__(self, found: Found, suffix: str):
        self.found, self._suffix = found, suffix
        self._state = self._read_state()
        own = 8 + 32 / (self._state.nested_blocksize or 1) if self._state.nested_blocksize else 32
        self.bits = 4 + own / self._state.blocksize

    def _read_state(self) -> _State:
        """The JSON that is stored as a tensor, its claims checked."""
        dtype, shape = self.found.tensors[self._suffix]
        if dtype != "U8" or len(shape) != 1 or shape[0] > _MOST_STATE:
            raise self.found.fail(f".{self._suffix} is {dtype} {list(shape)}; expected some bytes of JSON")
        where = f"{self.found.where}: {self.found.name}.{self._suffix}"
        try:
            values = json.loads(self.found.get(self._suffix).tobytes())
        except (ValueError, RecursionError):
            raise self.found.fail(f".{self._suffix} is no JSON") from None
        state = checked(values, _State, where=where, advice="download the files again")
        for name, said, expected in (
            ("quant_type", state.quant_type, _STATES[self._suffix]),
            ("shape", state.shape, list(self.found.shape)),
        ):
            if said != expected:
                raise self.found.fail(f".{self._suffix} says that {name} is {shown(said)}, not {expected}")
        if not math.isfinite(state.nested_offset):
            raise self.found.fail(f".{self._suffix} says that nested_offset is {state.nested_offset}")
        return state

    @property
    def _blocks(self) -> int:
        return -(-math.prod(self.found.shape) // self._state.blocksize)

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        count = -(-math.prod(self.found.shape) // 2)
        size = _SIZES.get(self.found.dtype("weight", "U8"), 1)
        parts = {
            "weight": Part(tuple(_SIZES), ((-(-count // size), 1),)),
            "weight.absmax": Part(("F32",), ((self._blocks,),)),
            "weight.quant_map": Part(("F32",), ((16,),)),
            self._suffix: Part(("U8",), (self.found.tensors[self._suffix][1],)),
        }
        if (nested := self._state.nested_blocksize) is not None:
            parts["weight.absmax"] = Part(("U8",), ((self._blocks,),))
            parts["weight.nested_absmax"] = Part(("F32",), ((-(-self._blocks // nested),),))
            parts["weight.nested_quant_map"] = Part(("F32",), ((256,),))
        return parts

    def rows(self, rows: slice) -> np.ndarray:
        """See `Weight`."""
        columns, block = self.found.shape[1], self._state.blocksize
        start, stop = rows.start * columns, rows.stop * columns
        size = _SIZES[self.found.dtype("weight")] * 2  # codes of an element
        stored = self.found.get("weight", slice(start // size, -(-stop // size)))
        raw = np.ascontiguousarray(stored).view(np.uint8).reshape(-1)
        codes = np.stack([raw >> np.uint8(4), raw & np.uint8(15)], axis=-1).reshape(-1)
        codes = codes[start % size : start % size + stop - start]
        table = self.found.get("weight.quant_map")
        largest = self._largest(slice(start // block, -(-stop // block)))
        each = np.repeat(largest, block)[start % block : start % block + stop - start]
        return (table[codes] * each).reshape(-1, columns)

    def _largest(self, blocks: slice) -> np.ndarray:
        """The largest magnitude in each block; of double quantization codes themselves."""
        stored = self.found.get("weight.absmax", blocks)
        nested = self._state.nested_blocksize
        if nested is None:
            return stored
        outer = self.found.get("weight.nested_absmax")[np.arange(blocks.start, blocks.stop) // nested]
        table = self.found.get("weight.nested_quant_map")
        return table[stored] * outer + np.float32(self._state.nested_offset)


class Int8Weight(Weight):
    """One layer of 8-bit codes with the largest magnitude of each row, which stands for 127."""

    def __init__(self, found: Found):
        self.found = found
        self.codes = Codes(bits=8, span=(-128, 127), group=0, affine=False, scale="float32")
        self.bits = 8 + 32 / found.shape[1]

    def parts(self) -> Mapping[str, Part]:
        """See `Weight`."""
        row: tuple[Shape, ...] = ((self.found.shape[0],),)
        return {
            "weight": Part(("I8",), (self.found.shape,)),
            "SCB": Part(("F32",), row),
            "weight_format": Part(("U8",), ((), (1,)), required=False),
        }

    def rows(self, rows: slice) -> Grid:
        """See `Weight`."""
        if "weight_format" in self.found.tensors and self.found.get("weight_format").any():
            raise self.found.fail(
                ".weight_format is not 0, rows: an order of a certain GPU", "save the model again"
            )
        scales = self.found.get("SCB", rows).reshape(-1, 1) / np.float32(127)
        return Grid(codes=self.found.get("weight", rows), scales=scales, group=0)


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""

    def weight(found: Found) -> Weight:
        state = next((suffix for suffix in _STATES if suffix in found.tensors), None)
        if state is not None:
            return Table4Weight(found, state)
        if "SCB" not in found.tensors:
            raise found.fail(f" has none of {', '.join(_STATES)}, SCB")
        return Int8Weight(found)

    return weight


def _label(settings: HfConfig) -> str:
    if settings.values.get("load_in_8bit") or settings.values.get("_load_in_8bit"):
        return "bitsandbytes int8"
    return f"bitsandbytes {settings.read('bnb_4bit_quant_type', str, 'fp4')[:8]}"


METHOD = Method(
    name="bitsandbytes",
    marks=("weight.absmax", "weight.quant_map", *_STATES, "SCB"),
    reader=reader,
    label=_label,
)
