"""The library: load a model, then generate, stream, chat and score text under any layer plan.

Joins the engine (token ids) with the tokenizer and chat template (text).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat import session_file
from jaxchat.chat import ChatTemplate, Conversation, Opening, Snapshot
from jaxchat.checkpoint import Progress, load_assembly, load_params
from jaxchat.checkpoint_manifest import load_plan
from jaxchat.checkpoint_quantized import Quant
from jaxchat.compilation_cache import enable_compilation_cache
from jaxchat.config import ModelConfig
from jaxchat.engine import (
    ContextOverflowError,
    Engine,
    FinishReason,
    Generation,
    Session,
    checked_kv_dtype,
)
from jaxchat.errors import UsageError
from jaxchat.healing import SETTLED_AFTER, Healing, byte_length, settle
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import GenerateOptions, Overflow
from jaxchat.pallas import select as select_kernels
from jaxchat.quant import QuantFormat
from jaxchat.reasoning import Kind, Piece, ReasoningSplitter, ThoughtTags, overlap
from jaxchat.recipe import read_recipe
from jaxchat.sampling import SamplingParams
from jaxchat.tokenizer import Detokenizer, Tokenizer, has_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


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

    def __init__(self, owner: "Model", session: Session, opening: Opening, end_ids: frozenset[int]):
        assert owner.tokenizer is not None
        self.opening = opening
        self._tokenizer, self._session, self._vocabulary = owner.tokenizer, session, owner.config.vocab_size
        self._end_ids = end_ids
        fresh = opening.given or (opening.lead and opening.continued is None)
        self._healing = Healing(owner.tokenizer, opening.ids if fresh else [])
        self._joint = byte_length(owner.tokenizer, opening.ids) if fresh else None
        self.kept = self._healing.kept if fresh else len(opening.ids)
        self.ids = list(opening.ids[: self.kept])
        self._beyond = 0

    @property
    def start_ids(self) -> list[int]:
        """What the cache holds before the first draw."""
        return [*self.opening.prompt, *self.ids]

    def allowed(self) -> np.ndarray | None:
        """bool [V]: the ids the next token may be; None is all."""
        mask = np.zeros(self._vocabulary, bool)
        if ids := self._healing.allowed():
            mask[[i for i in ids if i < self._vocabulary]] = True
        elif self.opening.resumes_ended and not self._beyond:
            mask[:] = True
            mask[list(self._end_ids)] = False
        else:
            return None
        return mask

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
        owner: "Model",
        session: Session,
        options: GenerateOptions,
        message: Opening | None = None,
        tags: ThoughtTags | None = None,
        numbers: Sequence[int] | None = None,
        ends: Sequence[Opening] = (),
    ):
        if options.stop_strings and owner.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; use stop_token_ids")
        ends = (message,) if message else ends
        stop_ids = set(options.stop_token_ids)
        if not options.ignore_eos:
            stop_ids |= {*owner.eos_ids, *(i for opening in ends for i in opening.stop_ids)}
        self.message = _Message(owner, session, message, frozenset(stop_ids)) if message else None
        if self.message:
            session.set_ids(self.message.start_ids)
        started = time.perf_counter()
        self.generation: Generation = session.generate(
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
        self.rows = [_RowText(owner.tokenizer, ids, stops, message, tags) for ids in self._prompts]
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


class Model:
    """A loaded model under one layer plan. Build with `load`; `with_plan` gives others over the same weights.

    Attributes:
      config: the model's configuration.
      plan: the layer plan that runs.
      base_plan: what plans in text count the slots of: the plan of the recipe, or the one that the checkpoint
        records, else every layer once. A `LayerPlan` is over the stacked layers.
      engine: the token-level runtime.
      tokenizer: None where the directory has none; token ids still work.
      template: the chat template, or None.
    """

    def __init__(
        self,
        engine: Engine,
        plan: LayerPlan,
        *,
        base_plan: LayerPlan | None = None,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        max_slots: int = 0,
    ):
        self.base_plan = base_plan or LayerPlan.identity(engine.config.num_layers)
        self.config: ModelConfig = engine.config
        self.engine = engine
        self.plan = plan
        self.tokenizer = tokenizer
        self.template = template
        self._max_slots = max_slots

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a text: the model's and the tokenizer's."""
        own = self.tokenizer.eos_ids if self.tokenizer else ()
        return tuple(dict.fromkeys((*self.config.eos_ids, *own)))

    def with_plan(self, plan: str | LayerPlan) -> "Model":
        """The same weights under another plan: no copy, no reload, no recompilation up to the same slots.

        >>> doubled = model.with_plan("0:2,1:4,3:")  # doctest: +SKIP
        """
        return Model(
            self.engine,
            as_plan(plan, self.base_plan),
            base_plan=self.base_plan,
            tokenizer=self.tokenizer,
            template=self.template,
            max_slots=self._max_slots,
        )

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """A text's token ids as a prompt of its own (with BOS where the model wants one)."""
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; give token_ids")
        return self.tokenizer.encode(text, parse_special=parse_special)

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[str | LayerPlan | None] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[Result]:
        """Continues each prompt; prompts of different lengths run together.

        Args:
          prompts: texts, continued as they are (no chat template). One string is a list of one.
          token_ids: instead of texts; needs no tokenizer.
          plans: a layer plan a prompt, None for the model's own; prompts under the same plan run together.
          batch_size: how many sequences are decoded together.
          **options: see `GenerateOptions`.

        Returns:
          One result a prompt, in order.

        >>> model.generate("Once upon a time", max_new_tokens=20)[0].text  # doctest: +SKIP
        """
        settings = _options(options)
        ids = self._prompt_ids(prompts, token_ids)
        chosen, slots = self._plans(plans, len(ids))
        results: dict[int, Result] = {}
        for group, session in self._groups(ids, chosen, slots, batch_size):
            batch = Batch(self, session, settings, numbers=group)
            for _ in batch.pieces():
                pass
            results.update(zip(group, batch.results(), strict=True))
        return [results[number] for number in range(len(ids))]

    def stream(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Any
    ) -> TextStream:
        """Continues one prompt, yielding text as it comes.

        >>> for piece in model.stream("Once upon a time", max_new_tokens=20):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        """
        ids = self._prompt_ids(prompt, None if token_ids is None else [token_ids])
        session = self.engine.session(self.plan, max_slots=self._max_slots)
        session.set_ids(ids[0])
        return TextStream(Batch(self, session, _options(options)))

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Result:
        """Replies to a conversation through the model's chat template.

        Args:
          messages: dicts with `role` and `content`, or one user message as a string.
          **options: see `GenerateOptions`.

        >>> model.chat("do you like music?", max_new_tokens=20).text  # doctest: +SKIP
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        chat = self.chat_session()
        chat.conversation.extend(messages)
        stream = chat.reply(**options)
        for _ in stream:
            pass
        return stream.result

    def chat_session(
        self,
        system: str | None = None,
        *,
        reversed_role: bool = False,
        opening: str | None = None,
        thought_tags: ThoughtTags | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "ChatSession":
        """A conversation whose KV cache is kept between turns.

        Args:
          system: the system prompt.
          reversed_role: the model plays the user, and what is sent to it is the assistant's.
          opening: with `reversed_role`, the user's first message, which stands before what is sent.
          thought_tags: what the model thinks between; default what its chat template says.
          template_kwargs: variables for the chat template, such as `enable_thinking`.
        """
        conversation = self.conversation(
            system=system,
            reversed_role=reversed_role,
            opening=opening,
            thought_tags=thought_tags,
            template_kwargs=template_kwargs,
        )
        return ChatSession(self, conversation)

    def load_session(self, path: str | Path) -> "ChatSession":
        """The conversation that `ChatSession.save` wrote, its KV cache included."""
        return session_file.load(path, self)

    def score(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[str | LayerPlan | None] | None = None,
        batch_size: int = 1,
    ) -> list[Score]:
        """Log-likelihood of every token of each text, given those before it.

        `plans` and `batch_size` are as in `generate`.

        >>> model.score("Once upon a time")[0].total  # doctest: +SKIP
        """
        all_ids = self._prompt_ids(texts, token_ids)
        chosen, slots = self._plans(plans, len(all_ids))
        scores: dict[int, Score] = {}
        for group, session in self._groups(all_ids, chosen, slots, batch_size):
            for number, logprobs in zip(group, session.score_rows(range(len(group))), strict=True):
                scores[number] = Score(list(all_ids[number]), logprobs.tolist())
        return [scores[number] for number in range(len(all_ids))]

    def _groups(
        self, ids: Sequence[Sequence[int]], plans: Sequence[LayerPlan], slots: int, batch_size: int
    ) -> Iterator[tuple[list[int], Session]]:
        """The numbers of the prompts that run together, under one plan, and a session that holds them."""
        session: Session | None = None
        for plan in dict.fromkeys(plans):
            numbers = [number for number, other in enumerate(plans) if other == plan]
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                if session is None or session.batch != len(group):
                    session = self.engine.session(plan, batch=len(group), max_slots=slots)
                session.set_plan(plan)
                for row, number in enumerate(group):
                    session.set_ids(ids[number], row)
                yield group, session

    def _prompt_ids(
        self, prompts: str | Sequence[str] | None, token_ids: Sequence[Sequence[int]] | None
    ) -> list[list[int]]:
        if (prompts is None) == (token_ids is None):
            raise UsageError("give either prompts or token_ids")
        if token_ids is not None:
            ids = [list(row) for row in token_ids]
        else:
            ids = [self.encode(text) for text in ([prompts] if isinstance(prompts, str) else prompts or [])]
        for number, row in enumerate(ids):
            if not row:
                raise UsageError(f"prompt {number} is empty; give at least one token")
        return ids

    def _plans(
        self, plans: Sequence[str | LayerPlan | None] | None, count: int
    ) -> tuple[list[LayerPlan], int]:
        """The plan of each of `count` prompts, and the cache slots that let all share their executables."""
        if plans is None:
            plans = [None] * count
        if isinstance(plans, str) or len(plans) != count:
            what = f"the string {plans!r}" if isinstance(plans, str) else f"{len(plans)} plans"
            raise UsageError(f"plans: got {what} for {count} prompts; give a list of one a prompt (or None)")
        chosen = [self.plan if plan is None else as_plan(plan, self.base_plan) for plan in plans]
        for plan in chosen:  # before the first one runs
            self.engine.check_plan(plan)
        return chosen, max([self._max_slots, *(len(plan.executed()) for plan in chosen)])

    def conversation(self, **settings: Any) -> Conversation:
        """A history for this model; the settings are those of `Conversation`. `chat_session` runs one."""
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; chat needs one")
        if self.template is None:
            raise UsageError(
                "this model has no chat template (tokenizer_config.json, chat_template.jinja); "
                "it can continue a text: use --format completion"
            )
        return Conversation(self.template, self.tokenizer, **settings)


class ChatSession:
    """A conversation with a model: history as token ids, KV cache kept between turns.

    The options of each turn are those of `GenerateOptions`. A message joins the history when its stream ends.

    Attributes:
      model: the model under its present plan.
      conversation: the history.
      session: the token ids and their KV cache.
    """

    def __init__(self, owner: Model, conversation: Conversation):
        self.model = owner
        self.conversation = conversation
        self.session = owner.engine.session(owner.plan, max_slots=owner._max_slots)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history as dicts with "role" and "content"."""
        return self.conversation.messages

    @property
    def token_ids(self) -> list[int]:
        """The ids of the history, as the cache holds them."""
        return self.conversation.token_ids

    @property
    def reversed_role(self) -> bool:
        """Whether the model plays the user."""
        return self.conversation.reversed_role

    def send(self, text: str, *, prefix: str = "", prefix_in: Kind = "content", **options: Any) -> TextStream:
        """Adds what was typed and streams the model's reply.

        Args:
          text: the user's message or, in reversed role, the assistant's. "" adds none: the model goes first.
          prefix: opens the reply, which goes on from there; it is streamed, and part of message and history.
          prefix_in: `content`, or `reasoning` to open the model's reasoning.
          **options: see `GenerateOptions`.

        Raises:
          ContextOverflowError: the conversation does not fit the context (the message is taken back).
          UsageError: the template refuses the conversation, or has no place for the prefix.
        """
        settings = _options(options)

        def open_message() -> Opening:
            return self.conversation.open(prefix=prefix, prefix_in=prefix_in)

        before = self.conversation.snapshot()
        if text:
            self.conversation.add_typed(text)
        return self._stream(open_message, settings, before)

    def reply(self, *, prefix: str = "", prefix_in: Kind = "content", **options: Any) -> TextStream:
        """Streams the model's next message to the conversation as it stands."""
        return self.send("", prefix=prefix, prefix_in=prefix_in, **options)

    def continue_(self, suffix: str = "", **options: Any) -> TextStream:
        """Appends to the model's last message, which then goes on; streams the suffix and the new text.

        Raises:
          UsageError: the last message is not the model's.
        """
        settings = _options(options)
        before = self.conversation.snapshot()
        return self._stream(lambda: self.conversation.reopen(suffix), settings, before)

    def retry(self, **options: Any) -> TextStream:
        """Generates the last message anew, with the same prefix; only other options make another text.

        Raises:
          UsageError: the last message is not the model's.
        """
        settings = _options(options)
        return self._stream(self.conversation.reopen_anew, settings, self.conversation.snapshot())

    def undo(self) -> str | None:
        """Forgets the last exchange.

        Returns:
          The message that was typed in it ("" if the model went first), None if there is none to forget.
        """
        return self.conversation.undo()

    def set_plan(self, plan: str | LayerPlan) -> None:
        """Reshapes the model in mid-conversation.

        The KV of the slots that both plans begin with is kept; the rest is recomputed at the next turn.
        """
        self.model = self.model.with_plan(plan)
        self.session.set_plan(self.model.plan)

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt, from the next turn on for the whole history; None takes it away."""
        self.conversation.set_system(text)

    def set_role(self, reversed_role: bool) -> None:
        """Lets the model play the user from now on, or the assistant again."""
        self.conversation.reversed_role = reversed_role

    def restart(self) -> None:
        """Forgets the conversation, but not the system prompt and the opening line."""
        self.conversation.restart()

    def save(self, path: str | Path) -> None:
        """Writes conversation and KV cache to a file; see `Model.load_session`."""
        session_file.save(path, self)

    def _stream(
        self, open_message: Callable[[], Opening], settings: GenerateOptions, before: Snapshot
    ) -> TextStream:
        """Starts the model's message; where that fails, all is as it was `before`."""
        limit = self.model.engine.max_length
        try:
            opening = fitting(self.conversation, open_message, limit, settings.overflow)
            batch = Batch(self.model, self.session, settings, opening, self.conversation.thought_tags)
        except Exception:
            self.conversation.restore(before)
            self.session.set_ids(self.conversation.token_ids)
            raise
        return TextStream(batch, on_end=self._finish)

    def _finish(self, batch: Batch) -> None:
        message, row = batch.message, batch.rows[0]
        assert message is not None
        message.settle()
        self.conversation.add_reply(
            message.ids,
            message.opening,
            end_ids=self.model.eos_ids,
            length=row.length if row.stopped else None,
        )
        if self.session.ids[0][: len(message.opening.prompt)] == list(message.opening.prompt):
            self.session.set_ids(self.conversation.token_ids)


