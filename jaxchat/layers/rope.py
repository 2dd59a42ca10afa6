"""Rotary position embeddings: frequencies of every scaling kind, and the rotation itself.

Formulas follow `modeling_rope_utils.py` of transformers; sources are named at each function.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchat.config import RopeConfig


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
    if rope.kind == "dynamic":
        return _dynamic(rope, context_length)
    if rope.kind == "longrope":
        # Ding et al. 2024 (LongRoPE): one set of factors up to the original context, another beyond.
        short, long = (
            np.asarray(1 / (np.asarray(factors) * _wavelengths(rope)), np.float32)
            for factors in (rope.short_factor, rope.long_factor)
        )
        return jnp.where(context_length[:, None] > rope.original_max_position, long, short)
    fixed = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.kind](rope)
    return jnp.broadcast_to(np.asarray(fixed, np.float32), (context_length.shape[0], rope.dim // 2))


def _wavelengths(rope: RopeConfig) -> np.ndarray:
    """theta^(2i/dim), float64 [dim / 2]: the inverse of the unscaled frequencies."""
    return rope.theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)


def _default(rope: RopeConfig) -> np.ndarray:
    return 1 / _wavelengths(rope)


def _linear(rope: RopeConfig) -> np.ndarray:
    """Chen et al. 2023 (position interpolation)."""
    return _default(rope) / rope.factor


def _dynamic(rope: RopeConfig, context_length: jax.Array) -> jax.Array:
    """NTK-aware scaling whose base follows the context length beyond the trained one."""
    trained = rope.original_max_position
    length = jnp.maximum(context_length, trained).astype(jnp.float32)
    growth = rope.factor * length / trained - (rope.factor - 1)
    # (theta * growth^e)^(-2i/dim), split so that the exact unscaled table is used while growth is 1.
    exponent = np.arange(0, rope.dim, 2, dtype=np.float64) / (rope.dim - 2)
    return jnp.asarray(_default(rope), jnp.float32) * growth[:, None] ** jnp.asarray(-exponent, jnp.float32)


def _llama3(rope: RopeConfig) -> np.ndarray:
    """Llama 3.1's interpolation by wavelength: long waves are stretched, short ones kept, others blended."""
    frequency = _default(rope)
    wavelength = 2 * np.pi / frequency
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def _yarn(rope: RopeConfig) -> np.ndarray:
    """Peng et al. 2023 (YaRN), NTK-by-parts between `beta_fast` and `beta_slow` rotations."""

    def dimension_of(rotations: float) -> float:
        period = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
    frequency = _default(rope)
    return frequency / rope.factor * interpolated + frequency * (1 - interpolated)
