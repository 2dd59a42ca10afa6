"""What a model is asked, and what its answers amount to: choices, completions, texts, replies. Needs no JAX.

A kind of item is a class here. What asks a model is a `Probe`; where items come from is `tasks/`'s.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np


class Turn(NamedTuple):
    """A message of a chat."""

    role: str
    content: str


Prompt = str | tuple[Turn, ...]
"""A text that goes on as it is ("" begins one), or messages for the model's chat template."""


class Request(NamedTuple):
    """The likelihood of a continuation after a context."""

    context: Prompt
    continuation: str


class Found(NamedTuple):
    """How probable a continuation is.

    Attributes:
      nats: minus its natural log-likelihood.
      tokens: how many it has.
      greedy: whether each of them is the most probable.
      cut: tokens that were left out at the start of its context, which was too long.
    """

    nats: float
    tokens: int
    greedy: bool
    cut: int = 0


class Reply(NamedTuple):
    """What a model says: the text without reasoning, why it ended, and tokens left out of the prompt."""

    text: str
    finish_reason: str
    cut: int = 0


class Figure(NamedTuple):
    """A score of an item, which counts `weight` times in the mean: a ratio's denominator."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What came of an item.

    Attributes:
      figures: by metric, see `metrics.py`.
      cut: tokens that were left out at the start of its contexts.
      detail: what else is worth keeping, as JSON values: the choice that was made, the reply.
    """

    figures: Mapping[str, Figure]
    cut: int = 0
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Probe(Protocol):
    """What asks a model; see `likelihood.ModelProbe`."""

    def likelihoods(self, requests: Sequence[Request]) -> list[Found]:
        """How probable continuations are, one a request."""

    def passages(self, passages: Sequence[tuple[str, str]]) -> list[Found]:
        """How probable texts of any length are: (what stands before, the text), read in windows."""

    def replies(self, items: Sequence["Generation"]) -> list[Reply]:
        """What the model says, one an item."""


class Item(Protocol):
    """One question of a task."""

    @property
    def id(self) -> str:
        """Its name in the task."""

    @property
    def group(self) -> str:
        """A part of the task that it belongs to, "" for none."""

    @property
    def work(self) -> int:
        """How much it is beside others, 1 for the likelihood of a continuation."""

    @classmethod
    def measure(cls, items: Sequence[Self], probe: Probe) -> list[Outcome]:
        """Asks a model several of the same kind together."""


