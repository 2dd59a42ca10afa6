"""What a task is: where its rows lie, how one is asked, and what its score is called. No task is here."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxchat.errors import UsageError, option
from jaxchat.evaluation.items import Item, Prompt, Turn
from jaxchat.evaluation.rows import Row

Frame = Callable[[str], Prompt]
"""A question -> all that is said to the model: a description, examples and the question."""


@dataclass(frozen=True)
class Example:
    """A row as it is asked.

    Attributes:
      id: its name in the task.
      place: where it comes from, for messages.
      ask: makes the item, given what frames its question.
      question: the question, as the examples of others show it.
      answer: what follows it there, with the blank between.
      group: the part of the task that it belongs to; its examples are of the same.
      about: what stands before all examples.
    """

    id: str
    place: str
    ask: Callable[[Frame], Item]
    question: str = ""
    answer: str = ""
    group: str = ""
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
      name, about: for people.
      files: patterns of the files of its questions, by preference; the first that is there counts.
      read: rows -> examples, one a question.
      metric: the headline.
      shots: patterns of the files that examples come from; without them, the other questions.
      few_shot: how many examples it has where nobody says; None where it can have none.
      in_order: examples are the first ones, else drawn.
      chat: whether its questions go through a chat template where nobody says; None where they cannot.
      folders: whether its files may lie in several folders.
      paths: its files, where they are known.
      needs: packages that its checks import.
    """

    name: str
    about: str
    read: Callable[[Sequence[Row]], list[Example]]
    metric: str
    files: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    few_shot: int | None = 0
    in_order: bool = False
    chat: bool | None = False
    folders: bool = False
    paths: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A task whose items are made: all that asking a model takes.

    Attributes:
      files: that the questions come from.
      few_shot: examples before each question.
      chat: whether questions go through the chat template.
      total: questions that there are, of which `items` are some.
    """

    name: str
    about: str
    metric: str
    items: tuple[Item, ...]
    files: tuple[Path, ...] = ()
    few_shot: int = 0
    chat: bool = False
    total: int = 0


def framed(example: Example, shots: Sequence[Example], *, chat: bool) -> Frame:
    """What is said to the model with a question: description, examples, question.

    As lm-evaluation-harness has it: a blank line between. In a chat examples are turns, and the description
    begins the first of them.
    """

    def text(question: str) -> str:
        shown = "".join(f"{shot.question}{shot.answer}\n\n" for shot in shots)
        return f"{example.about}{shown}{question}"

    def turns(question: str) -> tuple[Turn, ...]:
        said = [
            turn
            for shot in shots
            for turn in (Turn("user", shot.question), Turn("assistant", shot.answer.removeprefix(" ")))
        ]
        said.append(Turn("user", question))
        return (Turn("user", example.about + said[0].content), *said[1:])

    return turns if chat else text


def shots_of(
    task: Task, example: Example, pools: Mapping[str, Sequence[Example]], count: int, seed: int
) -> list[Example]:
    """The examples of a question: the same for all of a group, but never the question itself.

    Raises:
      UsageError: there are not enough.
    """
    if not count:
        return []
    pool = pools.get(example.group, ())
    order = range(len(pool))
    chosen = (
        [pool[n] for n in order[: count + 1]] if task.in_order else _drawn(task, example, pool, count, seed)
    )
    others = [one for one in chosen if (one.question, one.answer) != (example.question, example.answer)]
    if len(others) < count:
        of_group = f" of {example.group}" if example.group else ""
        raise UsageError(
            f"{option('few_shot')} is {count}, but {task.name} has {len(pool)} rows{of_group} to take "
            "examples from; choose fewer"
        )
    return others[:count]


def _drawn(task: Task, example: Example, pool: Sequence[Example], count: int, seed: int) -> list[Example]:
    draw = random.Random(f"{seed} {task.name} {example.group}")
    return draw.sample(list(pool), min(count + 1, len(pool)))
