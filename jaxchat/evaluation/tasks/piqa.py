"""PIQA (Bisk et al. 2019): how to reach a goal, worded as by lm-evaluation-harness 0.4.13."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxchat.errors import JaxchatError
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.choices import choice
from jaxchat.evaluation.tasks.task import Example, Task
from jaxchat.files import UnreadableError, read_small_text


@dataclass
class _Row:
    goal: str
    sol1: str
    sol2: str
    label: int | None = None


def _read(rows: Sequence[Row]) -> list[Example]:
    labels = {path: _labels(path) for path in dict.fromkeys(row.path for row in rows)}
    counts = {path: sum(row.path == path for row in rows) for path in labels}
    for path, own in labels.items():
        if own and len(own) != counts[path]:
            raise JaxchatError(
                f"{_labels_of(path)}: has {len(own)} labels; expected {counts[path]}, one a row of {path}"
            )
    return [_example(row, labels[row.path]) for row in rows]


def _example(row: Row, labels: Sequence[str]) -> Example:
    own = row.read(_Row)
    label = own.label
    if label is None:
        if not labels:
            raise row.wrong(
                f"has no label, and there is no {_labels_of(row.path).name} beside it; get that file"
            )
        text = labels[row.number]
        if text not in ("0", "1"):
            raise JaxchatError(f"{_labels_of(row.path)}:{row.number + 1}: is {text!r}; expected 0 or 1")
        label = int(text)
    question = f"Question: {own.goal}\nAnswer:"
    return choice(row, question=question, choices=(own.sol1, own.sol2), label=label)


def _labels_of(path: Path) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}-labels.lst")


def _labels(path: Path) -> list[str]:
    """Of `valid.jsonl` those in `valid-labels.lst`."""
    try:
        return read_small_text(_labels_of(path)).split() if _labels_of(path).exists() else []
    except UnreadableError as error:
        raise JaxchatError(f"{_labels_of(path)}: {error}; get the file again") from None


TASKS = (
    Task(
        name="piqa",
        about="PIQA: how to reach a goal, the likelier of two ways",
        read=_read,
        metric="acc",
        files=("*/piqa/valid.jsonl", "*/piqa/*validation*.parquet", "*/piqa/validation/*.arrow"),
        shots=("*/piqa/train.jsonl", "*/piqa/*train*.parquet", "*/piqa/train/*.arrow"),
    ),
)
