"""A model that answers lines: sorted so that those with one plan and one beginning run together.

What a line gets does not depend on the others: prompts are computed in blocks of their own
(`engine.blocks`), always as one of as many sequences, and drawn with seeds of their own.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.adapter_use import Uses, read_uses
from jaxchat.chat.batch import Send, opened_row
from jaxchat.chat.replies import Batch, Reply, Result, Row
from jaxchat.engine.blocks import computed_alike
from jaxchat.engine.session import ContextOverflowError, Session
from jaxchat.errors import JaxchatError, UsageError, in_flags, option
from jaxchat.families import rope
from jaxchat.jobs.answers import Drawn, Finished, Names, drawn_answer, embedded_answer, failed_answer
from jaxchat.jobs.input_file import MAX_LINE_BYTES, Line
from jaxchat.jobs.requests import Ask, Identity, LineError, read_line
from jaxchat.layer_plan import LayerPlan, as_plan
from jaxchat.lengths import common_prefix
from jaxchat.memory import TooLittleMemoryError
from jaxchat.options import GenerateOptions
from jaxchat.runtime import Model, unit

ROWS_ON_CPU = 8
"""Sequences that a step on a CPU always has, some of them empty: how numbers are rounded depends on it.

With more it is no faster there: 8 decode 8,200 tokens a second of the model in the box on two cores, 16 6,700
and 32 4,300.
"""
FEWEST_ROWS = 2
"""The same elsewhere: one sequence alone is rounded differently from one of several."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """How lines are answered where they do not say it.

    Attributes:
      options: how texts go on; line n draws with `seed + n`, its further choices with a multiple of `lines`
        added.
      system: the system prompt of chats that have none.
      together: how many sequences are decoded together.
      lines: in the whole file.
      model: what the model is called.
      created: seconds since 1970, for OpenAI's objects.
    """

    options: GenerateOptions
    system: str | None = None
    together: int = 8
    lines: int = 1
    model: str = ""
    created: int = 0


class _Task(NamedTuple):
    """One text of a line.

    Attributes:
      line: the number of the line.
      place: among the line's texts.
      ids: what it begins with.
      row: what it goes on with; None is to be embedded.
      plan, uses: of the model.
    """

    line: int
    place: int
    ids: list[int]
    row: Row | None
    plan: LayerPlan
    uses: Uses


class _Open(NamedTuple):
    """A line whose texts are not all there yet."""

    ask: Ask
    found: list[Any]  # one a text: `Drawn`, a vector, or None
    prompt_tokens: int


class Answerer:
    """A model and its cache, which outlives the lines.

    Args:
      model: what answers.
      manner: how.
    """

    def __init__(self, model: Model, manner: Manner):
        self._model, self._manner = model, manner
        self._names = Names(manner.model, manner.created, model.tokenizer)
        self._open: dict[int, _Open] = {}
        self._session: Session | None = None
        on_cpu = model.engine.platform == "cpu"
        self._rows = ROWS_ON_CPU if on_cpu else max(manner.together, FEWEST_ROWS)
        self._held: list[list[int]] = []
        """Per sequence, the prompt whose blocks the cache has."""

    def answers(self, lines: Iterable[Line]) -> Iterator[Finished]:
        """Answers lines, in an order that suits the model.

        Raises:
          TooLittleMemoryError: the cache does not fit.
        """
        tasks: list[_Task] = []
        for line in lines:
            prepared = self._prepared(line)
            if isinstance(prepared, Finished):
                yield prepared
            else:
                tasks += prepared
        for group in self._groups(tasks):
            for task, found in zip(group, self._computed(group), strict=True):
                if finished := self._settled(task, found):
                    yield finished

    # --- lines -> texts

    def _prepared(self, line: Line) -> list[_Task] | Finished:
        if line.data is None:
            text = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; give it in pieces"
            return failed_answer(line.number, Identity(), LineError(text))
        identity, ask = read_line(line.data)
        if isinstance(ask, LineError):
            return failed_answer(line.number, identity, ask)
        try:
            return self._tasks(line.number, ask)
        except ContextOverflowError as error:
            return failed_answer(line.number, identity, error, code="context_length_exceeded")
        except UsageError as error:
            return failed_answer(line.number, identity, error)
        except JaxchatError as error:  # the tokenizer or the template is broken
            return failed_answer(line.number, identity, error, status=500)

    def _tasks(self, number: int, ask: Ask) -> list[_Task]:
        plan, uses = self._reshaped(ask)
        if ask.kind == "embedding":
            ids = [self._ids(text) for text in ask.inputs]
            tasks = [_Task(number, place, own, None, plan, uses) for place, own in enumerate(ids)]
            prompts = sum(map(len, ids))
        else:
            options = ask.options(self._manner.options, seed=self._manner.options.seed + number)
            openings = [self._row(entry, ask, options) for entry in ask.inputs]
            drawn = [
                (again, ids)
                for row in openings
                for ids in [Reply(self._model.vocabulary, row).context]  # held once for all choices
                for again in self._choices(row, ask)
            ]
            tasks = [_Task(number, place, ids, row, plan, uses) for place, (row, ids) in enumerate(drawn)]
            prompts = sum(row.opening.length for row in openings)
        self._open[number] = _Open(ask, [None] * len(tasks), prompts)
        return tasks

    def _reshaped(self, ask: Ask) -> tuple[LayerPlan, Uses]:
        model = self._model
        plan = model.plan
        with in_flags(False):
            if ask.layer_plan is not None:
                plan = as_plan(ask.layer_plan, model.base_plan, "layer_plan")
            uses = read_uses(ask.adapter, "adapter") if ask.adapter_given else model.uses
        model.engine.check_uses(uses, plan)
        return plan, uses

    def _row(self, entry: Any, ask: Ask, options: GenerateOptions) -> Row:
        model = self._model
        if ask.kind == "chat":
            conversation = model.conversation()
            with in_flags(False):
                conversation.extend(self._messages(entry))
            return opened_row(
                conversation, Send(), options, model.vocabulary, max_length=model.engine.max_length
            )
        ids = self._ids(entry, cut=options.overflow == "truncate_oldest")
        return Row.of_prompt(ids, options)

    def _messages(self, messages: list[Any]) -> list[Any]:
        """A conversation with the job's system prompt, if it has none of its own."""
        own = any(isinstance(message, dict) and message.get("role") == "system" for message in messages)
        if own or self._manner.system is None:
            return messages
        return [{"role": "system", "content": self._manner.system}, *messages]

    def _ids(self, entry: str | list[int], *, cut: bool = False) -> list[int]:
        """A prompt's token ids; `cut` takes one that is longer than the context."""
        engine = self._model.engine
        ids = self._model.encode(entry) if isinstance(entry, str) else entry
        engine.check_ids(ids)
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        if len(ids) > engine.max_length and not cut:
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens but the context holds {engine.max_length}",
                f"shorten it, or raise {option('max_length')}",
            )
        return ids

    def _choices(self, row: Row, ask: Ask) -> Iterator[Row]:
        apart = 1 if "seed" in ask.settings else self._manner.lines
        for choice in range(ask.choices):
            seed = (row.options.seed + choice * apart) % 2**32
            yield dataclasses.replace(row, options=dataclasses.replace(row.options, seed=seed))

    # --- texts -> groups that are computed together

    def _groups(self, tasks: Iterable[_Task]) -> Iterator[list[_Task]]:
        """Of one plan and one kind each, sorted by adapters and beginnings."""
        keys: dict[LayerPlan, int] = {}
        kinds: dict[tuple[int, int, bool], list[_Task]] = {}
        for task in tasks:
            plan = keys.setdefault(task.plan, len(keys))
            key = plan, task.row is None, task.row is not None and self._stays_alone(task.row, task.ids)
            kinds.setdefault(key, []).append(task)
        for (_, embedded, alone), alike in sorted(kinds.items(), key=lambda item: item[0]):
            alike.sort(key=(lambda task: len(task.ids)) if embedded else _beginning)
            start = 0
            while start < len(alike):
                size = 1 if alone else min(self._manner.together, self._rows)
                yield alike[start : start + size]
                start += size

    def _stays_alone(self, row: Row, ids: Sequence[int]) -> bool:
        """Whether its cache may have to be computed anew on the way, in blocks that its neighbours share."""
        engine, options = self._model.engine, row.options
        longest = engine.max_length
        if options.max_new_tokens is not None:
            longest = min(longest, len(ids) + options.max_new_tokens)
        overflows = options.overflow == "truncate_oldest" and longest >= engine.max_length
        regime = functools.partial(rope.regime, engine.config)
        turns = rope.is_followed(engine.config) and regime(max(len(ids) - 1, 1)) != regime(longest)
        return overflows or turns or bool(row.opening.ids)

    def _computed(self, group: Sequence[_Task]) -> list[Any]:
        """What came of each: `Drawn`, a vector, or the `JaxchatError` that it ended in."""
        try:
            return self._embedded(group) if group[0].row is None else self._drawn(group)
        except TooLittleMemoryError as error:
            return self._with_fewer(group, error)
        except JaxchatError as error:
            self._held = [[] for _ in self._held]
            if len(group) == 1:
                return [error]
            return [self._computed([task])[0] for task in group]

    def _with_fewer(self, group: Sequence[_Task], error: TooLittleMemoryError) -> list[Any]:
        """The same with half as many sequences at a time, from here on.

        A line that lengthens the model is told so instead.
        """
        self._session = None
        usual = max(len(self._model.plan.executed()), self._model.config.num_layers)
        if len(group[0].plan.executed()) > usual:
            return [LineError(f"layer_plan: {error}", "layer_plan") for _ in group]
        if self._rows == 1:
            raise error
        self._rows //= 2
        logger.warning(
            "%s; goes on with %d at a time, rounded in the last digits as those are", error, self._rows
        )
        parts = [group[start : start + self._rows] for start in range(0, len(group), self._rows)]
        return [found for part in parts for found in self._computed(part)]

    def _embedded(self, group: Sequence[_Task]) -> list[np.ndarray]:
        session = self._set_up(group, keep=False)
        return [unit(mean) for mean in session.mean_rows(range(len(group)))]

    def _drawn(self, group: Sequence[_Task]) -> list[Drawn]:
        rows = [task.row for task in group if task.row is not None]
        alone = self._stays_alone(rows[0], group[0].ids)
        session = self._set_up(group, keep=not alone)
        if not alone:
            session.prefill_alike(range(len(group)))
            for place, task in enumerate(group):
                self._held[place] = task.ids
        vocabulary = self._model.vocabulary
        batch = Batch(vocabulary, session, [*rows, *[None] * (session.batch - len(rows))])
        for _ in batch.pieces():
            pass
        results = [batch.result(place) for place in range(len(group))]
        return [
            Drawn(result, _ended(result, row, vocabulary.eos_ids))
            for result, row in zip(results, rows, strict=True)
        ]

    def _set_up(self, group: Sequence[_Task], *, keep: bool) -> Session:
        """The session with the ids of a group, under its plan; `keep` keeps what the cache has of them."""
        plan, session = group[0].plan, self._session
        if session is None:
            slots = self._model.max_slots
            session = self._model.engine.session(plan, batch=self._rows, max_slots=slots, uses=())
            self._session, self._held = session, [[] for _ in range(self._rows)]
        if plan != session.plan:
            for row in range(session.batch):
                session.set_adapters((), row)  # those before may be in slots that this plan has not
            session.set_plan(plan)
            session.contexts.forget_all()
            self._held = [[] for _ in self._held]
        for row, task in enumerate(group):
            session.set_adapters(task.uses, row)
            before, self._held[row] = self._held[row], []
            session.set_ids(task.ids, row)
            kept = 0
            if keep and before:
                common = common_prefix(before, task.ids)
                kept = computed_alike(len(before) - 1, len(task.ids) - 1, common)
            session.contexts.forget(row, kept)
        return session

    # --- texts -> answers

    def _settled(self, task: _Task, found: Any) -> Finished | None:
        """Takes what came of a text; the answer, if it was the line's last."""
        line = self._open[task.line]
        line.found[task.place] = found
        if any(one is None for one in line.found):
            return None
        del self._open[task.line]
        ask = line.ask
        broken = next((one for one in line.found if isinstance(one, JaxchatError)), None)
        if broken is not None:
            identity = Identity(ask.key, ask.url or None)
            return failed_answer(task.line, identity, broken, status=500)
        make: Any = embedded_answer if ask.kind == "embedding" else drawn_answer
        finished: Finished = make(task.line, ask, line.found, line.prompt_tokens, self._names)
        return finished


def _beginning(task: _Task) -> tuple[str, list[int]]:
    return " ".join(map(str, task.uses)), task.ids


def _ended(result: Result, row: Row, eos_ids: Iterable[int]) -> bool:
    """Whether the last token says nothing but that the text ends."""
    return (
        result.finish_reason == "stop"
        and bool(result.token_ids)
        and result.token_ids[-1] in row.stop_ids(eos_ids)
    )
