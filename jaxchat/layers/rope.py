"""The rotation by rotary position embeddings; their kinds are in `families/rope.py`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchat.config import RopeConfig
from jaxchat.families.rope import KINDS


def rope_cos_sin(
    ropes: tuple[RopeConfig, ...], positions: Int[Array, "B T"], context_length: Int[Array, " B"]
) -> tuple[Float[Array, "R B T half"], Float[Array, "R B T half"]]:
    """Cosines and sines of every rotary embedding of a model.

    Args:
      ropes: R rotary embeddings; all rotate the same number of dimensions.
      positions: int [B, T], absolute positions.
      context_length: int [B], tokens in each whole context; the length-dependent kinds need it.

    Returns:
      cos and sin, float32 [R, B, T, dim / 2], attention factor included.
    """
    cos, sin = [], []
    for rope in ropes:
        angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, context_length)[:, None]
        cos.append(jnp.cos(angles) * rope.attention_factor)
        sin.append(jnp.sin(angles) * rope.attention_factor)
    return jnp.stack(cos), jnp.stack(sin)


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotates the first dimensions of each head, half-split order (RoFormer as in GPT-NeoX and Llama-HF).

    Args:
      x: [B, T, heads, H].
      cos, sin: float32 [B, T, dim / 2]; H - dim dimensions pass through.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, context_length: Int[Array, " B"]) -> Float[Array, "B half"]:
    """float32 [B, dim / 2] for contexts of `context_length` [B] tokens."""
    found = KINDS[rope.kind].frequencies(rope, context_length)
    return jnp.broadcast_to(jnp.asarray(found, jnp.float32), (context_length.shape[0], rope.dim // 2))
