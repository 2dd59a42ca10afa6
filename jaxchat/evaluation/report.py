"""Evaluations as scores with intervals, and as JSON, CSV and Markdown. Pictures are `plots.py`'s."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxchat.evaluation.baseline import FORMAT, Baseline, Column, Paired, Rows, arrays
from jaxchat.evaluation.items import digest
from jaxchat.evaluation.metrics import metric
from jaxchat.evaluation.run import Measured
from jaxchat.evaluation.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Comparison,
    Estimate,
    compare,
    estimate,
    proportion,
)
from jaxchat.visible import visible

_DRAWN = 20_000_000
"""Items drawn for an interval, all resamples together."""
_FEWEST = 1000


@dataclass(frozen=True)
class Compared:
    """A metric against the baseline's, on the items of both.

    Attributes:
      comparison: the score less the baseline's; `wins` are items that are better here.
      other: the baseline's score on those items.
    """

    comparison: Comparison
    other: float


@dataclass(frozen=True)
class Summary:
    """A task's scores.

    Attributes:
      measured: what they are of.
      scores: by metric.
      groups: of the headline, by group, where there are several.
      compared: by metric, with a baseline.
      rows: the items by column.
    """

    measured: Measured
    scores: Mapping[str, Estimate]
    groups: Mapping[str, Estimate]
    compared: Mapping[str, Compared]
    rows: Rows

    @property
    def cut(self) -> tuple[int, int]:
        """Items of which the context was too long, and the tokens that they lost."""
        cuts = [outcome.cut for outcome in self.measured.outcomes if outcome.cut]
        return len(cuts), sum(cuts)


def summaries(
    measured: Sequence[Measured], *, seed: int = 0, baseline: Baseline | None = None
) -> list[Summary]:
    """The scores of tasks, with 95 % intervals, and against a baseline item by item.

    Args:
      measured: of `run.evaluate`.
      seed: of the resamples that intervals are made of.
      baseline: an earlier evaluation.
    """
    return [_summary(one, seed, baseline) for one in measured]


def _summary(measured: Measured, seed: int, baseline: Baseline | None) -> Summary:
    task = measured.task
    rows = _rows(measured)
    everything = range(len(rows.ids))
    scores = {name: _estimate(*arrays(column, everything), seed) for name, column in rows.metrics.items()}
    members: dict[str, list[int]] = {}
    for number, item in enumerate(task.items):
        members.setdefault(item.group, []).append(number)
    head = rows.metrics.get(task.metric)
    groups = {}
    if len(members) > 1 and head is not None:
        groups = {group: _estimate(*arrays(head, own), seed) for group, own in sorted(members.items())}
    compared = {}
    if baseline is not None and task.name in baseline.tasks:
        compared = _compared(rows, baseline.tasks[task.name], baseline.paired(task), seed)
    return Summary(measured, scores, groups, compared, rows)


def _rows(measured: Measured) -> Rows:
    items, outcomes = measured.task.items, measured.outcomes
    shared = [name for name in outcomes[0].figures if all(name in outcome.figures for outcome in outcomes)]
    return Rows(
        [item.id for item in items],
        [digest(item) for item in items],
        {
            name: Column(
                [outcome.figures[name].value for outcome in outcomes],
                [outcome.figures[name].weight for outcome in outcomes],
            )
            for name in shared
        },
    )


def _resamples(count: int) -> int:
    return max(min(RESAMPLES, _DRAWN // max(count, 1)), _FEWEST)


def _estimate(values: np.ndarray, weights: np.ndarray, seed: int) -> Estimate:
    if (weights == 1).all() and np.isin(values, (0, 1)).all():
        return proportion(values)
    return estimate(values, weights, seed=seed, resamples=_resamples(len(values)))


def _compared(rows: Rows, others: Rows, pairs: Paired, seed: int) -> dict[str, Compared]:
    """Metrics that both have; of those that are ratios only where the denominators are the same."""
    found = {}
    for name, column in rows.metrics.items():
        if name not in others.metrics or not pairs.own:
            continue
        values, weights = arrays(column, pairs.own)
        theirs, their_weights = arrays(others.metrics[name], pairs.other)
        if not np.array_equal(weights, their_weights):
            continue
        result = compare(values, theirs, weights, seed=seed, resamples=_resamples(len(values)))
        if not metric(name).higher_is_better:
            result = result._replace(wins=result.losses, losses=result.wins)
        found[name] = Compared(result, float(np.average(theirs, weights=weights)))
    return found


# --- files


def as_json(results: Sequence[Summary], about: Mapping[str, Any]) -> bytes:
    """All of it: what was evaluated and how (`about`), the scores, and every item's."""
    value = {
        "format": FORMAT,
        **about,
        "confidence": CONFIDENCE,
        "tasks": [_task_json(one) for one in results],
    }
    return (json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode(errors="replace")


def _task_json(one: Summary) -> dict[str, Any]:
    task = one.measured.task
    items, tokens = one.cut
    return {
        "name": task.name,
        "about": task.about,
        "metric": task.metric,
        "files": [file.name for file in task.files],
        "few_shot": task.few_shot,
        "chat_template": task.chat,
        "items": len(task.items),
        "items_there_are": task.total,
        "items_cut": items,
        "tokens_cut": tokens,
        "scores": {name: _score_json(name, score) for name, score in one.scores.items()},
        "groups": {group: _score_json(task.metric, score) for group, score in one.groups.items()},
        "compared": {name: _compared_json(pair) for name, pair in one.compared.items()},
        "rows": {
            "ids": one.rows.ids,
            "digests": one.rows.digests,
            "metrics": {
                name: {"values": column.values, "weights": column.weights}
                for name, column in one.rows.metrics.items()
            },
        },
    }


def _score_json(name: str, score: Estimate) -> dict[str, Any]:
    kind = metric(name)
    value: dict[str, Any] = {part: _finite(found) for part, found in score._asdict().items()}
    value["higher_is_better"] = kind.higher_is_better
    if kind.shown is not None:
        value[kind.shown_as] = {
            part: _finite(kind.shown(getattr(score, part))) if math.isfinite(getattr(score, part)) else None
            for part in ("value", "low", "high")
        }
    return value


def _compared_json(pair: Compared) -> dict[str, Any]:
    difference = pair.comparison.difference
    return {
        "baseline": pair.other,
        "difference": {part: _finite(found) for part, found in difference._asdict().items()},
        "better": pair.comparison.wins,
        "worse": pair.comparison.losses,
        "mcnemar_p": pair.comparison.p_value,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(results: Sequence[Summary]) -> bytes:
    """A line an item and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("task", "item", "group", "metric", "value", "weight"))
    for one in results:
        for name, column in one.rows.metrics.items():
            for item, value, weight in zip(
                one.measured.task.items, column.values, column.weights, strict=True
            ):
                writer.writerow((one.measured.task.name, item.id, item.group, name, value, weight))
    return out.getvalue().encode(errors="replace")


def items_json(results: Sequence[Summary]) -> bytes:
    """A JSON line an item: what came of it, the reply or choice included."""
    lines = [
        json.dumps(
            {
                "task": one.measured.task.name,
                "item": item.id,
                "scores": {name: figure.value for name, figure in outcome.figures.items()},
                "tokens_cut": outcome.cut,
                **outcome.detail,
            },
            ensure_ascii=False,
            allow_nan=False,
        )
        for one in results
        for item, outcome in zip(one.measured.task.items, one.measured.outcomes, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


_SCORES = (
    "| task | score | value | standard error | 95 % interval | items |",
    "|---|---|---:|---:|---:|---:|",
)


def as_markdown(results: Sequence[Summary], about: Mapping[str, Any]) -> bytes:
    """What a person wants to know: a table of headlines, one of all scores, and how it was done."""
    lines = [f"# Evaluation of {about['model']}", "", *headlines(results), ""]
    if any(one.compared for one in results):
        lines += [f"Against {about['baseline']['model']} ({about['baseline']['layer_spec']}):", ""]
        lines += [*differences(results), ""]
    lines += ["## All scores", "", *_SCORES]
    for one in results:
        for name, score in one.scores.items():
            lines.append(_row(one.measured.task.name, name, score))
    for one in results:
        if one.groups:
            lines += ["", f"## {one.measured.task.name} by part ({one.measured.task.metric})", ""]
            lines += ["| part | value | 95 % interval | items |", "|---|---:|---:|---:|"]
            lines += [
                f"| {_cell(group)} | {number(score.value)} | {_interval(score)} | {score.items} |"
                for group, score in one.groups.items()
            ]
    lines += ["", "## How", ""]
    told = {name.replace("_", " "): _told(value) for name, value in about.items() if value is not None}
    lines += [f"- {name}: {_cell(value or 'none')}" for name, value in told.items()]
    for one in results:
        lines.append(f"- {_cell(one.measured.task.name)}: {_how(one)}")
    return ("\n".join(lines) + "\n").encode(errors="replace")


def headlines(results: Sequence[Summary]) -> list[str]:
    """A Markdown table of each task's first score."""
    return [*_SCORES] + [
        _row(one.measured.task.name, one.measured.task.metric, one.scores[one.measured.task.metric])
        for one in results
        if one.measured.task.metric in one.scores
    ]


def changes(results: Sequence[Summary]) -> list[str]:
    """A line a task: how its first score differs from the baseline's."""
    lines = []
    for one in results:
        task = one.measured.task
        if task.metric in one.compared:
            pair = one.compared[task.metric]
            found = pair.comparison
            p_value = "" if found.p_value is None else f", McNemar p {found.p_value:.3g}"
            lines.append(
                f"{visible(task.name)}: {task.metric} {found.difference.value:+.4f} from "
                f"{number(pair.other)} ({_interval(found.difference, signed=True)}), better on {found.wins} "
                f"and worse on {found.losses} of {found.difference.items} items{p_value}"
            )
    return lines


def differences(results: Sequence[Summary]) -> list[str]:
    """A Markdown table of what has changed from the baseline."""
    lines = [
        "| task | score | baseline | difference | 95 % interval | better | worse | McNemar p | items |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        for name, pair in one.compared.items():
            found = pair.comparison
            p_value = "" if found.p_value is None else f"{found.p_value:.3g}"
            sure = "**" if found.difference.excludes_zero else ""
            lines.append(
                f"| {_cell(one.measured.task.name)} | {name} | {number(pair.other)} | "
                f"{sure}{found.difference.value:+.4f}{sure} | {_interval(found.difference, signed=True)} | "
                f"{found.wins} | {found.losses} | {p_value} | {found.difference.items} |"
            )
    return lines


def _row(task: str, name: str, score: Estimate) -> str:
    kind = metric(name)
    shown = "" if kind.shown is None else f" ({kind.shown_as} {number(kind.shown(score.value))})"
    error = "" if math.isnan(score.error) else number(score.error)
    cells = (_cell(task), name, f"{number(score.value)}{shown}", error, _interval(score), str(score.items))
    return f"| {' | '.join(cells)} |"


def _interval(score: Estimate, *, signed: bool = False) -> str:
    if not math.isfinite(score.low):
        return "unknown"
    return (
        f"{score.low:+.4f} to {score.high:+.4f}" if signed else f"{number(score.low)} to {number(score.high)}"
    )


def _how(one: Summary) -> str:
    task = one.measured.task
    items, tokens = one.cut
    parts = [f"{len(task.items)} of {task.total} items", f"{task.few_shot} examples"]
    parts.append("through the chat template" if task.chat else "as text")
    parts.append(f"{items} contexts too long, cut by {tokens} tokens" if items else "no context too long")
    return ", ".join(parts)


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(part)}" for key, part in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list | tuple) else str(value)


def _cell(text: str) -> str:
    return " ".join(visible(text).replace("|", "\\|").split())


def number(value: float) -> str:
    """Four digits behind the point of what is small, four in all of the rest."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.4g}"
