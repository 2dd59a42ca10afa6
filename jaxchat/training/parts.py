"""Which part of a model is trained: low-rank deltas of all layers, or some layers whole.

A part knows how hidden states come of what is trained; at what it is trained is a task's (`tasks.py`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxchat.config import ModelConfig
from jaxchat.families import parameter_table
from jaxchat.layers.step import Params, Step
from jaxchat.mixed import MixedTensor
from jaxchat.pallas.storage import widen
from jaxchat.training import forward, lora
from jaxchat.training.forward import Kept, Run


class Part(Protocol):
    """Hashable: of a task, which is static."""

    def hidden_states(self, step: Step, trained: Any, key: jax.Array | None, kept: Kept, /) -> jax.Array:
        """`forward.hidden_states` of a model with what is trained of it."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank deltas of every layer, see `lora`."""

    scale: float
    dropout: float = 0.0

    def hidden_states(
        self, step: Step, trained: lora.Trained, key: jax.Array | None, kept: Kept
    ) -> jax.Array:
        """See `Part`."""
        attach = functools.partial(lora.attach, scale=self.scale, dropout=self.dropout, key=key)
        runs = [Run(tuple(range(step.config.num_layers)), {})]
        return forward.hidden_states(step, runs=runs, extras=trained, attach=attach, kept=kept)


@dataclasses.dataclass(frozen=True)
class WholeLayers:
    """Some layers with every parameter of theirs; what is trained is a stack of them, in order.

    Attributes:
      trained: of each layer, whether it is one of them.
    """

    trained: tuple[bool, ...]

    def hidden_states(self, step: Step, trained: Params, key: jax.Array | None, kept: Kept) -> jax.Array:
        """See `Part`."""
        runs, done = [], 0
        for own, group in itertools.groupby(range(len(self.trained)), key=self.trained.__getitem__):
            layers = tuple(group)
            stacks: Params = {}
            if own:
                stop = done + len(layers)
                stacks = {name: stack[done:stop] for name, stack in trained.items()}
                done = stop
            runs.append(Run(layers, stacks))
        return forward.hidden_states(step, runs=runs, kept=kept)


def copies(config: ModelConfig, params: Params, layers: Sequence[int], *, silent: bool) -> Params:
    """Layers of a model as float32 stacks [n, ...], to be trained.

    Args:
      config: the model.
      params: as loaded, quantized or not.
      layers: which of the configuration's layers.
      silent: with zeros for what adds to the residual stream, so that they pass it through: LLaMA-Pro's new
        blocks (Wu et al. 2024, 3.2).
    """
    found = {}
    for param in parameter_table(config):
        if not param.per_layer:
            continue
        rows = config.rows_of(param.name)
        stack = jnp.stack([_row(params[param.name], rows[layer]) for layer in layers])
        found[param.name] = jnp.zeros_like(stack) if silent and param.is_output else stack
    return found


def plain(params: Params) -> Params:
    """Parameters as float32 arrays, quantized ones as the numbers they stand for; copies."""

    def widened(value: Any) -> jax.Array:
        if isinstance(value, MixedTensor):
            return jnp.stack([_row(value, row) for row in range(value.shape[0])])
        return jnp.array(widen(value), jnp.float32)

    return {name: widened(value) for name, value in params.items()}


def _row(stack: Any, row: int) -> jax.Array:
    if isinstance(stack, MixedTensor):
        stack, row = stack.parts[stack.part[row]], stack.row[row]
    return widen(jax.tree.map(lambda array: array[row], stack)).astype(jnp.float32)
