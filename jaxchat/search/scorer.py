"""The scores of plans on a sample: its rows in groups of a few shapes, each a `Sweep`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxchat.analysis.sweep import Outcome, Sweep, Windows
from jaxchat.engine.session import Engine
from jaxchat.errors import UsageError, option
from jaxchat.layer_plan import LayerPlan
from jaxchat.lengths import next_power_of_two
from jaxchat.search.sample import Row, Sample, Scores

_GROUP_TOKENS = 2048
"""Tokens that are read together."""
_SHORTEST = 16


class _Group(NamedTuple):
    rows: list[int]  # of the sample
    windows: Windows
    room: int


class Scorer:
    """Scores plans on a sample.

    What a base plan's prefixes leave in the residual stream is kept, as far as `mebibytes` go; groups beyond
    are read anew for every call, so that plans are better given many at a time.
    """

    def __init__(
        self, engine: Engine, base: LayerPlan, sample: Sample, *, max_slots: int, mebibytes: int = 1024
    ):
        self.sample = sample
        self._engine, self._base, self._max_slots = engine, base, max_slots
        self._groups = _grouped(sample, engine.max_length)
        self._left = mebibytes << 20
        self._kept: dict[int, Sweep] = {}
        self._counts = np.array([len(row.continuation) for row in sample.rows])  # [rows]

    def scores(self, plans: Sequence[LayerPlan]) -> list[Scores]:
        """The scores of the sample's items under each plan."""
        parts = np.full((len(plans), 4, len(self._counts)), np.nan)
        for number, group in enumerate(self._groups):
            for plan, outcome in self._sweep(number).outcomes(plans):
                parts[plan][:, group.rows] = [part[: len(group.rows)] for part in outcome]
        return [self.sample.scores(_outcome(part), self._counts) for part in parts]

    def angular(self) -> np.ndarray:
        """Angular distances between the base plan's slots, [P + 1, P + 1], on the first group of rows."""
        group = self._groups[0]
        return self._sweep(0).angular()[: len(group.rows)].mean(0)

    def _sweep(self, number: int) -> Sweep:
        if number in self._kept:
            return self._kept[number]
        group = self._groups[number]
        sweep = Sweep(
            self._engine,
            self._base,
            group.windows,
            max_slots=self._max_slots,
            room=group.room,
            against_base=self.sample.measure.against_base,
        )
        if sweep.states.nbytes <= self._left:
            self._left -= sweep.states.nbytes
            self._kept[number] = sweep
        return sweep


def _outcome(part: np.ndarray) -> Outcome:
    nats, greedy, kl, agreed = part
    return Outcome(nats, greedy > 0, kl, agreed)


def _grouped(sample: Sample, longest: int) -> list[_Group]:
    """Rows of like lengths together, padded to a few shapes, which are what is compiled."""
    buckets: dict[int, list[int]] = {}
    every = sample.rows
    for number, row in enumerate(every):
        length = len(row.context) + len(row.continuation)
        if length > longest:
            raise UsageError(
                f"an item has {length} tokens, but the model's context holds {longest}; raise "
                f"{option('max_length')}, or choose other data"
            )
        buckets.setdefault(min(max(next_power_of_two(length), _SHORTEST), longest), []).append(number)
    groups = []
    for length, numbers in sorted(buckets.items()):
        batch = min(max(_GROUP_TOKENS // length, 1), next_power_of_two(len(numbers)))
        cut = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
        counts = [sum(len(every[n].continuation) for n in rows) for rows in cut]
        room = -(-max(counts) // 64) * 64
        groups += [_Group(rows, _windows([every[n] for n in rows], batch, length), room) for rows in cut]
    return groups


def _windows(rows: Sequence[Row], batch: int, length: int) -> Windows:
    tokens, scored = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
    lengths = np.zeros(batch, np.int32)
    for place, row in enumerate(rows):
        ids = (*row.context, *row.continuation)
        tokens[place, : len(ids)], lengths[place] = ids, len(ids)
        scored[place, len(row.context) : len(ids)] = True
    return Windows(tokens, lengths, scored)
