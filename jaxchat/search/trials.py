"""Scores of plans, kept on disk as they are found, and the budget that they are found within."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxchat.errors import JaxchatError
from jaxchat.layer_plan import LayerPlan
from jaxchat.search.sample import Sample, Scores
from jaxchat.visible import shown

AT_ONCE = 8
"""Plans that are scored in one call: what they share is run once, and this much is lost by a kill."""
_SECONDS = "seconds"


class Scoring(Protocol):
    """What scores plans: a `Scorer`, here or on other machines."""

    sample: Sample

    def scores(self, plans: Sequence[LayerPlan]) -> list[Scores]:
        """The scores of the sample's items under each plan."""


class Budget:
    """How much may be tried: a number of plans, or minutes, those of earlier runs counted."""

    def __init__(self, *, plans: int | None = None, minutes: float | None = None):
        self._plans = math.inf if plans is None else plans
        self._seconds = math.inf if minutes is None else minutes * 60

    def spent(self, plans: int, seconds: float) -> float:
        """The part of it that is used up."""
        return max(plans / self._plans, seconds / self._seconds)

    def room(self, plans: int, until: float) -> int:
        """How many plans may be tried before it is to be asked again: one call's, or all that are left."""
        if math.isinf(self._plans) or math.isinf(until):
            return AT_ONCE
        # As if it were asked after every call: what is tried does not depend on how many are tried at once.
        return max(-(-math.ceil(until * self._plans - plans) // AT_ONCE), 1) * AT_ONCE


class Trials:
    """Plans tried so far on the samples of a search, by the sample's name.

    Attributes:
      stages: (sample, plan) -> the stage in which it was tried first, in order.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scoring],
        budget: Budget,
        results: MutableMapping[str, Any],
        progress: Callable[[float, int], None] | None = None,
        workers: int = 1,
    ):
        self._workers = workers
        self._scorers, self._budget, self._results = scorers, budget, results
        self._progress = progress or (lambda spent, plans: None)
        self._before = _seconds(results.get(_SECONDS, 0.0))
        self._started = time.monotonic()
        self._scores: dict[tuple[str, LayerPlan], Scores] = {}
        self.stages: dict[tuple[str, LayerPlan], str] = {}

    @property
    def seconds(self) -> float:
        """Time spent, that of earlier runs included."""
        return self._before + time.monotonic() - self._started

    @property
    def spent(self) -> float:
        """The part of the budget that is used up."""
        return self._budget.spent(len(self.stages), self.seconds)

    def known(self, sample: str) -> dict[LayerPlan, Scores]:
        """What was tried on a sample, in the order in which it was."""
        return {plan: self._scores[sample, plan] for name, plan in self.stages if name == sample}

    def run(self, sample: str, plans: Iterable[LayerPlan], stage: str, until: float = 1.0) -> bool:
        """Tries plans, as far as a part of the budget goes; whether all of them are tried."""
        todo = [plan for plan in dict.fromkeys(plans) if (sample, plan) not in self._scores]
        while todo:
            count = min(self._budget.room(len(self.stages), until), AT_ONCE * self._workers)
            chunk = todo[:count]
            # What an earlier run has found takes no time, so that a run whose time is up finds it all again.
            known = all(_key(sample, plan) in self._results for plan in chunk)
            if self._budget.spent(len(self.stages), 0 if known else self.seconds) >= until:
                return False
            self._try(sample, chunk, stage)
            del todo[:count]
        return True

    def _try(self, sample: str, plans: Sequence[LayerPlan], stage: str) -> None:
        missing = [plan for plan in plans if _key(sample, plan) not in self._results]
        if missing:
            for plan, scores in zip(missing, self._scorers[sample].scores(missing), strict=True):
                self._results[_key(sample, plan)] = [_listed(scores.values), scores.weights.tolist()]
            self._results[_SECONDS] = round(self.seconds, 3)
        for plan in plans:
            self._scores[sample, plan] = _read(_key(sample, plan), self._results)
            self.stages[sample, plan] = stage
        self._progress(min(self.spent, 1.0), len(self.stages))


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float):
        raise JaxchatError(
            f"the result {_SECONDS!r} is {shown(value)}, no number; delete the journal, or give another --out"
        )
    return float(value)


def _key(sample: str, plan: LayerPlan) -> str:
    return f"{sample} {plan}"


def _listed(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _read(key: str, results: Mapping[str, Any]) -> Scores:
    try:
        values, weights = results[key]
        found = Scores(
            np.array([math.nan if value is None else value for value in values], np.float64),
            np.array(weights, np.float64),
        )
        if found.values.shape != found.weights.shape or found.values.ndim != 1:
            raise ValueError
    except (TypeError, ValueError):
        raise JaxchatError(
            f"the result {shown(key)} is no list of scores; delete the journal, or give another --out"
        ) from None
    return found
