"""The MLP half of a layer. A new kind is a function here, or in a file of its own, and a row in `MLPS`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import Block
from jaxchat.layers.step import Step, linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def gated(
    step: Step, block: Block, layer: Int[Array, ""], h: Float[Array, "B T D"]
) -> Float32[Array, "B T D"]:
    """down(act(gate(h)) * up(h)) of h [B, T, D], float32 (Shazeer 2020)."""
    gate, up = linear(step, layer, h, ("gate", "up"))
    (y,) = linear(step, layer, (ACTIVATIONS[block.activation](gate) * up).astype(step.dtype), ("down",))
    return y


def plain(
    step: Step, block: Block, layer: Int[Array, ""], h: Float[Array, "B T D"]
) -> Float32[Array, "B T D"]:
    """down(act(up(h))) of h [B, T, D], float32 (Vaswani et al. 2017)."""
    (up,) = linear(step, layer, h, ("up",))
    (y,) = linear(step, layer, ACTIVATIONS[block.activation](up).astype(step.dtype), ("down",))
    return y


MLPS: dict[str, Callable[[Step, Block, jax.Array, jax.Array], jax.Array]] = {"gated": gated, "plain": plain}
"""`Block.mlp` -> (step, kind, source layer, h [B, T, D]) -> what it adds, float32 [B, T, D]."""
