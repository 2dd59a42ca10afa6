"""The decoder as pure functions: embed -> run the layer plan -> norm -> logits, over a slot-stacked KV cache.

One alphabet of dimensions, here and everywhere:

  L stacked source layers   P plan slots              B batch        T query tokens   S cache length
  D model width             N query heads             K key/value heads               H head size
  F feed-forward width      V vocabulary              G quantization group

The plan is traced data: `plan.layer[p]` picks the weights and every per-layer constant, the slot p picks the
rows of the KV cache. One compiled executable serves every plan that fits the cache's P slots. What a layer
is made of is in `layers/`, one file a kind of half.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import EMBED, HEAD
from jaxchat.layers import attention
from jaxchat.layers.block import run_slot
from jaxchat.layers.cache import KVCache
from jaxchat.layers.norms import norm
from jaxchat.layers.step import Step, products


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
