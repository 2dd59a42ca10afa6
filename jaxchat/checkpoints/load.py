"""Model directories -> stacked parameters on devices, streamed: the peak is the result plus one layer.

Hugging Face, native and Orbax directories, onto one device or straight into a sharding.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxchat import memory
from jaxchat.checkpoints.assembled import AssembledSource
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import Keep, weight_dtype
from jaxchat.checkpoints.quantized import (
    Held,
    Mixture,
    Quant,
    Storage,
    choose_format,
    of_row,
    place,
    stored_bytes,
    stored_format_of,
    unit_of,
)
from jaxchat.checkpoints.safetensors_file import ALIGNMENT
from jaxchat.checkpoints.source import Source, convert_into
from jaxchat.config import ModelConfig, Param
from jaxchat.mixed import MixedTensor
from jaxchat.pallas import backends
from jaxchat.pallas.storage import as_bits
from jaxchat.quant import (
    InParts,
    QuantFormat,
    Quantized,
    QuantizedTensor,
    Reordered,
    empty_like,
    format_for,
    layer_slice,
    quantize,
)
from jaxchat.sharding import param_sharding, placements

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), counted in the stored dtype."""


def load_params(
    directory: str | Path | ModelDirectory,
    *,
    dtype: str | None = None,
    quant: Quant = "auto",
    keep: Keep = "small",
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model of any readable format, streaming: the peak is the result plus one layer.

    On the CPU bfloat16 arrays are returned as their bits in uint16 (XLA widens whole bfloat16 stacks there on
    every call), and a native checkpoint that needs no conversion is not read at all: its arrays are the
    mapped file, which must not be changed while they live.

    Args:
      directory: the model.
      dtype: `float32`, `bfloat16` or `float16` to convert what is not quantized to; None keeps what is
        stored.
      quant: the format to quantize to while loading, None for plain numbers, or `auto` for what is stored.
      keep: see `ModelDirectory.source`.
      mesh: to load straight into `param_sharding`; None is the first device.
      progress: called after every layer.

    Returns:
      The configuration (with `tied_embeddings` as the checkpoint has it) and name -> array or
      `QuantizedTensor`, [L, ...] for `layers.*`.

    Raises:
      UsageError: no such directory, or not one of a model, or one quantized in another way than `quant`.
      JaxchatError: a file is missing, truncated or malformed, or a value does not fit the dtype.
    """
    target = None if dtype is None else weight_dtype(dtype)
    directory = ModelDirectory.at(directory)
    source = directory.source(keep=keep)
    fmt = choose_format(directory, source.manifest, quant)
    meter = Meter(source, progress)
    if source.manifest.format == "orbax" and fmt is None:
        from jaxchat.checkpoints.orbax import OrbaxSource  # already imported by then

        assert isinstance(source, OrbaxSource)
        params: dict[str, Any] = source.load(target, mesh)
        meter.add(meter.total)
        return source.config, params
    return source.config, _load(source, storages(source, target, fmt), mesh, meter)


def load_assembly(
    assembly: Assembly,
    *,
    dtype: str | None = None,
    quant: Quant = "auto",
    keep: Keep = "small",
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads the layers that an assembly names, each once, into one stack; see `load_params`.

    Args:
      assembly: what to assemble; run its `plan` over the stack.
      dtype: of what is not quantized, instead of the assembly's. Scales are applied after the conversion.
      quant, keep, mesh, progress: as in `load_params`.

    Raises:
      UsageError: the models differ in architecture, vocabulary, a shape or in how they are quantized.
      JaxchatError: as in `load_params`.
    """
    target = None if dtype is None else weight_dtype(dtype)
    source = AssembledSource(assembly, target, keep)
    fmt = choose_format(assembly.models[assembly.base], source.manifest, quant)
    return source.config, _load(source, storages(source, target, fmt), mesh, Meter(source, progress))


def storages(source: Source, dtype: np.dtype | None, fmt: QuantFormat | None) -> dict[str, Storage]:
    """How to hold each parameter of a source that is to be quantized to `fmt`, or is already.

    What is not quantized is converted to `dtype`; None keeps what is stored.
    """
    quantized = source.manifest.quantization is not None

    def storage(param: Param) -> Storage:
        chosen = stored_format_of(source.manifest, param) if quantized else format_for(param, fmt)
        return chosen or dtype or source.dtype(param)

    return {param.name: storage(param) for param in source.table}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array starting at a multiple of 64 bytes, which JAX takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_storage(shape: tuple[int, ...], held: Held) -> np.ndarray | Quantized:
    """The same for plain numbers or a quantized weight."""
    if not isinstance(held, QuantFormat):
        return aligned_empty(shape, held)
    return jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), empty_like(shape, held))


