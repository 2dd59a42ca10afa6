"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k)."""

from collections.abc import Mapping
from typing import Any

from jaxchat.config import GLOBAL_WINDOW, Block, ModelConfig
from jaxchat.families.decoder import head_dim_of, llama_config, llama_params, windows_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family, relayer_types


def qwen2_config(hf: HfConfig) -> ModelConfig:
    """Reads a Qwen2Config; the windows of the upper layers apply only with `use_sliding_window`."""
    return llama_config(
        hf, family="qwen2", default_max_position=32768, qkv_bias=True, layer_windows=_windows(hf)
    )


def qwen3_config(hf: HfConfig) -> ModelConfig:
    """Reads a Qwen3Config."""
    bias = hf.flag("attention_bias", False)
    return llama_config(
        hf,
        family="qwen3",
        head_dim=head_dim_of(hf, 128),
        default_max_position=32768,
        qkv_bias=bias,
        o_bias=bias,
        block=Block(qk_norm=True, activation=hf.activation("silu", "hidden_act")),
        layer_windows=_windows(hf),
    )


def _windows(hf: HfConfig) -> tuple[int, ...]:
    num_layers = hf.layers("num_hidden_layers")
    window = hf.window(4096) if hf.flag("use_sliding_window", False) else None
    first = hf.integer("max_window_layers", 28)
    by_index = tuple("sliding_attention" if i >= first else "full_attention" for i in range(num_layers))
    return windows_of(hf.layer_types(num_layers) or by_index, window)


def _relayer(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Also says where the windows begin, for readers of before `layer_types`."""
    local = [layer for layer, window in enumerate(config.layer_windows) if window != GLOBAL_WINDOW]
    first = local[0] if local else config.num_layers
    return {
        **relayer_types(values, config),
        "use_sliding_window": bool(local),
        "max_window_layers": first,
    }


FAMILIES = (
    Family("qwen2", ("qwen2",), qwen2_config, llama_params, relayer=_relayer),
    Family("qwen3", ("qwen3",), qwen3_config, llama_params, relayer=_relayer),
)
