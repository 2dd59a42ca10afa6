"""Tiny GGUF models of every architecture, written as llama.cpp's converter makes them of Hugging Face's.

Names come from `gguf`'s own map of tensors, what is done to tensors from llama.cpp's conversion/*.py: nothing
here knows how jaxchat reads them. The files were compared with that converter's, key by key and byte by byte.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np

from tests.support.parity_cases import CASES

_GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 8}
_PATTERN = {"num_hidden_layers": 7, "sliding_window_pattern": 6}
GGUF_CASES: dict[str, dict[str, Any]] = {
    **{
        name: CASES[name]
        for name in (
            "llama-plain",
            "llama-one-kv-head",
            "llama-all-kv-heads",
            "llama-head-dim",
            "llama-biases",
            "llama-rope-llama3",
            "llama-rope-linear",
            "llama-rope-yarn",
            "mistral-null-window",
            "qwen2-plain",
            "qwen3-plain",
            "qwen3-biases",
            "gemma-plain",
            "phi3-plain",
            "phi3-window",
            "phi3-partial-rotary",
            "phi3-longrope-crossing",
            "gpt2-plain",
        )
    },
    "llama-tied": {**CASES["llama-plain"], "tie_word_embeddings": True},
    "gemma2-plain": {**CASES["gemma2-plain"], **_GEMMA},
    "gemma2-tight-caps": {**CASES["gemma2-tight-caps"], "query_pre_attn_scalar": 8},
    "gemma3_text-plain": {
        **CASES["gemma3_text-plain"],
        **_GEMMA,
        "num_hidden_layers": 7,
        "sliding_window_pattern": 6,
    },
    "gemma3_text-linear": {
        **CASES["gemma3_text-plain"],
        **_GEMMA,
        "num_hidden_layers": 6,
        "sliding_window_pattern": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt2-untied": {**CASES["gpt2-plain"], "n_inner": 50, "tie_word_embeddings": False},
}
"""Configurations that GGUF can express: activations, say, are implied by the architecture's name."""

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
_Q = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType = _Q.F32,
    metadata: Mapping[str, Any] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
    big_endian: bool = False,
    parts: int = 1,
    edit: Any = None,
) -> None:
    """Writes a model.

    Args:
      path: of the file; of several parts the name without their numbers.
      config: its `config.json`.
      tensors: by their Hugging Face names.
      kind: of the matrices.
      kinds: of some of them, by name.
      metadata: more keys, or other values; None leaves a key out.
      big_endian: of a big-endian machine.
      parts: how many files.
      edit: changes what is to be written: a function of the dictionaries of keys and of tensors.
    """
    arch = _ARCHITECTURES[config["model_type"]]
    keys: dict[str, Any] = {
        **{f"{gguf.MODEL_ARCH_NAMES[arch]}.{key}": value for key, value in _keys(config).items()},
        "general.name": "tiny",
        "tokenizer.ggml.model": "none",
        **(metadata or {}),
    }
    written = dict(_tensors(arch, config, tensors))
    if edit is not None:
        edit(keys, written)
    name = gguf.MODEL_ARCH_NAMES[arch]
    write_gguf_file(path, name, keys, written, kind=kind, kinds=kinds, big_endian=big_endian, parts=parts)


def write_gguf_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType = _Q.F32,
    kinds: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
    big_endian: bool = False,
    parts: int = 1,
) -> None:
    """Writes keys and tensors as they are; Python's types decide the keys' types."""
    endianess = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    most = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess, split_max_tensors=most)
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    for name, values in tensors.items():
        quantized = kinds.get(name, kind if values.ndim > 1 and name not in _ALWAYS_F32 else _Q.F32)
        if quantized == _Q.F32:
            writer.add_tensor(name, values.astype(np.float32))
        else:
            raw = _quantized(values.astype(np.float32), quantized)
            writer.add_tensor(name, raw, raw_dtype=quantized)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks; by ggml's own code where the library has none."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        import libgguf

        return libgguf.quantize_rows(values, kind)


