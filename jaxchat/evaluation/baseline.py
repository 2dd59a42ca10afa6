"""An earlier evaluation to compare with: its scores item by item, from the `evaluation.json` it wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.evaluation.items import Item, digest
from jaxchat.evaluation.tasks import Prepared
from jaxchat.files import read_json
from jaxchat.typed import Finite, checked

FORMAT = 1
"""Of `evaluation.json`."""

Weight = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


@dataclass(frozen=True)
class Column:
    """A metric of items: its values and weights, [n] each."""

    values: list[Finite]
    weights: list[Weight]


@dataclass(frozen=True)
class Rows:
    """Items by column: their ids, what they asked (`items.digest`), and metrics; a metric has all or none."""

    ids: list[str]
    digests: list[str]
    metrics: dict[str, Column]


@dataclass(frozen=True)
class _Task:
    name: str
    rows: Rows


@dataclass(frozen=True)
class _File:
    format: int
    model: str
    layer_spec: str
    tasks: list[_Task]


class Paired(NamedTuple):
    """Items of a task that the baseline has, too.

    Attributes:
      own, other: their numbers here and there, in the same order.
      changed: how many of them were asked otherwise there.
    """

    own: Sequence[int]
    other: Sequence[int]
    changed: int


@dataclass(frozen=True)
class Baseline:
    """An earlier evaluation.

    Attributes:
      path: its file.
      model, layer_spec: what was evaluated.
      tasks: the items of each.
    """

    path: Path
    model: str
    layer_spec: str
    tasks: Mapping[str, Rows]

    def paired(self, task: Prepared) -> Paired:
        """The items of a task that are there, too."""
        rows = self.tasks.get(task.name, Rows([], [], {}))
        places = {name: number for number, name in enumerate(rows.ids)}
        pairs = [(n, places[item.id]) for n, item in enumerate(task.items) if item.id in places]
        changed = sum(digest(_item(task, n)) != rows.digests[other] for n, other in pairs)
        return Paired([n for n, _ in pairs], [other for _, other in pairs], changed)


def _item(task: Prepared, number: int) -> Item:
    return task.items[number]


def read_baseline(path: Path) -> Baseline:
    """Reads the file that an evaluation wrote.

    Raises:
      JaxchatError: it is no such file, of another version, or damaged.
    """
    advice = f"give the evaluation.json of an earlier run with {option('baseline', 'FILE')}"
    if not path.is_file():
        raise UsageError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}; {advice}")
    found = checked(read_json(path), _File, where=str(path), advice=advice)
    if found.format != FORMAT:
        raise JaxchatError(f"{path}: format is {found.format}; this version reads {FORMAT}: evaluate it anew")
    for task in found.tasks:
        sizes = {len(task.rows.ids), len(set(task.rows.ids)), len(task.rows.digests)}
        sizes |= {
            len(part) for column in task.rows.metrics.values() for part in (column.values, column.weights)
        }
        if len(sizes) > 1:
            raise JaxchatError(
                f"{path}: the columns of {task.name} differ in length, or an id is there twice; {advice}"
            )
    return Baseline(path, found.model, found.layer_spec, {task.name: task.rows for task in found.tasks})


def remarks(baseline: Baseline, tasks: Sequence[Prepared]) -> list[str]:
    """What cannot be compared, a line each.

    Raises:
      UsageError: nothing can.
    """
    found, compared = [], 0
    for task in tasks:
        if task.name not in baseline.tasks:
            found.append(f"{baseline.path} has no {task.name}: it is not compared")
            continue
        pairs = baseline.paired(task)
        compared += len(pairs.own)
        if len(pairs.own) < len(task.items):
            found.append(
                f"{task.name}: {len(pairs.own)} of {len(task.items)} items are in {baseline.path}, too; "
                "those are compared"
            )
        if pairs.changed:
            found.append(
                f"{task.name}: {pairs.changed} of {len(pairs.own)} items were asked otherwise in "
                f"{baseline.path} (other examples, chat template, wording or data)"
            )
    if not compared:
        there = ", ".join(baseline.tasks) or "no tasks"
        raise UsageError(f"{baseline.path} has none of these items, but {there}; evaluate the same tasks")
    return found


def arrays(column: Column, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of some items, float64 [n]."""
    index = np.asarray(numbers, np.int64)
    return np.asarray(column.values, np.float64)[index], np.asarray(column.weights, np.float64)[index]
