"""How the TPU kernels find the mesh they run on: XLA partitions no Pallas call, each is mapped over shards.

A traced array's type names the mesh its buffer lies on, but (axes being `Auto`) not how it is split. The
splits are those of `jaxchat/sharding.py`, by the same rule: over an axis where the size divides evenly.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh


def mesh_of(*arrays: Any) -> AbstractMesh | None:
    """The mesh that (one of the) arrays are traced on; None on one device."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        if not mesh.empty and mesh.size > 1:
            return mesh
    return None


def split(mesh: AbstractMesh, axis: str | None, size: int) -> str | None:
    """`axis` if a dimension of this size is split over it, else None."""
    parts = mesh.shape.get(axis, 1) if axis else 1
    return axis if parts > 1 and size % parts == 0 else None
