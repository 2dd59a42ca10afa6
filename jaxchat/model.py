"""The decoder as pure functions: embed -> run the layer plan -> norm -> logits, over a slot-stacked KV cache.

One alphabet of dimensions, here and everywhere:

  L stacked source layers   P plan slots              B batch        T query tokens   S cache length
  D model width             N query heads             K key/value heads               H head size
  F feed-forward width      V vocabulary              G quantization group

The plan is traced data: `plan.layer[p]` picks the weights and every per-layer constant, the slot p picks the
rows of the KV cache. One compiled executable serves every plan that fits the cache's P slots. What a layer
is made of is in `layers/`, one file a kind of half.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import EMBED, HEAD, LAYERS, ModelConfig
from jaxchat.layer_plan import PlanArrays
from jaxchat.layers import attention
from jaxchat.layers.block import run_slot
from jaxchat.layers.cache import KVCache, empty_cache
from jaxchat.layers.norms import norm
from jaxchat.layers.step import Params, Step, products
from jaxchat.pallas.backends import DIFFERENTIABLE


def forward(step: Step, cache: KVCache) -> tuple[Float32[Array, "B T D"], KVCache]:
    """Runs new tokens through the plan and appends their keys and values to the cache.

    Args:
      step: what runs, on which tokens.
      cache: donate it, and it is updated in place.

    Returns:
      The normed hidden state, float32 [B, T, D], and the cache. `logits` turns the former into logits.
    """
    x, cache = run_plan(step, embed(step), cache)
    return final_norm(step, x), cache


def embed(step: Step) -> Float[Array, "B T D"]:
    """The residual stream before the first slot, [B, T, D]."""
    with jax.named_scope("embed"):
        x = _rows(step, EMBED, step.tokens) * np.float32(step.config.embedding_scale)
        if step.config.learned_positions:
            # Padding may run beyond the table; its positions are clipped, its output is never read.
            x = x + _rows(step, "positions.weight", step.positions)
    return x.astype(step.dtype)


def _rows(step: Step, name: str, ids: Int[Array, "B T"]) -> Float32[Array, "B T D"]:
    """Rows of a table, float32 [B, T, D]."""
    x = step.kernels.embedding_rows(step.params[name], ids)
    return x if step.adapters is None else step.adapters.embedded(name, ids, x)


def run_plan(
    step: Step, x: Float[Array, "B T D"], cache: KVCache, *, start: Int[Array, ""] | int = 0
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs the slots [start, plan.length) of a plan on a residual stream.

    Args:
      step: what runs; of its tokens only their number and positions count.
      x: [B, T, D], the residual stream before slot `start`.
      cache: as in `forward`.
      start: traced; an earlier end is `plan._replace(length=stop)`.

    Returns:
      The residual stream after the last of these slots, like `x`, and the cache with their rows written.
    """
    shared = attention.shared(step)

    def body(position: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return run_slot(step, shared, step.slot(position), *carry)

    return lax.fori_loop(start, step.plan.length, body, (x, cache))


def final_norm(step: Step, x: Float[Array, "*lead D"]) -> Float32[Array, "*lead D"]:
    """The normed hidden state, float32 [..., D], of a residual stream after its last slot."""
    return norm(step, "norm", x)


def logits(step: Step, hidden: Float[Array, "*lead D"]) -> Float32[Array, "*lead V"]:
    """Output head: normed hidden states [..., D] -> float32 logits [..., V]."""
    config = step.config
    head = step.params[EMBED if config.tied_embeddings else HEAD]
    with jax.named_scope("lm_head"):
        stack = jax.tree.map(lambda array: array[None], head)  # one layer of its own
        first = jnp.int32(0)
        (out,) = products(step, hidden.astype(step.dtype), [HEAD], [stack], [first], first)
    if config.final_softcap:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


def whole_sequences(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], *, dtype: jnp.dtype
) -> Step:
    """A step over whole sequences, int32 [B, T] from position 0, that can be differentiated.

    Args:
      config: static.
      params: plain floating-point arrays where gradients are wanted.
      tokens: what follows one does not change what comes of it.
      dtype: of the activations.
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
    )


def hidden_states(
    step: Step, *, dropout: float = 0.0, key: jax.Array | None = None
) -> Float32[Array, "B T D"]:
    """All layers once, in order, over whole sequences: `forward` in a form that can be differentiated.

    The layers are a scan's inputs, so that each layer's gradient is one layer and no stack is carried.

    Args:
      step: as `whole_sequences` makes it.
      dropout: static; the rate at which elements of what the embedding and each layer add to the residual
        stream are zeroed (Srivastava et al. 2014).
      key: of the random numbers for dropout; without one nothing is dropped.

    Returns:
      The normed hidden state, float32 [B, T, D].
    """
    config, (b, t) = step.config, step.tokens.shape

    def add(x: jax.Array, y: jax.Array, index: jax.Array) -> jax.Array:
        """The residual stream y with what was added to x dropped in places."""
        if key is None:
            return y
        bits = jax.random.bits(jax.random.fold_in(key, index), x.shape, jnp.uint8)
        zeroed = round(dropout * 256)
        return (x + jnp.where(bits >= zeroed, (y - x) * (256 / (256 - zeroed)), 0)).astype(step.dtype)

    shared = attention.shared(step)
    stacks = {name: stack for name, stack in step.params.items() if name.startswith(LAYERS)}
    # The scan hands each layer its own tensors: stacks of one, whose row 0 is every layer's.
    first_rows = tuple((name, (0,) * config.num_layers) for name in stacks)
    alone = dataclasses.replace(config, layer_rows=first_rows)

    def by_layer(name: str, stack: jax.Array) -> jax.Array:
        shares = name in dict(config.layer_rows)
        return stack[np.array(config.rows_of(name))] if shares else stack

    def body(x: jax.Array, layer: tuple[jax.Array, Params]) -> tuple[jax.Array, None]:
        index, own = layer
        own = jax.tree.map(lambda array: array[None], own)
        slot = step.slot(index)._replace(position=jnp.int32(0))
        cache = empty_cache(config, slots=1, batch=b, capacity=t, dtype=step.dtype)
        y, _ = run_slot(dataclasses.replace(step, config=alone, params=own), shared, slot, x, cache)
        return add(x, y, index), None

    x = embed(step)
    x = add(jnp.zeros_like(x), x, jnp.int32(config.num_layers))
    # Of a layer only its input is kept; on CPU computing the rest anew takes less time than storing it, too.
    layers = jnp.arange(config.num_layers), {name: by_layer(name, stack) for name, stack in stacks.items()}
    x, _ = lax.scan(jax.checkpoint(body, prevent_cse=False), x, layers)
    return final_norm(step, x)
