"""IFEval (Zhou et al. 2023, arXiv 2311.07911): instructions that a program can verify."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.evaluation.ifeval import INSTRUCTIONS, Instructions
from jaxchat.evaluation.items import Generation
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.task import Example, Frame, Task
from jaxchat.typed import checked
from jaxchat.visible import shown


@dataclass
class _Row:
    key: int
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


def _read(rows: Sequence[Row]) -> list[Example]:
    return [_example(row) for row in rows]


def _example(row: Row) -> Example:
    own = row.read(_Row)
    if not own.instruction_id_list or len(own.instruction_id_list) != len(own.kwargs):
        raise row.wrong(
            f"has {len(own.instruction_id_list)} instructions and {len(own.kwargs)} kwargs; expected as "
            "many, and at least one"
        )
    asked = tuple(
        (name, _arguments(row, name, given))
        for name, given in zip(own.instruction_id_list, own.kwargs, strict=True)
    )

    def ask(frame: Frame) -> Generation:
        return Generation(str(own.key), frame(own.prompt), Instructions(asked), max_new_tokens=1280)

    return Example(id=str(own.key), place=row.place, ask=ask)


def _arguments(row: Row, name: str, given: dict[str, Any]) -> str:
    """What an instruction asks for, as JSON. Rows of some files have every argument, most of them null."""
    if name not in INSTRUCTIONS:
        raise row.wrong(f"no instruction {shown(name)}; expected some of {', '.join(INSTRUCTIONS)}")
    advice = f"expected {', '.join(INSTRUCTIONS[name].arguments) or 'no arguments'}"
    values = {}
    for key, kind in INSTRUCTIONS[name].arguments.items():
        if given.get(key) is None:
            raise row.wrong(f"kwargs: {key} of {name} is missing; {advice}")
        value = given[key]
        if isinstance(value, float) and value.is_integer():  # where a column of numbers has nulls, too
            value = int(value)
        values[key] = checked(value, kind, where=f"{row.place}: kwargs.{key}", advice=advice)
    return json.dumps(values)


TASKS = (
    Task(
        name="ifeval",
        about="IFEval: instructions that can be verified, and whether replies follow them",
        read=_read,
        metric="prompt_strict",
        files=("*/ifeval/*.jsonl*", "*/ifeval/*.parquet", "*/ifeval/*.arrow"),
        few_shot=None,
        chat=True,
        needs=("langdetect",),
    ),
)
