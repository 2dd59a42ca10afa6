"""Tasks as samples for a search: questions that the likelihood of continuations answers."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxchat.analysis.sweep import Outcome
from jaxchat.errors import UsageError, option
from jaxchat.evaluation import items as kinds
from jaxchat.evaluation.items import Found, Request
from jaxchat.evaluation.likelihood import encode_pair
from jaxchat.evaluation.metrics import metric as metric_of
from jaxchat.evaluation.tasks import Prepared
from jaxchat.search.sample import Item, Measure, Row, Sample
from jaxchat.visible import shown

if TYPE_CHECKING:
    from jaxchat.runtime import Model


class _NoLikelihoodError(Exception):
    """An item asks for more than the likelihood of continuations."""


class _Asking:
    """A probe that notes what is asked, and knows no answer."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def likelihoods(self, requests: Sequence[Request]) -> list[Found]:
        self.asked += requests
        return [Found(1.0, 1, False) for _ in requests]

    def passages(self, passages: Sequence[tuple[str, str]]) -> list[Found]:
        raise _NoLikelihoodError

    def replies(self, items: Sequence[kinds.Generation]) -> list[kinds.Reply]:
        raise _NoLikelihoodError


class _Answering(_Asking):
    """A probe that has the answers."""

    def __init__(self, answers: Mapping[Request, Found]):
        super().__init__()
        self._answers = answers

    def likelihoods(self, requests: Sequence[Request]) -> list[Found]:
        return [self._answers[request] for request in requests]


def task_sample(model: "Model", task: Prepared, metric: str | None = None) -> Sample:
    """The items of a task, and one of its metrics, by default its headline.

    Raises:
      UsageError: its items take replies or long texts, it has no such metric, or an item is too long.
    """
    name = metric or task.metric
    about = metric_of(name)
    measure = Measure(f"{task.name} {name}", f"of {task.name}, {name}", higher=about.higher_is_better)
    return Sample(measure, tuple(_item(model, task, item, name) for item in task.items))


def split_items(sample: Sample, share: float, seed: int) -> tuple[Sample, Sample]:
    """Items drawn at random for the search, and the rest for the validation.

    Raises:
      UsageError: there are not two.
    """
    if len(sample.items) < 2:
        raise UsageError(
            f"{sample.measure.name} has {len(sample.items)} item(s); a search takes some, and the validation "
            "others"
        )
    order = list(range(len(sample.items)))
    random.Random(seed).shuffle(order)  # the same for every metric of a task
    count = min(max(round(len(order) * share), 1), len(order) - 1)
    parts = sorted(order[:count]), sorted(order[count:])
    first, second = (Sample(sample.measure, tuple(sample.items[n] for n in part)) for part in parts)
    return first, second


def _item(model: "Model", task: Prepared, item: kinds.Item, metric: str) -> Item:
    asking = _Asking()
    try:
        (outcome,) = type(item).measure([item], asking)
    except _NoLikelihoodError:
        raise UsageError(
            f"{task.name} is not scored by the likelihood of continuations, which a search takes; choose "
            f"another task for {option('objective')}, and evaluate this one afterwards"
        ) from None
    if metric not in outcome.figures:
        raise UsageError(
            f"{option('metric')}: {task.name} has no metric {shown(metric)}; it has "
            f"{', '.join(outcome.figures)}"
        )
    requests = list(dict.fromkeys(asking.asked))
    rows = tuple(_row(model, task, item, request) for request in requests)

    def score(outcome: Outcome, tokens: np.ndarray) -> tuple[float, float]:
        answers = {
            request: Found(float(outcome.nats[n]), int(tokens[n]), bool(outcome.greedy[n]))
            for n, request in enumerate(requests)
        }
        if not all(np.isfinite(found.nats) for found in answers.values()):
            return float("nan"), 1.0
        (found,) = type(item).measure([item], _Answering(answers))
        figure = found.figures[metric]
        return figure.value, figure.weight

    return Item(rows, score)


def _row(model: "Model", task: Prepared, item: kinds.Item, request: Request) -> Row:
    context, continuation = encode_pair(model, *request)
    room = model.engine.max_length - len(continuation)
    if not continuation or room < 1:
        raise UsageError(
            f"{task.name}: item {shown(item.id)} has {len(continuation)} tokens to predict; expected 1 to "
            f"{model.engine.max_length - 1}"
        )
    return Row(tuple(context[-room:]), tuple(continuation))
