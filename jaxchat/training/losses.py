"""Losses over the output head, a few rows of logits at a time: whole ones would be most of the memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat import model
from jaxchat.layers.step import Step

T = TypeVar("T")

_ROWS = 256
"""Rows of logits at a time: at a vocabulary of 128k they are 130 MB."""


class Loss(NamedTuple):
    """What a batch costs: a sum, of which the mean is by `weight`."""

    total: jax.Array  # float32 [], nats
    weight: jax.Array  # float32 []


def mean_of(losses: Sequence[Loss]) -> float:
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
    return Loss(summed(_cross_entropy, step, (), rows, targets, weights), weights.sum())


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
    return Loss(summed(_divergence, frozen, (), rows, lax.stop_gradient(wanted), flat), flat.sum())


def _cross_entropy(step: Step, trained: Any, rows: jax.Array, targets: jax.Array) -> jax.Array:
    return cross_entropy(model.logits(step, rows), targets)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Minus the log-probability, in nats, of targets int32 [...] under logits [..., V]: float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _divergence(
    frozen: tuple[Step, jax.Array], trained: Any, rows: jax.Array, teacher: jax.Array
) -> jax.Array:
    step, temperature = frozen
    student, wanted = (jax.nn.log_softmax(model.logits(step, x) / temperature) for x in (rows, teacher))
    return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(
    of_rows: Callable[[Any, Any, Any, Any], jax.Array],
    frozen: Any,
    trained: Any,
    rows: Any,
    wanted: Any,
    weights: jax.Array,
) -> jax.Array:
    """The weighted sum of `of_rows(frozen, trained, rows, wanted)` over N rows, a block of them at a time.

    The gradient is made with the loss, block by block: nothing is computed twice, no block is kept. Rows of
    weight 0 are not computed at all.

    Args:
      of_rows: float32 [n], the losses of n rows; hashable.
      frozen: a tree of arrays, not differentiated.
      trained: a tree of float arrays that all rows share.
      rows: a tree of float arrays [N, ...].
      wanted: a tree of arrays [N, ...], not differentiated.
      weights: float32 [N], not differentiated.
    """
    return _with_gradient(of_rows, frozen, trained, rows, wanted, weights)[0]


def _with_gradient(
    of_rows: Callable[..., jax.Array], frozen: Any, trained: Any, rows: Any, wanted: Any, weights: jax.Array
) -> tuple[jax.Array, tuple[Any, Any]]:
    def value(places: jax.Array, own: jax.Array, there: jax.Array) -> tuple[jax.Array, Any]:
        def loss(trained: Any, block: Any) -> jax.Array:
            found = of_rows(frozen, trained, block, _rows(wanted, places))
            return jnp.sum(jnp.where(there, found, 0.0) * own)

        return jax.value_and_grad(loss, argnums=(0, 1))(trained, _rows(rows, places))

    def add(
        done: tuple[jax.Array, tuple[Any, Any]], places: jax.Array, own: jax.Array, there: jax.Array
    ) -> Any:
        total, (of_trained, gradient) = done
        found, (more, slope) = value(places, own, there)
        gradient = jax.tree.map(lambda g, s: g.at[places].add(s), gradient, slope)
        return total + found, (jax.tree.map(jnp.add, of_trained, more), gradient)

    zeros = jax.tree.map(jnp.zeros_like, (trained, rows))
    return in_blocks(add, (jnp.float32(0), zeros), weights)


def _bwd(
    of_rows: Callable[..., jax.Array], gradients: tuple[Any, Any], slope: jax.Array
) -> tuple[None, Any, Any, None, None]:
    trained, rows = jax.tree.map(lambda g: (g * slope).astype(g.dtype), gradients)
    return None, trained, rows, None, None


summed.defvjp(_with_gradient, _bwd)


def in_blocks(add: Callable[[T, jax.Array, jax.Array, jax.Array], T], start: T, weights: jax.Array) -> T:
    """`add(done, places, weights, there)` over blocks of the rows whose weight is not 0, all in the end.

    Args:
      add: takes int32 [n] places of rows, their float32 [n] weights, and bool [n], false of what fills the
        last block up.
      start: what is done before the first.
      weights: float32 [N].
    """
    count = weights.shape[0]
    block = min(_ROWS, count)
    order = jnp.pad(jnp.argsort(weights == 0, stable=True), (0, -count % block), mode="edge")
    used = jnp.sum(weights != 0)

    def body(i: jax.Array, done: T) -> T:
        places = lax.dynamic_slice_in_dim(order, i * block, block)
        there = i * block + jnp.arange(block) < used
        return add(done, places, jnp.where(there, weights[places], 0.0), there)

    return lax.fori_loop(0, -(-used // block), body, start)


def _rows(tree: Any, places: jax.Array) -> Any:
    return jax.tree.map(lambda array: array[places], tree)
