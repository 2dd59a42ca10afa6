"""Plans evaluated on windows of text, from the hidden states of one base plan: what runs on the device.

One executable scores every plan, from the residual stream after the slots that it shares with the base plan
or with another one. What to evaluate, and what becomes of it, is `measure.py`'s.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat import memory, model
from jaxchat.engine.session import Engine
from jaxchat.errors import UsageError, option
from jaxchat.layer_plan import LayerPlan, PlanArrays, Slot
from jaxchat.layers import attention
from jaxchat.layers.block import run_slot
from jaxchat.layers.cache import KVCache, empty_cache
from jaxchat.layers.step import Step
from jaxchat.lengths import common_prefix

_LOGITS = 1 << 24
"""Logits computed at once: 64 MiB in float32."""


class Windows(NamedTuple):
    """Pieces of a text, each read by itself from position 0."""

    tokens: np.ndarray  # int32 [B, T], padded with 0
    lengths: np.ndarray  # int32 [B], how many of the T tokens are real; 0 for a row of padding
    scored: np.ndarray | None = None  # bool [B, T], which tokens count; None: all that have one before them

    @property
    def counted(self) -> np.ndarray:
        """bool [B, T], the tokens whose probability is asked for."""
        places = np.arange(self.tokens.shape[1])
        real = (places > 0) & (places < self.lengths[:, None])
        return real if self.scored is None else real & self.scored

    @property
    def predicted(self) -> int:
        """How many tokens the figures are over."""
        return int(self.counted.sum())


class Outcome(NamedTuple):
    """What came of the tokens that count, of each window, under a plan.

    The last two are against the base plan; zeros where that was not asked for.
    """

    nats: np.ndarray  # float64 [B], the sum of their negative log-likelihoods
    greedy: np.ndarray  # bool [B], whether each of them is the most probable one
    kl: (
        np.ndarray
    )  # float64 [B], the sum of the divergences KL(base || plan) where they are predicted, in nats
    agreed: np.ndarray  # int64 [B], where the most probable token is the base plan's


class TokenOutcomes(NamedTuple):
    """What came of each of the N tokens that count, window after window, under a plan and the base plan."""

    base_nats: np.ndarray  # float64 [N], the token's negative log-likelihood under the base plan
    nats: np.ndarray  # float64 [N], the same under the plan
    kl: np.ndarray  # float64 [N], the divergence KL(base || plan) where it is predicted, in nats
    base_ids: np.ndarray  # int32 [N, k], what the base plan thinks most probable there
    base_logprobs: np.ndarray  # float32 [N, k]
    ids: np.ndarray  # int32 [N, k], and the plan
    logprobs: np.ndarray  # float32 [N, k]


class Places(NamedTuple):
    """The N places in windows whose next token counts, those of padding included."""

    rows: jax.Array  # int32 [N], of the windows' B * T tokens
    targets: jax.Array  # int32 [N], what follows there
    owner: jax.Array  # int32 [N], the window
    real: jax.Array  # bool [N]


def _places(windows: Windows, room: int) -> Places:
    counted = windows.counted
    owner, place = np.nonzero(counted)
    padding = max(room - len(owner), 0)

    def padded(part: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        return np.pad(part.astype(dtype), (0, padding))

    found = (
        padded(owner * counted.shape[1] + place - 1),
        padded(windows.tokens[owner, place]),
        padded(owner),
        padded(np.ones(len(owner)), bool),
    )
    return Places(*found)  # type: ignore[arg-type]


def cut_windows(ids: Sequence[int], length: int, *, bos: int | None = None) -> Windows:
    """Cuts a text into windows of at most `length` tokens; what cannot predict a token is left out.

    Args:
      ids: the text.
      length: of a window, `bos` included.
      bos: begins every window, as a text begins for this model; leave it out of `ids`.
    """
    step = length - (bos is not None)
    if step < 1 or length < 2:
        raise UsageError(f"{option('window')} is {length}; it must be at least 2")
    first = [] if bos is None else [bos]
    rows = [[*first, *ids[start : start + step]] for start in range(0, len(ids), step)]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise UsageError(
            f"the text is too short: {len(ids)} token(s), and predicting one takes two; give a longer one"
        )
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return Windows(tokens, np.array([len(row) for row in rows], np.int32))


class Sweep:
    """Evaluates plans on windows of text.

    Memory beside the weights: the base plan's residual stream at every slot ([P + 1, B, T, D]), the keys and
    values of one slot (a window is read in one go, so they need not outlive it), and 64 MiB of logits.

    Attributes:
      base: the slots of the base plan that are executed.
      step: what runs under it.
      places: where tokens count.
      states: [P + 1, B, T, D], the residual stream before each of them and after the last.
    """

    def __init__(
        self,
        engine: Engine,
        base: LayerPlan,
        windows: Windows,
        *,
        max_slots: int = 0,
        room: int | None = None,
        against_base: bool = False,
    ):
        """Reads the windows once under the base plan.

        Args:
          engine: the model.
          base: the plan whose prefixes others share.
          windows: what is read; at most `engine.max_length` long.
          max_slots: room for longer plans than `base`; the executable is compiled for it.
          room: for how many tokens that count; sweeps of one room and shape share their executable. Default
            as many as the windows could have.
          against_base: whether plans are compared with the base plan token by token, which takes the output
            head once more.

        Raises:
          UsageError: a window is longer than the context, or holds an id beyond the vocabulary; or the model
            has adapters.
        """
        if engine.adapters is not None:
            raise UsageError(
                "the analysis runs a model without adapters, and this one was loaded with some; merge them "
                "first (jaxchat convert --adapter)"
            )
        if windows.tokens.shape[1] > engine.max_length:
            raise UsageError(
                f"{option('window')} is {windows.tokens.shape[1]}, but the model's context holds "
                f"{engine.max_length}; choose fewer"
            )
        engine.check_ids(windows.tokens.reshape(-1).tolist())
        count, length = windows.tokens.shape
        memory.require(
            _states_bytes(engine, base, count, length),
            engine.devices,
            what=f"the residual stream of {count} windows of {length} tokens",
            advice="read fewer windows at once (batch), or shorter ones",
        )
        self.engine = engine
        self.base = base.executed()
        self.windows = windows
        self._capacity = max(len(self.base), max_slots)
        self.places = jax.device_put(
            _places(windows, count * (length - 1) if room is None else room), engine.placement
        )
        tokens, lengths = (jax.device_put(array, engine.placement) for array in windows[:2])
        self.step = Step(
            config=engine.config,
            dtype=engine.dtype,
            kernels=engine.kernels,
            params=engine.params,
            plan=base.arrays(self._capacity),
            tokens=tokens,
            lengths=jnp.zeros_like(lengths),
            new=lengths,
            context=lengths,
        )
        self.states = _states(engine.stored_kv_dtype, len(self.base), self.step)
        self._last = self.states[len(self.base)] if against_base else None

    def shared(self, plan: LayerPlan) -> int:
        """How many leading slots a plan has in common with the base plan."""
        return common_prefix(plan.executed(), self.base)

    def nats(self, plan: LayerPlan, start: int | None = None) -> np.ndarray:
        """The negative log-likelihood of each window under a plan, float64 [B], in nats.

        Args:
          plan: at most as many executed slots as there is room for.
          start: how many leading slots to take from the base plan; default all they share.
        """
        start = self.shared(plan) if start is None else start
        return self._scored(plan.arrays(self._capacity), self.states[start], start).nats

    def outcomes(self, plans: Sequence[LayerPlan]) -> Iterator[tuple[int, Outcome]]:
        """What comes of each of several plans; slots that two begin with alike are run once for both.

        Yields:
          The number of a plan, and its outcome; in the order in which that is so.
        """
        slots = [plan.executed() for plan in plans]
        order = sorted(range(len(plans)), key=lambda number: [_order(slot) for slot in slots[number]])
        alike = [common_prefix(slots[a], slots[b]) for a, b in itertools.pairwise(order)]
        forks: list[tuple[int, jax.Array]] = []  # (slots that have run, the residual stream after them)
        for place, number in enumerate(order):
            arrays, start = plans[number].arrays(self._capacity), common_prefix(slots[number], self.base)
            x = self.states[start]
            while forks and forks[-1][0] > alike[place - 1]:
                forks.pop()
            if forks and forks[-1][0] > start:
                start, x = forks[-1]
            for stop in _forks(alike[place:], start):
                x = self._run(arrays, x, start, stop, score=False)[0]
                forks.append((start := stop, x))
            yield number, self._scored(arrays, x, start)

    def token_outcomes(self, plan: LayerPlan, k: int) -> TokenOutcomes:
        """What comes of each token that counts under a plan, against the base plan; the k best candidates."""
        start = self.shared(plan)
        arrays = plan.arrays(self._capacity)
        step = dataclasses.replace(self.step, plan=arrays)
        bounds = np.int32(start), np.int32(arrays.length)
        found = _tokens(
            self.engine.stored_kv_dtype, k, step, self.states[start], *bounds, self.places,
            self.states[len(self.base)],
        )  # fmt: skip
        nats, _, kl, _, base_nats, *best = (np.asarray(part)[: self.windows.predicted] for part in found)
        return TokenOutcomes(*(part.astype(np.float64) for part in (base_nats, nats, kl)), *best)

    def lens_nats(self, slots: int) -> np.ndarray:
        """The same if the final norm and head follow right after the first `slots` slots of the base plan."""
        plan = self.step.plan._replace(length=np.array(slots, np.int32))
        return self._scored(plan, self.states[slots], slots).nats

    def _scored(self, plan: PlanArrays, x: jax.Array, start: int) -> Outcome:
        nats, greedy, kl, agreed = map(np.asarray, self._run(plan, x, start, int(plan.length), score=True)[1])
        return Outcome(nats.astype(np.float64), greedy, kl.astype(np.float64), agreed.astype(np.int64))

    def _run(self, plan: PlanArrays, x: jax.Array, start: int, stop: int, *, score: bool) -> Any:
        step = dataclasses.replace(self.step, plan=plan)
        bounds = np.int32(start), np.int32(stop)
        return _outcome(
            self.engine.stored_kv_dtype, step, x, *bounds, self.places, self._last, np.bool_(score)
        )

    def influence(self) -> np.ndarray:
        """1 - cosine of each slot's input and output, summed over the tokens of each window, float64 [P, B].

        Its mean over tokens is the Block Influence of ShortGPT (Men et al. 2024, arXiv 2403.03853).
        """
        return np.asarray(_influence(self.states, self.step.new), np.float64)

    def angular(self) -> np.ndarray:
        """Angle over pi between the residual stream at two slots, at each window's last token.

        The angular distance of Gromov et al. 2024 (arXiv 2403.17887); its mean over windows at [l, l + n]
        says how much the block of n slots from l on changes.

        Returns:
          float64 [B, P + 1, P + 1]; rows of padding are meaningless.
        """
        last = _last(self.states, self.step.new)
        x = np.asarray(last.astype(jnp.float32), np.float64).swapaxes(0, 1)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
        # Not arccos: it is off by 1e-8 even in float64 where two states are almost the same.
        chords = [np.linalg.norm(x - x[:, [slot]], axis=-1) for slot in range(x.shape[1])]
        return 2 / np.pi * np.arcsin(np.minimum(np.stack(chords, 1) / 2, 1))

    def lens(self, window: int, positions: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most probable next tokens, read off the residual stream by the final norm and head.

        The logit lens (nostalgebraist 2020), at N positions of a window.

        Returns:
          Token ids int32 and log-probabilities float32, [P + 1, N, k]: before each slot and after the last.
        """
        rows = self.states[:, window, np.asarray(positions, np.int32)]
        ids, logprobs = _lens(k, self.step, rows)
        return np.asarray(ids), np.asarray(logprobs)