def digest(item: Item) -> str:
    """What tells an item from one that is asked otherwise."""
    return hashlib.blake2b(repr(item).encode(errors="surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Choice:
    """Several continuations, of which the most probable should be the right one.

    Attributes:
      requests: one a choice.
      label: which is right.
      unconditional: the same continuations after what says nothing, such as "Answer:".
    """

    id: str
    requests: tuple[Request, ...]
    label: int
    unconditional: tuple[Request, ...] | None = None
    group: str = ""

    @property
    def work(self) -> int:
        """See `Item`."""
        return len(self.requests) + len(self.unconditional or ())

    @classmethod
    def measure(cls, items: Sequence[Self], probe: Probe) -> list[Outcome]:
        """See `Item`."""
        found = iter(probe.likelihoods([r for i in items for r in (*i.requests, *(i.unconditional or ()))]))
        return [item.outcome(_take(found, item.work)) for item in items]

    def outcome(self, found: Sequence[Found]) -> Outcome:
        """What the likelihoods of the requests and of the unconditional ones say.

        Lengths are those of the choice without the blank before it, as lm-evaluation-harness (acc_norm,
        acc_bytes) and OLMo (len_norm) have it. The first of equals is the one chosen.
        """
        own, free = found[: len(self.requests)], found[len(self.requests) :]
        scores = -np.array([one.nats for one in own])
        texts = [_bare(request.continuation) for request in self.requests]
        rules = {
            "acc": scores,
            "acc_per_token": scores / [one.tokens for one in own],
            "acc_per_char": scores / [max(len(text), 1) for text in texts],
            "acc_per_byte": scores / [_bytes(text) for text in texts],
        }
        if free:
            rules["acc_uncond"] = scores + [one.nats for one in free]
        figures = {name: Figure(float(rule.argmax() == self.label)) for name, rule in rules.items()}
        right = own[self.label]
        likely = np.exp(scores - scores.max())
        figures["probability"] = Figure(float(likely[self.label] / likely.sum()))
        figures |= _of_text(right, texts[self.label])
        detail = {"chosen": int(scores.argmax()), "right": self.label, "nats": [one.nats for one in own]}
        if free:
            detail["unconditional_nats"] = [one.nats for one in free]
        return Outcome(figures, sum(one.cut for one in found), detail)


@dataclass(frozen=True)
class Completion:
    """The likelihood of one given continuation, and whether the model would have said it."""

    id: str
    request: Request
    group: str = ""

    @property
    def work(self) -> int:
        """See `Item`."""
        return 1

    @classmethod
    def measure(cls, items: Sequence[Self], probe: Probe) -> list[Outcome]:
        """See `Item`."""
        found = probe.likelihoods([item.request for item in items])
        return [item.outcome(one) for item, one in zip(items, found, strict=True)]

    def outcome(self, found: Found) -> Outcome:
        """What the likelihood says."""
        text = _bare(self.request.continuation)
        figures = {"acc": Figure(float(found.greedy)), "nats": Figure(found.nats), **_of_text(found, text)}
        figures["bits_per_byte_mean"] = Figure(figures["bits_per_byte"].value)
        return Outcome(figures, found.cut)


@dataclass(frozen=True)
class Document:
    """A text, how probable it is: read in windows, of which each sees some of what stands before.

    Attributes:
      source: what the text is a part of; one that is shared takes no memory.
      start, end: where in it.
    """

    id: str
    source: str
    start: int = 0
    end: int | None = None
    group: str = ""

    @property
    def text(self) -> str:
        """What is predicted."""
        return self.source[self.start : self.end]

    @property
    def before(self) -> str:
        """What stands before it, as far as a window may reach back."""
        return self.source[max(self.start - _REACH, 0) : self.start]

    @property
    def work(self) -> int:
        """See `Item`."""
        return 16

    def __repr__(self) -> str:
        """What it reads; its `digest` is made of this."""
        return f"Document({self.id!r}, {self.before!r}, {self.text!r})"

    @classmethod
    def measure(cls, items: Sequence[Self], probe: Probe) -> list[Outcome]:
        """See `Item`."""
        found = probe.passages([(item.before, item.text) for item in items])
        return [Outcome(_of_text(one, item.text), one.cut) for item, one in zip(items, found, strict=True)]


_REACH = 1 << 15
"""Characters before a text that a window may see: more than the overlap of any that pays."""


@dataclass(frozen=True)
class Generation:
    """A reply, which is checked.

    Attributes:
      prompt: what is said to the model.
      check: a reply's text -> its figures; a frozen dataclass, whose `repr` is part of the `digest`.
      stop: texts that end the reply, no part of it.
      max_new_tokens: the longest reply.
    """

    id: str
    prompt: Prompt
    check: Callable[[str], Mapping[str, Figure]]
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    group: str = ""

    @property
    def work(self) -> int:
        """See `Item`."""
        return 16

    @classmethod
    def measure(cls, items: Sequence[Self], probe: Probe) -> list[Outcome]:
        """See `Item`."""
        replies = probe.replies(items)
        return [
            Outcome(
                item.check(reply.text),
                reply.cut,
                {"reply": reply.text, "finish_reason": reply.finish_reason},
            )
            for item, reply in zip(items, replies, strict=True)
        ]


def _of_text(found: Found, text: str) -> dict[str, Figure]:
    size = _bytes(text)
    return {
        "nats_per_token": Figure(found.nats / found.tokens, found.tokens),
        "bits_per_byte": Figure(found.nats / math.log(2) / size, size),
    }


def _bare(continuation: str) -> str:
    """A continuation without the blank that parts it from its context."""
    return continuation.removeprefix(" ")


def _bytes(text: str) -> int:
    return max(len(text.encode(errors="surrogatepass")), 1)


def _take(found: Iterator[Found], count: int) -> list[Found]:
    return list(itertools.islice(found, count))
