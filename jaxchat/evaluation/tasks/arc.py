"""The AI2 Reasoning Challenge (Clark et al. 2018), worded as by lm-evaluation-harness 0.4.13."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.choices import choice
from jaxchat.evaluation.tasks.task import Example, Task


@dataclass
class _Choices:
    text: list[str]
    label: list[str]


@dataclass
class _Row:
    id: str
    question: str
    choices: _Choices
    answerKey: str


def _read(rows: Sequence[Row]) -> list[Example]:
    return [_example(row) for row in rows]


def _example(row: Row) -> Example:
    own = row.read(_Row)
    if own.answerKey not in own.choices.label or len(own.choices.label) != len(own.choices.text):
        raise row.wrong(f"answerKey is {own.answerKey!r}; expected one of choices.label: {own.choices.label}")
    label = own.choices.label.index(own.answerKey)
    question = f"Question: {own.question}\nAnswer:"
    return choice(row, question=question, choices=own.choices.text, label=label, id=own.id)


def _files(folder: str, *splits: str) -> tuple[str, ...]:
    kinds = ("/*.arrow", "-*.parquet", "*.jsonl*")
    return tuple(f"*/{folder}/{split}{kind}" for split in splits for kind in kinds)


TASKS = tuple(
    Task(
        name=name,
        about=f"{folder}: questions of science at school, the likeliest answer",
        read=_read,
        metric=metric,
        files=_files(folder, "test", "validation"),
        shots=_files(folder, "train"),
    )
    for name, folder, metric in (
        ("arc_easy", "ARC-Easy", "acc"),
        ("arc_challenge", "ARC-Challenge", "acc_per_char"),
    )
)