class Meter:
    """Adds up the bytes of finished layers, in the stored dtype, for a `Progress`."""

    def __init__(self, source: Source, progress: Progress | None):
        self._progress, self._done = progress, 0
        self.total = sum(self.size(source, p) for p in source.table)

    @staticmethod
    def size(source: Source, param: Param) -> int:
        """The stored bytes of a parameter."""
        storage = stored_format_of(source.manifest, param) or source.dtype(param)
        return stored_bytes(param.stacked_shape(source.config), storage)

    def add(self, size: int) -> None:
        """Reports that so many bytes more are done."""
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self.total)


def _load(source: Source, wanted: Mapping[str, Storage], mesh: Mesh | None, meter: Meter) -> dict[str, Any]:
    devices: list[Any] = list(backends.devices()[:1]) if mesh is None else list(mesh.devices.flat)
    is_host = devices[0].platform == "cpu" and len(devices) == 1
    sizes = {
        p.name: stored_bytes(p.stacked_shape(source.config), wanted[p.name])
        for p in source.table
        if not (is_host and _mapped(source, p, wanted[p.name]) is not None)
    }
    int4 = (
        storages(source, None, QuantFormat.parse("int4")) if source.manifest.quantization is None else wanted
    )
    smaller = sum(stored_bytes(p.stacked_shape(source.config), int4[p.name]) for p in source.table)
    memory.require(
        sum(sizes.values()),
        devices,
        what=f"the model's weights ({len(sizes)} parameters)",
        advice=f"quantize them (int4 needs {smaller / 1e9:,.1f} GB) or take a smaller model",
    )
    return {p.name: _load_param(source, p, wanted[p.name], mesh, meter) for p in source.table}


def _mapped(source: Source, param: Param, storage: Storage) -> np.ndarray | Quantized | MixedTensor | None:
    """The parameter where it lies in its file, if it can be used there."""
    stack = source.mapped(param)
    return stack if isinstance(stack, InParts) or (stack is not None and storage == stack.dtype) else None


def layers_of(
    source: Source, param: Param, storage: Storage, meter: Meter
) -> Iterator[tuple[int, np.ndarray | Quantized]]:
    """Each (index, layer as `storage` says, in C order) of a parameter."""
    for index in range(param.rows(source.config)):
        values = source.layer(param, index)
        yield index, _stored_as(values, of_row(storage, index), _label(param, index))
        meter.add(values.nbytes)


def _stored_as(values: np.ndarray | Quantized, held: Held, label: str) -> np.ndarray | Quantized:
    if isinstance(values, InParts):
        return values
    if isinstance(held, QuantFormat):
        return quantize(values, held, name=label)
    if values.dtype != held:
        converted = np.empty(values.shape, held)
        convert_into(converted, values, label)
        values = converted
    return np.ascontiguousarray(values)


def _label(param: Param, index: int) -> str:
    return f"{param.name}[{index}]" if param.per_layer else param.name


