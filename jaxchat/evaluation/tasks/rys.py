"""The probes of RYS (github.com/dnhkng/RYS), by which repeats of layers were found: sums, and feelings.

Replies of the second are compared with the intensities of 0 to 10 that the prompt asks for
(`reference_answer_fullscale`), not with those of RYS itself, which add up to 10.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxchat.evaluation.checks import Feelings, NearNumber
from jaxchat.evaluation.items import Generation
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.task import Example, Frame, Task


@dataclass
class _Sum:
    question: str
    answer: int


@dataclass
class _Intensities:
    emotion1: str
    emotion2: str
    emotion3: str
    emotion4: str
    emotion1_score: float
    emotion2_score: float
    emotion3_score: float
    emotion4_score: float


@dataclass
class _Dialogue:
    prompt: str
    reference_answer_fullscale: _Intensities


def _sums(rows: Sequence[Row]) -> list[Example]:
    def example(row: Row) -> Example:
        own = row.read(_Sum)

        def ask(frame: Frame) -> Generation:
            return Generation(row.name, frame(own.question), NearNumber(own.answer), max_new_tokens=32)

        return Example(id=row.name, place=row.place, ask=ask)

    return [example(row) for row in rows]


def _dialogues(rows: Sequence[Row]) -> list[Example]:
    def example(row: Row) -> Example:
        own = row.read(_Dialogue)
        right = own.reference_answer_fullscale
        pairs = (
            (right.emotion1, right.emotion1_score),
            (right.emotion2, right.emotion2_score),
            (right.emotion3, right.emotion3_score),
            (right.emotion4, right.emotion4_score),
        )
        # The reply names a feeling of several words by the last of them, as EQ-Bench reads it.
        check = Feelings(tuple(((re.findall(r"\w+", name) or [""])[-1], value) for name, value in pairs))

        def ask(frame: Frame) -> Generation:
            return Generation(row.name, frame(own.prompt), check, max_new_tokens=80)

        return Example(id=row.name, place=row.place, ask=ask)

    return [example(row) for row in rows]


def _task(
    name: str, about: str, file: str, read: Callable[[Sequence[Row]], list[Example]], metric: str
) -> Task:
    return Task(
        name=name, about=about, read=read, metric=metric, files=(f"*/rys/{file}",), few_shot=None, chat=True
    )


TASKS = (
    _task("rys_math", "RYS: sums that are guessed", "math_120.json", _sums, "partial"),
    _task("rys_math_16", "RYS: 16 hard sums that are guessed", "math_16.json", _sums, "partial"),
    _task("rys_eq", "RYS: feelings in dialogues (EQ-Bench)", "eq_140.json", _dialogues, "eq_bench"),
    _task("rys_eq_16", "RYS: feelings in 16 dialogues (EQ-Bench)", "eq_16.json", _dialogues, "eq_bench"),
)
