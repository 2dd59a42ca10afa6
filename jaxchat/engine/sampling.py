"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and the draw. Pure functions.

The parameters are traced arrays, one value per sequence: changing them compiles nothing, and one batch may
mix greedy and sampled sequences. Nothing here knows a model, a cache or a tokenizer.
`B` batch · `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.errors import UsageError
from jaxchat.options import SAMPLING_RANGES
from jaxchat.values import wrong

_INT_MAX = np.iinfo(np.int32).max
_Values = float | Sequence[float] | np.ndarray


class SamplingParams(NamedTuple):
    """How each sequence of a batch is sampled. Build with `make`, which checks the ranges."""

    temperature: jax.Array  # float32 [B], divides the logits; 0 = greedy
    top_k: jax.Array  # int32 [B], keep the k most probable tokens; 0 = off
    top_p: jax.Array  # float32 [B], keep the fewest tokens that together have this probability; 1 = off
    min_p: jax.Array  # float32 [B], keep tokens at least this probable relative to the top one; 0 = off
    repetition_penalty: jax.Array  # float32 [B], weakens tokens of prompt and output; 1 = off
    presence_penalty: jax.Array  # float32 [B], subtracted once from tokens of the output; 0 = off
    frequency_penalty: jax.Array  # float32 [B], subtracted per occurrence in the output; 0 = off

    @classmethod
    def make(
        cls,
        batch: int,
        *,
        temperature: _Values = 1.0,
        top_k: int | Sequence[int] | np.ndarray = 0,
        top_p: _Values = 1.0,
        min_p: _Values = 0.0,
        repetition_penalty: _Values = 1.0,
        presence_penalty: _Values = 0.0,
        frequency_penalty: _Values = 0.0,
    ) -> "SamplingParams":
        """Parameters for `batch` sequences; each is one number for all, or `batch` numbers.

        The defaults leave the model's distribution as it is.

        Raises:
          UsageError: a value is out of its range or not a number; the message names the parameter.
        """

        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        return cls(**{name: _checked(name, values, batch) for name, values in given.items()})


def adjust_logits(
    logits: jax.Array, params: SamplingParams, prompt_mask: jax.Array, counts: jax.Array
) -> jax.Array:
    """Apply the three penalties.

    Repetition is CTRL's (arXiv:1909.05858, section 4.1) as transformers has it: the logit of every token of
    the prompt or the output is divided by the penalty if positive and multiplied by it if negative. Presence
    and frequency are OpenAI's: `logit - presence * (count > 0) - frequency * count`, output tokens only.

    Args:
      logits: float32 [B, V].
      params: [B] each.
      prompt_mask: bool [B, V], which tokens occur in the prompt.
      counts: int32 [B, V], how often each token was generated.

    Returns:
      float32 [B, V]. With all penalties off, exactly `logits`.
    """
    generated = counts > 0
    penalty = params.repetition_penalty[:, None]
    weakened = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(prompt_mask | generated, weakened, logits)
    return logits - params.presence_penalty[:, None] * generated - params.frequency_penalty[:, None] * counts


def filter_logits(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Apply temperature, top-k, top-p and min-p, in this order, each on what the one before left.

    `softmax` of the result is the distribution that `sample` draws from; for a greedy sequence all of it is
    on the argmax. The order is that of transformers, and so are ties: top-k keeps all tokens tied with the
    k-th; of tokens tied at the edge of top-p only as many as needed are kept (the lowest ids; transformers
    keeps the same number but leaves the choice to an unstable sort). Top-p: Holtzman et al.
    (arXiv:1904.09751); min-p: Nguyen et al. (arXiv:2407.01082).

    Args:
      logits: float32 [B, V].
      params: [B] each; the penalties are not used.

    Returns:
      float32 [B, V], scaled and shifted so that the maximum is 0; removed tokens are -inf, and at least one
      token is left. A sequence with a NaN or without any finite logit is NaN throughout.
    """
    temperature = params.temperature[:, None]
    # The shift keeps a tiny temperature from overflowing to inf, and makes every scaled logit <= 0.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / jnp.where(temperature > 0, temperature, 1.0)

    active = params.temperature > 0
    limits_k = active & (params.top_k > 0) & (params.top_k < logits.shape[-1])
    limits_p = active & (params.top_p < 1)
    scaled = jax.lax.cond(jnp.any(limits_k), _keep_top_k, lambda x, _: x, scaled, params.top_k)
    scaled = jax.lax.cond(jnp.any(limits_p), _keep_top_p, lambda x, _: x, scaled, params.top_p)
    scaled = jnp.where(jnp.exp(scaled) < params.min_p[:, None], -jnp.inf, scaled)

    is_argmax = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[:, None]
    return jnp.where(active[:, None] | is_argmax | jnp.isnan(shifted), scaled, -jnp.inf)


def sample(
    keys: jax.Array, logits: jax.Array, params: SamplingParams, prompt_mask: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per sequence.

    A sequence's draw depends only on its own row and key, not on its neighbours. For step n of a
    sequence, pass `jax.random.fold_in(sequence_key, n)`.

    Args:
      keys: typed PRNG keys [B].
      logits: float32 [B, V], of the model.
      params: [B] each.
      prompt_mask: bool [B, V], which tokens occur in the prompt.
      counts: int32 [B, V], how often each token was generated.

    Returns:
      tokens int32 [B], and their log-probabilities float32 [B] under the *model*: log-softmax of `logits` as
      given, before penalties, temperature and filters. A NaN among a sequence's logits makes it NaN.
    """
    logits = logits.astype(jnp.float32)
    adjusted = adjust_logits(logits, params, prompt_mask, counts)
    tokens = jax.lax.cond(
        jnp.any(params.temperature > 0),
        lambda: _draw(keys, filter_logits(adjusted, params)),
        lambda: jnp.argmax(adjusted, axis=-1).astype(jnp.int32),
    )
    return tokens, log_probability(logits, tokens)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The tokens' log-softmax, float32 [...], of float32 logits [..., V], without writing that of all."""
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - top - jnp.log(total)


_BLOCK = 256
"""Tokens that a draw takes as one at first."""


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """int32 [B], drawn from softmax(logits): a block of tokens by their total, then one of that block.

    That needs V / 256 + 256 random numbers. One a token would take longer on a CPU than all else here.
    """

    def draw(key: jax.Array, row: jax.Array) -> jax.Array:
        blocks = jnp.pad(row, (0, -len(row) % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
        # The argmax with Gumbel noise is a draw from the softmax. JAX's default noise has 23 random bits:
        # among many its largest values are coarse and can tie.
        noise = jax.random.gumbel(key, (len(blocks) + _BLOCK,), mode="high")
        of_block, of_token = noise[: len(blocks)], noise[len(blocks) :]
        block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + of_block)
        return (block * _BLOCK + jnp.argmax(blocks[block] + of_token)).astype(jnp.int32)

    return jax.vmap(draw)(keys, logits)


# --- Top-k and top-p without sorting. Non-negative floats order like their bits, so a threshold is found
# exactly by bisecting over 31 bits, one reduction each. On CPU at V = 128k that takes 1 ms, a sort 20.


def _rank(scaled: jax.Array) -> jax.Array:
    """int32 [B, V] that grows as the logit (<= 0) falls: 0 for the top token, equal only for tied tokens."""
    return jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)  # abs: -0.0 is the top token too


def _behind(rank: jax.Array, weight: jax.Array | float, edge: jax.Array) -> jax.Array:
    """float32 [B, 1]: what the tokens behind rank `edge` [B, 1] weigh."""
    return jnp.sum(jnp.where(rank > edge, weight, 0.0), axis=-1, keepdims=True)


def _edge(rank: jax.Array, weight: jax.Array | float, budget: jax.Array) -> jax.Array:
    """int32 [B, 1]: the smallest of ranks (>= 0) behind which tokens weigh at most `budget` [B, 1]."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        found = _behind(rank, weight, middle) <= budget
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    low = jnp.zeros_like(rank, shape=(len(rank), 1))
    return jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, _INT_MAX)))[1]


def _keep_top_k(scaled: jax.Array, top_k: jax.Array) -> jax.Array:
    """Remove what ranks behind the k-th token. scaled [B, V] <= 0, top_k [B]."""
    vocabulary = scaled.shape[-1]
    removable = jnp.where(top_k > 0, jnp.maximum(vocabulary - top_k, 0), 0)[:, None]
    rank = _rank(scaled)
    # Counted in float32, exact to 2^24 tokens and twice as fast as in int32 on CPU.
    return jnp.where(rank > _edge(rank, 1.0, removable.astype(jnp.float32)), -jnp.inf, scaled)


def _keep_top_p(scaled: jax.Array, top_p: jax.Array) -> jax.Array:
    """Remove the least probable tokens while their sum is <= 1 - top_p. scaled [B, V] <= 0, top_p [B]."""
    rank = _rank(scaled)
    weight = jnp.exp(scaled)
    budget = (1 - top_p[:, None]) * jnp.sum(weight, axis=-1, keepdims=True)
    edge = _edge(rank, weight, budget)
    # Tokens tied at the edge go one by one, highest id first, and never all of them.
    tied = rank == edge
    edge_weight = jnp.exp(-jax.lax.bitcast_convert_type(edge, jnp.float32))
    spare = jnp.floor((budget - _behind(rank, weight, edge)) / edge_weight)
    surplus = jnp.minimum(spare, jnp.sum(tied, axis=-1, keepdims=True) - 1)
    ids = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1)
    behind = rank > edge
    # Not by a running sum over the vocabulary: a TPU's compiler takes longer for that than for all else here.
    removed = jax.lax.cond(
        jnp.any(surplus > 0),
        lambda: behind | (tied & (ids > _edge(ids, tied.astype(jnp.float32), surplus))),
        lambda: behind,
    )
    return jnp.where(removed & (top_p < 1)[:, None], -jnp.inf, scaled)


# --- validation


def _checked(name: str, given: Any, batch: int) -> jax.Array:
    """One parameter [batch], float32 or int32, within its range."""
    limits = SAMPLING_RANGES[name]
    dtype = np.int32 if limits.type is int else np.float32
    try:
        values = np.asarray(given)
    except ValueError:  # nested sequences of unequal lengths
        values = np.asarray(None)
    if values.dtype.kind not in ("iu" if dtype is np.int32 else "iuf"):
        raise wrong(name, given, limits.expected)
    if values.shape not in ((), (batch,)):
        raise UsageError(f"{name} has values of shape {values.shape}; expected one number or {batch} of them")
    bad = ~((values >= limits.low) & (values <= limits.high))  # NaN is not in any range
    if bad.any():
        raise wrong(name, values[bad].flat[0].item(), limits.expected)
    return jax.device_put(np.broadcast_to(values, (batch,)).astype(dtype))  # by numpy: nothing to compile
