"""Mistral and its fine-tunes (Zephyr, MistralLite, OpenHermes), and Ministral with windows by layer."""

from collections.abc import Mapping
from typing import Any

from jaxchat.config import ModelConfig
from jaxchat.families.decoder import llama_config, llama_params, windows_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family, relayer_plain, relayer_types


def config(hf: HfConfig) -> ModelConfig:
    """Reads a MistralConfig. As in transformers, an absent `sliding_window` is 4096 and null is none."""
    num_layers = hf.integer("num_hidden_layers")
    types = ("sliding_attention",) * num_layers
    if hf.get("model_type") == "ministral":
        # transformers' MistralModel ignores `layer_types`; its MinistralModel honours them.
        types = hf.layer_types(num_layers) or types
    return llama_config(
        hf,
        family="mistral",
        default_kv_heads=8,
        default_max_position=131072,
        layer_windows=windows_of(types, hf.get("sliding_window", 4096)),
    )


def _relayer(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    return (relayer_types if values.get("model_type") == "ministral" else relayer_plain)(values, config)


FAMILIES = (Family("mistral", ("mistral", "ministral"), config, llama_params, relayer=_relayer),)