_ALWAYS_F32 = ("position_embd.weight",)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    kinds[type(value)](key, value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config.get("rope_parameters", {}), **(config.get("rope_scaling") or {})}


def _keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an architecture, without its prefix."""
    if config["model_type"] == "gpt2":
        return {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    rope = _rope(config)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": width,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }
    if "head_dim" in config:
        keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    kind = rope.get("rope_type", rope.get("type"))
    if config["model_type"] == "phi3":
        kind = None
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= {f"rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow")}
    return keys | _OF_ITS_OWN.get(config["model_type"], lambda config: {})(config)


def _llama_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim}


def _gemma2_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps = {key: config.get(key, default) for key, default in names.items()}
    return {"rope.freq_base": None, "attention.sliding_window": config["sliding_window"], **caps}


def _gemma3_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config.get("rope_theta", 1e6)
    return {"rope.freq_base": theta, "attention.sliding_window": config["sliding_window"]}


def _phi3_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    context, width, heads = (
        config[key] for key in ("max_position_embeddings", "hidden_size", "num_attention_heads")
    )
    original = config.get("original_max_position_embeddings", 4096)
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": int(config.get("partial_rotary_factor", 1.0) * width) // heads,
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if "long_factor" in _rope(config):
        scale = context / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return keys


_OF_ITS_OWN = {
    "llama": _llama_keys,
    "mistral": _llama_keys,
    "gemma": lambda config: {"rope.freq_base": None},
    "gemma2": _gemma2_keys,
    "gemma3_text": _gemma3_keys,
    "phi3": _phi3_keys,
}


def _tensors(
    arch: gguf.MODEL_ARCH, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(arch, layers)
    for name, values in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        yield new, _changed(config, name, values)
    yield from _frequencies(config)


def _changed(config: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    family = config["model_type"]
    if family in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    conv1d = (".attn.c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return np.ascontiguousarray(values.T) if family == "gpt2" and name.endswith(conv1d) else values


def _frequencies(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    rope = _rope(config)
    if "long_factor" in rope:
        yield "rope_factors_long.weight", np.asarray(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.asarray(rope["short_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        yield "rope_freqs.weight", llama3_divisors(dim, rope)


def llama3_divisors(dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """By what Llama 3 divides each frequency, computed in float32 as the converter does."""
    frequencies = np.float32(1) / np.float32(rope["rope_theta"]) ** (
        np.arange(0, dim, 2, dtype=np.float32) / dim
    )
    low, high, original = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    found = []
    for wavelength in 2 * math.pi / frequencies:
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(rope["factor"])
        else:
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(found, np.float32)


def write_gguf_adapter(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    alpha: float = 8.0,
    metadata: Mapping[str, Any] | None = None,
    edit: Any = None,
) -> Path:
    """Writes a LoRA adapter as llama.cpp's convert_lora_to_gguf.py does.

    Args:
      path: of the file.
      config: the `config.json` of its model.
      tensors: the factors, by PEFT's names.
      alpha: `adapter.lora.alpha`.
      metadata: more keys, or other values; None leaves a key out.
      edit: changes the dictionary of tensors that is to be written.
    """
    arch = _ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config.get("num_hidden_layers") or config["n_layer"])
    written = {}
    for name, values in tensors.items():
        module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        letter = factor.removeprefix("embedding_")[0].lower()
        base = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert base is not None, name
        if letter == "b" and config["model_type"] != "gpt2":
            values = _changed(config, f"{module}.weight", values)
        if factor.startswith("embedding_A"):
            values = values.T
        written[f"{base}.lora_{letter}"] = np.ascontiguousarray(values)
    if edit is not None:
        edit(written)
    keys = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        **(metadata or {}),
    }
    write_gguf_file(path, gguf.MODEL_ARCH_NAMES[arch], keys, written)
    return path
