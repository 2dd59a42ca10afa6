"""The rotary embedding of a GGUF model, from its keys and its tensors of factors, as `rope_scaling`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxchat.config import RopeConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families.gguf_keys import ADVICE, Keys
from jaxchat.families.rope import KINDS
from jaxchat.visible import shown

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = frozenset({FREQUENCIES, LONG, SHORT})
"""The tensors of factors, one for each frequency."""


def rope_scaling(keys: Keys, theta: float, dim: int, context: int) -> dict[str, Any]:
    """`rope_scaling` of a Hugging Face configuration; empty where nothing is scaled.

    Args:
      keys: of the model.
      theta: the base of the frequencies.
      dim: how many dimensions of a head are rotated.
      context: the longest, in tokens.

    Raises:
      UsageError: the kind of scaling is not supported.
      JaxchatError: a tensor of factors is missing, or does not fit.
    """
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    divisors = _factors(keys, FREQUENCIES, dim)
    if divisors is not None and set(divisors) != {1.0}:
        if kind == "yarn":
            raise UsageError(f"{keys.at('rope.scaling.type')} is 'yarn', beside {FREQUENCIES}: not supported")
        if kind == "linear":
            divisors = tuple(divisor * factor for divisor in divisors)
        return _divided(divisors, theta, dim, context)
    if LONG in keys.model.shapes or kind == "longrope":
        return _longrope(keys, dim, context)
    if kind == "yarn":
        return _yarn(keys, factor, context)
    if kind not in ("none", "linear"):
        raise UsageError(
            f"{keys.at('rope.scaling.type')} is {shown(kind)}, which is not supported; supported: none, "
            "linear, yarn, longrope"
        )
    scaled = factor != 1.0 and (kind == "linear" or keys.get("rope.scaling.type") is None)
    return {"rope_type": "linear", "factor": factor} if scaled else {}


def _factors(keys: Keys, name: str, dim: int) -> tuple[float, ...] | None:
    """One number for each frequency, of a tensor; None where it is not there."""
    shape = keys.model.shapes.get(name)
    if shape is None:
        return None
    if shape != (dim // 2,):
        raise JaxchatError(
            f"{keys.model.where}: tensor {name} has the shape {list(shape)}; expected [{dim // 2}], half of "
            f"the {dim} rotated dimensions; {ADVICE}"
        )
    found = keys.model.values(name).astype(np.float32)
    if not (np.isfinite(found) & (found > 0)).all():
        raise JaxchatError(f"{keys.model.where}: tensor {name} has numbers that are not above 0; {ADVICE}")
    return tuple(float(str(value)) for value in found)


def _longrope(keys: Keys, dim: int, context: int) -> dict[str, Any]:
    long, short = (_factors(keys, name, dim) for name in (LONG, SHORT))
    if long is None or short is None:
        missing = LONG if long is None else SHORT
        raise JaxchatError(f"{keys.model.where}: tensor {missing} is missing; {ADVICE}")
    attention = keys.number("rope.scaling.attn_factor", 0.0)
    return {
        "rope_type": "longrope",
        "long_factor": list(long),
        "short_factor": list(short),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
        **({"attention_factor": attention} if attention else {}),
    }


def _yarn(keys: Keys, factor: float, context: int) -> dict[str, Any]:
    attention = keys.number("rope.scaling.yarn_attn_factor", 0.0)
    values: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if log := keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        values |= {"mscale": 1.0, "mscale_all_dim": log}
    return values | ({"attention_factor": attention} if attention else {})


def _divided(divisors: Sequence[float], theta: float, dim: int, context: int) -> dict[str, Any]:
    """Frequencies that are divided by these: Llama 3's, if those come to the same, or else any."""
    for original in (8192, *(1 << bits for bits in range(5, 18))):
        rope = RopeConfig(
            kind="llama3", theta=theta, dim=dim, factor=max(divisors), original_max_position=original
        )
        with np.errstate(all="ignore"):  # whatever theta a file states
            found = KINDS["default"].frequencies(rope, None) / KINDS["llama3"].frequencies(rope, None)
        if np.allclose(found, divisors, rtol=2e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "long_factor": list(divisors),
        "short_factor": list(divisors),
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }
