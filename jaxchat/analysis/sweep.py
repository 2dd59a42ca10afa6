"""Plans evaluated on windows of text, from the hidden states of one base plan: what runs on the device.

One executable scores every plan, from the base plan's residual stream after the slots that both share.
What to evaluate, and what becomes of it, is `measure.py`'s.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat import memory, model
from jaxchat.engine.session import Engine
from jaxchat.errors import UsageError, option
from jaxchat.layer_plan import LayerPlan, PlanArrays
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

    @property
    def predicted(self) -> int:
        """How many tokens have one before them in their window: those a perplexity is over."""
        return int(np.maximum(self.lengths - 1, 0).sum())


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
      states: [P + 1, B, T, D], the residual stream before each of them and after the last.
    """

    def __init__(self, engine: Engine, base: LayerPlan, windows: Windows, *, max_slots: int = 0):
        """Reads the windows once under the base plan.

        Args:
          engine: the model.
          base: the plan whose prefixes others share.
          windows: what is read; at most `engine.max_length` long.
          max_slots: room for longer plans than `base`; the executable is compiled for it.

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
        tokens, lengths = (jax.device_put(array, engine.placement) for array in windows)
        self._base_step = Step(
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
        self.states = _states(engine.stored_kv_dtype, len(self.base), self._base_step)

    def shared(self, plan: LayerPlan) -> int:
        """How many leading slots a plan has in common with the base plan."""
        return common_prefix(plan.executed(), self.base)

    def nats(self, plan: LayerPlan, start: int | None = None) -> np.ndarray:
        """The negative log-likelihood of each window under a plan, float64 [B], in nats.

        Args:
          plan: at most as many executed slots as there is room for.
          start: how many leading slots to take from the base plan; default all they share.
        """
        arrays = plan.arrays(self._capacity)
        return self._nats(arrays, self.shared(plan) if start is None else start)

    def lens_nats(self, slots: int) -> np.ndarray:
        """The same if the final norm and head follow right after the first `slots` slots of the base plan."""
        return self._nats(self._base_step.plan._replace(length=np.array(slots, np.int32)), slots)

    def _nats(self, plan: PlanArrays, start: int) -> np.ndarray:
        step = dataclasses.replace(self._base_step, plan=plan)
        out = _nats(self.engine.stored_kv_dtype, step, self.states, np.int32(start))
        return np.asarray(out, np.float64)

    def influence(self) -> np.ndarray:
        """1 - cosine of each slot's input and output, summed over the tokens of each window, float64 [P, B].

        Its mean over tokens is the Block Influence of ShortGPT (Men et al. 2024, arXiv 2403.03853).
        """
        return np.asarray(_influence(self.states, self._base_step.new), np.float64)

    def angular(self) -> np.ndarray:
        """Angle over pi between the residual stream at two slots, at each window's last token.

        The angular distance of Gromov et al. 2024 (arXiv 2403.17887); its mean over windows at [l, l + n]
        says how much the block of n slots from l on changes.

        Returns:
          float64 [B, P + 1, P + 1]; rows of padding are meaningless.
        """
        last = _last(self.states, self._base_step.new)
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
        ids, logprobs = _lens(k, self._base_step, rows)
        return np.asarray(ids), np.asarray(logprobs)


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
        return states.at[p + 1].set(_run(kv_dtype, step, states[p], p, p + 1))

    return lax.fori_loop(0, slots, keep, states)


@functools.partial(jax.jit, static_argnums=0)
def _nats(kv_dtype: jnp.dtype, step: Step, states: jax.Array, start: jax.Array) -> jax.Array:
    """The negative log-likelihood of each window, float32 [B], with the slots before `start` done already."""
    x = _run(kv_dtype, step, states[start], start, step.plan.length)
    targets = jnp.pad(step.tokens[:, 1:], ((0, 0), (0, 1)))
    nats = _token_nats(step, x, targets)
    return jnp.where(step.positions < step.new[:, None] - 1, nats, 0).sum(1)


def _run(kv_dtype: jnp.dtype, step: Step, x: jax.Array, start: jax.Array, stop: Any) -> jax.Array:
    """Runs the slots [start, stop) on whole windows, one after the other on the same slot of cache."""
    batch, length, _ = x.shape
    cache = empty_cache(step.config, slots=1, batch=batch, capacity=length, dtype=kv_dtype)
    shared = attention.shared(step)

    def body(p: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return run_slot(step, shared, step.slot(p)._replace(position=jnp.int32(0)), *carry)

    return lax.fori_loop(start, stop, body, (x, cache))[0]


def _token_nats(step: Step, x: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), float32 [B, T], of a residual stream [B, T, D], from so many logits at a time."""
    rows = targets.size
    chunks = -(-rows // max(_LOGITS // step.config.vocab_size, 1))
    chunk = -(-rows // chunks)  # as even as can be
    padding = -rows % chunk
    flat_x = jnp.pad(x.reshape(rows, -1), ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[-1])
    flat_targets = jnp.pad(targets.reshape(rows), (0, padding)).reshape(-1, chunk)

    def nats(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.logits(step, model.final_norm(step, part[0]))
        chosen = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return lax.map(nats, (flat_x, flat_targets)).reshape(-1)[:rows].reshape(targets.shape)


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
