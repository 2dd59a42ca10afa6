"""The decoder over whole sequences, in a form that can be differentiated: a scan, and nothing is cached.

What is trained is handed over apart, by layer, so that each layer's gradient is one layer and no stack is
carried; what is frozen is read where it lies, quantized or not.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

from jaxchat import model
from jaxchat.config import LAYERS, ModelConfig
from jaxchat.layer_plan import PlanArrays
from jaxchat.layers import attention
from jaxchat.layers.block import run_slot
from jaxchat.layers.cache import empty_cache
from jaxchat.layers.step import Params, Step
from jaxchat.pallas.backends import DIFFERENTIABLE

Kept = Literal["inputs", "products"]
"""What is kept of a layer for the backward pass: only its input, or the products with its weights, too."""

_POLICIES = {
    "inputs": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Run(NamedTuple):
    """Neighbouring layers."""

    layers: tuple[int, ...]  # of the configuration
    trained: Params  # parameter -> the stack [n, ...] that stands for the step's own in these layers


Attach = Callable[[Step, Any, jax.Array], Step]
"""Puts what one layer has of the extras into a step: (step, extras of the layer, its number)."""


def whole_sequences(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    dtype: jnp.dtype,
    starts: Int[Array, "B T"] | None = None,
) -> Step:
    """A step over whole sequences, int32 [B, T] from position 0, that can be differentiated.

    Args:
      config: static.
      params: plain floating-point arrays where gradients are wanted.
      tokens: what follows one does not change what comes of it.
      dtype: of the activations.
      starts: see `Step`.
    """
    b, t = tokens.shape
    whole = jnp.full(b, t, jnp.int32)
    count = config.num_layers
    plan = PlanArrays(jnp.arange(count), jnp.ones(count), jnp.ones(count), jnp.int32(count))
    return Step(
        config=config,
        dtype=dtype,
        kernels=DIFFERENTIABLE,
        params=params,
        plan=plan,
        tokens=tokens,
        lengths=jnp.zeros(b, jnp.int32),
        new=whole,
        context=whole,
        starts=starts,
    )


def all_trained(step: Step) -> list[Run]:
    """One run of all layers whose every parameter is trained."""
    config = step.config
    stacks = {name: stack for name, stack in step.params.items() if name.startswith(LAYERS)}

    def by_layer(name: str, stack: jax.Array) -> jax.Array:
        shares = name in dict(config.layer_rows)
        return stack[np.array(config.rows_of(name))] if shares else stack

    trained = {name: by_layer(name, stack) for name, stack in stacks.items()}
    return [Run(tuple(range(config.num_layers)), trained)]


def hidden_states(
    step: Step,
    *,
    runs: Sequence[Run] | None = None,
    extras: Any = None,
    attach: Attach = lambda step, own, layer: step,
    kept: Kept = "inputs",
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float32[Array, "B T D"]:
    """All layers once, in order, over whole sequences: `model.forward` in a form that can be differentiated.

    Args:
      step: as `whole_sequences` makes it.
      runs: the layers, all of them; None is `all_trained`.
      extras: a tree of arrays [L, ...], what else is trained of every layer; each gets its own by `attach`.
      attach: see `Attach`.
      kept: static; of each layer, for the backward pass.
      dropout: static; the rate at which elements of what the embedding and each layer add to the residual
        stream are zeroed (Srivastava et al. 2014).
      key: of the random numbers for dropout; without one nothing is dropped.

    Returns:
      The normed hidden state, float32 [B, T, D].
    """
    config, (b, t) = step.config, step.tokens.shape

    def add(x: jax.Array, y: jax.Array, index: jax.Array) -> jax.Array:
        """The residual stream y with what was added to x dropped in places."""
        if key is None or not dropout:
            return y
        bits = jax.random.bits(jax.random.fold_in(key, index), x.shape, jnp.uint8)
        zeroed = round(dropout * 256)
        return (x + jnp.where(bits >= zeroed, (y - x) * (256 / (256 - zeroed)), 0)).astype(step.dtype)

    shared = attention.shared(step)

    def of_run(trained: Mapping[str, Any]) -> Callable[[jax.Array, Any], tuple[jax.Array, None]]:
        # A scan hands each layer its own tensors: stacks of one, whose row 0 is every layer's.
        rows = dict(config.layer_rows) | dict.fromkeys(trained, (0,) * config.num_layers)
        alone = dataclasses.replace(config, layer_rows=tuple(rows.items()))

        def body(x: jax.Array, layer: tuple[jax.Array, Params, Any]) -> tuple[jax.Array, None]:
            index, own, extra = layer
            own = jax.tree.map(lambda array: array[None], own)
            slot = step.slot(index)._replace(position=jnp.int32(0))
            cache = empty_cache(config, slots=1, batch=b, capacity=t, dtype=step.dtype)
            inside = dataclasses.replace(step, config=alone, params={**step.params, **own})
            y, _ = run_slot(attach(inside, extra, index), shared, slot, x, cache)
            return add(x, y, index), None

        return body

    x = model.embed(step)
    x = add(jnp.zeros_like(x), x, jnp.int32(config.num_layers))
    for run in all_trained(step) if runs is None else runs:
        layers = np.array(run.layers, np.int32)
        own = jax.tree.map(lambda array, layers=layers: array[layers], extras)
        # On CPU computing anew what lies between products takes less time than storing it, too.
        body = jax.checkpoint(of_run(run.trained), prevent_cse=False, policy=_POLICIES[kept])
        x, _ = lax.scan(body, x, (jnp.asarray(layers), run.trained, own))
    return model.final_norm(step, x)
