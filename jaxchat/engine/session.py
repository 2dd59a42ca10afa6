"""Token ids in, token ids out: prefill, decode, sampling, sessions and batches. Knows no tokenizer.

A `Session` holds the token ids of a batch of sequences and a KV cache that is valid for a prefix of each.
Everything that changes a conversation (next turn, rollback, another plan) only changes ids and lengths;
the cache is brought up to date by the next prefill.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import model, pallas
from jaxchat.config import FINAL_NORM, ModelConfig
from jaxchat.engine import steps
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan, PlanArrays, Slot
from jaxchat.lengths import common_prefix, next_power_of_two
from jaxchat.model import KVCache, Params
from jaxchat.options import KV_DTYPES
from jaxchat.pallas.cache_attention import QuantizedRows
from jaxchat.sharding import cache_sharding

PREFILL_BUCKETS = (16, 64, 256, 1024)
"""Prompt chunks are padded to one of these lengths, so that a chat compiles a handful of steps."""

MIN_CAPACITY = 1024
"""Rows a cache starts with; it doubles as a session grows, up to the session's `max_length`."""


class ContextOverflowError(UsageError):
    """A prompt does not fit the context."""


class KVRows(NamedTuple):
    """The keys and values one sequence has in the cache, on the host: what `Session.restore` takes.

    A reshaped plan whose history is not recomputed yet may have more rows in its first slots than in its
    last; the rows beyond `slot_rows` are unspecified.
    """

    k: np.ndarray  # [P, K, S, H] of the executed slots and of the rows in use, in the cache's `kv_dtype`
    v: np.ndarray  # [P, K, S, H]
    slot_rows: np.ndarray  # int64 [P], how many rows of each slot are in use; S is the largest
    rope_regime: np.ndarray  # int64 [], `ModelConfig.rope_regime` of the context the keys are rotated for
    k_scale: np.ndarray | None = None  # float32 [P, K, S], with int8: see `QuantizedRows`
    v_scale: np.ndarray | None = None  # float32 [P, K, S]


class State(NamedTuple):
    """What a step of a session starts from. To be compared by `is`, part by part."""

    cache: KVCache | None
    plan: PlanArrays


class Engine:
    """A model on its device(s): configuration, parameters and how the arithmetic is done.

    Holds nothing mutable: sessions over one engine, and engines over one set of parameters, are independent.

    Args:
      config: the model.
      params: the parameter pytree, on device.
      max_length: the longest context in tokens; default the model's own.
      dtype: of the activations; default float32 on CPU and with float32 weights, else bfloat16.
      kv_dtype: of the KV cache, `float32`, `bfloat16` or `int8`; default as the activations.
      kernels: `auto`, `reference`, `native` or `pallas`: which implementations of the operations run.
      mesh: the mesh the parameters are sharded over; the caches are sharded to match.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        max_length: int | None = None,
        dtype: Any = None,
        kv_dtype: str | None = None,
        kernels: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
    ):
        if max_length is not None and max_length < 1:
            raise UsageError(f"--max_length is {max_length}; it must be at least 1")
        if config.learned_positions and max_length and max_length > config.max_position_embeddings:
            raise UsageError(
                f"--max_length is {max_length}, but this model has {config.max_position_embeddings} learned "
                f"positions; choose at most {config.max_position_embeddings}"
            )
        self.config = config
        if kernels == "auto" and mesh is not None and platform_of(params) == "cpu":
            kernels = "reference"  # XLA does not partition calls of native functions
        self.kernels = pallas.select(kernels, platform_of(params))
        self.params = self.kernels.prepare(params)
        self.max_length = max_length or config.max_position_embeddings
        self.dtype = jnp.dtype(dtype or default_dtype(params))
        self.kv_dtype = self.dtype if kv_dtype is None else jnp.dtype(checked_kv_dtype(kv_dtype))
        # XLA on CPU would widen a whole bfloat16 cache for every update of a row.
        as_bits = self.kv_dtype == jnp.bfloat16 and platform_of(params) == "cpu"
        self.stored_kv_dtype = jnp.dtype(jnp.uint16) if as_bits else self.kv_dtype
        self.mesh = mesh
        self.placement = _placement(params, mesh)

    def session(self, plan: LayerPlan | None = None, *, batch: int = 1, max_slots: int = 0) -> "Session":
        """A new, empty session of `batch` sequences under one plan."""
        return Session(
            self, plan or LayerPlan.identity(self.config.num_layers), batch=batch, max_slots=max_slots
        )

    def cache_sharding(self, batch: int) -> jax.sharding.Sharding | None:
        """Where the caches of a session of `batch` sequences live."""
        return self.placement if self.mesh is None else cache_sharding(self.config, self.mesh, batch)

    def check_plan(self, plan: LayerPlan) -> None:
        """Raises UsageError for a plan over another number of layers."""
        if plan.num_layers != self.config.num_layers:
            raise UsageError(
                f"the plan is over {plan.num_layers} layers, the model has {self.config.num_layers}"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UsageError for a token id that is not in the vocabulary."""
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(
                    f"token id {token} is not in the vocabulary of {self.config.vocab_size} tokens"
                )


