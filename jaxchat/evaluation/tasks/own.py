"""Questions in a file of one's own: `choice:FILE`, `completion:FILE`, `match:FILE`, `text:FILE`.

What the columns are is in the dataclasses of rows below; texts are taken as they are.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxchat.errors import UsageError, option
from jaxchat.evaluation.checks import Match
from jaxchat.evaluation.items import Completion, Document, Generation, Request
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.choices import choice
from jaxchat.evaluation.tasks.find import DataDirectory
from jaxchat.evaluation.tasks.task import Example, Frame, Task
from jaxchat.visible import shown

BLOCK = 2000
"""Characters of the parts that a text file is scored in, each an item, so that there is an interval."""


@dataclass
class ChoiceRow:
    """A question, its choices, and the right one: its number from 0, its letter, or its text."""

    question: str
    choices: list[str]
    answer: int | str
    id: int | str | None = None


@dataclass
class CompletionRow:
    """A text and what goes on from it, the blank between included."""

    context: str
    continuation: str
    id: int | str | None = None


@dataclass
class MatchRow:
    """A prompt, the answers of which any is right, and a pattern that finds the answer in a reply.

    Without an answer the pattern need only be there.
    """

    prompt: str
    answer: str | float | list[str] | None = None
    regex: str | None = None
    id: int | str | None = None


@dataclass
class TextRow:
    """A text."""

    text: str
    id: int | str | None = None


def _choice(row: Row) -> Example:
    own = row.read(ChoiceRow)
    label = own.answer
    if isinstance(label, str):
        letters = [chr(ord("A") + number) for number in range(min(len(own.choices), 26))]
        names = own.choices if label in own.choices else letters
        if label not in names:
            raise row.wrong(
                f"the answer is {shown(label)}; expected the number of a choice from 0, its letter or text"
            )
        label = names.index(label)
    return choice(row, question=own.question, choices=own.choices, label=label, id=_id(row, own.id))


def _completion(row: Row) -> Example:
    own = row.read(CompletionRow)
    if not own.continuation:
        raise row.wrong("continuation is empty; expected a text")
    name = _id(row, own.id)

    def ask(frame: Frame) -> Completion:
        return Completion(name, Request(frame(own.context), own.continuation))

    return Example(id=name, place=row.place, ask=ask, question=own.context, answer=own.continuation)


def _match(row: Row) -> Example:
    own = row.read(MatchRow)
    if not own.prompt:
        raise row.wrong("prompt is empty; expected a text")
    if own.regex is not None:
        try:
            re.compile(own.regex)
        except (re.error, OverflowError, RecursionError) as error:
            raise row.wrong(f"regex is no pattern of Python's ({error})") from None
    answers = _answers(own.answer)
    if not answers and own.regex is None:
        raise row.wrong("has neither answer nor regex; expected one of them")
    name = _id(row, own.id)

    def ask(frame: Frame) -> Generation:
        return Generation(name, frame(own.prompt), Match(answers, own.regex))

    first = f" {answers[0]}" if answers else ""
    return Example(id=name, place=row.place, ask=ask, question=own.prompt, answer=first)


def _answers(given: str | float | list[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, list):
        return tuple(given)
    return (f"{given:.15g}" if isinstance(given, float) else str(given),)


def _text(row: Row) -> Example:
    own = row.read(TextRow)
    if not own.text.strip():
        raise row.wrong("text is empty; expected something to read")
    name = _id(row, own.id)
    return Example(id=name, place=row.place, ask=lambda frame: Document(name, own.text))


def _id(row: Row, given: int | str | None) -> str:
    return row.name if given is None else str(given)


def _texts(rows: Sequence[Row]) -> list[Example]:
    """Rows one by one, but a text file in blocks, each after what stands before it."""
    if len(rows) != 1 or rows[0].name != rows[0].path.name:
        return [_text(row) for row in rows]
    (row,) = rows
    text = row.read(TextRow).text
    bounds = blocks(text)

    def example(number: int, start: int, end: int) -> Example:
        name = f"{start}"
        return Example(
            id=name, place=f"{row.place}, block {number}", ask=lambda frame: Document(name, text, start, end)
        )

    return [example(number, start, end) for number, (start, end) in enumerate(bounds)]


def blocks(text: str, size: int = BLOCK) -> list[tuple[int, int]]:
    """Where the parts of a text begin and end: before the blanks between paragraphs, lines or words.

    None but the last is shorter than half of `size`, so blanks stand at the beginnings alone.
    """
    starts = [0]
    length = len(text.rstrip())
    while length - starts[-1] > size:
        low, high = starts[-1] + size // 2, starts[-1] + size
        starts.append(next((cut for gap in _GAPS if (cut := _last(gap, text, low, high))), high))
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


_GAPS = tuple(re.compile(gap) for gap in (r"(?<=\S)\n\s*\n", r"(?<=\S)\n", r"(?<=\S)\s"))


def _last(gap: re.Pattern[str], text: str, low: int, high: int) -> int | None:
    found = [match.start() for match in gap.finditer(text, low, high)]
    return found[-1] if found else None


def _each(example: Callable[[Row], Example], rows: Sequence[Row]) -> list[Example]:
    return [example(row) for row in rows]


def _kind(
    kind: str, read: Callable[[Sequence[Row]], list[Example]], metric: str, **more: object
) -> Callable[[str, DataDirectory | None], Task]:
    def task(name: str, directory: DataDirectory | None) -> Task:
        if not name:
            raise UsageError(f"{option('tasks')}: {kind}: names no file; give {kind}:FILE")
        settings: dict = {"few_shot": 0, "chat": False, **more}
        return Task(
            name=f"{kind}:{name}",
            about=f"{kind} of a file",
            read=read,
            metric=metric,
            paths=(_place(name, directory),),
            **settings,
        )

    return task


def _place(name: str, directory: DataDirectory | None) -> Path:
    """A file by its name here or, where there is none, in the directory of data."""
    path = Path(name)
    if directory is not None and not path.exists() and (directory.path / name).exists():
        return directory.path / name
    return path


KINDS: Mapping[str, Callable[[str, DataDirectory | None], Task]] = {
    "choice": _kind("choice", functools.partial(_each, _choice), "acc"),
    "completion": _kind("completion", functools.partial(_each, _completion), "acc"),
    "match": _kind("match", functools.partial(_each, _match), "normalized", chat=True),
    "text": _kind("text", _texts, "bits_per_byte", few_shot=None, chat=None),
}
"""What stands before the `:` -> the task of a file."""
