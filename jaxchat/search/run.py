"""A search from its samples to the verdict."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np

from jaxchat.analysis.sweep import Windows
from jaxchat.arguments import refused
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError
from jaxchat.evaluation import statistics
from jaxchat.layer_plan import LayerPlan
from jaxchat.search.decode_cost import relative_cost
from jaxchat.search.ladder import SCREEN, SEARCH, Ladder
from jaxchat.search.sample import TEXT_MEASURES, Measure, Sample, Scores, split_windows, text_sample
from jaxchat.search.scorer import Scorer
from jaxchat.search.trials import Budget, Scoring, Trials
from jaxchat.search.validation import Candidate, Probe, Verdict, chosen, compared, luck, score_of

VALIDATION = "validation"
KEPT_MEBIBYTES = 512
"""Of the base plan's hidden states, for each sample that is searched on."""
SCREEN_TOKENS = 1024
"""Tokens of the sample that all blocks are tried on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched for, and within which bounds.

    Attributes:
      base: the plan to be beaten; all of its slots compute something.
      searched, validated: two samples without an item in common.
      probes: other measures of the candidates, by name.
      cost: of a plan, in units of the base plan's.
      max_slots: slots that a candidate may have.
      max_cost: what it may cost.
      candidates: how many are validated.
      surrogate: whether Optuna proposes some, and with which seed; None is no.
    """

    base: LayerPlan
    searched: Sample
    validated: Sample
    probes: Mapping[str, Sample]
    cost: Callable[[LayerPlan], float]
    max_slots: int
    max_cost: float = math.inf
    candidates: int = 6
    surrogate: int | None = None

    @property
    def measure(self) -> Measure:
        """What the search looks at."""
        return self.searched.measure

    @property
    def samples(self) -> dict[str, Sample]:
        """All that plans are scored on, by its name."""
        probes = {f"probe {name}": sample for name, sample in self.probes.items()}
        return {SCREEN: self.searched.part(SCREEN_TOKENS), SEARCH: self.searched,
                VALIDATION: self.validated, **probes}  # fmt: skip


def text_question(
    engine: Engine,
    base: LayerPlan,
    windows: Windows,
    *,
    objective: str = "loss",
    share: float = 0.5,
    **bounds: Any,
) -> Question:
    """A question about a text, of which a part is searched on, and the rest validates.

    Args:
      engine: the model.
      base: the plan to be beaten.
      windows: of the text, from `analysis.cut_windows`.
      objective: `loss`, `kl` or `agreement`, see `sample.TEXT_MEASURES`.
      share: of the windows that is searched on.
      **bounds: other fields of `Question`.

    Raises:
      UsageError: there is no such objective, or too little text.
    """
    if objective not in TEXT_MEASURES:
        raise refused("objective", objective, f"one of {', '.join(TEXT_MEASURES)}")
    base = LayerPlan(base.executed(), base.num_layers)
    parts = split_windows(windows, share)
    searched, validated = (text_sample(part, TEXT_MEASURES[objective]) for part in parts)
    settings = {"probes": {}, "cost": relative_cost(engine, base), "max_slots": 2 * len(base), **bounds}
    return Question(base=base, searched=searched, validated=validated, **settings)


@dataclasses.dataclass(frozen=True)
class Found:
    """A search: its verdict, and all that was tried, by sample."""

    verdict: Verdict
    trials: Trials


