"""Quantized parameters in checkpoints: their tensors, their description, and which formats may be asked for.

A quantized parameter `name` is stored as the tensors `name.codes`, `name.scales` and, of affine formats,
`name.mins`: the arrays of a `QuantizedTensor`. `jaxchat.json` says which parameters have which format.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxchat.checkpoints.manifest import Manifest, Quantization
from jaxchat.config import Param
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.quant import QuantFormat, QuantizedTensor, empty, format_for
from jaxchat.visible import shown

Storage = np.dtype | QuantFormat
"""How a parameter is held: as plain numbers, or quantized."""

Quant = QuantFormat | None | Literal["auto"]
"""What is asked for: a format, None for plain numbers, or `auto` for what the checkpoint has."""

TensorSpec = tuple[np.dtype, tuple[int, ...]]

_PARTS = ("codes", "scales", "mins")


def tensor_specs(name: str, shape: tuple[int, ...], storage: Storage) -> dict[str, TensorSpec]:
    """The tensors (name -> dtype, shape) that hold a parameter of `shape`."""
    if not isinstance(storage, QuantFormat):
        return {name: (storage, shape)}
    sample = named_arrays(name, empty((0, shape[-1]), storage))
    return {part: (array.dtype, (*shape[:-1], array.shape[-1])) for part, array in sample.items()}


def stored_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """The bytes a parameter of `shape` takes, scales included, in a file and in memory."""
    specs = tensor_specs("", shape, storage).values()
    return sum(math.prod(part) * dtype.itemsize for dtype, part in specs)


def named_arrays(name: str, values: np.ndarray | QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of a parameter's value, under their names in a checkpoint."""
    if not isinstance(values, QuantizedTensor):
        return {name: values}
    parts = {f"{name}.{part}": getattr(values, part) for part in _PARTS}
    return {part: array for part, array in parts.items() if array is not None}


def from_arrays(
    name: str, columns: int, storage: Storage, get: Callable[[str], np.ndarray]
) -> np.ndarray | QuantizedTensor:
    """The value of a parameter from its tensors; the inverse of `named_arrays`."""
    if not isinstance(storage, QuantFormat):
        return get(name)
    sample = empty((0, columns), storage)
    mins = None if sample.mins is None else get(f"{name}.mins")
    return dataclasses.replace(sample, codes=get(f"{name}.codes"), scales=get(f"{name}.scales"), mins=mins)


# --- what the description says


def quantization_entry(fmt: QuantFormat | None, table: Sequence[Param]) -> Quantization | None:
    """`Manifest.quantization`: the format as asked for, and that of every quantized parameter."""
    if fmt is None:
        return None
    formats = {param.name: format_for(param, fmt) for param in table}
    return Quantization(str(fmt), {name: str(f) for name, f in formats.items() if f is not None})


def stored_format(manifest: Manifest) -> QuantFormat | None:
    """The format a checkpoint was quantized to; None for plain numbers."""
    return None if manifest.quantization is None else _parsed(manifest.quantization.format)


def stored_format_of(manifest: Manifest, param: Param) -> QuantFormat | None:
    """The format in which a checkpoint holds one parameter; None for plain numbers."""
    if manifest.quantization is None:
        return None
    formats = manifest.quantization.parameters
    return _parsed(formats[param.name]) if param.name in formats else None


def _parsed(text: str) -> QuantFormat:
    with contextlib.suppress(UsageError):
        if (fmt := QuantFormat.parse(text)) is not None:
            return fmt
    raise JaxchatError(f"jaxchat.json: {shown(text)} is no quantization format; convert the model again")


def choose_format(directory: object, manifest: Manifest, wanted: Quant) -> QuantFormat | None:
    """The format to load or convert to.

    Raises:
      UsageError: the checkpoint is quantized, and not in the wanted way: what was rounded off is gone.
    """
    stored = stored_format(manifest)
    if wanted == "auto" or wanted == stored:
        return stored
    if stored is not None:
        asked = "none" if wanted is None else str(wanted)
        raise UsageError(
            f"{directory}: holds {stored} weights, not {asked}; leave {option('quant')} out, or take the "
            f"model it was made from. If there is none, `jaxchat convert --src {directory} --dst DIR --to_hf "
            "--dequantize` writes out the numbers that these stand for, which can be quantized again"
        )
    return wanted
