"""What a call of the model runs on: `Step`, and one slot of its plan; and how a slot finds its parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.config import LAYERS, Block, ModelConfig
from jaxchat.layer_plan import PlanArrays
from jaxchat.pallas import stacked_matmul
from jaxchat.pallas.backends import Kernels
from jaxchat.pallas.cache_attention import Tree
from jaxchat.pallas.storage import widen

Params = dict[str, Any]
"""The parameter pytree: `Param.name` -> jax.Array or QuantizedTensor; `layers.*` are stacked [L, ...]."""

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the model: what is static, the weights, the plan, and the new tokens of each sequence.

    Attributes:
      config: the model, static.
      dtype: of the activations, static; sums, norms, softmax and rotations are float32.
      kernels: the implementations to use, static.
      params: see `Params`.
      plan: traced; slots beyond `plan.length` are not executed.
      tokens: int32 [B, T]; entries from `new` on are padding.
      lengths: int32 [B], tokens each sequence already has in the cache.
      new: int32 [B], how many of the T tokens are real; 0 leaves a sequence untouched.
      context: int32 [B], tokens of the whole context this call belongs to, at least lengths + new; only
        models whose RoPE depends on the length use it.
      adapters: traced; None where the model has none.
      starts: None, or, in training, int32 [B, T]: the place in its row where the text of each token begins,
        of rows that hold several texts. A text sees only itself, and its positions count from 0.
      tree: of the new tokens, where they are not one after the other.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    kernels: Kernels = dataclasses.field(metadata={"static": True})
    params: Params
    plan: PlanArrays
    tokens: jax.Array
    lengths: jax.Array
    new: jax.Array
    context: jax.Array
    adapters: Any = None
    starts: jax.Array | None = None
    tree: Tree | None = None

    @property
    def positions(self) -> jax.Array:
        """int32 [B, T], the position of each new token."""
        if self.tree is not None:
            return self.lengths[:, None] + self.tree.depths
        places = self.lengths[:, None] + jnp.arange(self.tokens.shape[1])
        return places if self.starts is None else places - self.starts

    def slot(self, position: jax.Array) -> "SlotIndex":
        """A slot of the plan."""
        plan = self.plan
        return SlotIndex(position, plan.layer[position], plan.attn_scale[position], plan.mlp_scale[position])

    def at(self, slot: "SlotIndex") -> "Step":
        """The step within a slot, where an adapter may be that is nowhere else."""
        if self.adapters is None:
            return self
        return dataclasses.replace(self, adapters=self.adapters.at(slot.position))


class SlotIndex(NamedTuple):
    """A slot of a plan in a traced loop: all of it scalars."""

    position: jax.Array  # which of the P slots, and so whose keys and values
    layer: jax.Array  # whose weights
    attn_scale: jax.Array
    mlp_scale: jax.Array


def by_kind(step: Step, slot: SlotIndex, half: Callable[[Block], Callable[..., T]], *operands: Any) -> T:
    """`half(kind)(*operands)` for the kind of a slot's layer; all kinds return the same shapes."""
    halves = [half(kind) for kind in step.config.blocks]
    if len(halves) == 1:
        return halves[0](*operands)
    return lax.switch(jnp.asarray(step.config.layer_blocks, jnp.int32)[slot.layer], halves, *operands)


def row_of(config: ModelConfig, parameter: str, layer: jax.Array) -> jax.Array:
    """The row of a parameter's stack that holds a stacked layer's tensor: see `ModelConfig.layer_rows`."""
    rows = dict(config.layer_rows).get(parameter)
    return layer if rows is None else jnp.asarray(rows, jnp.int32)[layer]


def vector(step: Step, name: str, layer: jax.Array | None, dimensions: int) -> jax.Array | None:
    """A norm's weight or a bias, float32, of a layer (None: of the model); None where there is none.

    It is [O], or, with adapters that change it, [B, ..., O] of so many dimensions, for each sequence its own.
    """
    stack = step.params.get(name)
    found = None
    if stack is not None:
        own = stack if layer is None else stack[row_of(step.config, name, layer)]
        found = widen(own).astype(jnp.float32)
    if step.adapters is None:
        return found
    added = step.adapters.added(name, jnp.int32(0) if layer is None else layer, dimensions)
    if added is None:
        return found
    return added if found is None else found + added


def linear(step: Step, layer: jax.Array, x: jax.Array, names: Sequence[str]) -> list[jax.Array]:
    """The projections of x [B, T, I] with these names, each float32 [B, T, O], biases added.

    What reads the same x is multiplied in one call.
    """
    weights = [f"{LAYERS}{name}.weight" for name in names]
    rows = [row_of(step.config, weight, layer) for weight in weights]
    ys = products(step, x, weights, [step.params[weight] for weight in weights], rows, layer)
    biases = [vector(step, f"{LAYERS}{name}.bias", layer, y.ndim) for name, y in zip(names, ys, strict=True)]
    return [y if bias is None else y + bias for y, bias in zip(ys, biases, strict=True)]


def products(
    step: Step,
    x: jax.Array,
    names: Sequence[str],
    stacks: Sequence[Any],
    rows: Sequence[jax.Array],
    layer: jax.Array,
) -> list[jax.Array]:
    """`x @ stack[row].T` for the weights with these names, each changed by the adapters there are.

    Args:
      step: of its tokens only their number counts.
      x: [B, ..., I].
      names: of the parameters.
      stacks: these.
      rows: of the stacks.
      layer: of the adapters' deltas.
    """
    kernels, adapters = step.kernels, step.adapters
    ys = kernels.matmuls(x, stacks, rows)
    if adapters is None:
        return ys

    def product(stack: jax.Array, row: jax.Array) -> jax.Array:
        return stacked_matmul.reference.stacked_matmul(x, stack, row)

    changed = {name: adapters.changed(name, layer, y, product) for name, y in zip(names, ys, strict=True)}
    changed |= adapters.with_deltas(kernels, x, changed, layer)
    return [changed[name] for name in names]
