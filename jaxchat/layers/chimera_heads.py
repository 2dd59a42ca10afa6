"""The heads of a Chimera: a kind is its parameters and three functions, and a row in `HEADS`.

Head k, of [h ; f], predicts a token; R: rank, K: heads (here only).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat.config import EMBED, HEAD, ModelConfig
from jaxchat.layers.ends import capped, logits
from jaxchat.layers.step import Params, Step
from jaxchat.mixed import MixedTensor
from jaxchat.pallas.storage import widen

if TYPE_CHECKING:
    from jaxchat.layers.chimera import ChimeraConfig


class HeadKind(NamedTuple):
    """A kind of heads.

    Attributes:
      shapes: their parameters, `heads.*`, and the sizes of each.
      initial: the parameters that make head k say, at first, what the base's head does of h and f together.
      logits: of [h ; f] [..., D] each, float32 [..., V]; by the base's step and the number of the head.
      has_rank: whether `ChimeraConfig.rank` counts.
    """

    shapes: Callable[[ChimeraConfig, ModelConfig], dict[str, tuple[int, ...]]]
    initial: Callable[[ChimeraConfig, ModelConfig, Params, jax.Array], Params]
    logits: Callable[[Params, Step, int, jax.Array, jax.Array], jax.Array]
    has_rank: bool = False


def _both(h: jax.Array, f: jax.Array) -> jax.Array:
    return jnp.concatenate([h.astype(jnp.float32), f.astype(jnp.float32)], -1)


def _product(step: Step, params: Params, name: str, row: int, x: jax.Array) -> jax.Array:
    (y,) = step.kernels.matmuls(x.astype(step.dtype), [params[name]], [jnp.int32(row)])
    return y


def _output_matrix(base: ModelConfig, params: Params) -> jax.Array:
    """The base's output head, float32 [V, D], whatever it is kept in."""
    head = params[EMBED if base.tied_embeddings else HEAD]
    assert not isinstance(head, MixedTensor)  # those are stacks of layers
    return widen(head).astype(jnp.float32)


# --- full: a Linear 2D -> V each, the published form


def _full_shapes(chimera: ChimeraConfig, base: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {"heads.weight": (chimera.heads, base.vocab_size, 2 * base.hidden_size)}


def _full_initial(chimera: ChimeraConfig, base: ModelConfig, params: Params, key: jax.Array) -> Params:
    head = _output_matrix(base, params)
    return {"heads.weight": jnp.stack([jnp.concatenate([head, head], -1)] * chimera.heads)}


def _full_logits(params: Params, step: Step, k: int, h: jax.Array, f: jax.Array) -> jax.Array:
    return capped(step, _product(step, params, "heads.weight", k, _both(h, f)))


# --- shared: a map 2D -> D each, and then the base's own head, quantized or not


def _shared_shapes(chimera: ChimeraConfig, base: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {"heads.map.weight": (chimera.heads, base.hidden_size, 2 * base.hidden_size)}


def _shared_initial(chimera: ChimeraConfig, base: ModelConfig, params: Params, key: jax.Array) -> Params:
    same = jnp.eye(base.hidden_size)
    return {"heads.map.weight": jnp.stack([jnp.concatenate([same, same], -1)] * chimera.heads)}


def _shared_logits(params: Params, step: Step, k: int, h: jax.Array, f: jax.Array) -> jax.Array:
    return logits(step, _product(step, params, "heads.map.weight", k, _both(h, f)))


# --- low_rank: a map 2D -> R each, and then one of R -> V for all: where V is large, the cheapest to run


def _low_rank_shapes(chimera: ChimeraConfig, base: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        "heads.map.weight": (chimera.heads, chimera.rank, 2 * base.hidden_size),
        "heads.out.weight": (1, base.vocab_size, chimera.rank),
    }


def _low_rank_initial(chimera: ChimeraConfig, base: ModelConfig, params: Params, key: jax.Array) -> Params:
    """The nearest of this rank to the base's head: its projection on the first right singular vectors."""
    head = _output_matrix(base, params)
    _, vectors = jnp.linalg.eigh(jnp.matmul(head.T, head, precision="highest"))
    vectors = vectors[:, ::-1][:, : chimera.rank].T  # [R, D]
    both = jnp.concatenate([vectors, vectors], -1)
    return {
        "heads.map.weight": jnp.stack([both] * chimera.heads),
        "heads.out.weight": jnp.matmul(head, vectors.T, precision="highest")[None],
    }


def _low_rank_logits(params: Params, step: Step, k: int, h: jax.Array, f: jax.Array) -> jax.Array:
    low = _product(step, params, "heads.map.weight", k, _both(h, f))
    return capped(step, _product(step, params, "heads.out.weight", 0, low))


HEADS: dict[str, HeadKind] = {
    "full": HeadKind(_full_shapes, _full_initial, _full_logits),
    "shared": HeadKind(_shared_shapes, _shared_initial, _shared_logits),
    "low_rank": HeadKind(_low_rank_shapes, _low_rank_initial, _low_rank_logits, has_rank=True),
}
"""`ChimeraConfig.kind` -> what its heads are."""
