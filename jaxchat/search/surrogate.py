"""Candidates that a tree-structured Parzen estimator proposes (Bergstra et al. 2011), by Optuna.

It chooses how often each slot of the base plan runs: not at all, once or twice. From what earlier stages have
tried and can be put so, it learns. Importing it needs optuna, of the extra `search`.
"""

from collections.abc import Iterator, Sequence

import optuna

from jaxchat.layer_plan import LayerPlan
from jaxchat.search.ladder import SEARCH, Ladder
from jaxchat.search.trials import AT_ONCE, Trials

_MOST = 2
"""Times that a slot may run."""
_WORST = -1e9
"""What a plan counts for whose scores are not finite."""


def proposals(ladder: Ladder, trials: Trials, *, seed: int = 0) -> Iterator[list[LayerPlan]]:
    """Candidates, some at a time, until none is new; what becomes of them is read from the trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    counts = optuna.distributions.CategoricalDistribution(tuple(range(_MOST + 1)))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"slot {slot}": counts for slot in range(len(ladder.base))
    }
    told: set[LayerPlan] = set()
    while True:
        _tell(ladder, trials, study, space, told)
        found = dict.fromkeys(_asked(ladder, study, space, set(trials.known(SEARCH))))
        if not found:
            return
        yield list(found)


def _tell(
    ladder: Ladder,
    trials: Trials,
    study: optuna.Study,
    space: dict[str, optuna.distributions.BaseDistribution],
    told: set[LayerPlan],
) -> None:
    """Tells the study what it has not been told yet."""
    known = trials.known(SEARCH)
    for plan, scores in known.items():
        counts = counts_of(ladder.base, plan)
        if plan in told or counts is None:
            continue
        told.add(plan)
        gain = max(ladder.gain(scores, known[ladder.base]), _WORST)
        params = dict(zip(space, counts, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=gain))


def _asked(
    ladder: Ladder,
    study: optuna.Study,
    space: dict[str, optuna.distributions.BaseDistribution],
    known: set[LayerPlan],
) -> Iterator[LayerPlan]:
    """A few that are allowed and not known; of those proposed many are."""
    left = AT_ONCE
    for _ in range(20 * AT_ONCE):
        trial = study.ask(space)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # what becomes of it is told by `_tell`
        plan = plan_with(ladder.base, list(trial.params.values()))
        if plan is not None and plan not in known and ladder.allows(plan):
            yield plan
            left -= 1
        if not left:
            return


def plan_with(base: LayerPlan, counts: Sequence[int]) -> LayerPlan | None:
    """The base plan with each slot so many times, one behind the other; None if none is left."""
    slots = [slot for slot, count in zip(base.slots, counts, strict=True) for _ in range(count)]
    return LayerPlan(tuple(slots), base.num_layers) if slots else None


def counts_of(base: LayerPlan, plan: LayerPlan) -> list[int] | None:
    """How often each slot runs in a plan that `plan_with` makes; None of another."""
    counts, place = [], 0
    for slot in base.slots:
        count = 0
        while count < _MOST and plan.slots[place : place + 1] == (slot,):
            count, place = count + 1, place + 1
        counts.append(count)
    return counts if place == len(plan) else None
