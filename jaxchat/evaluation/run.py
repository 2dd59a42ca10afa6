"""Asking a model all items of some tasks, in groups, with what is known already left out."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxchat.errors import JaxchatError, option
from jaxchat.evaluation.items import Figure, Item, Outcome, Probe, digest
from jaxchat.evaluation.tasks import Prepared
from jaxchat.typed import Count, Finite, checked

if TYPE_CHECKING:
    from jaxchat.runtime import Model

GROUP = 16
"""Work of a group of items for each sequence of a batch: what is asked, and kept, at once."""


@dataclass(frozen=True)
class Measured:
    """A task, and what came of each of its items, in their order."""

    task: Prepared
    outcomes: tuple[Outcome, ...]


def evaluate(
    model: "Model",
    tasks: Sequence[Prepared],
    *,
    batch: int = 8,
    window: int | None = None,
    stride: int | None = None,
    results: MutableMapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Asks a model, under its plan, all items of tasks.

    Items are asked in groups that depend on the task and `batch` alone, so that an interrupted run goes on to
    the same numbers, to the last bit. Other values of `batch` give the same but for rounding.

    Args:
      model: under its plan.
      tasks: from `tasks.prepare`.
      batch: sequences computed together.
      window, stride: of long texts, see `likelihood.ModelProbe`.
      results: what is known already, by task, item and `digest`; filled on the way. JSON values.
      progress: called with how many of how many items are known.

    Raises:
      UsageError: a task and the model do not go together.
      JaxchatError: the model's logits are not finite, or `results` holds something else.
    """
    from jaxchat.evaluation.likelihood import ModelProbe

    probe = ModelProbe(model, batch, window, stride)
    return asked(probe, tasks, most=GROUP * batch, results=results, progress=progress)


def asked(
    probe: Probe,
    tasks: Sequence[Prepared],
    *,
    most: int,
    results: MutableMapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """The same with whatever answers; `most` is the work of a group."""
    results = {} if results is None else results
    report = progress or (lambda done, total: None)
    keys = [[key_of(task, item) for item in task.items] for task in tasks]
    total = sum(map(len, keys))
    done = sum(key in results for part in keys for key in part)
    for task, own in zip(tasks, keys, strict=True):
        for group in groups(task.items, most):
            missing = [number for number in group if own[number] not in results]
            if not missing:
                continue
            report(done, total)
            outcomes = _measure(task, [task.items[number] for number in group], probe)
            for number, outcome in zip(group, outcomes, strict=True):
                if own[number] not in results:
                    results[own[number]] = _kept(outcome)
            done += len(missing)
    report(done, total)
    return [
        Measured(task, tuple(_read(key, results[key]) for key in own))
        for task, own in zip(tasks, keys, strict=True)
    ]


def key_of(task: Prepared, item: Item) -> str:
    """The name of an item's result."""
    return f"{task.name}\t{item.id}\t{digest(item)}"


def groups(items: Sequence[Item], most: int) -> Iterator[range]:
    """The numbers of items that are asked together: of one kind, and about as much work each."""
    start = work = 0
    for number, item in enumerate(items):
        if number > start and (work + item.work > most or type(item) is not type(items[start])):
            yield range(start, number)
            start, work = number, 0
        work += item.work
    if start < len(items):
        yield range(start, len(items))


def _measure(task: Prepared, items: Sequence[Item], probe: Probe) -> list[Outcome]:
    outcomes = type(items[0]).measure(items, probe)
    for item, outcome in zip(items, outcomes, strict=True):
        for name, figure in outcome.figures.items():
            if not math.isfinite(figure.value):
                raise JaxchatError(
                    f"{task.name}: item {item.id}: {name} is {figure.value}: the model's logits are not "
                    f"finite (NaN or infinity); the checkpoint is broken or the dtype too narrow, try "
                    f"{option('dtype', 'float32')}"
                )
    return outcomes


@dataclass(frozen=True)
class _Result:
    """An outcome as it is kept."""

    figures: dict[str, tuple[Finite, Finite]]
    cut: Count
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


def _kept(outcome: Outcome) -> list[Any]:
    figures = {name: list(figure) for name, figure in outcome.figures.items()}
    return [{"figures": figures, "cut": outcome.cut, "detail": dict(outcome.detail)}]


def _read(key: str, value: Any) -> Outcome:
    advice = "delete the file, or give another directory"
    where = f"the result {key.replace(chr(9), ' ')}"
    (kept,) = checked(value, tuple[_Result], where=where, advice=advice)
    figures: Mapping[str, Figure] = {name: Figure(*pair) for name, pair in kept.figures.items()}
    return Outcome(figures, kept.cut, kept.detail)
