"""Norms over the last axis, in float32. A new kind of norm is a function here and a row in `NORMS`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import ModelConfig
from jaxchat.layers.step import Step, vector

Normed = Float32[Array, "*lead D"]
Weight = Float32[Array, "*#lead D"]  # of every sequence its own, or of all of them


def rms_norm(config: ModelConfig, x: Normed, weight: Weight, bias: Weight | None) -> Normed:
    """Zhang and Sennrich 2019; Gemma's weights are stored minus 1."""
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
    return x * (weight + config.norm_offset)


def layer_norm(config: ModelConfig, x: Normed, weight: Weight, bias: Weight | None) -> Normed:
    """Ba et al. 2016."""
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps) * weight
    return x if bias is None else x + bias


NORMS: dict[str, Callable[[ModelConfig, Normed, Weight, Weight | None], Normed]] = {
    "rmsnorm": rms_norm,
    "layernorm": layer_norm,
}
"""`ModelConfig.norm` -> the norm of float32 [..., D] with its weight and bias [D]."""


def norm(step: Step, name: str, x: Float[Array, "*lead D"], layer: Int[Array, ""] | None = None) -> Normed:
    """The norm called `name` of x [..., D], float32; `layer` picks from a stacked weight."""
    weight, bias = (vector(step, f"{name}.{kind}", layer, x.ndim) for kind in ("weight", "bias"))
    assert weight is not None  # every norm has one

    def whole(x: Normed) -> Normed:
        return NORMS[step.config.norm](step.config, x, weight, bias)

    if step.tree is None or x.ndim < 3:
        return whole(x.astype(jnp.float32))
    return lax.platform_dependent(x.astype(jnp.float32), cpu=lambda x: _by_token(whole, x), default=whole)


def _by_token(norm: Callable[[Normed], Normed], x: Normed) -> Normed:
    """The norm of each token of a tree [B, T, ...] as decoding it alone makes it, to the last bit.

    XLA on CPU adds several rows up in another order than one. What follows may round it: quantized weights
    meet activations in 8 bits, and a last bit becomes a 256th.
    """
    return jnp.moveaxis(lax.map(lambda row: norm(row[:, None])[:, 0], jnp.moveaxis(x, 1, 0)), 0, 1)
