"""A model as GGUF: the keys, tensors of factors and names of tensors that say what its configuration says.

The inverse of `gguf.py` and `gguf_tensors.py`, a row of `EXPORTS` for each family. What is written is read
back and compared, so that what GGUF cannot say is an error and not another model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxchat.config import GLOBAL_WINDOW, ModelConfig, Param, RopeConfig
from jaxchat.errors import UsageError
from jaxchat.families import read_config
from jaxchat.families.gguf import ARCHITECTURES, Architecture, hugging_face_config
from jaxchat.families.gguf_keys import GgufModel
from jaxchat.families.gguf_rope import FREQUENCIES, LONG, SHORT
from jaxchat.families.gguf_tensors import place_of
from jaxchat.families.rope import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """How models of a family are written.

    Attributes:
      architecture: `general.architecture`.
      keys: of its own, beside those that all have.
      fused: tensors of a layer that hold several parameters, one below the other: those that llama.cpp wants.
      theta: whether the base of the rotary embedding is a key.
      period: what llama.cpp takes for granted of the layers that have a window: all but each so many-th;
        0 is nothing.
    """

    architecture: str
    keys: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    theta: bool = True
    period: int = 0


@dataclasses.dataclass(frozen=True)
class GgufDescription:
    """What is written of a model beside its weights.

    Attributes:
      architecture: as it is read.
      metadata: keys and values, without those of the tokenizer.
      factors: tensors of numbers that are no parameters, by name.
      fused: see `Export`.
    """

    architecture: Architecture
    metadata: dict[str, Any]
    factors: dict[str, np.ndarray]
    fused: Mapping[str, tuple[str, ...]]


def described(config: ModelConfig, table: tuple[Param, ...], *, name: str, where: str) -> GgufDescription:
    """The keys and factors of a model.

    Args:
      config: of it.
      table: its parameters.
      name: what it is called.
      where: names its source in messages.

    Raises:
      UsageError: GGUF has no such architecture, or cannot say something about the model; names it.
    """
    export = EXPORTS.get(config.model_type)
    if export is None:
        raise UsageError(
            f"{where}: models of the type {config.model_type} have no form in GGUF here; there are "
            f"{', '.join(EXPORTS)}"
        )
    keys = {**_common(config), **(_rope_keys(config, export) if config.ropes else {}), **_windows(config)}
    keys |= export.keys(config)
    metadata = {f"{export.architecture}.{key}": value for key, value in keys.items() if value is not None}
    metadata = {"general.architecture": export.architecture, "general.name": name, **metadata}
    factors = _factors(config)
    _check_windows(config, export, where)
    _compare(config, table, metadata, factors, where)
    return GgufDescription(ARCHITECTURES[export.architecture], metadata, factors, export.fused)


def names_of(config: ModelConfig, table: tuple[Param, ...]) -> frozenset[str]:
    """The tensors of a model, as llama.cpp has them for its architecture, which is one of `EXPORTS`."""
    fused = {part: name for name, parts in EXPORTS[config.model_type].fused.items() for part in parts}
    names = set()
    for param in table:
        stem, _, kind = param.layer_name.rpartition(".")
        for layer in range(param.rows(config)):
            own = place_of(param, layer, config, {}).tensor
            names.add(f"blk.{layer}.{fused[stem]}.{kind}" if param.per_layer and stem in fused else own)
    return frozenset(names)


def _common(config: ModelConfig) -> dict[str, Any]:
    eps = "layer_norm_rms_epsilon" if config.norm == "rmsnorm" else "layer_norm_epsilon"
    return {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        f"attention.{eps}": float(config.norm_eps),
        "vocab_size": config.vocab_size,
    }


def _rope_keys(config: ModelConfig, export: Export) -> dict[str, Any]:
    rope = config.ropes[0]
    keys: dict[str, Any] = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": rope.dim,
        "rope.freq_base": float(rope.theta) if export.theta else None,
    }
    return keys | _SCALINGS.get(rope.kind, lambda rope: {})(rope)


def _yarn_keys(rope: RopeConfig) -> dict[str, Any]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_max_position,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }


_SCALINGS: Mapping[str, Callable[[RopeConfig], dict[str, Any]]] = {
    "linear": lambda rope: {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)},
    "yarn": _yarn_keys,
    "longrope": lambda rope: {
        "rope.scaling.original_context_length": rope.original_max_position,
        "rope.scaling.attn_factor": float(rope.attention_factor),
    },
}
"""Kind of rotary embedding -> its keys; Llama 3's is a tensor."""


