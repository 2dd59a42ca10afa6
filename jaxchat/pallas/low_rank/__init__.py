"""Low-rank deltas (LoRA) added to products with stacked weights."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from jaxchat.pallas.low_rank import cpu, reference

AddDeltas: TypeAlias = Callable[
    [
        jax.Array,
        Sequence[jax.Array],
        Sequence[jax.Array],
        Sequence[jax.Array],
        jax.Array,
        jax.Array,
    ],
    list[jax.Array],
]
"""x, ys, downs, ups, layer, scales -> see `reference.add_deltas`."""

__all__ = ["AddDeltas", "cpu", "reference"]
