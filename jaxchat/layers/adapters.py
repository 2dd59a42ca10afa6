"""Adapters (LoRA) beside the weights: what each sequence has of them is added to what the weights make.

All adapters of a model are in one set of stacks, and which of them a sequence uses is traced data: strengths,
0 for none. How the stacks are made of files is in `engine/adapters.py`. R: columns of all adapters' ranks.
A: adapters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.pallas.backends import Kernels
from jaxchat.pallas.embedding import embedding_rows


class Factors(NamedTuple):
    """The deltas of one weight by all adapters: `b[layer].T @ a[layer]`, a column of R of one adapter."""

    a: jax.Array  # [L, R, I]; L is 1 of what is not in a layer
    b: jax.Array  # [L, R, O]


class Replaced(NamedTuple):
    """What one adapter puts in the place of a parameter."""

    stack: jax.Array  # [rows, ...]
    row: jax.Array  # int32 [L], of the stack
    share: jax.Array  # float32 [L], 0 of the layers whose own stays
    adapter: jax.Array  # int32 [], whose it is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """All adapters of a model, and how much of each every sequence has.

    Attributes:
      low_rank: weight -> its deltas.
      gains: weight -> float32 [L, A, O], by how much DoRA lengthens what the weight itself makes.
      offsets: bias or norm -> float32 [L, A, O], what is added to it.
      replaced: weight -> what stands in its place, by adapter.
      columns: int32 [R], the adapter of each column.
      strengths: float32 [B, A], here; 1 is as the file has it.
      by_slot: float32 [P, B, A], in the slots of the plan; `strengths` are those outside of them, until `at`.
    """

    low_rank: Mapping[str, Factors]
    gains: Mapping[str, jax.Array]
    offsets: Mapping[str, jax.Array]
    replaced: Mapping[str, tuple[Replaced, ...]]
    columns: jax.Array
    strengths: jax.Array
    by_slot: jax.Array

    def at(self, position: jax.Array) -> "Adapters":
        """With the strengths that there are in a slot."""
        return dataclasses.replace(self, strengths=self.by_slot[position])

    @property
    def column_strengths(self) -> jax.Array:
        """float32 [B, R], of each column."""
        return self.strengths[:, self.columns]

    def changed(
        self, name: str, layer: jax.Array, y: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """What a weight makes of x, float32 [B, ..., O], where adapters replace it or lengthen its rows.

        Args:
          name: of the weight.
          layer: whose.
          y: what it makes by itself.
          product: of x with a row of a stack [rows, O, I].
        """
        out = y
        for other in self.replaced.get(name, ()):
            share = _along(self.strengths[:, other.adapter] * other.share[layer], y.ndim)
            out = out + share * (product(other.stack, other.row[layer]) - y)
        if name in self.gains:
            out = out + _along(self.strengths @ self.gains[name][layer], y.ndim) * y
        return out

    def with_deltas(
        self, kernels: Kernels, x: jax.Array, ys: Mapping[str, jax.Array], layer: jax.Array
    ) -> dict[str, jax.Array]:
        """What low-rank deltas make of weights' products with x [B, ..., I], of those that have some."""
        found = {name: self.low_rank[name] for name in ys if name in self.low_rank}
        added = kernels.add_deltas(
            x,
            [ys[name] for name in found],
            [each.a for each in found.values()],
            [each.b for each in found.values()],
            layer,
            self.column_strengths,
        )
        return dict(zip(found, added, strict=True))

    def added(self, name: str, layer: jax.Array, dimensions: int) -> jax.Array | None:
        """What is added to a bias or norm of values [B, ..., O] of so many dimensions; None if nothing is."""
        found = self.offsets.get(name)
        return None if found is None else _along(self.strengths @ found[layer], dimensions)

    def embedded(self, name: str, ids: jax.Array, x: jax.Array) -> jax.Array:
        """What rows `ids` [B, T] of a table become, float32 [B, T, D], where its own are x."""
        out = x
        for other in self.replaced.get(name, ()):
            rows = embedding_rows(other.stack[0], ids)
            out = out + _along(self.strengths[:, other.adapter], x.ndim) * (rows - x)
        if name in self.gains:
            out = out + _along(self.strengths @ self.gains[name][0], x.ndim) * x
        if name not in self.low_rank:
            return out
        a, b = self.low_rank[name]
        low = jnp.moveaxis(a[0][:, ids], 0, -1).astype(jnp.float32)  # no copy of the table is turned
        low = low * _along(self.column_strengths, x.ndim)
        return out + jnp.matmul(low, b[0].astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _along(values: jax.Array, dimensions: int) -> jax.Array:
    """What each sequence has, [B] or [B, n], for arrays [B, ..., n] of so many dimensions."""
    last = values.shape[1:] or (1,)
    return values.reshape(values.shape[0], *(1,) * (dimensions - 2), *last)
