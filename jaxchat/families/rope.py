"""Rotary position embeddings: each kind whole, from its configuration to its frequencies, a row of `KINDS`.

Formulas and defaults follow `modeling_rope_utils.py` of transformers; sources are named at each function. The
rotation itself is in `layers/rope.py`. Needs no JAX: what depends on a context's length computes with the
array library of what it is given.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxchat.config import ModelConfig, RopeConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families.hf_config import HfConfig, Positive
from jaxchat.visible import shown

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of rotary embedding.

    Attributes:
      frequencies: inverse frequencies, [dim / 2], or [B, dim / 2] of contexts of int [B] tokens.
      needs: the keys that its parameters must have.
      attention_factor: what cosines and sines are multiplied by, from the parameters, the factor by which the
        context is extended, and the length that was trained.
      regime: a number that is equal for two context lengths whose keys are rotated alike.
      is_followed: a generation that comes to another regime computes its keys anew; otherwise, as in
        transformers, they keep the rotation they were written with until the next prefill.
    """

    frequencies: Callable[[RopeConfig, Any], Any]
    needs: tuple[str, ...] = ()
    attention_factor: Callable[[HfConfig, float, int], float] = lambda parameters, factor, trained: 1.0
    regime: Callable[[RopeConfig, int], int] = lambda rope, length: 0
    is_followed: bool = False


def _wavelengths(rope: RopeConfig) -> np.ndarray:
    """theta^(2i/dim), float64 [dim / 2]: the inverse of the unscaled frequencies."""
    return rope.theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)


def _default(rope: RopeConfig, context: Any = None) -> np.ndarray:
    return 1 / _wavelengths(rope)


def _linear(rope: RopeConfig, context: Any) -> np.ndarray:
    """Chen et al. 2023 (position interpolation)."""
    return _default(rope) / rope.factor


def _llama3(rope: RopeConfig, context: Any) -> np.ndarray:
    """Llama 3.1's interpolation by wavelength: long waves are stretched, short ones kept, others blended."""
    frequency = _default(rope)
    wavelength = 2 * np.pi / frequency
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def _yarn(rope: RopeConfig, context: Any) -> np.ndarray:
    """Peng et al. 2023 (YaRN), NTK-by-parts between `beta_fast` and `beta_slow` rotations."""

    def dimension_of(rotations: float) -> float:
        period = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
    frequency = _default(rope)
    return frequency / rope.factor * interpolated + frequency * (1 - interpolated)


def _dynamic(rope: RopeConfig, context: Any) -> Any:
    """NTK-aware scaling whose base follows the context length beyond the trained one."""
    xp = context.__array_namespace__()
    trained = rope.original_max_position
    length = xp.astype(xp.maximum(context, trained), xp.float32)
    growth = rope.factor * length / trained - (rope.factor - 1)
    # (theta * growth^e)^(-2i/dim), split so that the exact unscaled table is used while growth is 1.
    exponent = np.arange(0, rope.dim, 2, dtype=np.float64) / (rope.dim - 2)
    return np.asarray(_default(rope), np.float32) * growth[:, None] ** np.asarray(-exponent, np.float32)


def _longrope(rope: RopeConfig, context: Any) -> Any:
    """Ding et al. 2024 (LongRoPE): one set of factors up to the original context, another beyond."""
    short, long = (
        np.asarray(1 / (np.asarray(factors) * _wavelengths(rope)), np.float32)
        for factors in (rope.short_factor, rope.long_factor)
    )
    xp = context.__array_namespace__()
    return xp.where(context[:, None] > rope.original_max_position, long, short)


def _yarn_factor(parameters: HfConfig, factor: float, trained: int) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    one, all_dimensions = (parameters.number(key, 0.0) for key in ("mscale", "mscale_all_dim"))
    if factor <= 1.0:
        default = 1.0
    else:
        default = mscale(one) / mscale(all_dimensions) if one and all_dimensions else mscale(1.0)
    return parameters.positive("attention_factor", default)


def _longrope_factor(parameters: HfConfig, factor: float, trained: int) -> float:
    default = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return parameters.positive("attention_factor", default)


KINDS: Mapping[str, Kind] = {
    "default": Kind(frequencies=_default),
    "linear": Kind(frequencies=_linear, needs=("factor",)),
    "dynamic": Kind(
        frequencies=_dynamic,
        needs=("factor",),
        regime=lambda rope, length: max(length, rope.original_max_position),
    ),
    "yarn": Kind(frequencies=_yarn, attention_factor=_yarn_factor),
    "longrope": Kind(
        frequencies=_longrope,
        needs=("short_factor", "long_factor"),
        attention_factor=_longrope_factor,
        regime=lambda rope, length: int(length > rope.original_max_position),
        is_followed=True,
    ),
    "llama3": Kind(frequencies=_llama3, needs=("factor", "low_freq_factor", "high_freq_factor")),
}
"""`RopeConfig.kind` -> what it is."""


