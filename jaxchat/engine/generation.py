"""A running generation: the loop over decode steps, and which sequences are still in it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.arguments import number
from jaxchat.engine import steps
from jaxchat.engine.acceptance import Draws, accept
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import Session, State
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.families import rope
from jaxchat.options import LENGTHS, SEEDS, Overflow

FinishReason = Literal["stop", "length", "context"]


class Token(NamedTuple):
    """One generated token of one sequence; `logprob` is the model's own, before temperature and penalties."""

    row: int
    id: int
    logprob: float


class Limits(NamedTuple):
    """What ends one sequence.

    Attributes:
      max_new_tokens: at most so many; None is until the context is full.
      stop_ids: token ids that end it.
      overflow: what happens when the context is full, see `generate`.
    """

    max_new_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    overflow: Overflow = "error"


class _Step(NamedTuple):
    """A decode step that has begun."""

    lengths: dict[int, int]  # sequence -> its tokens before the one that the step begins with
    tokens: jax.Array  # int32 [B], the next tokens
    logprobs: jax.Array  # float32 [B]
    state: State  # of the session


class _Drawn(NamedTuple):
    """Tokens of a step with a draft, on the host."""

    tokens: np.ndarray  # int32 [B, A], one after the other
    logprobs: np.ndarray  # float32 [B, A]
    counts: dict[int, int]  # sequence -> how many of them


@dataclasses.dataclass
class DraftTally:
    """What became of drafts: `tokens` of all that were generated in so many `steps`, a sequence each.

    Of a step the last token is the base's own, so that `tokens - steps` were drafted.
    """

    steps: int = 0
    tokens: int = 0


class _Vocabulary(NamedTuple):
    """What a generation knows of every token id, [B, V]."""

    in_prompt: jax.Array  # bool, whether the prompt has it
    all_allowed: jax.Array  # bool, all of them


