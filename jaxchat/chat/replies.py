"""Text from a running batch: results, streams and the growing text of each sequence.

Joins what the engine draws with the tokenizer; which prompts run, and under which plan, is `runtime`'s part.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxchat.chat.conversation import Opening
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.engine.generation import FinishReason, Generation, generate
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import Session
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.text.healing import SETTLED_AFTER, Healing, byte_length, settle
from jaxchat.text.reasoning import Kind, Piece, ReasoningSplitter, ThoughtTags, overlap
from jaxchat.text.tokenizer import Detokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one batch went.

    Attributes:
      prefill_tokens, prefill_seconds: prompt tokens computed, and the time until the first new token.
      decode_tokens, decode_seconds: new tokens after the first, and the time they took.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the request to its first token."""
        return self.prefill_seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, all sequences of the batch together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of a text.

    Attributes:
      token_ids: all tokens.
      logprobs: natural log-probability of each token after the first, given those before it.
    """

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log-likelihood of the whole, in nats."""
        return float(np.sum(self.logprobs))


class _RowText:
    """Text of one sequence as it grows: detokenizes, holds back what may turn into a stop string, and tells
    reasoning from content.

    Args:
      tokenizer: None is no text.
      prompt_ids: what precedes the first pushed id.
      stops: strings that end the text.
      message: what a chat's message begins with.
      tags: what the model thinks between.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        message: Opening | None = None,
        tags: ThoughtTags | None = None,
    ):
        self._shown_ids = _shown_ids(tokenizer, tags)
        self._detokenizer = (
            Detokenizer(tokenizer, prompt_ids=prompt_ids, skip_special_tokens=not self._shown_ids)
            if tokenizer
            else None
        )
        self._special = frozenset(tokenizer.special_tokens.values()) if tokenizer else frozenset()
        self._stops = stops
        self._held = ""
        self._pieces: list[Piece] = []
        self._tags = tags
        self._splitter = ReasoningSplitter(tags, opened=bool(message and message.opened))
        self._given = message.given if message else ""
        self._skip = _characters_to_skip(tokenizer, prompt_ids, message) if tokenizer and message else 0
        if message and message.continued:
            self._splitter.push(message.continued)
        self.length = len(message.continued or "") + len(self._given) if message else 0
        self.stopped = False

    def begin(self) -> list[Piece]:
        """The text that is given, no draw of the model's."""
        return self._shown(self._splitter.push(self._given))

    def push(self, token_id: int) -> list[Piece]:
        """Adds a token; returns the text that is now certain."""
        if self._detokenizer is None or (
            self._shown_ids and token_id in self._special and token_id not in self._shown_ids
        ):
            return []
        return self._release(self._detokenizer.push(token_id), last=False)

    def flush(self) -> list[Piece]:
        """Ends the sequence; returns the rest of the text."""
        if self._detokenizer is None:
            return []
        rest = [] if self.stopped else self._release(self._detokenizer.flush(), last=True)
        return [*rest, *self._shown(self._splitter.flush())]

    def part(self, kind: Kind) -> str:
        """The text so far that is of one kind."""
        return "".join(piece.text for piece in self._pieces if piece.kind == kind)

    @property
    def text(self) -> str | None:
        """All the text so far; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(piece.text for piece in self._pieces)

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told from content."""
        return self._tags is not None

    def _release(self, piece: str, *, last: bool) -> list[Piece]:
        self._skip, piece = max(self._skip - len(piece), 0), piece[self._skip :]
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if last else max((overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
        self.length += len(out)
        return self._shown(self._splitter.push(out)) if out else []

    def _shown(self, pieces: list[Piece]) -> list[Piece]:
        self._pieces += pieces
        return pieces


def _shown_ids(tokenizer: Tokenizer | None, tags: ThoughtTags | None) -> frozenset[int]:
    """Special tokens that are text: the thought tags, where they are special tokens."""
    special = tokenizer.special_tokens if tokenizer else {}
    return frozenset(special[tag] for tag in tags or () if tag in special)


def _characters_to_skip(tokenizer: Tokenizer, prompt_ids: Sequence[int], message: Opening) -> int:
    """Characters of the text drawn after `prompt_ids` that belong to the given text."""
    given = [*message.prompt, *message.ids][len(prompt_ids) :]
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt_ids, skip_special_tokens=False)
    return sum(len(detokenizer.push(token_id)) for token_id in given) + len(detokenizer.flush())


class _Message:
    """A chat's message while it is generated: which ids are settled, and what may come next.

    Attributes:
      ids: of the whole message so far.
    """

    def __init__(self, vocabulary: Vocabulary, session: Session, opening: Opening, end_ids: frozenset[int]):
        assert vocabulary.tokenizer is not None
        self.opening = opening
        self._tokenizer, self._session, self._size = vocabulary.tokenizer, session, vocabulary.size
        self._end_ids = end_ids
        fresh = opening.given or (opening.lead and opening.continued is None)
        self._healing = Healing(self._tokenizer, opening.ids if fresh else [])
        self._joint = byte_length(self._tokenizer, opening.ids) if fresh else None
        self.kept = self._healing.kept if fresh else len(opening.ids)
        self.ids = list(opening.ids[: self.kept])
        self._beyond = 0

    @property
    def start_ids(self) -> list[int]:
        """What the cache holds before the first draw."""
        return [*self.opening.prompt, *self.ids]

    def allowed(self) -> np.ndarray | None:
        """bool [V]: the ids the next token may be; None is all."""
        if ids := self._healing.allowed():
            mask = np.zeros(self._size, bool)
            mask[[i for i in ids if i < self._size]] = True
            return mask
        if self.opening.resumes_ended and not self._beyond:
            mask = np.ones(self._size, bool)
            mask[list(self._end_ids)] = False
            return mask
        return None

    def push(self, token_id: int) -> bool:
        """Takes a drawn token; true if it says nothing beyond what was given."""
        self.ids.append(token_id)
        spelled = self._healing.push(token_id)
        if not spelled:
            self._beyond += 1
            if self._beyond == SETTLED_AFTER:
                self._settle_cache()
        return spelled

    def _settle_cache(self) -> None:
        """Puts the joint's ids right in the cache while little follows it."""
        if self._session.ids[0] != [*self.opening.prompt, *self.ids]:
            return  # the oldest tokens were dropped
        self.settle()
        self._session.set_ids([*self.opening.prompt, *self.ids])

    def settle(self) -> None:
        """Puts the ids where given and generated text meet right."""
        if self._joint is not None:
            after = self.opening.prompt[-1] if self.opening.prompt else None
            self.ids = settle(self._tokenizer, self.ids, self._joint, after=after)


class Batch:
    """One running batch: drives a `Generation` and keeps each sequence's text and timings.

    With a `message` it is a batch of one, which goes on with that. Messages that just begin may be many:
    `ends` says what each ends with. `numbers` say which prompt of a request each sequence is, for its seed.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        session: Session,
        options: GenerateOptions,
        message: Opening | None = None,
        tags: ThoughtTags | None = None,
        numbers: Sequence[int] | None = None,
        ends: Sequence[Opening] = (),
    ):
        if options.stop_strings and vocabulary.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; use stop_token_ids")
        ends = (message,) if message else ends
        stop_ids = set(options.stop_token_ids)
        if not options.ignore_eos:
            stop_ids |= {*vocabulary.eos_ids, *(i for opening in ends for i in opening.stop_ids)}
        self.message = _Message(vocabulary, session, message, frozenset(stop_ids)) if message else None
        if self.message:
            session.set_ids(self.message.start_ids)
        started = time.perf_counter()
        self.generation: Generation = generate(
            session,
            max_new_tokens=options.max_new_tokens,
            params=sampling_params(options, session.batch),
            seeds=[(options.seed + number) % 2**32 for number in numbers or range(session.batch)],
            stop_ids=sorted(stop_ids),
            overflow=options.overflow,
        )
        self._started = started
        self._first: float | None = None
        self._last = started
        self._prefilled = sum(
            len(i) - min(c, len(i) - 1) for i, c in zip(session.ids, session.cached, strict=True)
        )
        self._prompts = [list(ids) for ids in session.ids]
        self._end_ids = frozenset(i for opening in ends for i in opening.stop_ids)
        stops = tuple(dict.fromkeys((*options.stop_strings, *(s for o in ends for s in o.stop_strings))))
        self.rows = [_RowText(vocabulary.tokenizer, ids, stops, message, tags) for ids in self._prompts]
        self.ids: list[list[int]] = [[] for _ in self.rows]
        self.logprobs: list[list[float]] = [[] for _ in self.rows]

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Runs to the end, yielding (row, text) whenever text becomes certain."""
        for row, text in enumerate(self.rows):
            yield from ((row, piece) for piece in text.begin())
        self._restrict()
        for row, token, logprob in self.generation:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            if self.message and self.message.push(token):
                self.generation.uncount(row)
            self._restrict()
            pieces = [] if token in self._end_ids else self.rows[row].push(token)
            if self.rows[row].stopped:
                self.generation.stop(row)
            if self.generation.finish_reasons[row] is not None:
                pieces += self.rows[row].flush()
            yield from ((row, piece) for piece in pieces)
        for row, text in enumerate(self.rows):  # those the context's end stopped
            yield from ((row, piece) for piece in text.flush())

    def _restrict(self) -> None:
        if self.message and (allowed := self.message.allowed()) is not None:
            self.generation.allow(0, allowed)

    def results(self) -> list[Result]:
        """The results as they stand; a sequence that was cut short by the caller counts as `stop`."""
        decoded = sum(max(len(ids) - 1, 0) for ids in self.ids)
        first = self._first or self._last
        timings = Timings(self._prefilled, first - self._started, decoded, self._last - first)
        return [
            Result(
                token_ids=self.ids[row],
                text=text.text,
                finish_reason=self.generation.finish_reasons[row] or "stop",
                logprobs=self.logprobs[row],
                prompt_tokens=len(self._prompts[row]),
                timings=timings,
                content=None if text.text is None else text.part("content"),
                reasoning=text.part("reasoning") if text.thinks else None,
            )
            for row, text in enumerate(self.rows)
        ]


class TextStream:
    """The pieces of one continuation as they become certain; iterate it, then read `result`.

    Iterating yields strings: reasoning and content, without the tags. `parts` tells the two apart. `close`
    ends it early, after the token last received.
    """

    def __init__(self, batch: Batch, on_end: Callable[[Batch], None] | None = None):
        self._batch = batch
        self._on_end = on_end
        self._pieces = self._run()

    def _run(self) -> Iterator[Piece]:
        try:
            for _, piece in self._batch.pieces():
                yield piece
        finally:
            if self._on_end is not None:
                self._on_end(self._batch)

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self._pieces)

    def parts(self) -> Iterator[Piece]:
        """The same pieces with their kind, "content" or "reasoning"."""
        return self._pieces

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
        return self._batch.results()[0]


def sampling_params(options: GenerateOptions, batch: int) -> SamplingParams:
    """The sampling parameters for `batch` sequences; a value out of its range is a `UsageError`."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty")  # fmt: skip
    return SamplingParams.make(batch, **{name: getattr(options, name) for name in names})
