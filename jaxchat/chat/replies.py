"""Replies while they are drawn: batches of them, streams of one, and their results.

Joins what the engine draws with healing and text; what they go on with is decided above, row by row.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.chat.message_text import MessageText
from jaxchat.chat.opening import Opening
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.engine.generation import FinishReason, Generation, Limits
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import Session
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.text.healing import SETTLED_AFTER, Healing, byte_length, settle
from jaxchat.text.reasoning import Piece, ThoughtTags
from jaxchat.visible import shown


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one batch went.

    Attributes:
      prefill_tokens, prefill_seconds: prompt tokens computed, and the time until the first new token.
      decode_tokens, decode_seconds: new tokens after the first, and the time they took.
      draft_steps: steps that verified a draft, each sequence's counted.
      draft_tokens: tokens that those gave: one each, and the drafted ones that were accepted.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    draft_steps: int = 0
    draft_tokens: int = 0

    @property
    def tokens_a_step(self) -> float | None:
        """How many tokens a step gave that verified a draft, 1 or more; None where none did."""
        return self.draft_tokens / self.draft_steps if self.draft_steps else None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, all sequences of the batch together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """One finished continuation.

    Attributes:
      token_ids: the new tokens as they were drawn, the one that ended it included.
      text: what was streamed: the prefix or suffix and the text of the new tokens, without special tokens,
        stop strings and thought tags; None where the model has no tokenizer.
      finish_reason: `stop` (end-of-sequence, stop token or stop string), `length` (max_new_tokens) or
        `context` (the context is full).
      logprobs: natural log-probability of each token under the model, before temperature and penalties.
      prompt_tokens: tokens of the prompt.
      timings: of the batch it was computed in.
      content: the part of `text` that is not reasoning.
      reasoning: the rest, "" if there was none; None where no reasoning is told from content: outside of
        chats, and with models whose template names no thought tags.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[float]
    prompt_tokens: int
    timings: Timings
    content: str | None = None
    reasoning: str | None = None

    def __repr__(self) -> str:
        """What it is, in a line."""
        said = "" if self.text is None else f"{shown(self.text)}, "
        return f"<Result {said}{len(self.token_ids)} tokens, finish_reason={self.finish_reason!r}>"


@dataclasses.dataclass(frozen=True, repr=False)
class Score:
    """Log-likelihood of a text.

    Attributes:
      token_ids: all tokens.
      logprobs: natural log-probability of each token after the first, given those before it.
    """

    token_ids: list[int]
    logprobs: list[float]

    def __repr__(self) -> str:
        """What it is, in a line."""
        return f"<Score of {len(self.token_ids)} tokens, total={self.total:.4g} nats>"

    @property
    def total(self) -> float:
        """Log-likelihood of the whole, in nats."""
        return float(np.sum(self.logprobs))


class Likelihood(NamedTuple):
    """How probable a continuation is, in nats, and whether each of its tokens is the most probable one."""

    total: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """What one sequence of a batch goes on with, and how.

    Attributes:
      opening: where it begins, and with what.
      options: how it is drawn; `seed` is this sequence's own.
      tags: what the model thinks between; None tells no reasoning apart.
    """

    opening: Opening
    options: GenerateOptions
    tags: ThoughtTags | None = None

    @classmethod
    def of_prompt(cls, ids: Sequence[int], options: GenerateOptions) -> "Row":
        """A text that goes on as it is."""
        return cls(Opening(role="", prompt=tuple(ids)), options)

    def stop_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """The ids that end it, where `eos_ids` end the model's texts."""
        own = frozenset(self.options.stop_token_ids or ())
        return own if self.options.ignore_eos else own.union(eos_ids, self.opening.stop_ids)