class Generation:
    """A running generation: an iterator of `Token`s, in step order, finished sequences left out.

    While a token is with the consumer, the device computes the next one. What the consumer does then counts:
    a step that does not follow from it is left unused.

    Attributes:
      session, params, seeds: as in `generate`.
      limits: of each sequence; None leaves it out.
      finish_reasons: per sequence, None while it runs; `stop` (a stop id or `stop()`, or left out), `length`
        (max_new_tokens) or `context` (the context is full).
      tally: what became of drafts, where the engine has one.
    """

    def __init__(
        self, session: Session, params: SamplingParams, seeds: list[int], limits: Sequence[Limits | None]
    ):
        self.session, self.params, self.seeds, self.limits = session, params, seeds, limits
        self._check()
        self._limits = [own or Limits() for own in limits]
        self.finish_reasons: list[FinishReason | None] = ["stop" if own is None else None for own in limits]
        self.tally = DraftTally()
        self._generated = [0] * session.batch
        self._among: dict[int, np.ndarray] = {}
        self._restricted = False  # whether the token drawn last was one of those
        pad = session.padded_batch - session.batch
        self._params = params
        if pad:
            self._params = SamplingParams(*(jnp.pad(p, (0, pad), mode="edge") for p in params))
        self._seeds = self._on_device(np.asarray(seeds + [0] * pad, np.uint32))
        self._drop_oldest()
        self._vocabulary = self._begun_vocabulary()

    def _check(self) -> None:
        batch = self.session.batch
        for ids, limits in zip(self.session.ids, self.limits, strict=True):
            if limits is None:
                continue
            if limits.max_new_tokens is not None:
                number("max_new_tokens", limits.max_new_tokens, LENGTHS)
            if not ids:
                raise UsageError("an empty prompt: give at least one token")
        for name, values in (*self.params._asdict().items(), ("seeds", np.asarray(self.seeds))):
            if values.shape != (batch,):
                raise UsageError(
                    f"{name}: got values of shape {values.shape}, expected one for each of {batch}"
                )
        for seed in self.seeds:
            number("seed", seed, SEEDS)

    def stop(self, row: int) -> None:
        """Ends a sequence after the token last yielded for it."""
        self.finish_reasons[row] = self.finish_reasons[row] or "stop"

    def allow(self, row: int, allowed: np.ndarray) -> None:
        """Draws a sequence's next token, and only that one, among those with `allowed` (bool [V]) set."""
        self._among[row] = allowed

    def uncount(self, row: int) -> None:
        """Takes a sequence's last token out of the count that `max_new_tokens` limits."""
        self._generated[row] -= 1
        if self.finish_reasons[row] == "length":
            self.finish_reasons[row] = None

    def __iter__(self) -> Iterator[Token]:
        if not self._active():
            return iter(())
        return self._one_by_one() if self.session.engine.draft is None else self._drafted()

    def _one_by_one(self) -> Iterator[Token]:
        session = self.session
        logits = session.prefill(self._active())
        counts = self._no_counts()
        tokens, logprobs = self._drawn(logits, self._positions(), counts)
        first = True
        while True:
            counts = steps.count(counts, tokens, self._int_active())
            # The first token is not to wait for the step's compilation.
            ahead = None if first else self._run_ahead(tokens, counts)
            ids, values = np.asarray(tokens), np.asarray(logprobs)
            self._refuse_broken(values, logits if first else None)
            first = False
            for row in range(session.batch):
                if self.finish_reasons[row]:  # before this step, or stopped by the consumer during it
                    continue
                yield self._take(row, int(ids[row]), float(values[row]))
            if not self._make_room():
                return
            if ahead is not None and self._continues(ahead, ids):
                tokens, logprobs = self._end(ahead)
            else:
                tokens, logprobs = self._step(counts)

    def _take(self, row: int, token: int, logprob: float) -> Token:
        """Adds a token to its sequence, and sees whether it is the last."""
        self.session.ids[row].append(token)
        self._generated[row] += 1
        limits = self._limits[row]
        if token in limits.stop_ids:
            self.finish_reasons[row] = "stop"
        elif limits.max_new_tokens is not None and self._generated[row] >= limits.max_new_tokens:
            self.finish_reasons[row] = "length"
        return Token(row, token, logprob)

    # --- with a draft: a step gives several tokens. What the consumer does after one of them counts, too:
    # those that do not follow from it are left unused.

    def _drafted(self) -> Iterator[Token]:
        rows = self._active()
        logits = self.session.prefill(rows)
        counts = self._no_counts()
        drawn = self._alone(rows, logits, counts)
        self._refuse_broken(drawn.logprobs[:, 0], logits)
        while True:
            used = dict.fromkeys(drawn.counts, 0)
            yield from self._taken(drawn, used)
            counts = steps.count_several(counts, drawn.tokens, self.session.contexts.array(used))
            if not self._make_room():
                return
            drawn = self._next(counts)
            for place in range(drawn.logprobs.shape[1]):
                rows = [row for row, count in drawn.counts.items() if place < count]
                self._refuse_broken(drawn.logprobs[:, place], None, rows)

    def _taken(self, drawn: _Drawn, used: dict[int, int]) -> Iterator[Token]:
        """The tokens of a step, as far as each follows from what was done with those before; counts them."""
        session, state = self.session, self.session.state
        for place in range(drawn.tokens.shape[1]):
            for row, count in drawn.counts.items():
                if self.finish_reasons[row] or place >= count or used[row] != place:
                    continue
                if place and not self._goes_on(row, int(drawn.tokens[row, place - 1]), state):
                    continue
                session.cached[row] += place > 0
                used[row] += 1
                yield self._take(row, int(drawn.tokens[row, place]), float(drawn.logprobs[row, place]))

    def _goes_on(self, row: int, token: int, state: State) -> bool:
        """Whether what was computed behind this token, which was a sequence's last, still follows it."""
        ids, limit = self.session.ids[row], self.session.engine.max_length
        return (
            row not in self._among
            and self.session.cached[row] == len(ids) - 1 < limit - 1
            and ids[-1] == token
            and all(now is then for now, then in zip(self.session.state, state, strict=True))
        )

    def _next(self, counts: jax.Array) -> _Drawn:
        """Drafts, verifies and accepts; where the draft cannot go on, computes and draws one by one.

        Here is the place to weigh what drafts give against what they cost, and to do without where they lose.
        """
        session, rows = self.session, self._active()
        moved = [row for row in rows if self._has_moved(row)]
        if moved or not session.drafts(rows):
            for row in moved:
                session.contexts.follow_rotation(row)
            return self._alone(rows, session.prefill_as_rotated(rows), counts)
        tokens, new, logits, hidden = session.verify({row: self._room(row) for row in rows})
        prompt, positions = self._vocabulary.in_prompt, jnp.asarray(self._positions())
        draws = Draws(self._params, self._seeds, positions, prompt, counts, self._allowed())
        rule, shape = session.engine.draft_accept, session.engine.draft.shape  # type: ignore[union-attr]
        kept = accept(rule, shape, logits, hidden, tokens, new, draws)
        drawn, logprobs, number, path = map(np.asarray, (kept.tokens, kept.logprobs, kept.number, kept.path))
        found = {row: int(number[row]) for row in rows}
        session.keep(kept, found, path)
        for row in rows:
            session.cached[row] += 1
        self.tally.steps += len(rows)
        self.tally.tokens += sum(found.values())
        return _Drawn(drawn, logprobs, found)

    def _alone(self, rows: Sequence[int], logits: jax.Array, counts: jax.Array) -> _Drawn:
        """One token of each sequence, from float32 [B, V] logits."""
        tokens, logprobs = (
            np.asarray(part)[:, None] for part in self._drawn(logits, self._positions(), counts)
        )
        return _Drawn(tokens, logprobs, dict.fromkeys(rows, 1))

    def _room(self, row: int) -> int:
        """How many tokens of a draft count: of all, but where less fits, or all that follows is another."""
        session, shape = self.session, self.session.engine.draft.shape  # type: ignore[union-attr]
        length = len(session.ids[row])
        config = session.engine.config
        turns = rope.regime(config, length) != rope.regime(config, length + shape.depth)
        if row in self._among or turns:
            return 1
        return min(len(shape.parents), session.engine.max_length - length + 1)

    def _no_counts(self) -> jax.Array:
        return self._on_device(np.zeros(self._vocabulary.in_prompt.shape, np.int32))

    def _refuse_broken(
        self, logprobs: np.ndarray, logits: jax.Array | None, rows: Sequence[int] | None = None
    ) -> None:
        """Refuses logits that say nothing: not finite, or, of those of the first token, all equal."""
        found = ""
        rows = self._active() if rows is None else rows
        if not np.isfinite(logprobs[rows]).all():
            found = "not finite (NaN or infinity)"
        elif rows and logits is not None and _all_equal(logprobs[rows], logits, rows):
            found = "all equal"
        if found:
            self.session.drop_cache()  # broken values would outlive a rollback
            raise JaxchatError(
                f"the model's logits are {found}: the checkpoint is broken or the dtype too narrow; try "
                f"{option('dtype', 'float32')}"
            )

    def _step(self, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the last token of every running sequence and samples the next."""
        session, rows = self.session, self._active()
        # Usually just the last token is new; not after a truncation, or if the consumer changed the session.
        moved = [r for r in rows if self._has_moved(r)]
        if moved:
            for r in moved:
                session.contexts.follow_rotation(r)
            return self._drawn(session.prefill_as_rotated(rows), self._positions(), counts)
        last = session.contexts.array({r: session.ids[r][-1] for r in rows})
        return self._end(self._begin(last, {r: session.cached[r] for r in rows}, counts))

    def _has_moved(self, row: int) -> bool:
        """Whether more than a sequence's last token is to be computed."""
        ids, cached = self.session.ids[row], self.session.cached[row]
        return len(ids) - cached != 1 or not self.session.contexts.keeps_rotation(row, len(ids))

    def _begin(self, tokens: jax.Array | np.ndarray, lengths: dict[int, int], counts: jax.Array) -> _Step:
        logits, state = self.session.decode(tokens, lengths)
        positions = self.session.contexts.array({r: n + 1 for r, n in lengths.items()})
        return _Step(lengths, *self._drawn(logits, positions, counts), state)

    def _end(self, step: _Step) -> tuple[jax.Array, jax.Array]:
        for row in self._active():
            self.session.cached[row] += 1
        return step.tokens, step.logprobs

    def _run_ahead(self, tokens: jax.Array, counts: jax.Array) -> _Step | None:
        """Begins the step after `tokens` before they are read: the device does not wait for the host.

        None where they probably are not what the next step begins with.
        """
        session = self.session
        lengths = {
            row: len(session.ids[row])
            for row in self._active()
            if self._generated[row] + 1 != self._limits[row].max_new_tokens
            and len(session.ids[row]) + 1 < session.engine.max_length
        }
        as_expected = all(
            session.cached[r] == n and session.contexts.keeps_rotation(r, n + 1) for r, n in lengths.items()
        )
        if not lengths or not as_expected or self._restricted:
            return None
        return self._begin(tokens, lengths, counts)

    def _continues(self, step: _Step, ids: np.ndarray) -> bool:
        """Whether a step that began before `ids` were read is the next, whatever the consumer did."""
        session = self.session
        return (
            not self._among
            and all(now is then for now, then in zip(session.state, step.state, strict=True))
            and all(
                step.lengths.get(row) == session.cached[row] == len(session.ids[row]) - 1
                and session.ids[row][-1] == ids[row]
                for row in self._active()
            )
        )

    def _drawn(
        self, logits: jax.Array, positions: np.ndarray, counts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Each sequence's next token, at its position, and its logprob, from float32 [B, V] logits."""
        allowed = self._allowed()
        return steps.sample(
            logits, self._params, self._seeds, positions, self._vocabulary.in_prompt, counts, allowed
        )

    def _allowed(self) -> jax.Array:
        """bool [B, V], what the next tokens may be; what `allow` said counts once."""
        allowed = self._vocabulary.all_allowed
        self._restricted = bool(self._among)
        if self._among:
            some = np.ones(allowed.shape, bool)
            for row, mask in self._among.items():
                some[row] = mask
            self._among.clear()
            allowed = self._on_device(some)
        return allowed

    def _make_room(self) -> bool:
        """Applies the overflow policy; false when no sequence is left running."""
        self._drop_oldest()
        for row in self._active():
            if len(self.session.ids[row]) >= self.session.engine.max_length:
                self.finish_reasons[row] = "context"
        return bool(self._active())

    def _drop_oldest(self) -> None:
        """Halves full contexts where that is wanted; half, so as not to drop at the next token again."""
        limit = self.session.engine.max_length
        for row in self._active():
            if self._limits[row].overflow == "truncate_oldest" and len(self.session.ids[row]) >= limit:
                self.session.contexts.truncate_oldest(row, max(1, limit // 2))

    def _active(self) -> list[int]:
        return [r for r in range(self.session.batch) if self.finish_reasons[r] is None]

    def _int_active(self) -> np.ndarray:
        return self.session.contexts.array(dict.fromkeys(self._active(), 1))

    def _positions(self) -> np.ndarray:
        """The position of each sequence's next token: what its key is folded with."""
        return self.session.contexts.lengths(range(self.session.batch))

    def _begun_vocabulary(self) -> _Vocabulary:
        shape = self.session.padded_batch, self.session.engine.config.vocab_size
        in_prompt = np.zeros(shape, bool)
        for row, ids in enumerate(self.session.ids):
            in_prompt[row, ids] = True
        return _Vocabulary(self._on_device(in_prompt), self._on_device(np.ones(shape, bool)))

    def _on_device(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.session.engine.placement)


def generate(
    session: Session,
    *,
    max_new_tokens: int | None = None,
    params: SamplingParams | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    overflow: Overflow = "error",
) -> Generation:
    """Continues every sequence of a session; iterate the result for the tokens as they come.

    Args:
      session: what to continue.
      max_new_tokens: at most so many per sequence; default until the context is full.
      params: one entry a sequence; default greedy.
      seeds: one a sequence; the same seed, context and position draw the same token.
      stop_ids: token ids that end a sequence; the id is still yielded and kept in `ids`.
      overflow: what happens when the context is full. `error`: a prompt that does not fit is an error,
        and a generation that fills the context ends with the reason `context`. `truncate_oldest`: the
        oldest tokens are dropped, and the rest is computed anew.
    """
    if params is None:
        params = SamplingParams.make(session.batch, temperature=0.0)
    limits = Limits(max_new_tokens, frozenset(stop_ids), overflow)
    return Generation(
        session,
        params,
        list(range(session.batch) if seeds is None else seeds),
        [limits] * session.batch,
    )


def _all_equal(logprobs: np.ndarray, logits: jax.Array, rows: Sequence[int]) -> bool:
    """Whether every token is as probable as any other, as where zeros are all that is left of a model.

    The logits are fetched only where the tokens drawn from them are as probable as one of all.
    """
    if not np.allclose(logprobs, -np.log(logits.shape[-1])):
        return False
    return bool(np.ptp(np.asarray(logits)[rows], axis=-1).max() == 0)
