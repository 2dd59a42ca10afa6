"""Reading Hugging Face configurations: keys with checks, rotary embeddings, what most decoders share."""

import math
from collections.abc import Mapping
from typing import Any

from jaxchat.config import GLOBAL_WINDOW, Block, ModelConfig, RopeConfig
from jaxchat.errors import JaxchatError, UsageError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
"""Hugging Face activation name -> ours."""

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class HfConfig:
    """A Hugging Face configuration whose errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where it is absent (an explicit null stays None)."""
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; without a default the key must be there."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise JaxchatError(f"{self.source}: key {key!r} is missing; is this the model's own config.json?")
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise JaxchatError(f"{self.source}: key {key!r} is {value!r}; expected a whole number")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A number; null and absent give the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise JaxchatError(f"{self.source}: key {key!r} is {value!r}; expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; null and absent give the default."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one number or a list."""
        value = self.values.get(key)
        if value is None:
            return ()
        return tuple(int(v) for v in (value if isinstance(value, list) else [value]))

    def activation(self, default: str, *keys: str) -> str:
        """The MLP's activation, from the first of `keys` that is set."""
        name = next((self.values[key] for key in keys if self.values.get(key)), default)
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UsageError(f"{self.source}: activation {name!r} is not supported; supported: {known}")
        return ACTIVATIONS[name]

    def refuse(self, key: str, *, unless: tuple[Any, ...] = (None, False)) -> None:
        """Refuses a feature this runtime does not have rather than ignore it."""
        if self.values.get(key) not in unless:
            raise UsageError(f"{self.source}: {key}={self.values[key]!r} is not supported")

    def layer_types(self, num_layers: int) -> tuple[str, ...] | None:
        """`layer_types`, checked, or None where the configuration has none."""
        types = self.values.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention")
        unknown = sorted({str(t) for t in types} - set(known))
        if unknown:
            raise UsageError(f"{self.source}: layer type {unknown[0]!r} is not supported; supported: {known}")
        if len(types) != num_layers:
            raise JaxchatError(f"{self.source}: {len(types)} layer_types for {num_layers} layers")
        return tuple(types)


def read_rope(
    hf: HfConfig,
    parameters: Mapping[str, Any] | None,
    *,
    theta: float,
    head_dim: int,
    max_position: int,
    partial: float | None = None,
    original_max_position: int | None = None,
) -> RopeConfig:
    """Reads one rotary embedding from a `rope_parameters` or legacy `rope_scaling` dictionary.

    Formulas and defaults follow `modeling_rope_utils.py` of transformers.

    Args:
      hf: the whole configuration, for error messages.
      parameters: the dictionary, or None.
      theta: base frequency where the dictionary has none.
      head_dim: H.
      max_position: `max_position_embeddings`.
      partial: rotated fraction of a head where the dictionary has none; None: the architecture rotates whole
        heads (transformers ignores a fraction there or fails, so it is refused).
      original_max_position: from outside the dictionary, takes precedence, as in transformers.
    """
    p = dict(parameters or {})
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UsageError(
            f"{hf.source}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    fraction = p.get("partial_rotary_factor") or partial or hf.number("partial_rotary_factor", 1.0)
    if partial is None and fraction != 1.0:
        raise UsageError(
            f"{hf.source}: partial_rotary_factor={fraction} is not supported for {hf.get('model_type')!r}, "
            "which rotates whole heads"
        )
    dim = int(head_dim * fraction)
    if dim % 2 or dim < 2:
        raise JaxchatError(f"{hf.source}: RoPE rotates {dim} dimensions of a head; expected an even number")
    original = original_max_position or p.get("original_max_position_embeddings") or max_position
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "longrope": ("short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(kind, ())
    missing = [key for key in needed if p.get(key) is None]
    if missing:
        raise JaxchatError(f"{hf.source}: rope type {kind!r} needs {missing[0]!r} in its rope parameters")
    factor = p.get("factor")
    if factor is None:
        factor = max_position / original
    short, long = tuple(p.get("short_factor") or ()), tuple(p.get("long_factor") or ())
    if kind == "longrope" and not len(short) == len(long) == dim // 2:
        raise JaxchatError(
            f"{hf.source}: short_factor and long_factor have {len(short)} and {len(long)} entries; "
            f"expected {dim // 2}, half the rotated dimensions"
        )
    return RopeConfig(
        kind=kind,
        theta=float(p.get("rope_theta") or theta),
        dim=dim,
        factor=float(factor),
        original_max_position=int(max_position if kind == "dynamic" else original),
        attention_factor=_attention_factor(kind, p, float(factor), original),
        low_freq_factor=float(p.get("low_freq_factor") or 1.0),
        high_freq_factor=float(p.get("high_freq_factor") or 4.0),
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        truncate=bool(p.get("truncate", True)),
        short_factor=short,
        long_factor=long,
    )


def _attention_factor(kind: str, p: Mapping[str, Any], factor: float, original: int) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def rope_dictionary(hf: HfConfig) -> Mapping[str, Any] | None:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    return hf.get("rope_parameters") or hf.get("rope_scaling")


def llama_config(hf: HfConfig, *, family: str, block: Block | None = None, **changes: Any) -> ModelConfig:
    """The configuration keys that most decoders share; a family passes what differs.

    Defaults for absent keys are those of transformers' LlamaConfig.
    """
    num_layers = hf.integer("num_hidden_layers")
    num_heads = hf.integer("num_attention_heads")
    hidden = hf.integer("hidden_size")
    head_dim = changes.pop("head_dim", None) or hf.integer("head_dim", hidden // max(num_heads, 1))
    max_position = hf.integer("max_position_embeddings", changes.pop("default_max_position", 2048))
    rope = changes.pop("rope", None) or read_rope(
        hf,
        rope_dictionary(hf),
        theta=hf.number("rope_theta", changes.pop("default_theta", 10000.0)),
        head_dim=head_dim,
        max_position=max_position,
        original_max_position=hf.get("original_max_position_embeddings"),
    )
    default_kv_heads = changes.pop("default_kv_heads", num_heads)
    if "num_key_value_heads" in hf.values:  # an explicit null is not an absent key
        default_kv_heads = num_heads
    bos = hf.ids("bos_token_id")
    values: dict[str, Any] = {
        "model_type": hf.get("model_type"),
        "family": family,
        "vocab_size": hf.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": hf.integer("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": hf.integer("num_key_value_heads", default_kv_heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "norm_eps": hf.number("rms_norm_eps", 1e-6),
        "blocks": (block or Block(activation=hf.activation("silu", "hidden_act")),),
        "ropes": (rope,),
        "layer_ropes": (0,) * num_layers,
        "layer_windows": (GLOBAL_WINDOW,) * num_layers,
        "layer_attn_scales": (head_dim**-0.5,) * num_layers,
        "tied_embeddings": hf.flag("tie_word_embeddings", False),
        "bos_id": bos[0] if bos else None,
        "eos_ids": hf.ids("eos_token_id"),
    }
    values.update(changes)
    return ModelConfig(**values)


def windows_of(layer_types: tuple[str, ...], window: int | None) -> tuple[int, ...]:
    """`layer_windows` from layer types and the one window of the sliding layers."""
    return tuple(window or GLOBAL_WINDOW if t == "sliding_attention" else GLOBAL_WINDOW for t in layer_types)
