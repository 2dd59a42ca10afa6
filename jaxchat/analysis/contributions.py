"""What attention and MLP of each slot add to the residual stream, and to the right next token's logit.

Which texts and plans, and means over windows, are `measure.py`'s.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.analysis.sweep import Places, Sweep, in_parts, rows_at, run_windows
from jaxchat.config import ModelConfig
from jaxchat.layers.ends import scores
from jaxchat.layers.step import Step, vector

ADDING = ("attention", "mlp")
"""The halves of a slot, in the order in which they add."""


@dataclasses.dataclass(frozen=True)
class Contributions:
    """What the halves of P slots add, means over the tokens read, or, of logits, over those predicted.

    A half adds y to the residual stream x: what is there after it less what was there before. The stream
    after the last slot is the embedding and all y. The final norm, its scale held at what it is for this
    sum, is linear but for its bias (a layer norm's mean is linear, too), and so is the output head. Thus
    what each y adds to a token's logit is known, and embedding, bias and all y add up to the logit exactly:
    direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the
    norm's scale is held as in Wang et al. 2022, arXiv 2211.00593). The logit is that of the token that
    follows, before a soft-cap, less the mean over the vocabulary, since softmax knows no other zero.

    It is the direct effect alone: later slots read y as well, and what they make of it counts as theirs.

    Attributes:
      norm: half -> |y| / |x|, float64 [P].
      cosine: half -> cosine of y and x, float64 [P]; 0 where a half adds nothing.
      logit: half -> what y adds to the logit, float64 [P].
      embedding: what the embedding adds to the logit.
      bias: what the final norm's bias adds to it; 0 where there is none.
      total: the logit.
    """

    norm: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    logit: dict[str, np.ndarray]
    embedding: float
    bias: float
    total: float


def shape(slots: int) -> tuple[int, ...]:
    """Of what `sums` returns."""
    return (2 * slots + 1, 3)


def sums(sweep: Sweep) -> list[list[float]]:
    """Sums over tokens: a row for each half of a slot (norm, cosine, logit); then embedding, bias, total."""
    halves, ends = _contributions(
        sweep.engine.stored_kv_dtype, len(sweep.base), sweep.step, sweep.states, sweep.places
    )
    rows = np.concatenate([np.asarray(halves).reshape(-1, 3), np.asarray(ends)[None]])
    return rows.astype(np.float64).tolist()


def means(total: np.ndarray, read: int, predicted: int) -> Contributions:
    """Of sums over all windows, in which so many tokens are read and predicted."""
    halves = total[:-1].reshape(-1, 2, 3) / np.array([read, read, predicted])
    norm, cosine, logit = (
        {half: halves[:, number, part] for number, half in enumerate(ADDING)} for part in range(3)
    )
    embedding, bias, whole = (total[-1] / predicted).tolist()
    return Contributions(norm, cosine, logit, embedding, bias, whole)


# --- the final norm with its scale held


class Frozen(NamedTuple):
    """How a kind of norm is linear once its scale is held."""

    takes_mean: bool  # whether each row's mean is taken off first
    offset: Callable[[ModelConfig], float]  # what is added to the weight


FROZEN = {
    "rmsnorm": Frozen(False, lambda config: config.norm_offset),
    "layernorm": Frozen(True, lambda config: 0.0),
}
"""`ModelConfig.norm` -> the same; a row for each of `layers.norms.NORMS`."""


def _frozen_norm(step: Step, last: jax.Array) -> tuple[jax.Array, Callable[..., jax.Array]]:
    """The final norm's scale [N, 1] for rows [N, D], and (y, scale) -> what it makes of y, without bias."""
    kind, weight = FROZEN[step.config.norm], vector(step, "norm.weight", None, 2)
    assert weight is not None  # every norm has one
    gain = weight + kind.offset(step.config)

    def centred(x: jax.Array) -> jax.Array:
        return x - x.mean(-1, keepdims=True) if kind.takes_mean else x

    squares = jnp.square(centred(last.astype(jnp.float32)))
    scale = lax.rsqrt(squares.mean(-1, keepdims=True) + step.config.norm_eps)
    return scale, lambda y, scale: centred(y) * scale * gain


# --- the executable


@functools.partial(jax.jit, static_argnums=(0, 1))
def _contributions(
    kv_dtype: jnp.dtype, slots: int, step: Step, states: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    """float32 [P, 2, 3] and [3], of states [P + 1, B, T, D]: see `sums`."""
    direct = _direct_effect(step, states[slots], places)
    no_mlp = dataclasses.replace(step, plan=step.plan._replace(mlp_scale=jnp.zeros_like(step.plan.mlp_scale)))
    read = jnp.arange(states.shape[2]) < step.new[:, None]

    def added(before: jax.Array, after: jax.Array) -> jax.Array:
        x = before.astype(jnp.float32)
        y = after.astype(jnp.float32) - x
        size, own = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1)
        ratio = own / jnp.maximum(size, 1e-30)
        cosine = (x * y).sum(-1) / jnp.maximum(size, 1e-30) / jnp.maximum(own, 1e-30)
        measured = [jnp.where(read, part, 0).sum() for part in (ratio, cosine)]
        return jnp.stack([*measured, direct(rows_at(places, y))])

    def halves(p: jax.Array) -> jax.Array:
        between = run_windows(kv_dtype, no_mlp, states[p], p, p + 1)
        return jnp.stack([added(states[p], between), added(between, states[p + 1])])

    last = rows_at(places, states[slots]).astype(jnp.float32)
    first = rows_at(places, states[0]).astype(jnp.float32)
    bias = _bias_effect(step, places)
    ends = jnp.stack([direct(first), bias, direct(last) + bias])
    return lax.map(halves, jnp.arange(slots)), ends


def _direct_effect(step: Step, last: jax.Array, places: Places) -> Callable[[jax.Array], jax.Array]:
    """Rows [N, D] -> the sum of what they add to the logits of the tokens that follow at the places."""
    scale, normed = _frozen_norm(step, rows_at(places, last))

    def effect(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        y, scale, targets = part
        return _centred(scores(step, normed(y, scale)), targets)

    def direct(y: jax.Array) -> jax.Array:
        found = in_parts(step, effect, (y, scale, places.targets))
        return jnp.where(places.real, found, 0).sum()

    return direct


def _bias_effect(step: Step, places: Places) -> jax.Array:
    bias: Any = vector(step, "norm.bias", None, 2)
    if bias is None:
        return jnp.float32(0)
    logits = scores(step, bias[None])[0]
    effect = logits[places.targets] - logits.mean()
    return jnp.where(places.real, effect, 0).sum()


def _centred(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of logits [N, V] those of one token each, less the mean over the vocabulary, [N]."""
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - logits.mean(-1)
