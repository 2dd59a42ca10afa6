"""Token ids in, token ids out: prefill, decode, sampling, sessions and batches. Knows no tokenizer.

A `Session` holds the token ids of a batch of sequences and a KV cache that is valid for a prefix of each.
Everything that changes a conversation (next turn, rollback, another plan) only changes ids and lengths;
the cache is brought up to date by the next prefill.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import memory, pallas
from jaxchat.adapter_use import Uses
from jaxchat.arguments import refused, whole
from jaxchat.config import EMBED, FINAL_NORM, ModelConfig
from jaxchat.draft_use import TreeShape
from jaxchat.engine import steps
from jaxchat.engine.acceptance import Kept
from jaxchat.engine.adapters import AdapterSet, check_uses
from jaxchat.engine.blocks import block_of
from jaxchat.engine.drafts import Draft
from jaxchat.engine.rows import Contexts
from jaxchat.errors import AdvisedError, UsageError, option
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan, PlanArrays
from jaxchat.layers.adapters import Adapters
from jaxchat.layers.cache import KVCache, cache_bytes, cache_sharding, empty_cache
from jaxchat.layers.step import Params, Step
from jaxchat.lengths import next_power_of_two
from jaxchat.options import KV_DTYPES, MAX_SLOTS
from jaxchat.pallas import Kernels
from jaxchat.pallas.cache_attention import QuantizedRows
from jaxchat.pallas.cache_attention.tree import Tree, tree_of
from jaxchat.pallas.storage import stored_dtype
from jaxchat.visible import shown

PREFILL_BUCKETS = (16, 64, 256, 1024)
"""Prompt chunks are padded to one of these lengths, so that a chat compiles a handful of steps."""

MIN_CAPACITY = 1024
"""Rows a cache starts with; it doubles as a session grows, up to the session's `max_length`."""


class ContextOverflowError(AdvisedError):
    """A prompt does not fit the context."""


class KVRows(NamedTuple):
    """The keys and values one sequence has in the cache, on the host: what `Session.restore` takes."""

    k: np.ndarray  # [P, K, S, H] of the executed slots and of the rows in use, in the cache's `kv_dtype`
    v: np.ndarray  # [P, K, S, H]
    rope_regime: np.ndarray  # int64 [], `families.rope.regime` of the context the keys are rotated for
    k_scale: np.ndarray | None = None  # float32 [P, K, S], with int8: see `QuantizedRows`
    v_scale: np.ndarray | None = None  # float32 [P, K, S]


class RowScores(NamedTuple):
    """How probable some tokens of a sequence are, given those before them."""

    logprobs: np.ndarray  # float32 [n]
    greedy: np.ndarray  # bool [n], whether it is the most probable one


_NO_SCORES = RowScores(np.zeros(0, np.float32), np.zeros(0, bool))


class State(NamedTuple):
    """What a step of a session starts from. To be compared by `is`, part by part."""

    cache: KVCache | None
    plan: PlanArrays
    adapters: Adapters | None


