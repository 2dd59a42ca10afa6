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
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxchat.layers import attention
from jaxchat.layers.block import run_slot
from jaxchat.layers.cache import KVCache
from jaxchat.layers.ends import embed, final_norm, logits
from jaxchat.layers.step import Step

__all__ = ["embed", "final_norm", "forward", "logits", "run_plan"]


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
