"""The adapters of an engine: read ones made into stacks once, and what every sequence uses of them.

How the stacks are used is in `layers/adapters.py`, how adapters are read in `checkpoints/adapter.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxchat import memory
from jaxchat.adapter_use import AdapterUse, Uses
from jaxchat.arguments import meant
from jaxchat.checkpoints.low_rank import Adapter, LowRank
from jaxchat.config import EMBED, HEAD, LAYERS, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.adapters import Adapters, Factors, Replaced
from jaxchat.layers.step import Params
from jaxchat.mixed import MixedTensor
from jaxchat.pallas.storage import as_bits, stored_dtype, widen
from jaxchat.quant import InParts, QuantizedTensor, Reordered
from jaxchat.visible import shown

COLUMNS = 8
"""Columns are added so many at a time: adapters of ranks that add up to the same share their executables."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterSet:
    """Adapters of one model as they are on its devices. Immutable: sessions hold what they use of it.

    Attributes:
      adapters: in the order of the strengths.
      stacks: with no strengths.
    """

    adapters: tuple[Adapter, ...]
    stacks: Adapters

    @property
    def rank(self) -> int:
        """R: the columns there are, of all adapters together."""
        return int(self.stacks.columns.shape[0])

    @property
    def names(self) -> list[str]:
        """What the adapters are called."""
        return [adapter.name for adapter in self.adapters]

    def number(self, use: AdapterUse) -> int:
        """See `number_of`."""
        return number_of(self.adapters, use)

    def strengths(
        self, rows: Sequence[Uses], plan: LayerPlan, *, padded: int, slots: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """float32 [B, A] outside of the slots and [P, B, A] in the executed ones, of sequences' uses."""
        everywhere = np.zeros((padded, len(self.adapters)), np.float32)
        bound = np.zeros((len(plan), padded, len(self.adapters)), np.float32)
        for row, uses in enumerate(rows):
            for use in uses:
                if use.slot is None:
                    everywhere[row, self.number(use)] += use.strength
                else:
                    bound[use.slot, row, self.number(use)] += use.strength
        executed = [place for place, slot in enumerate(plan) if not slot.is_identity]
        by_slot = np.zeros((slots, *everywhere.shape), np.float32)
        by_slot[: len(executed)] = everywhere + bound[executed]
        return everywhere, by_slot

    def identity(self, uses: Uses) -> list[str]:
        """What tells uses apart, whatever the directories are called: in any order the same."""
        totals: dict[tuple[str, int | None], float] = {}
        for use in uses:
            key = self.adapters[self.number(use)].digest, use.slot
            totals[key] = totals.get(key, 0.0) + use.strength
        return sorted(str(AdapterUse(name, value, slot)) for (name, slot), value in totals.items() if value)


def number_of(adapters: Sequence[Adapter], use: AdapterUse) -> int:
    """Which of some adapters a use names: by its directory, or the last part of that.

    Raises:
      UsageError: none, or several.
    """
    path = Path(use.name)
    found = [number for number, own in enumerate(adapters) if own.path in (path, path.absolute())]
    found = found or [number for number, own in enumerate(adapters) if use.name == own.name]
    if len(found) == 1:
        return found[0]
    names = [own.name for own in adapters]
    if found:
        raise UsageError(f"adapter {shown(use.name)}: {len(found)} of that name are loaded; give a directory")
    hint = meant(use.name, names) or f"; loaded are {', '.join(names)}"
    raise UsageError(f"adapter {shown(use.name)} is not loaded{hint} (load the model with it)")


def check_uses(adapters: Sequence[Adapter], uses: Uses, plan: LayerPlan) -> None:
    """Raises UsageError for uses of an adapter that is not there, or in a slot that it cannot be in."""
    for use in uses:
        adapter = adapters[number_of(adapters, use)]
        if use.slot is None:
            continue
        if use.slot >= len(plan):
            raise UsageError(
                f"adapter {shown(str(use))}: the layer plan has {len(plan)} slots; expected a slot from 0 to "
                f"{len(plan) - 1}"
            )
        if outside := sorted(name for name in adapter.touched if not name.startswith(LAYERS)):
            raise UsageError(
                f"adapter {shown(str(use))}: {adapter.path} changes {', '.join(outside)}, which is in no "
                "slot; use it without @SLOT"
            )


def adapter_set(
    adapters: Iterable[Adapter],
    config: ModelConfig,
    params: Params,
    *,
    dtype: jnp.dtype,
    placement: jax.sharding.Sharding | None,
) -> AdapterSet:
    """Puts adapters beside a model's weights.

    Args:
      adapters: read for this model.
      config: the model, its layers repeated as the adapters' `replicated` says.
      params: as loaded, before a kernel's own layout: DoRA needs the lengths of their rows.
      dtype: of the activations.
      placement: where they are to be.

    Raises:
      JaxchatError: there is no room for them.
      UsageError: a combination that has no meaning.
    """
    building = _Building(tuple(adapters), config, params, dtype, placement)
    return AdapterSet(building.adapters, building.stacks())


class _Building:
    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        config: ModelConfig,
        params: Params,
        dtype: jnp.dtype,
        placement: jax.sharding.Sharding | None,
    ):
        self.adapters, self.config, self.params, self.placement = adapters, config, params, placement
        leaf = jax.tree.leaves(params)[0]
        platform = next(iter(leaf.devices())).platform
        # bfloat16 on CPU would be widened at every use: its numbers fit float32.
        self.dtype = jnp.dtype(jnp.float32) if platform == "cpu" else dtype
        if platform == "cpu" and any(_bits(value) < 8 for value in params.values()):
            self.dtype = jnp.dtype(jnp.float16)  # what it rounds is far below what the weights have lost
        self.platform = "cpu" if platform == "cpu" else "other"
        self.table = {param.name: param for param in parameter_table(config)}
        starts = np.cumsum([0, *(adapter.rank for adapter in adapters)])
        self.starts = [int(start) for start in starts[:-1]]
        self.rank = -(-int(starts[-1]) // COLUMNS) * COLUMNS

    def stacks(self) -> Adapters:
        """All of it, on the devices."""
        size = sum(
            values.nbytes
            for adapter in self.adapters
            for layers in adapter.replaced.values()
            for values in layers.values()
        )
        size += sum(4 * self.config.vocab_size * self.config.hidden_size * len(a.rows) for a in self.adapters)
        devices = {device for leaf in jax.tree.leaves(self.params) for device in leaf.devices()}
        sizes = [self._factor_bytes(name) for name in self._names(lambda adapter: adapter.low_rank)]
        memory.require(
            size + sum(sizes), devices, what="the adapters", advice="load fewer, or of smaller ranks"
        )
        low_rank, gains = {}, {}
        for name in self._names(lambda adapter: adapter.low_rank):
            low_rank[name], gain = self._factors(name)
            if gain is not None:
                gains[name] = self._placed(gain)
        columns = np.zeros(self.rank, np.int32)
        for number, (start, adapter) in enumerate(zip(self.starts, self.adapters, strict=True)):
            columns[start : start + adapter.rank] = number
        empty = np.zeros((1, len(self.adapters)), np.float32)
        return Adapters(
            low_rank=low_rank,
            gains=gains,
            offsets=self._offsets(),
            replaced=self._replaced(),
            columns=self._placed(columns),
            strengths=self._placed(empty),
            by_slot=self._placed(empty[None]),
        )

    def _names(self, part: Callable[[Adapter], Mapping[str, Any]]) -> list[str]:
        return sorted({name for adapter in self.adapters for name in part(adapter)})

    def _placed(self, values: np.ndarray) -> jax.Array:
        return jax.device_put(values, self.placement)

    def _is_stacked(self, name: str) -> bool:
        return name.startswith(LAYERS)

    def _layers(self, adapter: Adapter, given: Mapping[int, Any], name: str) -> dict[int, Any]:
        """What an adapter has, by this model's layers: one that knows no repetitions follows its layer."""
        if not self._is_stacked(name):
            return dict(given)
        repeated = next((own.replicated for own in self.adapters if own.replicated), None)
        if repeated is None or adapter.replicated is not None:
            return dict(given)
        return {slot: given[layer] for slot, layer in enumerate(repeated) if layer in given}

    def _depth(self, name: str) -> int:
        return self.config.num_layers if self._is_stacked(name) else 1

    def _sizes(self, name: str) -> tuple[int, int]:
        """I and O of a weight's deltas."""
        deltas = (adapter.low_rank.get(name, {}).values() for adapter in self.adapters)
        delta = next(delta for own in deltas for delta in own)
        return delta.a.shape[1], delta.b.shape[0]

    def _factor_bytes(self, name: str) -> int:
        return self._depth(name) * self.rank * sum(self._sizes(name)) * self.dtype.itemsize

    def _factors(self, name: str) -> tuple[Factors, np.ndarray | None]:
        inp, out = self._sizes(name)
        depth = self._depth(name)
        a = np.zeros((depth, self.rank, inp), self.dtype)
        b = np.zeros((depth, self.rank, out), self.dtype)
        gain = np.zeros((depth, len(self.adapters), out), np.float32)
        for number, (start, adapter) in enumerate(zip(self.starts, self.adapters, strict=True)):
            layers = self._layers(adapter, adapter.low_rank.get(name, {}), name)
            for layer, delta in layers.items():
                factor = self._lengthening(adapter, name, layer, delta)
                columns = slice(start, start + len(delta.a))
                with np.errstate(over="ignore"):
                    a[layer, columns], b[layer, columns] = _balanced(delta.a, (delta.b * factor[:, None]).T)
                if not (_is_finite(a[layer, columns]) and _is_finite(b[layer, columns])):
                    raise JaxchatError(
                        f"{adapter.path}: the delta of {name} of layer {layer} is too large for "
                        f"{self.dtype}; the adapter is broken, or its lora_alpha is"
                    )
                gain[layer, number] = factor - 1
        return Factors(self._placed(a), self._placed(b)), gain if gain.any() else None

    def _lengthening(self, adapter: Adapter, name: str, layer: int, delta: LowRank) -> np.ndarray:
        """float32 [O]: what DoRA multiplies each row of weight and delta with, computed once; 1 without."""
        if delta.magnitude is None:
            return np.ones(len(delta.b), np.float32)
        replaced = adapter.replaced.get(name, {}).get(layer)
        if replaced is not None and not self._is_own(name, layer, replaced):
            raise UsageError(
                f"{adapter.path}: {name} is replaced, and has a DoRA delta, too; expected one of them"
            )
        weight = self._weight(name, layer)
        weight = weight.T if name == EMBED else weight
        lengths = np.asarray(_lengths(weight, delta.a, delta.b))
        if not (lengths > 0).all():
            raise JaxchatError(
                f"{adapter.path}: {name} of layer {layer} has a row of zeros, which DoRA cannot lengthen; "
                "take the model that the adapter was made for"
            )
        return np.asarray(delta.magnitude / lengths, np.float32)

    def _weight(self, name: str, layer: int) -> jax.Array:
        """A weight of the model, float32 [O, I]; a tied head is the embedding."""
        stack = self.params[EMBED if name == HEAD and HEAD not in self.params else name]
        if not self._is_stacked(name):
            return widen(stack).astype(jnp.float32)
        row = self.config.rows_of(name)[layer]
        if isinstance(stack, MixedTensor):
            part, row = stack.part[row], stack.row[row]
            stack = stack.parts[part]
        return widen(jax.tree.map(lambda array: array[row], stack)).astype(jnp.float32)

    def _offsets(self) -> dict[str, jax.Array]:
        """What is added to biases and norms: of one that is replaced, the difference."""
        found: dict[str, np.ndarray] = {}

        def put(name: str, number: int, layer: int, values: np.ndarray) -> None:
            shape = (self._depth(name), len(self.adapters), len(values))
            found.setdefault(name, np.zeros(shape, np.float32))[layer, number] += values

        for number, adapter in enumerate(self.adapters):
            for name, given in adapter.added.items():
                for layer, values in self._layers(adapter, given, name).items():
                    put(name, number, layer, values)
            for name, given in adapter.replaced.items():
                if not self._is_vector(name):
                    continue
                for layer, values in self._layers(adapter, given, name).items():
                    own = np.asarray(self._weight(name, layer))
                    put(name, number, layer, values.astype(np.float32) - own)
        return {name: self._placed(values) for name, values in found.items()}

    def _is_vector(self, name: str) -> bool:
        param: Param | None = self.table.get(name)
        return param is not None and len(param.shape.split()) == 1

    def _replaced(self) -> dict[str, tuple[Replaced, ...]]:
        found: dict[str, list[Replaced]] = {}
        for number, adapter in enumerate(self.adapters):
            for name, given in adapter.replaced.items():
                if self._is_vector(name):
                    continue
                layers = self._layers(adapter, given, name)
                layers = {i: values for i, values in layers.items() if not self._is_own(name, i, values)}
                if layers and name not in adapter.rows:
                    found.setdefault(name, []).append(self._stack_of(name, number, layers))
            for name in adapter.rows:
                table = adapter.replaced.get(name, {}).get(0, self._table(name))
                layers = {0: adapter.with_rows(name, table)}
                found.setdefault(name, []).append(self._stack_of(name, number, layers))
        return {name: tuple(parts) for name, parts in found.items()}

    def _table(self, name: str) -> np.ndarray:
        """An embedding or a head [V, D], in the type that it has; quantized ones in float32."""
        stack = self.params[EMBED if name == HEAD and HEAD not in self.params else name]
        if isinstance(stack, InParts):
            return np.asarray(self._weight(name, 0))
        table = np.asarray(stack)
        return table.view(ml_dtypes.bfloat16) if table.dtype == np.uint16 else table

    def _is_own(self, name: str, layer: int, values: np.ndarray) -> bool:
        """Whether what is to replace a weight is that: PEFT saves an embedding with its delta."""
        own = np.asarray(self._weight(name, layer))
        return own.shape == values.shape and np.array_equal(own, values.astype(np.float32))

    def _stack_of(self, name: str, number: int, layers: Mapping[int, np.ndarray]) -> Replaced:
        depth = self._depth(name)
        row, share = np.zeros(depth, np.int32), np.zeros(depth, np.float32)
        for place, layer in enumerate(layers):
            row[layer], share[layer] = place, 1
        stack = np.stack(list(layers.values()))
        kept = as_bits(stack) if stored_dtype(stack.dtype, self.platform) == jnp.uint16 else stack
        return Replaced(*map(self._placed, (kept, row, share, np.asarray(number, np.int32))))


def _bits(value: Any) -> int:
    """The fewest bits that a parameter's numbers have."""
    if isinstance(value, MixedTensor):
        return min(map(_bits, value.parts))
    if isinstance(value, Reordered):
        return _bits(value.weight)
    return value.bits if isinstance(value, QuantizedTensor) else 8 * value.dtype.itemsize


def _is_finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values.astype(np.float32)).all())


def _balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two factors [R, I] and [R, O] of the same product, of about one size: neither leaves float16.

    By powers of two, so that no digit changes.
    """
    sizes = [np.abs(part).max(axis=1, keepdims=True, initial=0) for part in (a, b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.exp2(np.round(np.log2(sizes[1] / sizes[0]) / 2))
    ratio = np.where((sizes[0] > 0) & (sizes[1] > 0), ratio, 1).astype(np.float32)
    return a * ratio, b / ratio


@jax.jit
def _lengths(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [O], the length of each row of `weight + b @ a`."""
    product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.norm(weight + product, axis=1)
