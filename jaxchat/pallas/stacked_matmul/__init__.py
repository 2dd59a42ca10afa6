"""x @ w[layer].T with the whole layer stack as operand."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from jaxchat.pallas.stacked_matmul import cpu, reference
from jaxchat.pallas.stacked_matmul.reference import stacked_matmul

__all__ = ["StackedMatmul", "StackedMatmuls", "cpu", "reference", "stacked_matmul"]


class StackedMatmul(Protocol):
    """x [..., I], stack [L, O, I] in the form that the backend reads, layer -> float32 [..., O]."""

    def __call__(self, x: jax.Array, w: Any, layer: jax.Array, /) -> jax.Array:
        """`x @ w[layer].T`."""


class StackedMatmuls(Protocol):
    """Several products of one x in one call."""

    def __call__(
        self, x: jax.Array, weights: Sequence[Any], layers: Sequence[jax.Array], /
    ) -> list[jax.Array]:
        """`x @ w[layer].T` for each."""