def _forks(alike: Sequence[int], start: int) -> list[int]:
    """Where plans after this one, which have these slots in common with the one before, leave it."""
    found: list[int] = []
    for shared in itertools.accumulate(alike, min):
        if shared <= start:
            break
        if not found or shared < found[-1]:
            found.append(shared)
    return found[::-1]


def _order(slot: Slot) -> tuple[int, float, float]:
    """What slots are sorted by."""
    return slot.layer, slot.attn_scale, slot.mlp_scale


def _states_bytes(engine: Engine, base: LayerPlan, count: int, length: int) -> int:
    slots = len(base.executed()) + 1
    return slots * count * length * engine.config.hidden_size * engine.dtype.itemsize


def windows_at_once(engine: Engine, base: LayerPlan, windows: Windows, mebibytes: int = 256) -> int:
    """How many windows' hidden states, before and after every slot, fit `mebibytes`; at least one."""
    count, length = windows.tokens.shape
    most = min(max((mebibytes << 20) // _states_bytes(engine, base, 1, length), 1), count)
    return -(-count // -(-count // most))  # as even as can be


# --- the executables. Configuration, dtype, kernels and counts are static; plans, starts and texts traced.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _states(kv_dtype: jnp.dtype, slots: int, step: Step) -> jax.Array:
    """The residual stream before each slot and after the last, [P + 1, B, T, D]."""
    x = model.embed(step)
    states = jnp.zeros((slots + 1, *x.shape), step.dtype).at[0].set(x)

    def keep(p: jax.Array, states: jax.Array) -> jax.Array:
        return states.at[p + 1].set(run_windows(kv_dtype, step, states[p], p, p + 1))

    return lax.fori_loop(0, slots, keep, states)


@functools.partial(jax.jit, static_argnums=0)
def _outcome(
    kv_dtype: jnp.dtype,
    step: Step,
    x: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    places: Places,
    last: jax.Array | None,
    score: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The residual stream after the slots [start, stop), and, if `score`, an `Outcome`.

    `last` [B, T, D] is the base plan's after its last slot.
    """
    x = run_windows(kv_dtype, step, x, start, stop)
    batch = x.shape[0]

    def scored(x: jax.Array) -> tuple[jax.Array, ...]:
        nats, greedy, kl, agreed = _token_outcomes(step, x, places, last)
        add = functools.partial(jax.ops.segment_sum, segment_ids=places.owner, num_segments=batch)
        real = places.real
        nats, kl = (add(jnp.where(real, part, 0)) for part in (nats, kl))
        missed, agreed = (add((real & part).astype(jnp.int32)) for part in (~greedy, agreed))
        return nats, missed == 0, kl, agreed

    def nothing(x: jax.Array) -> tuple[jax.Array, ...]:
        zeros = jnp.zeros(batch, jnp.float32)
        return zeros, zeros > 0, zeros, zeros.astype(jnp.int32)

    return x, lax.cond(score, scored, nothing, x)


def run_windows(kv_dtype: jnp.dtype, step: Step, x: jax.Array, start: jax.Array, stop: Any) -> jax.Array:
    """Runs the slots [start, stop) on whole windows, one after the other on the same slot of cache."""
    batch, length, _ = x.shape
    cache = empty_cache(step.config, slots=1, batch=batch, capacity=length, dtype=kv_dtype)
    shared = attention.shared(step)

    def body(p: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return run_slot(step, shared, step.slot(p)._replace(position=jnp.int32(0)), *carry)

    return lax.fori_loop(start, stop, body, (x, cache))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tokens(
    kv_dtype: jnp.dtype,
    k: int,
    step: Step,
    x: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    places: Places,
    last: jax.Array,
) -> tuple[jax.Array, ...]:
    """The slots [start, stop), and what `_token_outcomes` has with candidates."""
    return _token_outcomes(step, run_windows(kv_dtype, step, x, start, stop), places, last, k)


def _token_outcomes(
    step: Step, x: jax.Array, places: Places, last: jax.Array | None, k: int = 0
) -> tuple[jax.Array, ...]:
    """Of the tokens at `places`, [N] each: nats, greedy, KL and agreed.

    With k, which needs `last`, also the base plan's nats, and the k most probable tokens and their
    log-probabilities under the base plan and under this one, [N, k].
    """

    def logits(x: jax.Array) -> jax.Array:
        return model.logits(step, model.final_norm(step, x))

    def outcome(part: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, ...]:
        x, targets, base_x = part
        scores = logits(x)
        chosen = _at(scores, targets)
        total = jax.nn.logsumexp(scores, axis=-1)
        greedy = chosen >= scores.max(-1)
        if base_x is None:
            return total - chosen, greedy, jnp.zeros_like(total), jnp.zeros_like(greedy)
        base = logits(base_x)
        base_total = jax.nn.logsumexp(base, axis=-1)
        difference = (base - base_total[:, None]) - (scores - total[:, None])
        kl = (jnp.exp(base - base_total[:, None]) * difference).sum(-1)
        found = total - chosen, greedy, kl, scores.argmax(-1) == base.argmax(-1)
        if not k:
            return found
        best, ids = lax.top_k(scores, k)
        base_best, base_ids = lax.top_k(base, k)
        return (
            *found, base_total - _at(base, targets),
            base_ids, base_best - base_total[:, None], ids, best - total[:, None],
        )  # fmt: skip

    base_rows = None if last is None else rows_at(places, last)
    return in_parts(step, outcome, (rows_at(places, x), places.targets, base_rows))


def rows_at(places: Places, states: jax.Array) -> jax.Array:
    """Of states [B, T, D] those at the places, [N, D]."""
    return states.reshape(-1, states.shape[-1])[places.rows]


def in_parts(step: Step, outcome: Callable[[Any], Any], parts: Any) -> Any:
    """`outcome(parts)`, all of them [N, ...], of so few at a time that logits [N, V] of them are small."""
    count = jax.tree.leaves(parts)[0].shape[0]
    chunks = -(-count // max(_LOGITS // step.config.vocab_size, 1))
    chunk = -(-count // chunks)  # as even as can be
    padding = -count % chunk

    def cut(part: jax.Array) -> jax.Array:
        padded = jnp.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1))
        return padded.reshape(chunks, chunk, *part.shape[1:])

    found = lax.map(outcome, jax.tree.map(cut, parts))
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[:count], found)


def _at(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Of scores [N, V] those of one token each, [N]."""
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _lens(k: int, step: Step, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows [P + 1, N, D] -> the k most probable tokens and their log-probabilities, [P + 1, N, k]."""

    def read(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, ids = lax.top_k(jax.nn.log_softmax(model.logits(step, model.final_norm(step, x))), k)
        return ids, logprobs

    return lax.map(read, rows)


@jax.jit
def _influence(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sum over tokens of 1 - cos, float32 [P, B]."""
    x = states.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    # |a - b|^2 / 2 is 1 - cos for unit vectors, and exact where they are almost the same.
    values = jnp.square(x[1:] - x[:-1]).sum(-1) / 2
    return jnp.where(jnp.arange(states.shape[2]) < lengths[:, None], values, 0).sum(-1)


@jax.jit
def _last(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """The states of each window's last token, [P + 1, B, D]."""
    index = jnp.maximum(lengths - 1, 0)[None, :, None, None]
    return jnp.take_along_axis(states, index, axis=2)[:, :, 0]
