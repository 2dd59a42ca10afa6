"""What is kept of a draft: a walk through its tree, which draws at each token as if there were no draft.

At every token the walk draws the next one from the base's own distribution there (penalties, temperature and
filters included), with the random numbers of that position. If a drafted token is the one drawn, the walk
goes on behind it; otherwise the draw is the last of the step. So tokens are those that decoding one by one
gives, and with a seed the same ones. It is the rejection rule of speculative sampling (Leviathan et al. 2023,
over siblings as in SpecInfer and EAGLE) for drafts that are no draws themselves but the likeliest tokens: a
sibling x is accepted with p(x), rejected ones are taken out of p, and what is left of p is drawn from.

The rules in `RULES` that are not lossless accept more, and change the distribution.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.draft_use import TreeShape
from jaxchat.engine import sampling
from jaxchat.engine.sampling import SamplingParams

TYPICAL_THRESHOLD, TYPICAL_ALPHA = 0.09, 0.3
"""Of `typical`: what Chimera's authors use with Medusa's rule (Cai et al. 2024)."""
TOP_K = 3
"""Of `top_k`."""


class Kept(NamedTuple):
    """What a step gives: A is the depth of the tree and 1."""

    tokens: jax.Array  # int32 [B, A], one after the other; `number` of them
    logprobs: jax.Array  # float32 [B, A], of the model
    number: jax.Array  # int32 [B], 1 or more: the accepted ones, and the last, which was drawn
    path: jax.Array  # int32 [B, A], of the tokens that were computed those that led there; as many
    computed: jax.Array  # int32 [B, A], these tokens
    hidden: jax.Array  # float32 [B, A, D], their hidden states


class Draws(NamedTuple):
    """What the draws of a step depend on."""

    params: SamplingParams
    seeds: jax.Array  # uint32 [B]
    positions: jax.Array  # int32 [B], of the first token that is drawn
    prompt_mask: jax.Array  # bool [B, V]
    counts: jax.Array  # int32 [B, V]
    allowed: jax.Array  # bool [B, V], what the first token may be


def _none(logits: jax.Array, tokens: jax.Array, parents: np.ndarray) -> jax.Array:
    """Lossless: what is drawn decides, and nothing else."""
    return jnp.zeros(tokens.shape, bool)


def _typical(logits: jax.Array, tokens: jax.Array, parents: np.ndarray) -> jax.Array:
    """Accepts x if p(x) > min(threshold, alpha exp(-H(p)))."""
    logp = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(logp) * jnp.where(jnp.isfinite(logp), logp, 0), -1)
    least = jnp.minimum(TYPICAL_THRESHOLD, TYPICAL_ALPHA * jnp.exp(-entropy))
    own = jnp.take_along_axis(logp[:, parents], tokens[..., None], -1)[..., 0]
    return jnp.exp(own) > least[:, parents]


def _top_k(logits: jax.Array, tokens: jax.Array, parents: np.ndarray) -> jax.Array:
    """Accepts x if it is among the base's likeliest."""
    # Behind the barrier XLA's own selection stays one; on CPU it would sort the vocabulary instead.
    found, _ = lax.optimization_barrier(lax.top_k(logits, min(TOP_K, logits.shape[-1])))
    least = found[..., -1]
    own = jnp.take_along_axis(logits[:, parents], tokens[..., None], -1)[..., 0]
    return own >= least[:, parents]


RULES: Mapping[str, Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]] = {
    "lossless": _none,
    "typical": _typical,
    "top_k": _top_k,
}
"""`draft_use.ACCEPT` -> which drafted tokens, bool [B, T], are accepted whatever is drawn; see `_typical`.

They are given the base's logits float32 [B, T, V] at each token, the tokens [B, T], and their parents [T].
"""


@functools.partial(jax.jit, static_argnums=(0, 1))
def accept(
    rule: str,
    shape: TreeShape,
    logits: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    new: jax.Array,
    draws: Draws,
) -> Kept:
    """Walks through a verified draft.

    Args:
      rule: of `RULES`.
      shape: of the tree.
      logits: float32 [B, T, V], at each of its tokens.
      hidden: float32 [B, T, D].
      tokens: int32 [B, T].
      new: int32 [B], how many of the tokens count; 0 leaves a sequence out.
      draws: see `Draws`.
    """
    parents, (b, t) = np.array(shape.parents), tokens.shape
    real = jnp.arange(t) < new[:, None]
    forced = _longest(shape, RULES[rule](logits, tokens, parents) & real)
    every, steps = jnp.arange(b), shape.depth + 1

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, node, active, counts, drawn, logprobs, path = state
        own = logits[every, node]
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
            draws.seeds, draws.positions + i
        )
        among = jnp.where(draws.allowed, own, -jnp.inf)
        token, _ = sampling.sample(keys, among, draws.params, draws.prompt_mask, counts)
        child = forced[every, node]
        token = jnp.where(child > 0, tokens[every, child], token)
        follows = (parents == node[:, None]) & (np.arange(t) > 0) & (tokens == token[:, None]) & real
        child = jnp.where(child > 0, child, jnp.argmax(follows, -1))
        drawn = drawn.at[:, i].set(jnp.where(active, token, 0))
        logprobs = logprobs.at[:, i].set(jnp.where(active, sampling.log_probability(own, token), 0))
        path = path.at[:, i].set(jnp.where(active, node, -1))
        counts = counts.at[every, token].add(active)
        return i + 1, child, active & (child > 0), counts, drawn, logprobs, path

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < steps) & jnp.any(state[2])

    none = jnp.zeros((b, steps), jnp.int32)
    start: tuple[jax.Array, ...] = (
        jnp.int32(0),
        jnp.zeros(b, jnp.int32),
        new > 0,
        draws.counts,
        none,
        none.astype(jnp.float32),
        none - 1,
    )
    _, _, _, _, drawn, logprobs, path = lax.while_loop(unfinished, body, start)
    number = jnp.sum(path >= 0, -1)
    path = jnp.maximum(path, 0)
    return Kept(
        drawn,
        logprobs,
        number,
        path,
        jnp.take_along_axis(tokens, path, 1),
        jnp.take_along_axis(hidden, path[..., None], 1),
    )


def _longest(shape: TreeShape, accepted: jax.Array) -> jax.Array:
    """int32 [B, T]: behind each token of the longest accepted path the next; 0 behind any other."""
    b, t = accepted.shape
    reached = [jnp.ones(b, bool)]
    for token in range(1, t):
        reached.append(reached[shape.parents[token]] & accepted[:, token])
    lengths = jnp.where(jnp.stack(reached, 1), jnp.array(shape.depths), 0)
    end = jnp.argmax(lengths, 1)  # of equal ones the first, which is the likeliest
    after = jnp.zeros((b, t), jnp.int32)
    every = jnp.arange(b)
    for _ in range(shape.depth):
        parent = jnp.array(shape.parents)[end]
        after = after.at[every, parent].max(end)
        end = parent
    return after
