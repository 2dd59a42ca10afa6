"""Which candidates are tried, one stage after the other, each of them with the best of those before.

Screening is by one pass: blocks whose input and output are alike (Gromov et al. 2024) come first. Then every
block once again (RYS), and without it; what else can be done with the best blocks; several of them together;
their neighbours; and what a surrogate model proposes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxchat.layer_plan import LayerPlan
from jaxchat.search.moves import VARIANTS, Genes, Move, disjoint, neighbours, plan_of
from jaxchat.search.sample import Measure, Scores
from jaxchat.search.trials import Trials

SCREEN, SEARCH = "screen", "search"
"""The samples: a small part of the data for the search, and all of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """How a search goes about it.

    Attributes:
      base: the plan that is to be beaten.
      measure: what scores mean.
      distances: of the blocks [start, stop), how much they change what they read, [P + 1, P + 1].
      cost: of a plan, in units of the base plan's.
      max_slots: slots that a candidate may execute.
      max_cost: what it may cost. Where the base plan is the measure of all, less than that in any case.
      surrogate: proposes more when the stages are through, given what was tried; None for none.
      beam: how many candidates are built upon.
      pool: how many single moves are combined.
    """

    base: LayerPlan
    measure: Measure
    distances: np.ndarray
    cost: Callable[[LayerPlan], float]
    max_slots: int
    max_cost: float = math.inf
    surrogate: "Callable[[Ladder, Trials], Iterable[list[LayerPlan]]] | None" = None
    beam: int = 8
    pool: int = 24

    def run(self, trials: Trials) -> None:
        """Tries candidates until the budget is used up, or there is nothing left to try."""
        last = 0.8 if self.surrogate else 1.0
        trials.run(SCREEN, [self.base], "base", math.inf)
        trials.run(SEARCH, [self.base], "base", math.inf)
        self._singles(trials, "repeat", 0.4 * last)
        self._singles(trials, "drop", 0.55 * last)
        found = self._promoted(trials, self._all(("repeat", "drop")), "best blocks", 0.65 * last)
        variants = [(dataclasses.replace(move, kind=kind),) for move in _moves(found[: self.beam])
                    for kind in VARIANTS if kind != "reverse" or move.stop - move.start > 1]  # fmt: skip
        self._try(trials, SCREEN, variants, "variants", 0.75 * last)
        singles = [*self._all(("repeat", "drop")), *variants]
        found = self._promoted(trials, singles, "best blocks", 0.8 * last)
        beam = self._composed(trials, found, 0.92 * last)
        self._refined(trials, beam, last)
        if self.surrogate is not None:
            for plans in self.surrogate(self, trials):
                if not trials.run(SEARCH, filter(self.allows, plans), "surrogate"):
                    break

    def allows(self, plan: LayerPlan | None) -> bool:
        """Whether a candidate is within the bounds."""
        if plan is None or len(plan.executed()) > self.max_slots:
            return False
        cost = self.cost(plan)
        return cost < 1 if self.measure.against_base else cost <= self.max_cost

    def gain(self, scores: Scores, base: Scores) -> float:
        """How much better scores are than the base plan's; minus infinity where they are not finite."""
        gain = self.measure.gain(scores.values, base.values)
        mean = float((gain * base.weights).sum() / base.weights.sum())
        return mean if math.isfinite(mean) else -math.inf

    def ranked(self, trials: Trials, sample: str, among: Iterable[Genes]) -> list[Genes]:
        """Those that were tried on a sample, the best first."""
        known = trials.known(sample)
        base = known[self.base]
        tried = [(genes, known[plan]) for genes in dict.fromkeys(among)
                 if (plan := plan_of(self.base, genes)) in known]  # fmt: skip
        gains = {genes: self.gain(scores, base) for genes, scores in tried}
        return sorted(gains, key=lambda genes: -gains[genes])

    def _all(self, kinds: Sequence[str]) -> list[Genes]:
        slots = len(self.base)
        return [(Move(i, j, kind),) for kind in kinds for i in range(slots) for j in range(i + 1, slots + 1)]

    def _try(self, trials: Trials, sample: str, genes: Iterable[Genes], stage: str, until: float) -> bool:
        plans = (plan_of(self.base, one) for one in genes)
        return trials.run(sample, [plan for plan in plans if plan and self.allows(plan)], stage, until)

    def _singles(self, trials: Trials, kind: str, until: float) -> None:
        order = sorted(self._all((kind,)), key=lambda genes: self.distances[genes[0].start, genes[0].stop])
        self._try(trials, SCREEN, order, kind, until)

    def _promoted(self, trials: Trials, among: Sequence[Genes], stage: str, until: float) -> list[Genes]:
        """The best of the small sample, tried on all of it; from the best on."""
        ranked = self.ranked(trials, SCREEN, among)
        self._try(trials, SEARCH, ranked[: max(self.pool, len(ranked) // 10)], stage, until)
        return self.ranked(trials, SEARCH, among)

    def _composed(self, trials: Trials, found: Sequence[Genes], until: float) -> list[Genes]:
        """The best of one, two and three moves together."""
        pool = list(found[: self.pool])
        every, beam = list(pool), pool[: self.beam]
        for _ in range(2):
            pairs = itertools.product(beam, pool)
            joined = [genes for one, more in pairs if (genes := disjoint((*one, *more))) is not None]
            every += joined
            if not self._try(trials, SEARCH, joined, "several blocks", until):
                break
            beam = self.ranked(trials, SEARCH, joined)[: self.beam]
        return self.ranked(trials, SEARCH, every)

    def _refined(self, trials: Trials, found: Sequence[Genes], until: float) -> None:
        """Goes from the best to their neighbours, as long as these are better."""
        every, seen = list(found), set[Genes]()
        while True:
            best = [g for g in self.ranked(trials, SEARCH, every)[: max(self.beam // 2, 1)] if g not in seen]
            if not best:
                return
            seen.update(best)
            near = [genes for one in best for genes in neighbours(one, len(self.base))]
            every += near
            if not self._try(trials, SEARCH, near, "neighbours", until):
                return


def _moves(found: Iterable[Genes]) -> list[Move]:
    return [genes[0] for genes in found]
