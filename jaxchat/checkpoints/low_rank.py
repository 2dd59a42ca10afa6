"""Adapters as they are held in memory, whoever wrote them: deltas of a model's parameters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class LowRank(NamedTuple):
    """A delta of one projection: `b @ a`, or, with a magnitude, DoRA's (Liu et al. 2024)."""

    a: np.ndarray  # float32 [R, I]
    b: np.ndarray  # float32 [O, R], what it is multiplied with included
    magnitude: np.ndarray | None  # float32 [O], the length that each row of the sum is to have


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An adapter for one model. Parameters have the names of its table; layer 0 stands for no layer.

    Attributes:
      name: what people call it.
      path: its directory.
      replicated: [slots] the model's layer that each of the adapter's layers is, where it repeats some
        (`layer_replication`); else its layers are the model's.
      low_rank: weight -> layer -> delta; of the embedding that of its transpose, [D, V].
      added: bias -> layer -> float32 [O] that is added to the projection (`lora_bias`).
      replaced: parameter -> layer -> what stands in its place, [...] in the stored dtype.
      rows: embedding or head -> token ids int [n], and their rows [n, D] (`trainable_token_indices`).
      digest: of all of it.
      keeps_tie: a replaced embedding is the output head, too, of a model that ties them; PEFT's is not.
    """

    name: str
    path: Path
    replicated: tuple[int, ...] | None
    low_rank: Mapping[str, Mapping[int, LowRank]]
    added: Mapping[str, Mapping[int, np.ndarray]]
    replaced: Mapping[str, Mapping[int, np.ndarray]]
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]]
    digest: str
    keeps_tie: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of its deltas."""
        return max((len(d.a) for layers in self.low_rank.values() for d in layers.values()), default=0)

    @property
    def touched(self) -> frozenset[str]:
        """The parameters that it changes."""
        return frozenset((*self.low_rank, *self.added, *self.replaced, *self.rows))

    def with_rows(self, name: str, table: np.ndarray) -> np.ndarray:
        """A table [V, D] with the rows that the adapter has of it, in the table's dtype; a copy."""
        ids, values = self.rows[name]
        table = table.copy()
        table[ids] = values.astype(table.dtype)
        return table
