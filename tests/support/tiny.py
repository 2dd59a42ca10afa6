"""Tiny random Hugging Face checkpoints of every supported `model_type`, for the tests.

The shapes are odd on purpose: widths that are no multiple of a tile, a vector or a cache line; unequal heads.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxchat.config import ModelConfig, Param
from jaxchat.families import parameter_table, read_config

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA_LIKE = {
    **_LLAMA_LIKE,
    "head_dim": 10,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
    "mistral": {
        **_LLAMA_LIKE,
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 6,
        "sliding_window": 7,
    },
    "qwen2": {
        **_LLAMA_LIKE,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        **_LLAMA_LIKE,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 10,
        "attention_bias": False,
    },
    "gemma": {**_GEMMA_LIKE, "architectures": ["GemmaForCausalLM"], "num_key_value_heads": 1},
    "gemma2": {
        **_GEMMA_LIKE,
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA_LIKE,
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
    "phi3": {
        **_LLAMA_LIKE,
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "original_max_position_embeddings": 96,
        "sliding_window": 9,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 67,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 44,
        "n_positions": 96,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""The `config.json` of each model type."""

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_tiny_hf(
    directory: str | Path, model_type: str, seed: int = 0, dtype: str = "float32", **config_overrides: Any
) -> dict[str, Any]:
    """Writes `config.json` and `model.safetensors` of a random model and returns the configuration.

    Args:
      directory: created if need be.
      model_type: a key of `TINY_CONFIGS`.
      seed: of the weights.
      dtype: `float32`, `bfloat16` or `float16`.
      **config_overrides: configuration keys to set; None removes a key. Gemma 3's `layer_types` follow
        `num_hidden_layers`.
    """
    config = {"model_type": model_type, **TINY_CONFIGS[model_type], **config_overrides, "dtype": dtype}
    if "layer_types" in config and "layer_types" not in config_overrides:
        count = config["num_hidden_layers"]
        config["layer_types"] = [("sliding" if (i + 1) % 3 else "full") + "_attention" for i in range(count)]
    config = {key: value for key, value in config.items() if value is not None}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(random_hf_tensors(read_config(config), seed, dtype), directory / "model.safetensors")
    return config


def random_hf_tensors(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors under their Hugging Face names: weights small, norms near the identity."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for param in parameter_table(config):
        for layer in range(config.num_layers if param.per_layer else 1):
            name = param.hf.format(layer)
            if name not in tensors:
                tensors[name] = _values(param, config, rng).astype(_DTYPES[dtype])
    return tensors


def _values(param: Param, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(param.hf_shape(config), dtype=np.float32)
    if param.role == "norm":
        return float(param.init == "ones") + 0.1 * noise
    return (0.2 if param.quantizable else 0.1) * noise