class Reply:
    """What is drawn for one sequence: its ids as they are settled, what may come next, and its text.

    Attributes:
      row: what it goes on with.
      ids: of the whole message so far.
      text: of them.
      drawn, logprobs: the tokens as they came.
    """

    def __init__(self, vocabulary: Vocabulary, row: Row):
        opening, options = row.opening, row.options
        if options.ignore_eos:
            opening = dataclasses.replace(opening, stop_ids=(), stop_strings=(), tail="")
        if options.stop_strings and vocabulary.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; use stop_token_ids")
        self.row = row
        self.stop_ids = row.stop_ids(vocabulary.eos_ids)
        self.drawn: list[int] = []
        self.logprobs: list[float] = []
        self._tokenizer, self._size = vocabulary.tokenizer, vocabulary.size
        self._healing: Healing | None = None
        self._joint: int | None = None
        if opening.given or (opening.lead and opening.continued is None):
            assert vocabulary.tokenizer is not None
            self._healing = Healing(vocabulary.tokenizer, opening.ids)
            self._joint = byte_length(vocabulary.tokenizer, opening.ids)
        kept = self._healing.kept if self._healing else len(opening.ids)
        self.ids = list(opening.ids[:kept])
        self._beyond = 0
        ends = vocabulary.eos_ids if opening.role and not options.ignore_eos else ()
        self.text = MessageText(
            vocabulary.tokenizer, opening, kept=kept, tags=row.tags, stops=options.stop_strings, end_ids=ends
        )

    @property
    def context(self) -> list[int]:
        """The ids of the prompt and of the message so far."""
        return [*self.row.opening.prompt, *self.ids]

    @property
    def just_joined(self) -> bool:
        """Whether the ids where given and generated text meet can be put right, and little follows them."""
        return self._joint is not None and self._beyond == SETTLED_AFTER

    def allowed(self) -> np.ndarray | None:
        """bool [V]: the ids the next token may be; None is all."""
        if self._healing and (ids := self._healing.allowed()):
            mask = np.zeros(self._size, bool)
            mask[[i for i in ids if i < self._size]] = True
            return mask
        if self.row.opening.resumes_ended and not self._beyond:
            mask = np.ones(self._size, bool)
            mask[list(self.stop_ids)] = False
            return mask
        return None

    def push(self, token_id: int, logprob: float) -> bool:
        """Takes a drawn token; true if it says nothing beyond what was given."""
        self.drawn.append(token_id)
        self.logprobs.append(logprob)
        self.ids.append(token_id)
        spelled = self._healing is not None and self._healing.push(token_id)
        if not spelled:
            self._beyond += 1
        return spelled

    def settle(self) -> None:
        """Puts the ids where given and generated text meet right."""
        if self._joint is not None and self._tokenizer is not None:
            prompt = self.row.opening.prompt
            self.ids = settle(self._tokenizer, self.ids, self._joint, after=prompt[-1] if prompt else None)