def _load_param(source: Source, param: Param, storage: Storage, mesh: Mesh | None, meter: Meter) -> Any:
    device: Any = backends.devices()[0] if mesh is None else mesh.devices.flat[0]
    sharding: Sharding = SingleDeviceSharding(device)
    if mesh is not None:
        columns = param.layer_shape(source.config)[-1]
        sharding = param_sharding(param, source.config, mesh, group=unit_of(storage, columns))
    if device.platform != "cpu" or (mesh is not None and mesh.size > 1):
        return _fill_device(source, param, storage, sharding, meter)
    stack = _mapped(source, param, storage)
    if stack is not None:
        meter.add(stack.nbytes)
    else:
        stack = _fill_host(source, param, storage, meter)
    return jax.device_put(jax.tree.map(as_bits, stack), sharding, may_alias=True)


def _fill_host(
    source: Source, param: Param, storage: Storage, meter: Meter
) -> np.ndarray | Quantized | MixedTensor:
    """The parameter in host memory, each layer converted or quantized right into its place."""
    shape = param.stacked_shape(source.config)
    if isinstance(storage, Mixture):
        parts = [
            aligned_storage(storage.shape(number, shape), part) for number, part in enumerate(storage.parts)
        ]
        targets = [(parts[part], row) for part, row in zip(storage.part, storage.row, strict=True)]
    else:
        parts = [aligned_storage(shape, storage)]
        targets = [(parts[0], index) for index in range(param.rows(source.config))]
    for index, (stack, row) in enumerate(targets):
        values = source.layer(param, index)
        _put(stack, row if param.per_layer else None, values, of_row(storage, index), _label(param, index))
        meter.add(values.nbytes)
    return storage.joined(parts) if isinstance(storage, Mixture) else parts[0]


def _put(
    stack: np.ndarray | Quantized,
    row: int | None,
    values: np.ndarray | Quantized,
    held: Held,
    label: str,
) -> None:
    """Writes a layer's values into a row of a stack, or to the whole of it."""
    if isinstance(held, QuantFormat):
        assert isinstance(stack, InParts)
        out = stack if row is None else layer_slice(stack, row)
        if isinstance(values, InParts):
            jax.tree.map(np.copyto, out, values)
        else:
            assert isinstance(out, QuantizedTensor)  # nothing is reordered here
            quantize(values, held, name=label, out=out)
        return
    assert isinstance(values, np.ndarray)  # quantized parameters stay quantized
    assert isinstance(stack, np.ndarray)
    convert_into(stack if row is None else stack[row], values, label)


def _fill_device(source: Source, param: Param, storage: Storage, sharding: Sharding, meter: Meter) -> Any:
    """Fills a device stack by donated updates, so that neither host nor device ever holds it twice."""
    device: Any = next(iter(sharding.device_set))
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding) and param.per_layer:
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stacks: dict[str, Any] = {}
    counts = Counter(place(param.name, storage, index)[0] for index in range(param.rows(source.config)))
    for index, values in layers_of(source, param, storage, meter):
        name, row = place(param.name, storage, index)
        host = jax.tree.map(as_bits, values) if device.platform == "cpu" else values
        layer = jax.device_put(host, placements(host, layer_sharding))
        if not param.per_layer:
            stacks[name] = layer
        else:
            if name not in stacks:
                stacks[name] = _zeros_like_stack(layer, counts[name], sharding)
            stacks[name] = _set_layer(stacks[name], layer, row)
        # The copy must be over before the host reuses the memory it is made from.
        jax.block_until_ready(stacks[name])
    return storage.joined(list(stacks.values())) if isinstance(storage, Mixture) else stacks[param.name]


def _zeros_like_stack(layer: Any, count: int, sharding: Sharding) -> Any:
    """A stack of so many layers; every array of a quantized one is split as the weight is."""
    split = placements(layer, sharding)
    each = split if isinstance(split, Reordered) else jax.tree.map(lambda _: split, layer)
    return jax.tree.map(lambda a, where: jnp.zeros((count, *a.shape), a.dtype, device=where), layer, each)


@jax.jit(donate_argnums=0)
def _set_layer(stack: Any, layer: Any, index: jax.Array) -> Any:
    def put(to: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(to, values, index, 0)

    return jax.tree.map(put, stack, layer)