class Engine:
    """A model on its device(s): configuration, parameters and how the arithmetic is done.

    Holds nothing mutable: sessions over one engine, and engines over one set of parameters, are independent.

    Args:
      config: the model.
      params: the parameter pytree, on device.
      max_length: the longest context in tokens; default the model's own.
      dtype: of the activations; default float32 on CPU and with float32 weights, else bfloat16.
      kv_dtype: of the KV cache, `float32`, `bfloat16` or `int8`; default as the activations.
      kernels: `auto`, `reference`, `native` or `pallas`: which implementations of the operations run; or
        these themselves.
      mesh: the mesh the parameters are sharded over; the caches are sharded to match.
      adapters: what sessions may use beside the weights, see `engine.adapters`.
      uses: what a new session uses of them.
      draft: what drafts tokens for its sessions; None decodes one by one.
      draft_accept: which rule of `acceptance.RULES` keeps them.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        max_length: int | None = None,
        dtype: Any = None,
        kv_dtype: str | np.dtype | None = None,
        kernels: str | pallas.Kernels = "auto",
        mesh: jax.sharding.Mesh | None = None,
        adapters: AdapterSet | None = None,
        uses: Uses = (),
        draft: Draft | None = None,
        draft_accept: str = "lossless",
    ):
        if max_length is not None:
            max_length = whole("max_length", max_length, 1)
        most = config.max_position_embeddings
        if config.learned_positions and max_length and max_length > most:
            raise UsageError(
                f"{option('max_length')} is {max_length}, but this model has {most} learned positions; "
                f"choose at most {most}"
            )
        self.config = config
        if isinstance(kernels, str):
            kernels = kernels_for(kernels, next(iter(params[FINAL_NORM].devices())), mesh)
        self.kernels = kernels
        self.params = prepared(self.kernels, config, params)
        self.max_length = max_length or config.max_position_embeddings
        self.dtype = jnp.dtype(dtype or default_dtype(params))
        self.kv_dtype = self.dtype if kv_dtype is None else read_kv_dtype(kv_dtype)
        self.stored_kv_dtype = stored_dtype(self.kv_dtype, platform_of(params))
        self.mesh = mesh
        self.placement = placement_of(params, mesh)
        self.adapters = adapters
        self.uses = uses
        self.draft, self.draft_accept = draft, draft_accept

    def __repr__(self) -> str:
        """What it is, in a line."""
        return f"<Engine {self.described()}>"

    def described(self) -> str:
        """The model in a few words."""
        config = self.config
        return (
            f"{config.model_type}: {config.num_layers} layers, vocabulary of {config.vocab_size}, context of "
            f"{self.max_length}, computed in {self.dtype} on {platform_of(self.params)}"
        )

    def session(
        self,
        plan: LayerPlan | None = None,
        *,
        batch: int = 1,
        max_slots: int = 0,
        uses: Uses | None = None,
    ) -> "Session":
        """A new, empty session of `batch` sequences under one plan, with the engine's or other adapters."""
        plan = plan or LayerPlan.identity(self.config.num_layers)
        uses = self.uses if uses is None else uses
        return Session(self, plan, batch=batch, max_slots=max_slots, uses=uses)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return platform_of(self.params)

    @property
    def devices(self) -> set[jax.Device]:
        """What the parameters live on."""
        return {device for leaf in jax.tree.leaves(self.params) for device in leaf.devices()}

    def cache_sharding(self, batch: int) -> jax.sharding.Sharding | None:
        """Where the caches of a session of `batch` sequences live."""
        return self.placement if self.mesh is None else cache_sharding(self.config, self.mesh, batch)

    def check_plan(self, plan: LayerPlan) -> None:
        """Raises UsageError for what is no plan, or one over another number of layers."""
        if not isinstance(plan, LayerPlan):
            raise refused("plan", plan, "a LayerPlan")
        if plan.num_layers != self.config.num_layers:
            raise UsageError(
                f"the plan is over {plan.num_layers} layers, the model has {self.config.num_layers}"
            )

    def check_uses(self, uses: Uses, plan: LayerPlan) -> None:
        """Raises UsageError for uses of adapters that are not loaded, or have no such slot."""
        if self.adapters is not None:
            check_uses(self.adapters.adapters, uses, plan)
        elif uses:
            raise UsageError(
                f"adapter {shown(str(uses[0]))} is not loaded: the model has no adapters; load it with "
                f"{option('adapter')}"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UsageError for a token id that is not in the vocabulary."""
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(
                    f"token id {token} is not in the vocabulary: expected 0 to {self.config.vocab_size - 1}"
                )


def prepared(kernels: Kernels, config: ModelConfig, params: Params) -> Params:
    """Loaded parameters in the layout that the kernels read."""
    return {
        param.name: kernels.prepared(params[param.name], param.role, config.tied_embeddings)
        for param in parameter_table(config)
    }


def platform_of(params: Params) -> str:
    """`cpu`, `gpu` or `tpu`: where the parameters are."""
    return _platform(next(iter(params[FINAL_NORM].devices())))


def _platform(device: jax.Device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def kernels_for(name: str, device: jax.Device, mesh: jax.sharding.Mesh | None) -> pallas.Kernels:
    """The kernels of that name for a device, see `pallas.select`; `auto` heeds the mesh."""
    platform = _platform(device)
    if name == "auto" and mesh is not None and platform == "cpu":
        name = "reference"  # XLA does not partition calls of native functions
    return pallas.select(name, platform)


def read_kv_dtype(given: str | np.dtype) -> np.dtype:
    """The dtype of a name in `KV_DTYPES`; a dtype as it is."""
    if isinstance(given, str) and given not in KV_DTYPES:
        raise refused("kv_dtype", given, f"one of {', '.join(KV_DTYPES)}")
    return jnp.dtype(given)


def default_dtype(params: Params) -> jnp.dtype:
    """float32 on CPU or with float32 weights, else bfloat16."""
    on_cpu = platform_of(params) == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu or _in_float32(params) else jnp.bfloat16)


def _in_float32(params: Params) -> bool:
    """Whether the weights are float32: of quantized ones it tells nothing that their norms are."""
    embedding = params[EMBED]
    return isinstance(embedding, jax.Array) and embedding.dtype == jnp.float32


def placement_of(params: Params, mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
    """Where small state lives: each device of a mesh, or the one that holds the parameters.

    An array that was never placed would make the first call of every executable compile apart from the rest,
    whose arguments are earlier results and so placed.
    """
    if mesh is not None:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    devices = params[FINAL_NORM].devices()
    return jax.sharding.SingleDeviceSharding(next(iter(devices))) if len(devices) == 1 else None


class Computed(NamedTuple):
    """Drafted tokens that were verified and accepted, of which the draft is not told yet."""

    tokens: jax.Array  # int32 [B, A]
    hidden: jax.Array  # float32 [B, A, D]
    lengths: dict[int, int]  # sequence -> the position of the first
    counts: dict[int, int]  # sequence -> how many


class Session:
    """A batch of sequences with their KV cache.

    Attributes:
      engine: the model.
      plan: the layer plan that runs.
      contexts: what the sequences hold, and how much of it is cached.
      uses: what each sequence uses of the engine's adapters.
    """

    def __init__(
        self, engine: Engine, plan: LayerPlan, *, batch: int = 1, max_slots: int = 0, uses: Uses = ()
    ):
        self.engine = engine
        self.uses = [uses] * whole("batch", batch, 1)
        self._adapters: Adapters | None = None
        self.contexts = Contexts(engine.config, whole("batch", batch, 1))
        self._slots = whole("max_slots", max_slots, 0, MAX_SLOTS)
        self._cache: KVCache | None = None
        self._drafting = None if engine.draft is None else engine.draft.drafting(engine, self.padded_batch)
        self._unseen: Computed | None = None
        self.plan = plan
        self._plan_arrays: PlanArrays
        self.set_plan(plan)

    def __repr__(self) -> str:
        """What it is, in a line."""
        tokens = ", ".join(map(str, map(len, self.ids[:8]))) + (", ..." if self.batch > 8 else "")
        return f"<Session of {self.batch}, with {tokens} tokens, plan {shown(str(self.plan))}>"

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.contexts.batch

    @property
    def ids(self) -> list[list[int]]:
        """Per sequence, every token of its context so far, generated ones included."""
        return self.contexts.ids

    @property
    def cached(self) -> list[int]:
        """Per sequence, how many leading tokens of `ids` have valid keys and values."""
        return self.contexts.cached

    @property
    def padded_batch(self) -> int:
        """Rows of the arrays on device; those beyond the batch are padding."""
        return self.contexts.padded

    @property
    def slots(self) -> int:
        """Slots that the KV cache has or is to have: plans of up to so many share their executables."""
        return self._slots

    @property
    def cache_bytes(self) -> int:
        """Bytes the KV cache takes now."""
        return sum(part.nbytes for part in jax.tree.leaves(self._cache))

    def set_plan(self, plan: LayerPlan) -> None:
        """Runs everything from now on under another plan.

        If it is the beginning of the one before, nothing is computed anew, nor what is cached from before
        when that one comes back; else the next prefill runs the kept ids through it.
        """
        self.engine.check_plan(plan)
        for uses in dict.fromkeys(self.uses):
            self.engine.check_uses(uses, plan)
        executed = plan.executed()
        self._slots = max(len(executed), self.engine.config.num_layers, self._slots)
        self.contexts.run_under(executed)
        for row, uses in enumerate(self.uses):
            if plan != self.plan and any(use.slot is not None for use in uses):
                self.contexts.forget(row, 0)  # the slot may be of another layer
        self._plan_arrays = plan.arrays(self._slots)
        self.plan = plan
        self._set_strengths()

    def set_adapters(self, uses: Uses, row: int = 0) -> None:
        """Runs a sequence with other adapters from now on; nothing is compiled for it.

        What its cache holds is of those before: the next prefill computes it anew.

        Raises:
          UsageError: one is not loaded, or bound to a slot that it cannot be in.
        """
        self.engine.check_uses(uses, self.plan)
        if uses == self.uses[row]:
            return
        self.uses[row] = uses
        self.contexts.forget(row, 0)
        self._set_strengths()

    def _set_strengths(self) -> None:
        adapters = self.engine.adapters
        if adapters is None:
            return
        both = adapters.strengths(self.uses, self.plan, padded=self.padded_batch, slots=self._slots)
        strengths, by_slot = (jax.device_put(values, self.engine.placement) for values in both)
        self._adapters = dataclasses.replace(adapters.stacks, strengths=strengths, by_slot=by_slot)

    def rollback(self, length: int, row: int = 0) -> None:
        """Forgets a sequence's tokens from `length` on. Nothing is copied: it sets a length."""
        self.contexts.rollback(length, row)

    def set_ids(self, ids: Sequence[int], row: int = 0) -> int:
        """Makes `ids` a sequence's context, keeping what the cache already holds of it.

        Returns:
          How many leading tokens were kept.
        """
        self.engine.check_ids(ids)
        return self.contexts.set_ids(ids, row)

    def cached_rows(self, row: int = 0) -> KVRows:
        """A sequence's keys and values, to be stored with its `ids` and given to `restore` later."""
        engine, slots, length = self.engine, len(self.plan.executed()), self.cached[row]
        cache = self._cache
        if cache is None or length == 0:  # whose slots may be fewer than the plan's
            shape = {"slots": slots, "batch": self.padded_batch, "capacity": 0}
            cache = empty_cache(engine.config, **shape, dtype=engine.stored_kv_dtype)
        rows = cache.rows(slots, row, length)
        regime = np.asarray(self.contexts.regimes[row])
        if isinstance(rows.k, QuantizedRows) and isinstance(rows.v, QuantizedRows):
            return KVRows(*map(np.asarray, (rows.k.codes, rows.v.codes, regime, rows.k.scale, rows.v.scale)))
        k, v = (np.asarray(part) for part in (rows.k, rows.v))
        if k.dtype == np.uint16:
            k, v = k.view(engine.kv_dtype), v.view(engine.kv_dtype)
        return KVRows(k, v, regime)

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
                f"the stored context has {len(ids)} tokens but the context holds {self.engine.max_length}",
                f"raise {option('max_length')}",
            )
        slots, length = rows.k.shape[0], rows.k.shape[2]
        self._show_draft()
        if self._drafting is not None:
            self._drafting.forget(row)
        self.ids[row][:] = ids
        self.contexts.forget(row, 0)
        if slots == 0 or length == 0:
            return
        self._reserve(length)
        k, v = (jnp.asarray(part.view(self.engine.stored_kv_dtype)) for part in (rows.k, rows.v))
        new = KVCache(k, v)
        if rows.k_scale is not None and rows.v_scale is not None:
            scales = jnp.asarray(rows.k_scale), jnp.asarray(rows.v_scale)
            new = KVCache(QuantizedRows(k, scales[0]), QuantizedRows(v, scales[1]))
        sharding = self.engine.cache_sharding(self.padded_batch)
        assert self._cache is not None  # reserved above
        self._cache = steps.put_rows(self._cache, new, row, sharding=sharding)
        self.cached[row] = length
        self.contexts.regimes[row] = int(rows.rope_regime)

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
                    f"restore them with {option('kv_dtype', str(part.dtype))}"
                )
        needed = (shape[:-1], np.dtype(np.float32)) if self.engine.kv_dtype == np.int8 else None
        for name, scale in (("keys", rows.k_scale), ("values", rows.v_scale)):
            if (None if scale is None else (scale.shape, scale.dtype)) != needed:
                raise UsageError(
                    f"the stored scales of the {name} do not belong to {self.engine.kv_dtype} {name}: "
                    f"expected {'none' if needed is None else f'float32 {list(shape[:-1])}'}"
                )
        if shape[2] > tokens:
            raise UsageError(
                f"the stored keys are of {shape[2]} tokens, the conversation has {tokens}: expected no more"
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
            self.contexts.follow_rotation(r)
        return self.prefill_as_rotated(rows)

    def prefill_as_rotated(self, rows: Sequence[int]) -> jax.Array:
        """`prefill` that takes the rotation of the cached keys as given."""
        if not rows or not all(self.ids[r] for r in rows):
            raise UsageError("nothing to prefill: give at least one token")
        longest = max(len(self.ids[r]) for r in rows)
        if longest > self.engine.max_length:
            raise ContextOverflowError(
                f"the prompt has {longest} tokens but the context holds {self.engine.max_length}",
                f"shorten it, raise {option('max_length')} or use {option('overflow', 'truncate_oldest')}",
            )
        self._reserve(longest)
        self._show_draft()
        for r in rows:
            self.cached[r] = min(self.cached[r], len(self.ids[r]) - 1)  # the last token gives the logits
        context = self.contexts.lengths(rows)
        out: jax.Array | None = None
        while left := max(len(self.ids[r]) - self.cached[r] for r in rows):
            chunk = _chunk_length(left)
            tokens = np.zeros((self.padded_batch, chunk), np.int32)
            new = dict.fromkeys(rows, 0)
            for r in rows:
                part = self.ids[r][self.cached[r] : self.cached[r] + chunk]
                tokens[r, : len(part)] = part
                new[r] = len(part)
            lengths, new_rows = self._array({r: self.cached[r] for r in rows}), self._array(new)
            logits = self._prefilled(self.step(tokens, lengths, new_rows, context))
            out = logits if out is None else jnp.where(new_rows[:, None] > 0, logits, out)
            for r in rows:
                self.cached[r] += new[r]
        assert out is not None
        return out

    def _prefilled(self, step: Step) -> jax.Array:
        """Runs a chunk of prompts; float32 [B, V] logits."""
        if self._drafting is None:
            logits, self._cache = steps.prefill(step, self._cache)
            return logits
        logits, hidden, self._cache = steps.prefill_seen(step, self._cache)
        self._drafting.observe(step, self._before(np.asarray(step.lengths)), hidden, self._cache.capacity)
        return logits

    def _before(self, lengths: np.ndarray) -> np.ndarray:
        """int32 [B, 2], the two tokens before these positions; 0 before the first."""
        out = np.zeros((self.padded_batch, 2), np.int32)
        for row, ids in enumerate(self.ids):
            at = int(lengths[row])
            two = ids[max(at - 2, 0) : at]
            out[row, 2 - len(two) :] = two
        return out

    # --- drafted tokens

    def drafts(self, rows: Sequence[int]) -> bool:
        """Whether there is a draft that can go on from here, for all of these sequences."""
        if self._drafting is None:
            return False
        self._show_draft()
        return all(self._drafting.ready(row, self.cached[row]) for row in rows)

    def verify(self, room: dict[int, int]) -> tuple[jax.Array, np.ndarray, jax.Array, jax.Array]:
        """Drafts tokens behind the last of each of some sequences, and computes them; see `drafts`, `keep`.

        Args:
          room: sequence -> how many tokens of the tree count, its first among them.

        Returns:
          The tokens int32 [B, T]; `room` as int32 [B]; logits float32 [B, T, V]; hidden states [B, T, D].
        """
        engine, shape = self.engine, self.engine.draft.shape  # type: ignore[union-attr]
        assert self._drafting is not None  # `drafts` said so
        lengths = {row: self.cached[row] for row in room}
        self._reserve(min(max(lengths.values()) + len(shape.parents), engine.max_length))
        before, new = self._array(lengths), self._array(room)
        last = np.zeros((self.padded_batch, 3), np.int32)
        for row in room:
            three = self.ids[row][-3:]
            last[row, 3 - len(three) :] = three
        step = self.step(last[:, 2:], before, new, before + 1)
        tokens = self._drafting.propose(step, last)
        step = dataclasses.replace(step, tokens=tokens, tree=_tree(shape, self.padded_batch))
        logits, hidden, self._cache = steps.verify(step, self._cache)
        return tokens, new, logits, hidden

    def keep(self, kept: Kept, counts: dict[int, int], path: np.ndarray) -> None:
        """Keeps the accepted ones of the tokens that were verified last; `cached` stays as it is.

        Args:
          kept: what was accepted.
          counts: sequence -> how many of the computed tokens it keeps.
          path: `kept.path`, on the host.
        """
        lengths = {row: self.cached[row] for row in counts}
        if any((path[row, :count] != np.arange(count)).any() for row, count in counts.items()):
            assert self._cache is not None
            self._cache = steps.gather(self._cache, self._array(lengths), kept.path, self._array(counts))
        self._unseen = Computed(kept.computed, kept.hidden, lengths, counts)

    def _show_draft(self) -> None:
        """Lets the draft observe what it has not yet, as far as it is still of the texts."""
        unseen, self._unseen = self._unseen, None
        if unseen is None:
            return
        assert self._drafting is not None
        assert self._cache is not None
        new = {
            row: min(max(self.cached[row] - start, 0), unseen.counts[row])
            for row, start in unseen.lengths.items()
        }
        lengths, counts = self._array(unseen.lengths), self._array(new)
        step = self.step(unseen.tokens, lengths, counts, lengths + counts)
        self._drafting.observe(step, self._before(lengths), unseen.hidden, self._cache.capacity)

    def decode(self, tokens: jax.Array | np.ndarray, lengths: dict[int, int]) -> tuple[jax.Array, State]:
        """Begins the step of the sequences that have `lengths` tokens in the cache; `cached` stays as it is.

        Args:
          tokens: int32 [B], what follows those tokens.
          lengths: sequence -> its tokens.

        Returns:
          float32 [B, V] logits after `tokens`, and the state that the step left behind.
        """
        self._reserve(max(lengths.values()) + 1)
        # Wherever they come from, one executable serves.
        tokens = jax.device_put(tokens, self.engine.placement)
        before, active = self._array(lengths), self._array(dict.fromkeys(lengths, 1))
        logits, self._cache = steps.decode(self.step(tokens, before, active, before + 1), self._cache)
        return logits, self.state

    def step(
        self,
        tokens: Any,
        lengths: Any,
        new: Any,
        context: Any,
    ) -> Step:
        """A step of this model under this plan; the arguments are as in `Step`, or numpy arrays."""
        engine = self.engine
        return Step(
            config=engine.config,
            dtype=engine.dtype,
            kernels=engine.kernels,
            params=engine.params,
            plan=self._plan_arrays,
            tokens=tokens,
            lengths=lengths,
            new=new,
            context=context,
            adapters=self._adapters,
        )

    @property
    def state(self) -> State:
        """Other objects after every call that writes to the cache, or sets the plan or adapters."""
        return State(self._cache, self._plan_arrays, self._adapters)

    def score_rows(self, rows: Sequence[int], starts: Mapping[int, int] | None = None) -> list[RowScores]:
        """How probable the tokens of sequences are, given those before them; computed together.

        Args:
          rows: the sequences.
          starts: sequence -> its first token that counts, at least 1 (the default), whose predecessors may be
            in the cache; without it a sequence is computed from its start. The numbers do then not depend
            on what was in the cache, nor on other sequences: all is computed in short chunks, as CPU kernels
            round the activations of long ones otherwise.

        Returns:
          Of each sequence the scores of its tokens from there on.
        """
        ids = {row: self.ids[row] for row in rows}
        longest = max((len(tokens) for tokens in ids.values()), default=0)
        if longest > self.engine.max_length + 1:  # the last one predicts nothing
            raise ContextOverflowError(
                f"the text has {longest} tokens but the context holds {self.engine.max_length}",
                f"score it in pieces or raise {option('max_length')}",
            )
        for row in rows:
            self.contexts.follow_rotation(row)
        self._reserve(max(longest - 1, 1))
        first = {row: (starts or {}).get(row, 1) - 1 for row in rows}
        done = {row: min(self.cached[row], first[row]) for row in rows}
        limit = None if starts is None else PREFILL_BUCKETS[0]
        self._fill(done, first, limit)
        parts: dict[int, list[RowScores]] = {row: [_NO_SCORES] for row in rows}
        for tokens, targets, new in self._chunks(done, {row: len(ids[row]) - 1 for row in rows}, limit):
            step = self.step(tokens, self._array(done), self._array(new), self.contexts.lengths(rows))
            scored, self._cache = steps.score(step, self._cache, targets)
            logprobs, greedy = map(np.asarray, scored)
            for row, n in new.items():
                parts[row].append(RowScores(logprobs[row, :n], greedy[row, :n]))
                done[row] += n
        for row in rows:
            self.cached[row] = max(done[row], 0)
        return [RowScores(*map(np.concatenate, zip(*parts[row], strict=True))) for row in rows]

    def _fill(self, done: dict[int, int], until: Mapping[int, int], limit: int | None) -> None:
        """Computes sequences from `done` on, which it moves on, until a place of each, without logits."""
        for tokens, _, new in self._chunks(done, until, limit):
            step = self.step(tokens, self._array(done), self._array(new), self.contexts.lengths(list(done)))
            self._cache = steps.fill(step, self._cache)
            for row, n in new.items():
                done[row] += n

    def _chunks(
        self, done: Mapping[int, int], until: Mapping[int, int], limit: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, int]]]:
        """Tokens int32 [B, T] from `done` on, those after each, and how many are a sequence's own."""
        # Logits of a whole chunk are [B, T, V] float32: chunks are kept short.
        limit = limit or max(
            b for b in PREFILL_BUCKETS if b == PREFILL_BUCKETS[0] or b * self.padded_batch <= 256
        )
        while (left := max((until[row] - done[row] for row in done), default=0)) > 0:
            chunk = min(_chunk_length(left), limit)
            tokens, targets = np.zeros((2, self.padded_batch, chunk), np.int32)
            new = {row: min(chunk, max(until[row] - done[row], 0)) for row in done}
            for row, n in new.items():
                at = done[row]
                tokens[row, :n] = self.ids[row][at : at + n]
                targets[row, :n] = self.ids[row][at + 1 : at + n + 1]
            yield tokens, targets, new

    def prefill_alike(self, rows: Sequence[int]) -> None:
        """Brings the cache up to date with all but the last token of sequences, each as it would be alone.

        `prefill` takes chunks that the longest sequence chooses; these are each sequence's own, see `blocks`.
        What is cached before has to be in such blocks, too.

        Raises:
          ContextOverflowError: a sequence is longer than the engine's `max_length`.
        """
        for step, _ in self._steps_alike({row: len(self.ids[row]) - 1 for row in rows}):
            self._prefilled(step)

    def mean_rows(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The means of the normed hidden states over all tokens of sequences, float32 [D] each.

        Recomputes them from their starts, each in its own blocks. The sums are of 64 bits, in order.
        """
        for row in rows:
            self.contexts.forget(row, 0)
        sums = {row: np.zeros((1, self.engine.config.hidden_size)) for row in rows}
        for step, new in self._steps_alike({row: len(self.ids[row]) for row in rows}):
            hidden, self._cache = steps.hidden(step, self._cache)
            found = np.asarray(hidden)
            for row, count in new.items():
                parts = np.concatenate([sums[row], found[row, :count]])
                sums[row] = np.add.reduce(parts, axis=0, keepdims=True)  # one after the other, as the axis is
        return [(sums[row][0] / max(len(self.ids[row]), 1)).astype(np.float32) for row in rows]

    def _steps_alike(self, ends: Mapping[int, int]) -> Iterator[tuple[Step, dict[int, int]]]:
        """Steps that bring sequences up to so many tokens, and how many new ones each has in a step."""
        longest = max((len(self.ids[row]) for row in ends), default=0)
        if longest > self.engine.max_length:
            raise ContextOverflowError(
                f"the text has {longest} tokens but the context holds {self.engine.max_length}",
                f"shorten it or raise {option('max_length')}",
            )
        for row in ends:
            self.contexts.follow_rotation(row)
        self._reserve(longest)
        self._show_draft()
        context = self.contexts.lengths(list(ends))
        while left := {row: end - self.cached[row] for row, end in ends.items() if end > self.cached[row]}:
            size = max(map(block_of, left.values()))
            new = {row: min(size, count) for row, count in left.items() if block_of(count) == size}
            tokens = np.zeros((self.padded_batch, size), np.int32)
            for row, count in new.items():
                at = self.cached[row]
                tokens[row, :count] = self.ids[row][at : at + count]
            before = self._array({row: self.cached[row] for row in new})
            yield self.step(tokens, before, self._array(new), context), new
            for row, count in new.items():
                self.cached[row] += count

    def _reserve(self, length: int) -> None:
        """Makes room for `length` rows of every slot: allocates the cache or grows it by powers of two."""
        if any(part.is_deleted() for part in jax.tree.leaves(self._cache)):
            # A call that was interrupted (Ctrl-C) after taking the cache over and before handing it back.
            self.drop_cache()
        slots, rows = (0, 0) if self._cache is None else (self._cache.slots, self._cache.capacity)
        if length <= rows and self._slots <= slots:
            return
        capacity = max(min(max(next_power_of_two(length), MIN_CAPACITY), self.engine.max_length), rows)
        sizes: dict[str, Any] = {
            "slots": self._slots,
            "batch": self.padded_batch,
            "capacity": capacity,
            "dtype": self.engine.stored_kv_dtype,
        }
        memory.require(
            cache_bytes(self.engine.config, **sizes),
            self.engine.devices,
            what=f"the KV cache of {self._slots} slots, {self.batch} x {capacity} tokens",
            advice="choose a shorter context, fewer slots or the KV dtype int8",
        )
        if self._cache is not None:
            self._cache = steps.grow(self._cache, self._slots, capacity)
            return
        self.drop_cache()
        self._cache = steps.allocate(
            self.engine.config, **sizes, sharding=self.engine.cache_sharding(self.padded_batch)
        )

    def drop_cache(self) -> None:
        """Forgets all keys and values."""
        self._cache = self._unseen = None
        self.contexts.forget_all()

    def _array(self, values: dict[int, int]) -> np.ndarray:
        return self.contexts.array(values)


def _tree(shape: TreeShape, batch: int) -> Tree:
    """The same tree for every sequence."""
    return Tree(*(np.broadcast_to(part, (batch, len(part))) for part in tree_of(shape.parents)))  # type: ignore[arg-type]


def _chunk_length(remaining: int) -> int:
    """The bucket for the next chunk: the next one up unless half of it would be padding."""
    up = next((b for b in PREFILL_BUCKETS if b >= remaining), None)
    down = max((b for b in PREFILL_BUCKETS if b <= remaining), default=None)
    if up is not None and (down is None or up < 2 * remaining):
        return up
    assert down is not None
    return down