def fitting(
    conversation: Conversation, open_message: Callable[[], Opening], limit: int, overflow: Overflow
) -> Opening:
    """An opening of at most `limit` tokens; `truncate_oldest` drops oldest turns until a quarter is free."""
    opening = open_message()
    if opening.length < limit:
        return opening
    while overflow == "truncate_oldest" and opening.length > limit * 3 // 4:
        if not conversation.drop_oldest():
            break
        opening = open_message()
    if opening.length >= limit:
        advice = "shorten it or raise --max_length"
        if overflow == "error":
            advice = "start anew, raise --max_length or use --overflow truncate_oldest"
        raise ContextOverflowError(
            f"the conversation has {opening.length} tokens, too many for the context of {limit}; {advice}"
        )
    return opening


def load(
    path: str | Path | None = None,
    plan: str | LayerPlan | None = None,
    *,
    recipe: str | Path | None = None,
    model_paths: Mapping[str, str | Path] | None = None,
    keep_identity: bool = False,
    dtype: str | None = None,
    quant: str | QuantFormat | None = None,
    kv_dtype: str | None = None,
    kernels: str = "auto",
    max_length: int | None = None,
    max_slots: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    compilation_cache_dir: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a model directory (Hugging Face layout, or one that `tools/convert.py` wrote), or a recipe.

    Args:
      path: the directory.
      plan: a layer plan or `--layer_spec` string; default every layer once, in order. Of a recipe, or of a
        directory that records a plan, a string counts the slots, and the default is that plan.
      recipe: instead of `path`, a mergekit recipe; its remarks are logged as warnings. See `read_recipe`.
      model_paths: model names of the recipe -> directories.
      keep_identity: executes the recipe's layers that change nothing, too.
      dtype: of the weights, `float32`, `bfloat16` or `float16`; default as stored.
      quant: quantizes the weights while they are read: `int8`, `int4`, `int4:64`, ... (`QuantFormat.parse`);
        default as stored.
      kv_dtype: of the KV cache, `float32`, `bfloat16` or `int8`; default that of the activations, which is
        float32 on CPU and with float32 weights, else bfloat16.
      kernels: `auto`, `reference`, `native` or `pallas`: which implementations of the operations run.
      max_length: the longest context in tokens (the KV cache grows up to it); default the model's own.
      max_slots: cache slots to reserve, so that longer plans chosen later need no new executable.
      mesh: shards the model over its `model` axis and batches over its `data` axis.
      compilation_cache_dir: where compiled executables are kept; default a user cache directory, "" is none.
      progress: called while weights are read, see `jaxchat.checkpoint`.

    Raises:
      UsageError, JaxchatError: one line that says what is wrong with the directory, plan or setting.

    >>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:", quant="int4")  # doctest: +SKIP
    """
    wanted: Quant = QuantFormat.parse(quant) if isinstance(quant, str) else quant or "auto"
    enable_compilation_cache(compilation_cache_dir)
    if (path is None) == (recipe is None):
        raise UsageError("give a model directory or a recipe, one of them")
    if recipe is None:
        assembly, directory = None, Path(path or "")
        base_plan = load_plan(directory)
    else:
        assembly = read_recipe(recipe, model_paths, keep_identity=keep_identity)
        directory, base_plan = assembly.models[assembly.tokenizer], assembly.plan
        for note in assembly.notes:
            logger.warning("%s: %s", recipe, note)
    chosen = as_plan(plan, base_plan)
    # Before the weights: what is wrong with a setting or a small file is not told after minutes of loading.
    select_kernels(kernels, jax.default_backend())
    if kv_dtype is not None:
        checked_kv_dtype(kv_dtype)
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    template = ChatTemplate.load(directory, tokenizer) if tokenizer else None
    weights: dict[str, Any] = {"dtype": dtype, "quant": wanted, "mesh": mesh, "progress": progress}
    if assembly is None:
        config, params = load_params(directory, **weights)
    else:
        config, params = load_assembly(assembly, **weights)
    engine = Engine(config, params, max_length=max_length, kv_dtype=kv_dtype, kernels=kernels, mesh=mesh)
    return Model(
        engine,
        chosen,
        base_plan=base_plan,
        tokenizer=tokenizer,
        template=template,
        max_slots=max_slots,
    )


def as_plan(plan: str | LayerPlan | None, base: LayerPlan) -> LayerPlan:
    """A plan over the stacked layers: a spec of the slots of `base`, a plan as it is, or `base` itself."""
    if isinstance(plan, str):
        return base.select(plan)
    return base if plan is None else plan


def sampling_params(options: GenerateOptions, batch: int) -> SamplingParams:
    """The sampling parameters for `batch` sequences; a value out of its range is a `UsageError`."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty")  # fmt: skip
    return SamplingParams.make(batch, **{name: getattr(options, name) for name in names})


def _options(options: Mapping[str, Any]) -> GenerateOptions:
    known = {f.name for f in dataclasses.fields(GenerateOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return GenerateOptions(**options)
