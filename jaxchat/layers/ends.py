"""What stands before the layers and behind them: the token embedding, the last norm, the output head."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxchat.config import EMBED, HEAD
from jaxchat.layers.norms import norm
from jaxchat.layers.step import Step, products


def embed(step: Step) -> Float[Array, "B T D"]:
    """The residual stream before the first slot, [B, T, D]."""
    return embedded(step, step.tokens, step.positions)


def embedded(step: Step, ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What tokens at these positions are before the first slot, [B, T, D]."""
    with jax.named_scope("embed"):
        x = _rows(step, EMBED, ids) * np.float32(step.config.embedding_scale)
        if step.config.learned_positions:
            # Padding may run beyond the table; its positions are clipped, its output is never read.
            x = x + _rows(step, "positions.weight", positions)
    return x.astype(step.dtype)


def _rows(step: Step, name: str, ids: Int[Array, "B T"]) -> Float32[Array, "B T D"]:
    """Rows of a table, float32 [B, T, D]."""
    x = step.kernels.embedding_rows(step.params[name], ids)
    return x if step.adapters is None else step.adapters.embedded(name, ids, x)


def final_norm(step: Step, x: Float[Array, "*lead D"]) -> Float32[Array, "*lead D"]:
    """The normed hidden state, float32 [..., D], of a residual stream after its last slot."""
    return norm(step, "norm", x)


def logits(step: Step, hidden: Float[Array, "*lead D"]) -> Float32[Array, "*lead V"]:
    """Output head: normed hidden states [..., D] -> float32 logits [..., V]."""
    return capped(step, scores(step, hidden))


def scores(step: Step, hidden: Float[Array, "*lead D"]) -> Float32[Array, "*lead V"]:
    """The product with the output head alone: logits before their soft-cap."""
    head = step.params[EMBED if step.config.tied_embeddings else HEAD]
    with jax.named_scope("lm_head"):
        stack = jax.tree.map(lambda array: array[None], head)  # one layer of its own
        first = jnp.int32(0)
        (out,) = products(step, hidden.astype(step.dtype), [HEAD], [stack], [first], first)
    return out


def capped(step: Step, scores: Float32[Array, "*lead V"]) -> Float32[Array, "*lead V"]:
    """Logits of what an output head makes: soft-capped where the model is (Gemma 2)."""
    cap = step.config.final_softcap
    return cap * jnp.tanh(scores / cap) if cap else scores