def search(
    engine: Engine,
    question: Question,
    budget: Budget,
    results: MutableMapping[str, Any],
    *,
    progress: Callable[[float, int], None] | None = None,
    scorers: Mapping[str, Scoring] | None = None,
    alike: np.ndarray | None = None,
    workers: int = 1,
) -> Found:
    """Searches for a plan that is better than the base plan, and validates the best.

    Args:
      engine: the model.
      question: what is searched for.
      budget: how much is tried; the validation comes on top.
      results: what is known already, by name; filled as the search goes on. JSON values.
      progress: called with the part of the budget that is spent, and how many plans were tried.
      scorers: of `question.samples`, where it is not this process that scores.
      workers: how many score at once.
      alike: how much blocks change what they read, see `Ladder.distances`; default what `distances` says.

    Raises:
      JaxchatError: the base plan's scores are not finite.
    """
    scorers = scorers or local_scorers(engine, question)
    trials = Trials(scorers, budget, results, progress, workers)
    ladder = Ladder(
        base=question.base,
        measure=question.measure,
        distances=distances(engine, question, scorers) if alike is None else alike,
        cost=question.cost,
        max_slots=question.max_slots,
        max_cost=question.max_cost,
        surrogate=_surrogate(question.surrogate),
    )
    ladder.run(trials)
    if not np.isfinite(trials.known(SEARCH)[question.base].values).all():
        raise JaxchatError(
            "the model's logits are not finite (NaN or infinity): the checkpoint is broken or the dtype too "
            "narrow; try --dtype float32"
        )
    return Found(_verdict(question, ladder, trials), trials)


def local_scorers(engine: Engine, question: Question) -> dict[str, Scoring]:
    """Scorers of the question's samples in this process; those of equal samples are one."""
    found: dict[str, Scoring] = {}
    for name, sample in question.samples.items():
        same = (scorer for scorer in found.values() if scorer.sample is sample)
        # The others are asked once, for a few plans together.
        kept = KEPT_MEBIBYTES if name in (SCREEN, SEARCH) else 0
        slots = question.max_slots
        found[name] = next(same, None) or Scorer(
            engine, question.base, sample, max_slots=slots, mebibytes=kept
        )
    return found


def distances(engine: Engine, question: Question, scorers: Mapping[str, Scoring]) -> np.ndarray:
    """Angular distances between the base plan's slots, [P + 1, P + 1], on the small sample."""
    scorer = scorers[SCREEN]
    if not isinstance(scorer, Scorer):  # it is in another process
        sample = question.samples[SCREEN]
        scorer = Scorer(engine, question.base, sample, max_slots=question.max_slots)
    return scorer.angular()


def _surrogate(seed: int | None) -> Any:
    if seed is None:
        return None
    from jaxchat.search import surrogate  # needs optuna

    return functools.partial(surrogate.proposals, seed=seed)


def _verdict(question: Question, ladder: Ladder, trials: Trials) -> Verdict:
    base, measure = question.base, question.measure
    known = trials.known(SEARCH)
    gains = {plan: ladder.gain(scores, known[base]) for plan, scores in known.items() if plan != base}
    plans = chosen(gains, question.cost, question.candidates)
    for name in question.samples:
        if name not in (SCREEN, SEARCH):
            trials.run(name, [base, *plans], "validation", math.inf)
    confidence = statistics.adjusted(statistics.CONFIDENCE, len(plans))
    validated = trials.known(VALIDATION)
    tried = {plan for sample, plan in trials.stages if sample in (SCREEN, SEARCH)} - {base}

    def candidate(plan: LayerPlan) -> Candidate:
        return Candidate(
            plan=plan,
            stage=trials.stages[SEARCH, plan],
            cost=question.cost(plan),
            searched=known[plan].mean,
            optimistic=compared(measure, known[plan], known[base], statistics.CONFIDENCE),
            validated=validated[plan].mean,
            gain=compared(measure, validated[plan], validated[base], confidence),
            probes=tuple(
                _probe(name, sample.measure, trials.known(f"probe {name}"), plan, base)
                for name, sample in question.probes.items()
            ),
        )

    return Verdict(
        measure=measure,
        base=base,
        tried=len(tried),
        searched=score_of(known[base]),
        validated=score_of(validated[base]),
        confidence=confidence,
        luck=luck(measure, [known[plan] for plan in gains], known[base]),
        candidates=tuple(candidate(plan) for plan in plans),
    )


def _probe(
    name: str, measure: Measure, known: Mapping[LayerPlan, Scores], plan: LayerPlan, base: LayerPlan
) -> Probe:
    gain = compared(measure, known[plan], known[base], statistics.CONFIDENCE)
    return Probe(name, measure.unit, known[plan].mean, known[base].mean, gain)
