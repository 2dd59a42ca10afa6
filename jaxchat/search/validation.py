"""What is left of the best candidates on data that the search has not seen."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxchat.evaluation import statistics
from jaxchat.evaluation.statistics import Comparison, Estimate
from jaxchat.layer_plan import LayerPlan
from jaxchat.search.sample import Measure, Scores

SEED = 0
"""Of the bootstrap: the same scores give the same intervals."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Another measure of a candidate, which the search did not look at: what a gain may have cost."""

    name: str
    unit: str
    score: float
    base: float
    gain: Comparison


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that the search chose, and what was found of it.

    Attributes:
      plan: itself.
      stage: where it was found.
      cost: of a token, in units of the base plan's.
      searched: its score on the search's own data, which is too good to be true.
      optimistic: its gain there, as one would report it who does not know how many were tried.
      validated: its score on other data.
      gain: its gain there, with an interval that holds for all candidates together.
      probes: what else became better or worse.
    """

    plan: LayerPlan
    stage: str
    cost: float
    searched: float
    optimistic: Comparison
    validated: float
    gain: Comparison
    probes: tuple[Probe, ...] = ()

    @property
    def wins(self) -> bool:
        """Whether it beats the base plan for certain."""
        return self.gain.difference.low > 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a search amounts to.

    Attributes:
      measure: what was searched for.
      base: the plan to be beaten.
      tried: how many plans were tried in all.
      searched, validated: the base plan's scores.
      confidence: of each interval of a validated gain, so that all hold together with 95 %.
      luck: the p-value that a search among as many plans, none of which is better, finds so good a one on its
        own data.
      candidates: the best by the search, the most promising first.
    """

    measure: Measure
    base: LayerPlan
    tried: int
    searched: Estimate
    validated: Estimate
    confidence: float
    luck: float
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The best of those that win; None if no plan beats the base plan.

        Where the base plan is the measure of all, the one that is nearest to it.
        """
        good = [one for one in self.candidates if one.wins or self.measure.against_base]
        finite = [one for one in good if math.isfinite(one.gain.difference.value)]
        return max(finite, key=lambda one: one.gain.difference.value, default=None)


def draft_gain(acceptance: float, cost: float, most: int = 16) -> tuple[float, int]:
    """How much faster a draft at best makes decoding, and with how many tokens at once.

    Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.8, with a verification that costs as much as a step.

    Args:
      acceptance: how often one of its tokens is kept.
      cost: of its tokens, in units of the model's.
      most: tokens that are drafted at once.
    """

    def gain(count: int) -> float:
        kept = count + 1 if acceptance >= 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)
        return kept / (count * cost + 1)

    return max((gain(count), count) for count in range(1, most + 1))


def chosen(
    gains: Mapping[LayerPlan, float], cost: Callable[[LayerPlan], float], count: int
) -> list[LayerPlan]:
    """Which plans to validate: the best, and a few that are best for what they cost, the best first."""
    ranked = sorted((plan for plan in gains if math.isfinite(gains[plan])), key=lambda plan: -gains[plan])
    front = [plan for plan in pareto(gains, cost) if cost(plan) < 1]
    cheap = front[-max(count // 3, 1) :] if front else []
    best = [plan for plan in ranked if plan not in cheap][: count - len(cheap)]
    return [plan for plan in ranked if plan in best or plan in cheap]


def pareto(gains: Mapping[LayerPlan, float], cost: Callable[[LayerPlan], float]) -> list[LayerPlan]:
    """Plans of which none is both cheaper and better, the cheapest first."""
    found: list[LayerPlan] = []
    best = -math.inf
    for plan in sorted(gains, key=lambda plan: (cost(plan), -gains[plan])):
        if gains[plan] > best:
            best = gains[plan]
            found.append(plan)
    return found


def compared(measure: Measure, scores: Scores, base: Scores, confidence: float) -> Comparison:
    """How much better scores are than others; items that are not finite under either are left out."""
    sign = 1.0 if measure.higher else -1.0
    finite = np.isfinite(scores.values) & np.isfinite(base.values)
    if not np.isfinite(scores.values).all():  # it has failed where the base plan has not
        nothing = Estimate(-math.inf, math.nan, -math.inf, -math.inf, int(finite.sum()))
        return Comparison(nothing, 0, int((~finite).sum()), None)
    values, others = sign * scores.values[finite], sign * base.values[finite]
    return statistics.compare(values, others, base.weights[finite], confidence=confidence, seed=SEED)


def luck(measure: Measure, tried: Sequence[Scores], base: Scores) -> float:
    """See `Verdict.luck`."""
    gains = [measure.gain(scores.values, base.values) for scores in tried]
    finite = [gain for gain in gains if np.isfinite(gain).all()]
    if not finite:
        return 1.0
    return statistics.best_of(np.array(finite), base.weights, seed=SEED)


def score_of(scores: Scores, confidence: float = statistics.CONFIDENCE) -> Estimate:
    """The score of items, with its interval; NaN where one of them is not finite."""
    if not np.isfinite(scores.values).all():
        return Estimate(math.nan, math.nan, -math.inf, math.inf, len(scores.values))
    return statistics.estimate(scores.values, scores.weights, confidence=confidence, seed=SEED)
