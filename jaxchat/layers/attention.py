"""Attention as the mixing half of a layer: projections, rotation, and attention over the cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import LAYERS, Block
from jaxchat.layers.cache import Fresh, KVCache
from jaxchat.layers.norms import norm
from jaxchat.layers.rope import rope_cos_sin, rotate
from jaxchat.layers.step import SlotIndex, Step, linear


class Shared(NamedTuple):
    """What all slots of a step share: computed once, outside the loop over them."""

    rotations: tuple[jax.Array, jax.Array] | None  # cos and sin, float32 [ropes, B, T, dim / 2]
    layer_ropes: jax.Array  # int32 [L], which of the ropes a layer has
    windows: jax.Array  # int32 [L]
    scales: jax.Array  # float32 [L], of the logits


def shared(step: Step) -> Shared:
    """See `Shared`."""
    config = step.config
    return Shared(
        rope_cos_sin(config.ropes, step.positions, step.context) if config.ropes else None,
        jnp.asarray(config.layer_ropes or (0,) * config.num_layers, jnp.int32),
        jnp.asarray(config.layer_windows, jnp.int32),
        jnp.asarray(config.layer_attn_scales, jnp.float32),
    )


def project(
    step: Step, block: Block, shared: Shared, layer: Int[Array, ""], h: Float[Array, "B T D"]
) -> Fresh:
    """Queries, keys and values of h [B, T, D], normed and rotated."""
    config = step.config
    q, k, v = (
        y.reshape(*y.shape[:2], heads, config.head_dim)
        for y, heads in zip(linear(step, layer, h, ("q", "k", "v")), _head_counts(step), strict=True)
    )
    if block.qk_norm:
        q, k = (norm(step, f"{LAYERS}{name}_norm", y, layer) for name, y in (("q", q), ("k", k)))
    if shared.rotations is not None:
        cos, sin = (part[shared.layer_ropes[layer]] for part in shared.rotations)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return Fresh(*(y.astype(step.dtype) for y in (q, k, v)))


def nothing(step: Step) -> Fresh:
    """What stands for the projections of a layer whose attention is skipped."""
    shape = step.tokens.shape
    zeros = (jnp.zeros((*shape, heads, step.config.head_dim), step.dtype) for heads in _head_counts(step))
    return Fresh(*zeros)


def mix(
    step: Step, block: Block, shared: Shared, slot: SlotIndex, fresh: Fresh, cache: KVCache
) -> Float32[Array, "B T D"]:
    """What attention adds, float32 [B, T, D]; the cache holds the new keys and values already."""
    mixed = cache.attend(
        step.kernels, fresh.q, slot.position, step.lengths if step.starts is None else step.starts,
        scale=shared.scales[slot.layer], window=shared.windows[slot.layer], softcap=block.softcap,
        tree=step.tree,
    )  # fmt: skip
    return output(step, slot.layer, mixed.reshape(*mixed.shape[:2], -1))


def output(step: Step, layer: Int[Array, ""], mixed: Float32[Array, "B T NH"]) -> Float32[Array, "B T D"]:
    """The output projection of the mixed values of all heads."""
    (y,) = linear(step, layer, mixed.astype(step.dtype), ("o",))
    return y


def _head_counts(step: Step) -> tuple[int, int, int]:
    return step.config.num_heads, step.config.num_kv_heads, step.config.num_kv_heads
