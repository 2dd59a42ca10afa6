"""A search as Markdown, JSON, CSV, and the plan it recommends. Pictures are `plots.py`'s."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxchat.evaluation.statistics import CONFIDENCE, Comparison, Estimate
from jaxchat.layer_plan import LayerPlan
from jaxchat.search.run import Found, Question
from jaxchat.search.sample import AGREEMENT
from jaxchat.search.validation import Candidate, Verdict, draft_gain


def headline(verdict: Verdict) -> str:
    """What came of the search, in a sentence."""
    tried, best, measure = f"of {verdict.tried:,} plans tried", verdict.best, verdict.measure
    if measure.against_base:
        if best is None:
            return f"No plan that costs less than the base is near it, {tried}."
        return (
            f"{best.plan} is the nearest to the base, {tried}: {_number(best.validated)} {measure.unit}, at "
            f"a cost of {best.cost:.2f}, on data that the search has not seen."
        )
    if best is None:
        return f"No plan beats the base at {_percent(CONFIDENCE)}, {tried}."
    return (
        f"{best.plan} beats the base at {_percent(CONFIDENCE)}, {tried}: it gains "
        f"{_interval(best.gain.difference)} {measure.unit} on data that the search has not seen."
    )


def markdown(found: Found, question: Question, about: Mapping[str, str]) -> str:
    """The report for people.

    Args:
      found: the search.
      question: what was searched for.
      about: what it was made of and with, by name.
    """
    verdict = found.verdict
    lines = ["# A search for a layer plan", "", headline(verdict), ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "## What was found", "", *_explanation(verdict), ""]
    lines += _table(_candidate_rows(verdict))
    if any(candidate.probes for candidate in verdict.candidates):
        lines += ["", "## What else became better or worse", ""]
        lines += [f"Gains on data and measures that the search did not look at, with {_percent(CONFIDENCE)} "
                  "intervals; a loss is negative.", ""]  # fmt: skip
        lines += _table(_probe_rows(verdict))
    lines += ["", "## What was tried", ""]
    stages = list(found.trials.stages.values())
    lines += _table(
        [("stage", "scored"), *((stage, str(stages.count(stage))) for stage in dict.fromkeys(stages))]
    )
    return "\n".join(lines) + "\n"


def _explanation(verdict: Verdict) -> Iterator[str]:
    measure = verdict.measure
    better = "more" if measure.higher else "less"
    yield (
        f"Scores are {measure.unit}, {better} is better. The base plan has {_estimate(verdict.searched)} on "
        f"the {verdict.searched.items} items of the search and {_estimate(verdict.validated)} on the "
        f"{verdict.validated.items} of the validation."
    )
    yield ""
    if measure.against_base:
        yield (
            "Candidates cost less than the base plan, and are chosen for being near it and for being cheap. "
            "A gain is how much nearer to it than itself, which is never above 0; the validated one is of "
            "data that no candidate was chosen by."
        )
        return
    yield (
        f"The gain on the search's items is too good: the best of {verdict.tried:,} was picked by it. A "
        "search among as many plans that are no better than the base would find one that looks as good with "
        f"a probability of {_p(verdict.luck)} (White's reality check). What counts is the validated gain; "
        f"its intervals are of {_percent(verdict.confidence)} each, so that all {len(verdict.candidates)} "
        f"hold together with {_percent(CONFIDENCE)}."
    )


def _candidate_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    against = verdict.measure.against_base
    last = "as a draft, at best" if verdict.measure is AGREEMENT else "" if against else "beats the base"
    header = ("--layer_spec", "found by", "cost", "gain on the search's items", "validated gain",
              "better : worse", last)  # fmt: skip
    rows = [header, *(_candidate_row(verdict, candidate) for candidate in verdict.candidates)]
    return rows if last else [row[:-1] for row in rows]


def _candidate_row(verdict: Verdict, candidate: Candidate) -> tuple[str, ...]:
    last = "yes" if candidate.wins else "no"
    if verdict.measure is AGREEMENT:
        gain, count = draft_gain(candidate.validated, candidate.cost)
        last = f"x{gain:.2f} ({count} tokens)"
    p = "" if candidate.gain.p_value is None else f", McNemar p {_p(candidate.gain.p_value)}"
    return (
        f"`{candidate.plan}`",
        candidate.stage,
        f"{candidate.cost:.2f}",
        _interval(candidate.optimistic.difference),
        _interval(candidate.gain.difference),
        f"{candidate.gain.wins} : {candidate.gain.losses}{p}",
        last,
    )


def _probe_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("--layer_spec", "measure", "base", "plan", "gain")]
    for candidate in verdict.candidates:
        rows += [
            (f"`{candidate.plan}`", f"{probe.name} ({probe.unit})", _number(probe.base), _number(probe.score),
             _interval(probe.gain.difference))
            for probe in candidate.probes
        ]  # fmt: skip
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def as_json(found: Found, about: Mapping[str, str]) -> dict[str, Any]:
    """The verdict as JSON values; figures that are not finite are null."""
    verdict = found.verdict
    best = verdict.best
    return {
        "about": dict(about),
        "objective": verdict.measure.name,
        "unit": verdict.measure.unit,
        "higher_is_better": verdict.measure.higher,
        "base": str(verdict.base),
        "tried": verdict.tried,
        "base_on_search": _fields(verdict.searched),
        "base_on_validation": _fields(verdict.validated),
        "confidence_of_each": verdict.confidence,
        "luck_p_value": verdict.luck,
        "best": None if best is None else str(best.plan),
        "headline": headline(verdict),
        "candidates": [
            {
                "layer_spec": str(one.plan),
                "stage": one.stage,
                "cost": one.cost,
                "search_score": _finite(one.searched),
                "search_gain": _comparison(one.optimistic),
                "validation_score": _finite(one.validated),
                "validation_gain": _comparison(one.gain),
                "beats_base": one.wins,
                "probes": [
                    {"name": probe.name, "unit": probe.unit, "base": _finite(probe.base),
                     "score": _finite(probe.score), "gain": _comparison(probe.gain)}
                    for probe in one.probes
                ],
            }
            for one in verdict.candidates
        ],
    }  # fmt: skip


def plans_csv(found: Found, question: Question) -> str:
    """Every score of every plan, in the order in which they were found."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("sample", "stage", "layer_spec", "slots", "cost", "score"))
    known = {sample: found.trials.known(sample) for sample in question.samples}
    for (sample, plan), stage in found.trials.stages.items():
        cost, score = f"{question.cost(plan):.6g}", known[sample][plan].mean
        writer.writerow((sample, stage, str(plan), len(plan.executed()), cost, score))
    return out.getvalue()


def best_json(verdict: Verdict) -> str:
    """The plan to run, for `--layer_spec @best.json`: the best, or the base plan where nothing beats it."""
    plan: LayerPlan = verdict.base if verdict.best is None else verdict.best.plan
    return plan.to_notation("json") + "\n"


def dumped(value: Any) -> str:
    """JSON text."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# --- figures


def _fields(estimate: Estimate) -> dict[str, Any]:
    return {name: _finite(value) for name, value in estimate._asdict().items()}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {**_fields(comparison.difference), "wins": comparison.wins, "losses": comparison.losses,
            "mcnemar_p_value": comparison.p_value}  # fmt: skip


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(estimate: Estimate) -> str:
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"


def _interval(difference: Estimate) -> str:
    if not math.isfinite(difference.value):
        return "not finite"
    return f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "less than 0.001"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
