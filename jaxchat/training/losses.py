"""Losses over the output head, a few rows of logits at a time: whole ones would be most of the memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxchat import model
from jaxchat.layers.step import Step

_ROWS = 256
"""Rows of logits at a time: at a vocabulary of 128k they are 130 MB."""


class Loss(NamedTuple):
    """What a batch costs: a sum, of which the mean is by `weight`."""

    total: jax.Array  # float32 [], nats
    weight: jax.Array  # float32 []


def mean_of(losses: list[Loss]) -> float:
    """The mean over several batches, nats a token; NaN where nothing was to be learnt."""
    weight = sum(float(loss.weight) for loss in losses)
    return sum(float(loss.total) for loss in losses) / weight if weight else float("nan")


def next_token(step: Step, hidden: jax.Array, tokens: jax.Array, weights: jax.Array) -> Loss:
    """The weighted loss of predicting each token from those before, under a frozen output head.

    Args:
      step: with the head; nothing of it is differentiated.
      hidden: float [B, T, D], of all tokens.
      tokens: int32 [B, T].
      weights: float32 [B, T], of predicting the token there; that of the first counts for nothing.
    """
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets, weights = tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    return Loss(_summed(_cross_entropy, step, rows, targets, weights), weights.sum())


def distilled(
    step: Step, hidden: jax.Array, teacher: jax.Array, weights: jax.Array, *, temperature: float
) -> Loss:
    """The divergence of the head's distributions from a teacher's: KL(teacher || student) times T squared.

    Hinton et al. 2015. The head is the same for both, and frozen.

    Args:
      step: with the head.
      hidden, teacher: float [B, T, D], the final hidden states of student and teacher.
      weights: float32 [B, T], of the distribution after the token there.
      temperature: T, what logits are divided by.
    """
    rows, wanted = (x.reshape(-1, x.shape[-1]) for x in (hidden, teacher))
    flat, frozen = weights.reshape(-1), (step, jnp.float32(temperature))
    return Loss(_summed(_divergence, frozen, rows, lax.stop_gradient(wanted), flat), flat.sum())


def _cross_entropy(step: Step, rows: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(step, rows), targets)


def _divergence(frozen: tuple[Step, jax.Array], rows: jax.Array, teacher: jax.Array) -> jax.Array:
    step, temperature = frozen
    student, wanted = (jax.nn.log_softmax(model.logits(step, x) / temperature) for x in (rows, teacher))
    return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(of_rows: Any, frozen: Any, rows: jax.Array, wanted: Any, weights: jax.Array) -> jax.Array:
    """The weighted sum of `of_rows(frozen, rows [n, D], wanted [n, ...])`, only `rows` being differentiated.

    The gradient is made with the loss, block by block: nothing is computed twice, no block is kept. Rows of
    weight 0 are not computed at all.
    """
    return _with_gradient(of_rows, frozen, rows, wanted, weights)[0]


def _with_gradient(
    of_rows: Any, frozen: Any, rows: jax.Array, wanted: Any, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    count = rows.shape[0]
    block = min(_ROWS, count)
    order = jnp.argsort(weights == 0, stable=True)
    padded = jnp.pad(order, (0, -count % block), mode="edge")
    used = jnp.sum(weights != 0)

    def add(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, gradient = done
        places = lax.dynamic_slice_in_dim(padded, i * block, block)
        there = i * block + jnp.arange(block) < used
        own = jnp.where(there, weights[places], 0.0)

        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(there, of_rows(frozen, x, wanted[places]), 0.0) * own)

        value, slope = jax.value_and_grad(loss)(rows[places])
        return total + value, gradient.at[places].add(slope)

    start = (jnp.float32(0), jnp.zeros_like(rows))
    return lax.fori_loop(0, -(-used // block), add, start)


def _bwd(of_rows: Any, gradient: jax.Array, slope: jax.Array) -> tuple[None, jax.Array, None, None]:
    return None, (gradient * slope).astype(gradient.dtype), None, None


_summed.defvjp(_with_gradient, _bwd)