def _factors(config: ModelConfig) -> dict[str, np.ndarray]:
    rope = config.ropes[0] if config.ropes else None
    if rope is not None and rope.kind == "longrope":
        return {
            LONG: np.asarray(rope.long_factor, np.float32),
            SHORT: np.asarray(rope.short_factor, np.float32),
        }
    if rope is not None and rope.kind == "llama3":
        divided, whole = (KINDS[kind].frequencies(rope, None) for kind in ("llama3", "default"))
        return {FREQUENCIES: np.asarray(whole / divided, np.float32)}
    return {}


def _windows(config: ModelConfig) -> dict[str, Any]:
    window = max(config.layer_windows, default=GLOBAL_WINDOW)
    return {"attention.sliding_window": window} if window != GLOBAL_WINDOW else {}


def _check_windows(config: ModelConfig, export: Export, where: str) -> None:
    """Refuses layers in another order of windows than the architecture's name says: no key would be read."""
    local = [window != GLOBAL_WINDOW for window in config.layer_windows]
    if export.period > 1 and local != [bool((i + 1) % export.period) for i in range(len(local))]:
        raise UsageError(
            f"{where}: in GGUF the layers of {export.architecture} have a sliding window, all but each "
            f"{export.period}th; these layers are in another order, so give --to_hf instead"
        )


def _gemma2(config: ModelConfig) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": float(config.block.softcap),
        "final_logit_softcapping": float(config.final_softcap),
    }


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    cap = float(config.final_softcap) or None
    local = float(config.ropes[-1].theta) if any(config.layer_windows) else None
    return {"final_logit_softcapping": cap, "rope.freq_base_swa": local}


def _phi3(config: ModelConfig) -> dict[str, Any]:
    rope = config.ropes[0]
    original = rope.original_max_position or config.max_position_embeddings
    window = max(config.layer_windows, default=GLOBAL_WINDOW)
    return {"rope.scaling.original_context_length": original, "attention.sliding_window": window}


_QKV = {"attn_qkv": ("q", "k", "v")}
EXPORTS: Mapping[str, Export] = {
    "llama": Export(architecture="llama"),
    "mistral": Export(architecture="llama"),
    "qwen2": Export(architecture="qwen2"),
    "qwen3": Export(architecture="qwen3"),
    "gemma": Export(architecture="gemma"),
    "gemma2": Export(architecture="gemma2", keys=_gemma2, period=2),
    "gemma3_text": Export(architecture="gemma3", keys=_gemma3, period=6),
    "gemma3": Export(architecture="gemma3", keys=_gemma3, period=6),
    "phi3": Export(architecture="phi3", keys=_phi3, fused={**_QKV, "ffn_up": ("gate", "up")}),
    "gpt2": Export(architecture="gpt2", fused=_QKV),
}
"""Hugging Face `model_type` -> how it is written."""


def _compare(
    config: ModelConfig,
    table: tuple[Param, ...],
    metadata: dict[str, Any],
    factors: dict[str, np.ndarray],
    where: str,
) -> None:
    """Reads back what was written of the configuration.

    Raises:
      UsageError: it is another model; the message has the first field.
    """
    shapes = {name: values.shape for name, values in factors.items()}
    for param in table:
        for layer in range(param.rows(config)):
            found = place_of(param, layer, config, {})
            shapes[found.tensor] = found.shape
    narrowed = {key: float(np.float32(v)) if type(v) is float else v for key, v in metadata.items()}
    model = GgufModel(narrowed, shapes, lambda name: factors[name], where)
    again = read_config(hugging_face_config(model), source=where)
    for field in dataclasses.fields(ModelConfig):
        said, meant = getattr(again, field.name), getattr(config, field.name)
        if field.name not in _UNSAID and not _alike(said, meant):
            raise UsageError(
                f"{where}: GGUF cannot say this of a model of the type {config.model_type}: {field.name} "
                f"would be {said!r}, not {meant!r}; give --to_hf instead"
            )


_UNSAID = ("model_type", "family", "bos_id", "eos_ids", "max_position_embeddings")
"""Told by the architecture, or by the tokenizer."""


def _alike(said: Any, meant: Any) -> bool:
    """Whether two values are the same, numbers to the digits that float32 has."""
    if dataclasses.is_dataclass(said) and dataclasses.is_dataclass(meant):
        names = [field.name for field in dataclasses.fields(said)]
        return all(_alike(getattr(said, name), getattr(meant, name)) for name in names)
    if isinstance(said, tuple) and isinstance(meant, tuple):
        return len(said) == len(meant) and all(map(_alike, said, meant))
    if isinstance(said, float) or isinstance(meant, float):
        return bool(np.isclose(said, meant, rtol=2e-6, atol=0))
    return bool(said == meant)
