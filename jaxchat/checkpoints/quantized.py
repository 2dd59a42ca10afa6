"""Quantized parameters in checkpoints: their tensors, their description, and which formats may be asked for.

A quantized parameter `name` is stored as the tensors `name.codes`, `name.scales` and, of affine formats,
`name.mins`: the arrays of a `QuantizedTensor`; of a `Reordered` one, `name.order`, too. One whose layers
are held in several ways is in parts, as if
they were parameters `name.0`, `name.1`: see `Mixture`. `jaxchat.json` says which has which format.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Manifest, Quantization
from jaxchat.config import Param
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.mixed import MixedTensor
from jaxchat.quant import SUPER_GROUP, QuantFormat, Quantized, Reordered, empty, format_for
from jaxchat.visible import shown

Held = np.dtype | QuantFormat
"""How a tensor is held: as plain numbers, or quantized."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How the layers of a stack are held, where not all alike; `alike` of such that are is no mixture."""

    rows: tuple[Held, ...]

    @functools.cached_property
    def parts(self) -> tuple[Held, ...]:
        """The different ones, each once."""
        return tuple(dict.fromkeys(self.rows))

    @functools.cached_property
    def part(self) -> tuple[int, ...]:
        """[L], which of the parts has a layer."""
        return tuple(map(self.parts.index, self.rows))

    @functools.cached_property
    def row(self) -> tuple[int, ...]:
        """[L], the row in its part."""
        return tuple(self.part[:index].count(part) for index, part in enumerate(self.part))

    def shape(self, part: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a part, of a stack of this shape."""
        return (self.part.count(part), *shape[1:])

    def joined(self, parts: Sequence[Any]) -> MixedTensor:
        """The stack made of these parts."""
        return MixedTensor(parts=tuple(parts), part=self.part, row=self.row)

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))


Storage = Held | Mixture
"""How a parameter is held."""


def alike(rows: Sequence[Held]) -> Storage:
    """How a stack is held whose layers are held so."""
    return rows[0] if len(set(rows)) == 1 else Mixture(tuple(rows))


def of_row(storage: Storage, index: int) -> Held:
    """How one layer of a stack is held."""
    return storage.rows[index] if isinstance(storage, Mixture) else storage


def place(name: str, storage: Storage, index: int) -> tuple[str, int]:
    """Under which name a layer of a stack is stored, and in which row."""
    if isinstance(storage, Mixture):
        return f"{name}.{storage.part[index]}", storage.row[index]
    return name, index


def unit_of(storage: Storage, columns: int) -> int | None:
    """The columns that a split along a row must not divide; None of plain numbers."""
    if isinstance(storage, Mixture):
        return max((unit_of(part, columns) or 1 for part in storage.parts), default=1)
    if not isinstance(storage, QuantFormat):
        return None
    return SUPER_GROUP if storage.two_level else storage.group_size(columns)


Quant = QuantFormat | None | Literal["auto"]
"""What is asked for: a format, None for plain numbers, or `auto` for what the checkpoint has."""

TensorSpec = tuple[np.dtype, tuple[int, ...]]

_ARRAYS = ("codes", "high", "scales", "mins", "super_scales", "super_mins")
_ORDER = "order"


def tensor_specs(name: str, shape: tuple[int, ...], storage: Storage) -> dict[str, TensorSpec]:
    """The tensors (name -> dtype, shape) that hold a parameter of `shape`."""
    if isinstance(storage, Mixture):
        specs: dict[str, TensorSpec] = {}
        for number, part in enumerate(storage.parts):
            specs |= tensor_specs(f"{name}.{number}", storage.shape(number, shape), part)
        return specs
    if not isinstance(storage, QuantFormat):
        return {name: (storage, shape)}
    sample = named_arrays(name, empty((0, shape[-1]), storage))
    specs = {part: (array.dtype, (*shape[:-1], array.shape[-1])) for part, array in sample.items()}
    if storage.reordered:
        specs[f"{name}.{_ORDER}"] = (np.dtype(np.int32), (*shape[:-2], shape[-1]))
    return specs


def stored_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """The bytes a parameter of `shape` takes, scales included, in a file and in memory."""
    specs = tensor_specs("", shape, storage).values()
    return sum(math.prod(part) * dtype.itemsize for dtype, part in specs)


def named_arrays(name: str, values: np.ndarray | Quantized) -> dict[str, np.ndarray]:
    """The tensors of a parameter's value, under their names in a checkpoint."""
    if isinstance(values, np.ndarray):
        return {name: values}
    if isinstance(values, Reordered):
        return {**named_arrays(name, values.weight), f"{name}.{_ORDER}": np.asarray(values.order)}
    arrays = {f"{name}.{part}": getattr(values, part) for part in _ARRAYS}
    return {part: array for part, array in arrays.items() if array is not None}


def from_arrays(
    name: str, columns: int, held: Held, get: Callable[[str], np.ndarray]
) -> np.ndarray | Quantized:
    """The value of a parameter, or part of one, from its tensors; the inverse of `named_arrays`."""
    if not isinstance(held, QuantFormat):
        return get(name)
    sample = empty((0, columns), held)
    parts = [part for part in _ARRAYS if getattr(sample, part) is not None]
    arrays: dict[str, Any] = {part: get(f"{name}.{part}") for part in parts}
    tensor = dataclasses.replace(sample, **arrays)
    return Reordered(weight=tensor, order=get(f"{name}.{_ORDER}")) if held.reordered else tensor


# --- what the description says


def quantization_entry(fmt: QuantFormat | None, table: Sequence[Param]) -> Quantization | None:
    """`Manifest.quantization`: the format as asked for, and that of every quantized parameter."""
    if fmt is None:
        return None
    formats = {param.name: format_for(param, fmt) for param in table}
    return Quantization(str(fmt), {name: str(f) for name, f in formats.items() if f is not None})


def described(label: str, stored: Mapping[str, Storage]) -> Quantization:
    """`Manifest.quantization` of parameters that are held so.

    Args:
      label: of all of it, for people: a format, or what its maker calls the mixture.
      stored: how each parameter is held; those of plain numbers throughout are left out.
    """
    return Quantization(
        label,
        {
            name: [str(row) for row in storage.rows] if isinstance(storage, Mixture) else str(storage)
            for name, storage in stored.items()
            if not isinstance(storage, np.dtype)
        },
    )


def stored_format_of(manifest: Manifest, param: Param) -> QuantFormat | Mixture | None:
    """How a checkpoint holds one parameter; None for plain numbers."""
    if manifest.quantization is None:
        return None
    found = manifest.quantization.parameters.get(param.name)
    if found is None:
        return None
    storage = alike([_parsed(text) for text in ([found] if isinstance(found, str) else found)])
    if isinstance(storage, np.dtype):
        raise JaxchatError(f"jaxchat.json: {param.name} is listed as quantized, and is not; {_ADVICE}")
    return storage


_ADVICE = "convert the model again"


def _parsed(text: str) -> Held:
    if text in WEIGHT_DTYPES:
        return WEIGHT_DTYPES[text]
    with contextlib.suppress(UsageError):
        if (fmt := QuantFormat.parse(text)) is not None:
            return fmt
    raise JaxchatError(f"jaxchat.json: {shown(text)} is no quantization format; {_ADVICE}")


def choose_format(directory: object, manifest: Manifest, wanted: Quant) -> QuantFormat | None:
    """The format to quantize to while loading or converting; None keeps what is stored.

    Raises:
      UsageError: the checkpoint is quantized, and not in the wanted way: what was rounded off is gone.
    """
    stored = manifest.quantization
    if isinstance(wanted, QuantFormat) and wanted.reordered:
        raise UsageError(
            f"{option('quant', str(wanted))}: only weights that GPTQ has reordered are held so; leave "
            ":reordered out"
        )
    if wanted == "auto" or (stored is not None and stored.format == str(wanted)):
        return None
    if stored is not None:
        asked = "none" if wanted is None else str(wanted)
        raise UsageError(
            f"{directory}: holds {stored.format} weights, not {asked}; leave {option('quant')} out, or take "
            f"the model it was made from. If there is none, `jaxchat convert --src {directory} --dst DIR "
            "--to_hf --dequantize` writes out the numbers that these stand for, which can be quantized again"
        )
    return wanted