def regime(config: ModelConfig, length: int) -> int:
    """A number that is equal for two context lengths whose keys a model rotates alike: see `Kind.regime`."""
    return max((KINDS[rope.kind].regime(rope, length) for rope in config.ropes), default=0)


def is_followed(config: ModelConfig) -> bool:
    """Whether a generation follows a change of the regime: see `Kind.is_followed`."""
    return any(KINDS[rope.kind].is_followed for rope in config.ropes)


def read_rope(
    hf: HfConfig,
    parameters: HfConfig | None,
    *,
    theta: float,
    head_dim: int,
    max_position: int,
    partial: float | None = None,
    original_max_position: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> RopeConfig:
    """Reads one rotary embedding from a `rope_parameters` or legacy `rope_scaling` dictionary.

    Formulas and defaults follow `modeling_rope_utils.py` of transformers.

    Args:
      hf: the whole configuration.
      parameters: the dictionary, or None.
      theta: base frequency where the dictionary has none.
      head_dim: H.
      max_position: `max_position_embeddings`.
      partial: rotated fraction of a head where the dictionary has none; None: the architecture rotates whole
        heads (transformers ignores a fraction there or fails, so it is refused).
      original_max_position: from outside the dictionary, takes precedence, as in transformers.
      names: what the family calls a kind -> its name in `KINDS`.
    """
    p = parameters or HfConfig({}, hf.at("rope_parameters"))
    kind = p.read("rope_type", str, "") or p.read("type", str, "") or "default"
    kind = names.get(kind, kind)
    if kind not in KINDS:
        raise UsageError(
            f"{p.source}: rope type {shown(kind)} is not supported; supported: {', '.join(KINDS)}"
        )
    if nested := [key for key, value in p.values.items() if isinstance(value, dict)]:
        raise UsageError(f"{p.at(nested[0])}: rope parameters by layer type are not supported for this model")
    fraction = p.positive("partial_rotary_factor", partial or hf.positive("partial_rotary_factor", 1.0))
    if partial is None and fraction != 1.0:
        raise UsageError(
            f"{hf.source}: partial_rotary_factor={fraction} is not supported for "
            f"{hf.values.get('model_type')!r}, which rotates whole heads"
        )
    dim = int(head_dim * fraction)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise JaxchatError(
            f"{hf.source}: RoPE rotates {dim} dimensions of a head; expected an even number, "
            f"2 to {head_dim} (head_dim)"
        )
    original = original_max_position or p.length("original_max_position_embeddings", max_position)
    for key in KINDS[kind].needs:
        if p.values.get(key) is None:
            raise JaxchatError(f"{p.source}: rope type {kind!r} needs {key!r} in its rope parameters")
    factor = p.positive("factor", max_position / original)
    short, long = (tuple(p.read(key, list[Positive], [])) for key in ("short_factor", "long_factor"))
    if kind == "longrope" and not len(short) == len(long) == dim // 2:
        raise JaxchatError(
            f"{p.source}: short_factor and long_factor have {len(short)} and {len(long)} entries; "
            f"expected {dim // 2}, half the rotated dimensions"
        )
    try:
        attention_factor = KINDS[kind].attention_factor(p, factor, original)
    except ZeroDivisionError:
        attention_factor = math.nan
    rope = RopeConfig(
        kind=kind,
        theta=p.positive("rope_theta", theta),
        dim=dim,
        factor=factor,
        original_max_position=max_position if kind == "dynamic" else original,
        attention_factor=attention_factor,
        low_freq_factor=p.positive("low_freq_factor", 1.0),
        high_freq_factor=p.positive("high_freq_factor", 4.0),
        beta_fast=p.positive("beta_fast", 32.0),
        beta_slow=p.positive("beta_slow", 1.0),
        truncate=p.flag("truncate", True),
        short_factor=short,
        long_factor=long,
    )
    _check(rope, p, max_position)
    return rope


def _check(rope: RopeConfig, parameters: HfConfig, max_position: int) -> None:
    """Refuses parameters, each possible, that together give no rotation."""
    with np.errstate(all="ignore"):
        try:
            found = KINDS[rope.kind].frequencies(rope, np.asarray([1, max_position]))
        except ZeroDivisionError:
            found = math.nan
    if not (np.isfinite(found).all() and math.isfinite(rope.attention_factor)):
        raise JaxchatError(
            f"{parameters.source}: rope type {rope.kind!r} has no finite frequencies with these parameters; "
            "download the file again"
        )


def rope_section(hf: HfConfig) -> HfConfig | None:
    """`rope_scaling`, or `rope_parameters` (transformers 5).

    Of both the former is followed, as transformers does: users add it to what transformers has saved.
    """
    scaling, parameters = hf.section("rope_scaling"), hf.section("rope_parameters")
    if scaling and parameters and not scaling.values.items() <= parameters.values.items():
        logger.warning("%s: rope_scaling is followed, and not rope_parameters", hf.source)
    return scaling or parameters
