"""Which mesh axis each dimension of a parameter or cache is split over: one table, used wherever they go."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxchat.config import ModelConfig, Param
from jaxchat.families import parameter_table
from jaxchat.quant import Quantized, QuantizedTensor, Reordered

MESH_AXES: Mapping[str, str | None] = {
    "heads": "model",
    "kv_heads": "model",
    "ffn": "model",
    "vocab": "model",
    "batch": "data",
    "embed": None,
    "layers": None,
    "-": None,
}
"""Logical axis of a `Param` or cache -> mesh axis, None where every device holds the whole dimension."""


def param_spec(param: Param, config: ModelConfig, mesh: Mesh, *, group: int | None = None) -> PartitionSpec:
    """How one parameter (stacked, if it is per layer) is split over a mesh.

    A dimension is split only where it divides evenly, and a dimension of heads only between heads: with 8
    query and 2 key/value heads on 4 devices the queries are split, the keys and values whole on each device.

    With a `group` this is the split of a quantized parameter: of its codes, its scales and its offsets, whose
    axes are those of the weight. The last one is split only between groups.
    """
    units = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    names: list[str | None] = [MESH_AXES["layers"]] if param.per_layer else []
    *_, columns = shape = param.layer_shape(config)
    for axis, size in zip(param.axes.split(), shape, strict=True):
        target = MESH_AXES[axis]
        divides = target in mesh.shape and units.get(axis, size) % mesh.shape[target] == 0
        names.append(target if divides else None)
    if group is not None and names[-1] is not None and columns % (group * mesh.shape[names[-1]]):
        names[-1] = None
    return PartitionSpec(*names)


def param_sharding(
    param: Param, config: ModelConfig, mesh: Mesh, *, group: int | None = None
) -> NamedSharding:
    """The sharding of one parameter on a mesh; see `param_spec`. A mesh without a `model` axis replicates."""
    return NamedSharding(mesh, param_spec(param, config, mesh, group=group))


def placements(value: Any, sharding: Sharding) -> Any:
    """The sharding of every array of a parameter's value: an order of columns is whole on each device."""
    if not isinstance(value, Reordered):
        return sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    split: Any = {"weight": jax.tree.map(lambda _: sharding, value.weight), "order": whole}
    return dataclasses.replace(value, **split)


def shard_params(
    params: Mapping[str, jax.Array | Quantized], config: ModelConfig, mesh: Mesh
) -> dict[str, jax.Array | Quantized]:
    """Moves loaded parameters (name -> [L, ...] or [...]) onto a mesh, each into its `param_sharding`."""
    table = {param.name: param for param in parameter_table(config)}

    def sharding(name: str, value: jax.Array | Quantized) -> Any:
        weight = value.weight if isinstance(value, Reordered) else value
        group = weight.group if isinstance(weight, QuantizedTensor) else None
        return placements(value, param_sharding(table[name], config, mesh, group=group))

    return {name: jax.device_put(value, sharding(name, value)) for name, value in params.items()}
