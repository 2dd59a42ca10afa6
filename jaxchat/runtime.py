"""The library: load a model, then generate, stream, chat and score text under any layer plan.

Joins the engine (token ids) with the tokenizer and chat template (text).
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat.chat import ChatTemplate, Conversation
from jaxchat.checkpoint import Progress, load_params
from jaxchat.checkpoint_quantized import Quant
from jaxchat.compilation_cache import enable_compilation_cache
from jaxchat.config import ModelConfig
from jaxchat.engine import ContextOverflowError, Engine, FinishReason, Generation, Session
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import GenerateOptions, Overflow
from jaxchat.pallas import select as select_kernels
from jaxchat.quant import QuantFormat
from jaxchat.sampling import SamplingParams
from jaxchat.tokenizer import Detokenizer, Tokenizer, has_tokenizer, load_tokenizer


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
      token_ids: the new tokens, the one that ended it included.
      text: their text without special tokens and stop strings; None where the model has no tokenizer.
      finish_reason: `stop` (end-of-sequence, stop token or stop string), `length` (max_new_tokens) or
        `context` (the context is full).
      logprobs: natural log-probability of each token under the model, before temperature and penalties.
      prompt_tokens: tokens of the prompt.
      timings: of the batch it was computed in.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[float]
    prompt_tokens: int
    timings: Timings


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
    """Text of one sequence as it grows: detokenizes, and holds back what may turn into a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], stops: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids=prompt_ids) if tokenizer else None
        self._stops = stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain."""
        return self._release(self._detokenizer.push(token_id), last=False) if self._detokenizer else ""

    def flush(self) -> str:
        """Ends the sequence; returns the rest of the text."""
        if self._detokenizer is None or self.stopped:
            return ""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class _Batch:
    """One running batch: drives a `Generation` and keeps each sequence's text and timings.

    `numbers` say which prompt of a request each sequence is, for its seed.
    """

    def __init__(
        self,
        owner: "Model",
        session: Session,
        options: GenerateOptions,
        numbers: Sequence[int] | None = None,
    ):
        if options.stop_strings and owner.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; use stop_token_ids")
        stop_ids = set(options.stop_token_ids)
        if not options.ignore_eos:
            stop_ids |= set(owner.eos_ids)
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
        self.rows = [_RowText(owner.tokenizer, ids, options.stop_strings) for ids in self._prompts]
        self.ids: list[list[int]] = [[] for _ in self.rows]
        self.logprobs: list[list[float]] = [[] for _ in self.rows]

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Runs to the end, yielding (row, text) whenever text becomes certain."""
        for row, token, logprob in self.generation:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            piece = self.rows[row].push(token)
            if self.rows[row].stopped:
                self.generation.stop(row)
            if self.generation.finish_reasons[row] is not None:
                piece += self.rows[row].flush()
            if piece:
                yield row, piece
        for row, text in enumerate(self.rows):  # those the context's end stopped
            if piece := text.flush():
                yield row, piece

    def results(self) -> list[Result]:
        """The results as they stand; a sequence that was cut short by the caller counts as `stop`."""
        decoded = sum(max(len(ids) - 1, 0) for ids in self.ids)
        first = self._first or self._last
        timings = Timings(self._prefilled, first - self._started, decoded, self._last - first)
        return [
            Result(
                token_ids=self.ids[row],
                text=None if self.rows[row]._detokenizer is None else self.rows[row].text,
                finish_reason=self.generation.finish_reasons[row] or "stop",
                logprobs=self.logprobs[row],
                prompt_tokens=len(self._prompts[row]),
                timings=timings,
            )
            for row in range(len(self.rows))
        ]


class TextStream:
    """The pieces of one continuation as they become certain; iterate it, then read `result`.

    `close` ends it early, after the token last received.
    """

    def __init__(self, batch: _Batch, on_end: Any = None):
        self._batch = batch
        self._on_end = on_end
        self._pieces = self._run()

    def _run(self) -> Iterator[str]:
        try:
            for _, piece in self._batch.pieces():
                yield piece
        finally:
            if self._on_end is not None:
                self._on_end(self._batch.ids[0])

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the continuation here."""
        self._batch.generation.stop(0)
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
      engine: the token-level runtime.
      tokenizer: None where the directory has none; token ids still work.
      template: the chat template, or None.
    """

    def __init__(
        self,
        engine: Engine,
        plan: LayerPlan,
        *,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        max_slots: int = 0,
    ):
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
            as_plan(plan, self.config),
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
        for plan in dict.fromkeys(chosen):
            numbers = [number for number, other in enumerate(chosen) if other == plan]
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                session = self.engine.session(plan, batch=len(group), max_slots=slots)
                for row, number in enumerate(group):
                    session.set_ids(ids[number], row)
                batch = _Batch(self, session, settings, numbers=group)
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
        return TextStream(_Batch(self, session, _options(options)))

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Result:
        """Replies to a conversation through the model's chat template.

        Args:
          messages: dicts with `role` and `content`, or one user message as a string.
          **options: see `GenerateOptions`.

        >>> model.chat("do you like music?", max_new_tokens=20).text  # doctest: +SKIP
        """
        conversation = self._conversation(None)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        conversation.messages.extend(dict(m) for m in messages)
        session = self.engine.session(self.plan, max_slots=self._max_slots)
        session.set_ids(conversation.prompt_ids())
        batch = _Batch(self, session, _options(options))
        for _ in batch.pieces():
            pass
        return batch.results()[0]

    def chat_session(self, system: str | None = None) -> "ChatSession":
        """A conversation whose KV cache is kept between turns."""
        return ChatSession(self, system)

    def score(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        plans: Sequence[str | LayerPlan | None] | None = None,
    ) -> list[Score]:
        """Log-likelihood of every token of each text, given those before it; `plans` is as in `generate`.

        >>> model.score("Once upon a time")[0].total  # doctest: +SKIP
        """
        all_ids = self._prompt_ids(texts, token_ids)
        chosen, slots = self._plans(plans, len(all_ids))
        session = self.engine.session(self.plan, max_slots=slots)
        scores = []
        for ids, plan in zip(all_ids, chosen, strict=True):
            session.set_plan(plan)
            session.set_ids(ids)
            scores.append(Score(list(ids), session.score().tolist()))
        return scores

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
        chosen = [self.plan if plan is None else as_plan(plan, self.config) for plan in plans]
        for plan in chosen:  # before the first one runs
            self.engine.check_plan(plan)
        return chosen, max([self._max_slots, *(len(plan.executed()) for plan in chosen)])

    def _conversation(self, system: str | None) -> Conversation:
        if self.tokenizer is None:
            raise UsageError("this model directory has no tokenizer; chat needs one")
        if self.template is None:
            raise UsageError(
                "this model has no chat template (tokenizer_config.json, chat_template.jinja); "
                "it can continue a text: use --format completion"
            )
        return Conversation(self.template, self.tokenizer, system=system)


