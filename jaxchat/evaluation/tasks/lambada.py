"""LAMBADA (Paperno et al. 2016; OpenAI's variant): the last word of a passage.

As by lm-evaluation-harness 0.4.13, where it is called lambada_openai.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.evaluation.items import Completion, Request
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.task import Example, Frame, Task


@dataclass
class _Row:
    text: str


def _read(rows: Sequence[Row]) -> list[Example]:
    return [_example(row) for row in rows]


def _example(row: Row) -> Example:
    question, _, word = row.read(_Row).text.rpartition(" ")
    if not question or not word:
        raise row.wrong("text has no last word after a blank; expected a passage")

    def ask(frame: Frame) -> Completion:
        return Completion(row.name, Request(frame(question), f" {word}"))

    return Example(id=row.name, place=row.place, ask=ask, question=question, answer=f" {word}")


TASKS = (
    Task(
        name="lambada",
        about="LAMBADA: the last word of a passage, right if each of its tokens is the likeliest",
        read=_read,
        metric="acc",
        files=("*lambada*test*.jsonl*", "*lambada*/*test*.parquet", "*lambada*/test/*.arrow"),
        few_shot=0,
    ),
)
