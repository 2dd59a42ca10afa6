"""Stacks whose layers are held in several ways: a "Q4_K_M" has half of its down projections at 6 bits.

How a layer is picked is here; products with one are in `jaxchat/pallas`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.quant import Array, InParts, Quantized

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedTensor(InParts):
    """A stack [L, O, I] in parts, each a stack of the layers that are held alike.

    Attributes:
      parts: weights [Lp, O, I] in different formats.
      part: [L], which of them has a layer, static.
      row: [L], where in it, static.
    """

    parts: tuple[Array | Quantized, ...]
    part: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    row: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [L, O, I]."""
        return (len(self.part), *self.parts[0].shape[1:])

    def place(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which part has a traced layer, and its row there: int32 scalars."""
        return jnp.asarray(self.part, jnp.int32)[layer], jnp.asarray(self.row, jnp.int32)[layer]

    def map(self, change: Callable[[Any], Any]) -> "MixedTensor":
        """With every part changed."""
        return dataclasses.replace(self, parts=tuple(change(part) for part in self.parts))


def by_part(stack: Any, layer: jax.Array, use: Callable[[Any, jax.Array], T]) -> T:
    """`use(stack, layer)`; of a mixed stack, `use(part, row)` of the part that has the layer.

    All parts must give the same shapes, and no large ones: the result is a conditional's.
    """
    if not isinstance(stack, MixedTensor):
        return use(stack, layer)
    part, row = stack.place(layer)
    uses = [lambda row, held=held: use(held, row) for held in stack.parts]
    return lax.switch(part, uses, row)