class ChatSession:
    """A conversation with a model: history as token ids, KV cache kept between turns."""

    def __init__(self, owner: Model, system: str | None = None):
        self._model = owner
        self._system = system
        self.conversation = owner._conversation(system)
        self.session = owner.engine.session(owner.plan, max_slots=owner._max_slots)

    def send(self, text: str, **options: Any) -> TextStream:
        """Adds a user message and streams the reply, which joins the history when the stream ends.

        Raises:
          ContextOverflowError: the conversation does not fit the context (the message is taken back).
        """
        settings = _options(options)
        self.conversation.add_user(text)
        try:
            self.session.set_ids(self._fitting_prompt(settings.overflow))
            batch = _Batch(self._model, self.session, settings)
        except Exception:
            self.conversation.messages.pop()
            raise
        return TextStream(batch, on_end=self.conversation.add_reply)

    def set_plan(self, plan: str | LayerPlan) -> None:
        """Reshapes the model in mid-conversation; the history is recomputed at the next turn."""
        self._model = self._model.with_plan(plan)
        self.session.set_plan(self._model.plan)

    def restart(self) -> None:
        """Forgets the conversation, but not the system prompt."""
        self.conversation = self._model._conversation(self._system)

    def _fitting_prompt(self, overflow: Overflow) -> list[int]:
        """The prompt's ids; `truncate_oldest` drops whole oldest turns until a quarter is free."""
        limit = self._model.engine.max_length
        ids = self.conversation.prompt_ids()
        if len(ids) < limit:
            return ids
        first = 1 if self._system is not None else 0
        while overflow == "truncate_oldest" and len(ids) > limit * 3 // 4:
            if len(self.conversation.messages) <= first + 1:
                break
            del self.conversation.messages[first : first + 2]
            ids = self.conversation.prompt_ids()
        if len(ids) >= limit:
            advice = "shorten it or raise --max_length"
            if overflow == "error":
                advice = "start anew, raise --max_length or use --overflow truncate_oldest"
            raise ContextOverflowError(
                f"the conversation has {len(ids)} tokens, too many for the context of {limit}; {advice}"
            )
        return ids


def load(
    path: str | Path,
    plan: str | LayerPlan | None = None,
    *,
    dtype: str | None = None,
    quant: str | QuantFormat | None = None,
    kernels: str = "auto",
    max_length: int | None = None,
    max_slots: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    compilation_cache_dir: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a model directory: Hugging Face layout, or one that `tools/convert.py` wrote.

    Args:
      path: the directory.
      plan: a layer plan or `--layer_spec` string; default every layer once, in order.
      dtype: of the weights, `float32`, `bfloat16` or `float16`; default as stored.
      quant: quantizes the weights while they are read: `int8`, `int4`, `int4:64`, ... (`QuantFormat.parse`);
        default as stored.
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
    directory = Path(path)
    wanted: Quant = QuantFormat.parse(quant) if isinstance(quant, str) else quant or "auto"
    enable_compilation_cache(compilation_cache_dir)
    config = ModelConfig.from_directory(directory)
    chosen = as_plan(plan, config)
    # Before the weights: what is wrong with a setting or a small file is not told after minutes of loading.
    select_kernels(kernels, jax.default_backend())
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    template = ChatTemplate.load(directory, tokenizer) if tokenizer else None
    config, params = load_params(
        directory, config=config, dtype=dtype, quant=wanted, mesh=mesh, progress=progress
    )
    engine = Engine(config, params, max_length=max_length, kernels=kernels, mesh=mesh)
    return Model(engine, chosen, tokenizer=tokenizer, template=template, max_slots=max_slots)


def as_plan(plan: str | LayerPlan | None, config: ModelConfig) -> LayerPlan:
    """A plan from a spec string, a plan, or nothing (every layer once, in order)."""
    if plan is None:
        return LayerPlan.identity(config.num_layers)
    return LayerPlan.parse(plan, config.num_layers) if isinstance(plan, str) else plan


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