def platform_of(params: Params) -> str:
    """`cpu`, `gpu` or `tpu`: where the parameters are."""
    platform = next(iter(params[FINAL_NORM].devices())).platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def checked_kv_dtype(name: str) -> str:
    """The name, unless it is not one of `KV_DTYPES`."""
    if name not in KV_DTYPES:
        raise UsageError(f"--kv_dtype is {name!r}; expected one of {', '.join(KV_DTYPES)}")
    return name


def default_dtype(params: Params) -> jnp.dtype:
    """float32 on CPU or with float32 weights, else bfloat16."""
    on_cpu = platform_of(params) == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu or params[FINAL_NORM].dtype == jnp.float32 else jnp.bfloat16)


def _placement(params: Params, mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
    """Where small state lives: each device of a mesh, or the one that holds the parameters.

    An array that was never placed would make the first call of every executable compile apart from the rest,
    whose arguments are earlier results and so placed.
    """
    if mesh is not None:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    devices = params[FINAL_NORM].devices()
    return jax.sharding.SingleDeviceSharding(next(iter(devices))) if len(devices) == 1 else None


class Session:
    """A batch of sequences with their KV cache.

    Attributes:
      ids: per sequence, every token of its context so far, generated ones included.
      cached: per sequence, how many leading tokens of `ids` have valid keys and values.
      padded_batch: rows of the arrays on device; those beyond the batch are padding.
    """

    def __init__(self, engine: Engine, plan: LayerPlan, *, batch: int = 1, max_slots: int = 0):
        self.engine = engine
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.cached = [0] * batch
        self._regime = [0] * batch
        self.padded_batch = next_power_of_two(batch)
        self._slots = max_slots
        self._cache: KVCache | None = None
        # What the slots of the cache hold: the executed slots they were written by, of which `plan` may be
        # just the first, and for each [P, B] how many leading rows are valid at least. `_rows_by_slot` adds
        # what `cached` knows.
        self._written: tuple[Slot, ...] = ()
        self._valid = np.zeros((max_slots, batch), np.int64)
        self.plan = plan
        self._plan_arrays: PlanArrays
        self.set_plan(plan)

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.ids)

    @property
    def cache_bytes(self) -> int:
        """Bytes the KV cache takes now."""
        return sum(part.nbytes for part in jax.tree.leaves(self._cache))

    def set_plan(self, plan: LayerPlan) -> None:
        """Runs everything from now on under another plan.

        The slots that both plans begin with keep their keys and values. The next prefill computes those of
        the others, for which the kept ids pass through the whole plan again; if the new plan is no more than
        the beginning of the old one, nothing is computed anew.
        """
        self.engine.check_plan(plan)
        executed = plan.executed()
        self._valid = self._rows_by_slot()
        more = max(len(executed), self.engine.config.num_layers) - self._slots
        if more > 0:
            self._valid = np.pad(self._valid, ((0, more), (0, 0)))
            self._slots += more
        kept = common_prefix(self._written, executed)
        if kept < len(executed):
            self._written = executed
            self._valid[kept:] = 0
        self._plan_arrays = plan.arrays(self._slots)
        self.plan = plan
        # Without slots there is nothing to cache.
        self.cached = self._valid[len(executed) - 1].tolist() if executed else [len(i) for i in self.ids]

    def _rows_by_slot(self) -> np.ndarray:
        """int [P, B], how many leading rows of each slot are valid; never more than in the slot before."""
        valid, slots = self._valid.copy(), len(self.plan.executed())
        valid[:slots] = np.maximum(valid[:slots], self.cached)
        return valid

    def _forget(self, row: int, length: int) -> None:
        """Declares a sequence's cache rows from `length` on invalid."""
        self.cached[row] = min(self.cached[row], length)
        self._valid[:, row] = np.minimum(self._valid[:, row], length)

    def rollback(self, length: int, row: int = 0) -> None:
        """Forgets a sequence's tokens from `length` on. Nothing is copied: it sets a length."""
        if not 0 <= length <= len(self.ids[row]):
            raise UsageError(f"cannot roll back to {length} tokens; the sequence has {len(self.ids[row])}")
        del self.ids[row][length:]
        self._forget(row, length)

    def set_ids(self, ids: Sequence[int], row: int = 0) -> int:
        """Makes `ids` a sequence's context, keeping what the cache already holds of it.

        Returns:
          How many leading tokens were kept.
        """
        self.engine.check_ids(ids)
        old = self.ids[row]
        kept = common_prefix(old, ids)
        self.rollback(kept, row)
        old.extend(ids[kept:])
        return min(kept, self.cached[row])

    def truncate_oldest(self, row: int, keep: int) -> None:
        """Drops the oldest tokens of a sequence, but not its first (the BOS), so that `keep` remain."""
        ids = self.ids[row]
        if len(ids) > keep:
            first = ids[: 1 if keep > 1 and ids[0] == self.engine.config.bos_id else 0]
            self.ids[row] = first + ids[len(ids) - (keep - len(first)) :]
            self._forget(row, 0)

    def cached_rows(self, row: int = 0) -> KVRows:
        """A sequence's keys and values, to be stored with its `ids` and given to `restore` later."""
        valid = self._rows_by_slot()[: len(self.plan.executed()), row]
        slots, rows = len(valid), int(valid.max(initial=0))

        def take(part: jax.Array) -> np.ndarray:
            out = np.asarray(part[:slots, row, :, :rows])
            # The cache gets the slots of a longer plan at the next prefill only.
            out = np.pad(out, [(0, slots - len(out))] + [(0, 0)] * (out.ndim - 1))
            return out.view(self.engine.kv_dtype) if out.dtype == np.uint16 else out

        config, dtype = self.engine.config, self.engine.stored_kv_dtype
        cache = self._cache or model.init_cache(
            config, slots=slots, batch=self.padded_batch, capacity=0, dtype=dtype
        )
        regime = np.asarray(self._regime[row])
        if isinstance(cache.k, QuantizedRows) and isinstance(cache.v, QuantizedRows):
            scales = take(cache.k.scale), take(cache.v.scale)
            return KVRows(take(cache.k.codes), take(cache.v.codes), valid, regime, *scales)
        k, v = map(take, jax.tree.leaves(cache))
        return KVRows(k, v, valid, regime)

    def restore(self, ids: Sequence[int], rows: KVRows, row: int = 0) -> None:
        """Makes `ids` a sequence's context whose keys and values are those that `cached_rows` gave.

        What follows is what would have followed there, bit for bit, on the same kind of machine.

        Raises:
          UsageError: the rows are not of this model, plan, cache dtype or number of tokens.
        """
        self.engine.check_ids(ids)
        self._check_rows(len(ids), rows)
        if len(ids) > self.engine.max_length:
            raise ContextOverflowError(
                f"the stored context has {len(ids)} tokens but the context holds {self.engine.max_length}; "
                "raise --max_length"
            )
        slots, length = rows.k.shape[0], rows.k.shape[2]
        self.ids[row] = list(ids)
        self._forget(row, 0)
        if slots == 0 or length == 0:
            return
        self._reserve(length)
        put = jax.jit(
            steps.put_rows,
            donate_argnums=0,
            out_shardings=self.engine.cache_sharding(self.padded_batch),
        )
        k, v = (jnp.asarray(part.view(self.engine.stored_kv_dtype)) for part in (rows.k, rows.v))
        new = KVCache(k, v)
        if rows.k_scale is not None and rows.v_scale is not None:
            scales = jnp.asarray(rows.k_scale), jnp.asarray(rows.v_scale)
            new = KVCache(QuantizedRows(k, scales[0]), QuantizedRows(v, scales[1]))
        self._cache = put(self._cache, new, row)
        self._valid[:slots, row] = rows.slot_rows
        self.cached[row] = int(rows.slot_rows[-1])
        self._regime[row] = int(rows.rope_regime)

    def _check_rows(self, tokens: int, rows: KVRows) -> None:
        config, slots = self.engine.config, len(self.plan.executed())
        shape = (slots, config.num_kv_heads, rows.k.shape[2] if rows.k.ndim == 4 else 0, config.head_dim)
        for name, part in (("keys", rows.k), ("values", rows.v)):
            if part.shape != shape:
                raise UsageError(
                    f"the stored {name} have the shape {list(part.shape)}, expected {list(shape)} (slots, "
                    "key/value heads, tokens, head size): restore them under their own model and plan"
                )
            if part.dtype != self.engine.kv_dtype:
                raise UsageError(
                    f"the stored {name} are {part.dtype}, the cache here is {self.engine.kv_dtype}: "
                    f"restore them with --kv_dtype {part.dtype}"
                )
        needed = (shape[:-1], np.dtype(np.float32)) if self.engine.kv_dtype == np.int8 else None
        for name, scale in (("keys", rows.k_scale), ("values", rows.v_scale)):
            if (None if scale is None else (scale.shape, scale.dtype)) != needed:
                raise UsageError(
                    f"the stored scales of the {name} do not belong to {self.engine.kv_dtype} {name}: "
                    f"expected {'none' if needed is None else f'float32 {list(shape[:-1])}'}"
                )
        counts = np.asarray(rows.slot_rows)
        falling = counts.shape == (slots,) and (np.diff(counts) <= 0).all() and (counts >= 0).all()
        if not falling or counts.max(initial=0) != shape[2] * (slots > 0) or shape[2] > tokens:
            raise UsageError(
                f"the stored numbers of rows are {counts.tolist()}: expected {slots} that never rise, the "
                f"first of them {shape[2]}, and none above the {tokens} tokens"
            )

    def prefill(self, rows: Sequence[int] | None = None) -> jax.Array:
        """Brings the cache up to date with `ids`, in padded chunks.

        Args:
          rows: the sequences to work on; default all that have tokens.

        Returns:
          float32 [B, V] logits after the last token of each of those sequences (other rows: undefined).

        Raises:
          ContextOverflowError: a sequence is longer than the engine's `max_length`.
        """
        rows = [r for r in range(self.batch) if self.ids[r]] if rows is None else rows
        for r in rows:
            self.follow_rope(r)
        return self.fill(rows)

    def keeps_rope(self, row: int, length: int) -> bool:
        """Whether cached keys fit a context of so many tokens: LongRoPE switches its factors.

        Dynamic NTK moves its base with every token. There, as in transformers, keys keep the rotation they
        were written with until the next prefill.
        """
        config = self.engine.config
        if not any(rope.kind == "longrope" for rope in config.ropes):
            return True
        return config.rope_regime(length) == self._regime[row]

    def follow_rope(self, row: int) -> None:
        """Forgets cached keys whose rotation is not that of the whole context at its present length."""
        regime = self.engine.config.rope_regime(len(self.ids[row]))
        if regime != self._regime[row]:
            self._forget(row, 0)
            self._regime[row] = regime

    def fill(self, rows: Sequence[int]) -> jax.Array:
        """`prefill` that takes the rotation of the cached keys as given."""
        if not rows or not all(self.ids[r] for r in rows):
            raise UsageError("nothing to prefill: give at least one token")
        longest = max(len(self.ids[r]) for r in rows)
        if longest > self.engine.max_length:
            raise ContextOverflowError(
                f"the prompt has {longest} tokens but the context holds {self.engine.max_length}; "
                "shorten it, raise --max_length or use --overflow truncate_oldest"
            )
        self._reserve(longest)
        for r in rows:
            self.cached[r] = min(self.cached[r], len(self.ids[r]) - 1)  # the last token gives the logits
        context = self.int_rows({r: len(self.ids[r]) for r in rows})
        out: jax.Array | None = None
        while any(self.cached[r] < len(self.ids[r]) for r in rows):
            kept = {r: self._kept(r) for r in rows}
            chunk = _chunk_length(max(end - self.cached[r] for r, (_, end) in kept.items()))
            tokens = np.zeros((self.padded_batch, chunk), np.int32)
            new = dict.fromkeys(rows, 0)
            for r, (_, end) in kept.items():
                part = self.ids[r][self.cached[r] : min(self.cached[r] + chunk, end)]
                tokens[r, : len(part)] = part
                new[r] = len(part)
            lengths, new_rows = self.int_rows({r: self.cached[r] for r in rows}), self.int_rows(new)
            logits, self._cache = steps.prefill(
                *self.operands,
                tokens,
                lengths,
                new_rows,
                context,
                self.int_rows({r: slots for r, (slots, _) in kept.items()}),
            )
            out = logits if out is None else jnp.where(new_rows[:, None] > 0, logits, out)
            for r in rows:
                self.cached[r] += new[r]
        assert out is not None
        return out

    def _kept(self, row: int) -> tuple[int, int]:
        """How many leading slots already have the row that comes next, and up to which row they have them."""
        valid = self._valid[: int(self._plan_arrays.length), row]
        slots = int(np.count_nonzero(valid > self.cached[row]))
        return slots, int(valid[slots - 1]) if slots else len(self.ids[row])

    def decode(self, tokens: jax.Array | np.ndarray, lengths: dict[int, int]) -> tuple[jax.Array, State]:
        """Begins the step of the sequences that have `lengths` tokens in the cache; `cached` stays as it is.

        Args:
          tokens: int32 [B], what follows those tokens.
          lengths: sequence -> its tokens.

        Returns:
          float32 [B, V] logits after `tokens`, and the state that the step left behind.
        """
        self._reserve(max(lengths.values()) + 1)
        logits, self._cache = steps.decode(
            *self.operands,
            # Wherever they come from, one executable serves.
            jax.device_put(tokens, self.engine.placement),
            self.int_rows(lengths),
            self.int_rows(dict.fromkeys(lengths, 1)),
        )
        return logits, self.state

    @property
    def operands(self) -> tuple[Any, ...]:
        """What all of the model's compiled steps begin with: configuration to plan, see `steps`."""
        engine = self.engine
        return engine.config, engine.dtype, engine.kernels, engine.params, self._cache, self._plan_arrays

    @property
    def state(self) -> State:
        """Other objects after every call that writes to the cache or sets the plan."""
        return State(self._cache, self._plan_arrays)

    def score(self, row: int = 0) -> np.ndarray:
        """`score_rows` of one sequence."""
        return self.score_rows([row])[0]

    def score_rows(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Log-probability of each token of sequences given those before it, float32 [len(ids) - 1] each.

        Recomputes them from their starts, together.
        """
        ids = {row: self.ids[row] for row in rows}
        longest = max((len(tokens) for tokens in ids.values()), default=0)
        if longest > self.engine.max_length:
            raise ContextOverflowError(
                f"the text has {longest} tokens but the context holds {self.engine.max_length}; "
                "score it in pieces or raise --max_length"
            )
        for row in rows:
            self.follow_rope(row)
        self._reserve(longest)
        context = self.int_rows({row: len(tokens) for row, tokens in ids.items()})
        # Logits of a whole chunk are [B, T, V] float32: chunks are kept short.
        limit = max(b for b in PREFILL_BUCKETS if b == PREFILL_BUCKETS[0] or b * self.padded_batch <= 256)
        done = dict.fromkeys(rows, 0)
        parts: dict[int, list[np.ndarray]] = {row: [np.zeros(0, np.float32)] for row in rows}
        while left := max((len(ids[row]) - 1 - done[row] for row in rows), default=0):
            chunk = min(_chunk_length(left), limit)
            tokens, targets = np.zeros((2, self.padded_batch, chunk), np.int32)
            new = {row: min(chunk, len(ids[row]) - 1 - done[row]) for row in rows}
            for row, n in new.items():
                at = done[row]
                tokens[row, :n], targets[row, :n] = ids[row][at : at + n], ids[row][at + 1 : at + n + 1]
            logprobs, self._cache = steps.score(
                *self.operands,
                tokens,
                self.int_rows(done),
                self.int_rows(new),
                context,
                targets,
            )
            for row, n in new.items():
                parts[row].append(np.asarray(logprobs[row, :n]))
                done[row] += n
        for row in rows:
            self.cached[row] = done[row]
        return [np.concatenate(parts[row]) for row in rows]

    def _reserve(self, length: int) -> None:
        """Makes room for `length` rows of every slot: allocates the cache or grows it by powers of two."""
        if any(part.is_deleted() for part in jax.tree.leaves(self._cache)):
            # A call that was interrupted (Ctrl-C) after taking the cache over and before handing it back.
            self.drop_cache()
        slots, _, _, rows, *_ = self._cache.k.shape if self._cache is not None else (0,) * 5
        if length <= rows and self._slots <= slots:
            return
        capacity = max(min(max(next_power_of_two(length), MIN_CAPACITY), self.engine.max_length), rows)
        if self._cache is None:
            self.drop_cache()
            self._cache = jax.jit(
                model.init_cache,
                static_argnums=0,
                static_argnames=("slots", "batch", "capacity", "dtype"),
                out_shardings=self.engine.cache_sharding(self.padded_batch),
            )(
                self.engine.config,
                slots=self._slots,
                batch=self.padded_batch,
                capacity=capacity,
                dtype=self.engine.stored_kv_dtype,
            )
        else:
            self._cache = steps.grow(self._cache, self._slots, capacity)

    def drop_cache(self) -> None:
        """Forgets all keys and values."""
        self._cache = None
        for row in range(self.batch):
            self._forget(row, 0)

    def int_rows(self, values: dict[int, int]) -> np.ndarray:
        """int32 [B], 0 where no value is given (padding rows among them)."""
        out = np.zeros(self.padded_batch, np.int32)
        for row, value in values.items():
            out[row] = value
        return out


def _chunk_length(remaining: int) -> int:
    """The bucket for the next chunk: the next one up unless half of it would be padding."""
    up = next((b for b in PREFILL_BUCKETS if b >= remaining), None)
    down = max((b for b in PREFILL_BUCKETS if b <= remaining), default=None)
    if up is not None and (down is None or up < 2 * remaining):
        return up
    assert down is not None
    return down
