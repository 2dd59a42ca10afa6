"""Attention of new tokens over the slot-stacked KV cache, and the write of their keys and values."""

from typing import Protocol

import jax

from jaxchat.pallas.cache_attention import cpu, dense, reference
from jaxchat.pallas.cache_attention.reference import QuantizedRows, Rows, attend, write_rows
from jaxchat.pallas.cache_attention.tree import Tree

__all__ = [
    "Attend",
    "QuantizedRows",
    "Rows",
    "Tree",
    "WriteRows",
    "attend",
    "cpu",
    "dense",
    "reference",
    "write_rows",
]


class Attend(Protocol):
    """See `reference.attend`, which has the shapes."""

    def __call__(
        self,
        q: jax.Array,
        k_cache: Rows,
        v_cache: Rows,
        slot: jax.Array,
        lengths: jax.Array,
        /,
        *,
        scale: jax.Array,
        window: jax.Array,
        softcap: float,
        tree: Tree | None = None,
    ) -> jax.Array:
        """Attention of q over one slot."""


class WriteRows(Protocol):
    """See `reference.write_rows`, which has the shapes."""

    def __call__(
        self, cache: Rows, rows: jax.Array, slot: jax.Array, lengths: jax.Array, new: jax.Array, /
    ) -> Rows:
        """The cache with new rows behind those it has."""
