"""Mistral and its fine-tunes (Zephyr, MistralLite, OpenHermes), and Ministral with windows by layer."""

from collections.abc import Mapping
from typing import Any

from jaxchat.config import ModelConfig
from jaxchat.families.decoder import llama_config, llama_params, windows_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family, relayer_plain, relayer_types


def config(hf: HfConfig) -> ModelConfig:
    """Reads a MistralConfig. As in transformers, an absent `sliding_window` is 4096 and null is none."""
    num_layers = hf.layers("num_hidden_layers")
    types = (hf.layer_types(num_layers) if _is_by_layer(hf.values) else None) or (
        "sliding_attention",
    ) * num_layers
    return llama_config(
        hf,
        family="mistral",
        default_kv_heads=8,
        default_max_position=131072,
        layer_windows=windows_of(types, hf.window(4096)),
    )


def _is_by_layer(values: Mapping[str, Any]) -> bool:
    """As in transformers' AutoConfig, a Mistral configuration with layer types is a Ministral one."""
    return values.get("model_type") == "ministral" or "layer_types" in values


def _relayer(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    return (relayer_types if _is_by_layer(values) else relayer_plain)(values, config)


FAMILIES = (Family("mistral", ("mistral", "ministral"), config, llama_params, relayer=_relayer),)
