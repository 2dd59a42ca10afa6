"""One slot of a plan: the halves of its layer, put together as its kind (`config.Block`) says.

No branch returns the cache (XLA would copy it on GPU): a branch returns what its slot adds to it, which is
written outside. A half scaled by 0 adds nothing to the residual stream, so its weights are not read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxchat.config import LAYERS, Block
from jaxchat.layers import attention
from jaxchat.layers.cache import Fresh, KVCache
from jaxchat.layers.mlp import MLPS
from jaxchat.layers.norms import norm
from jaxchat.layers.step import SlotIndex, Step, by_kind

ARRANGEMENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sequential": lambda before, after: after,
}
"""`Block.arrangement` -> what the MLP reads: of the residual stream before and after attention."""


def run_slot(
    step: Step, shared: attention.Shared, slot: SlotIndex, x: Float[Array, "B T D"], cache: KVCache
) -> tuple[Float[Array, "B T D"], KVCache]:
    """The residual stream [B, T, D] after a slot, and the cache with its new keys and values."""
    before, step = x, step.at(slot)

    def project(block: Block) -> Callable[[jax.Array], Fresh]:
        return lambda x: attention.project(
            step, block, shared, slot.layer, read(step, block, "attn_norm", slot, x)
        )

    def attend(block: Block) -> Callable[[jax.Array], jax.Array]:
        def add(x: jax.Array) -> jax.Array:
            y = attention.mix(step, block, shared, slot, fresh, cache) * slot.attn_scale
            return add_to(step, block, "attn_post_norm", slot, x, y)

        return add

    def feed(block: Block) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def add(before: jax.Array, x: jax.Array) -> jax.Array:
            h = read(step, block, "mlp_norm", slot, ARRANGEMENTS[block.arrangement](before, x))
            y = MLPS[block.mlp](step, block, slot.layer, h) * slot.mlp_scale
            return add_to(step, block, "mlp_post_norm", slot, x, y)

        return add

    with jax.named_scope("attention"):
        attends = slot.attn_scale != 0
        fresh = lax.cond(
            attends, lambda x: by_kind(step, slot, project, x), lambda x: attention.nothing(step), x
        )
        new = jnp.where(attends, step.new, 0)
        cache = cache.append(step.kernels, fresh, slot.position, step.lengths, new)
        x = lax.cond(attends, lambda x: by_kind(step, slot, attend, x), lambda x: x, x)
    with jax.named_scope("mlp"):
        x = lax.cond(slot.mlp_scale != 0, lambda x: by_kind(step, slot, feed, before, x), lambda x: x, x)
    return x, cache


def read(step: Step, block: Block, name: str, slot: SlotIndex, x: jax.Array) -> jax.Array:
    """What a half reads of the residual stream, in the step's dtype: normed, if the kind has this norm."""
    return norm(step, LAYERS + name, x, slot.layer).astype(step.dtype) if name in block.norms else x


def add_to(step: Step, block: Block, name: str, slot: SlotIndex, x: jax.Array, y: jax.Array) -> jax.Array:
    """The residual stream with what a half adds, normed if the kind has this norm; the sum is float32."""
    if name in block.norms:
        y = norm(step, LAYERS + name, y, slot.layer)
    return (x.astype(jnp.float32) + y).astype(step.dtype)