class Batch:
    """Replies that are drawn together: drives a `Generation` and keeps each one's text, and the timings.

    Args:
      vocabulary: of the model.
      session: what runs it; its sequences get what the rows begin with.
      rows: one a sequence; None leaves it out.
      on_end: told when `pieces` has ended, for whatever reason.

    Attributes:
      replies: by sequence, those that are not left out.
      generation: what draws them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        session: Session,
        rows: Sequence[Row | None],
        on_end: Callable[["Batch"], None] | None = None,
    ):
        self.replies = {n: Reply(vocabulary, row) for n, row in enumerate(rows) if row is not None}
        for number, reply in self.replies.items():
            session.set_ids(reply.context, number)
        self._session, self._on_end = session, on_end
        self._started = self._last = time.perf_counter()
        self._first: float | None = None
        options = [GenerateOptions() if row is None else row.options for row in rows]
        self.generation = Generation(
            session,
            _sampling_params(options),
            [o.seed for o in options],
            [self._limits(number) for number in range(len(rows))],
        )
        self._prompts = {number: len(session.ids[number]) for number in self.replies}
        self._prefilled = sum(n - min(session.cached[r], n - 1) for r, n in self._prompts.items())

    def _limits(self, number: int) -> Limits | None:
        if number not in self.replies:
            return None
        reply = self.replies[number]
        options = reply.row.options
        return Limits(options.max_new_tokens, reply.stop_ids, options.overflow)

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Runs to the end, yielding (sequence, text) whenever text becomes certain."""
        try:
            yield from self._run()
        finally:
            if self._on_end is not None:
                self._on_end(self)

    def _run(self) -> Iterator[tuple[int, Piece]]:
        for number, reply in self.replies.items():
            yield from ((number, piece) for piece in reply.text.begin())
            self._restrict(number)
        for number, token, logprob in self.generation:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            yield from ((number, piece) for piece in self._push(number, token, logprob))
        for number, reply in self.replies.items():  # those the context's end stopped
            yield from ((number, piece) for piece in reply.text.end())

    def _push(self, number: int, token: int, logprob: float) -> list[Piece]:
        reply, reasons = self.replies[number], self.generation.finish_reasons
        if reply.push(token, logprob):
            self.generation.uncount(number)
        elif reply.just_joined:
            self._settle_cache(number)
        pieces = reply.text.push(token)
        if reply.text.stopped:
            self.generation.stop(number)
        if reasons[number] is not None:
            return [*pieces, *reply.text.end()]
        self._restrict(number)
        return pieces

    def _restrict(self, number: int) -> None:
        if (allowed := self.replies[number].allowed()) is not None:
            self.generation.allow(number, allowed)

    def _settle_cache(self, number: int) -> None:
        """Puts the joint's ids right in the cache while little follows it."""
        reply = self.replies[number]
        if self._session.ids[number] == reply.context:  # the oldest tokens were not dropped
            reply.settle()
            self._session.set_ids(reply.context, number)

    def result(self, number: int) -> Result:
        """A sequence's result as it stands; one that was cut short by the caller counts as `stop`."""
        reply = self.replies[number]
        text = reply.text
        return Result(
            token_ids=reply.drawn,
            text=text.text,
            finish_reason=self.generation.finish_reasons[number] or "stop",
            logprobs=reply.logprobs,
            prompt_tokens=self._prompts[number],
            timings=self._timings(),
            content=None if text.text is None else text.part("content"),
            reasoning=text.part("reasoning") if text.thinks else None,
        )

    def _timings(self) -> Timings:
        decoded = sum(max(len(reply.drawn) - 1, 0) for reply in self.replies.values())
        first = self._first or self._last
        tally = self.generation.tally
        times = first - self._started, decoded, self._last - first
        return Timings(self._prefilled, *times, tally.steps, tally.tokens)


class TextStream:
    """The pieces of one continuation as they become certain; iterate it, then read `result`.

    Iterating yields strings: reasoning and content, without the tags. `parts` tells the two apart. `close`
    ends it early, after the token last received.
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        self._pieces = batch.pieces()

    def __repr__(self) -> str:
        """What it is, in a line."""
        return f"<TextStream: iterate it for the text; so far {self.result!r}>"

    def __iter__(self) -> Iterator[str]:
        return (piece.text for _, piece in self._pieces)

    def parts(self) -> Iterator[Piece]:
        """The same pieces with their kind, "content" or "reasoning"."""
        return (piece for _, piece in self._pieces)

    def stop(self) -> None:
        """Ends the continuation after the token last received; a signal handler may call it."""
        self._batch.generation.stop(0)

    def close(self) -> None:
        """Ends the continuation here."""
        self.stop()
        next(self._pieces, None)  # lets a stream that was never started run its end
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> Result:
        """What was generated so far; complete once the iteration has ended."""
        return self._batch.result(0)


def numbered(options: GenerateOptions, number: int) -> GenerateOptions:
    """The options of one of several: number n draws with the seed `seed + n`."""
    return dataclasses.replace(options, seed=(options.seed + number) % 2**32)


def _sampling_params(options: Sequence[GenerateOptions]) -> SamplingParams:
    """The sampling parameters of sequences, one each."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty")  # fmt: skip
    values: dict[str, Any] = {name: [getattr(own, name) for own in options] for name in names}
    return SamplingParams.make(len(options), **values)
