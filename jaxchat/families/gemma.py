"""Gemma 1, 2 and 3 (text): scaled embeddings, (1 + w) norms, soft-caps, post-norms, local/global layers."""

from collections.abc import Mapping
from typing import Any

from jaxchat.config import POST_NORMS, PRE_NORMS, Block, ModelConfig
from jaxchat.families.decoder import head_dim_of, llama_config, llama_params, windows_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.rope import read_rope
from jaxchat.families.tables import BARE, Family, relayer_types


def gemma1_config(hf: HfConfig) -> ModelConfig:
    """Reads a GemmaConfig. Its legacy `gelu` means the tanh approximation, as in transformers."""
    return _gemma(
        hf,
        "gemma",
        max_position=8192,
        block=Block(
            activation="gelu_tanh"
            if hf.values.get("hidden_act") == "gelu"
            else hf.activation("gelu_pytorch_tanh", "hidden_act")
        ),
    )


def gemma2_config(hf: HfConfig) -> ModelConfig:
    """Reads a Gemma2Config: every other layer, from the first, is local."""
    num_layers = hf.layers("num_hidden_layers")
    types = hf.layer_types(num_layers) or _pattern(num_layers, 2)
    return _gemma(
        hf,
        "gemma2",
        max_position=8192,
        block=Block(
            norms=PRE_NORMS + POST_NORMS,
            softcap=_cap(hf, "attn_logit_softcapping", 50.0),
            activation=_activation(hf),
        ),
        layer_windows=windows_of(types, hf.window(4096)),
        layer_attn_scales=(hf.positive("query_pre_attn_scalar", 256) ** -0.5,) * num_layers,
        final_softcap=_cap(hf, "final_logit_softcapping", 30.0),
    )


def gemma3_config(hf: HfConfig) -> ModelConfig:
    """Reads a Gemma3TextConfig, or the text half of a Gemma3Config."""
    text = hf.section("text_config")
    values = {**_GEMMA3_DEFAULTS, **_text_half(hf.values), "model_type": hf.values["model_type"]}
    hf = HfConfig(values, text.source if text else hf.source)
    num_layers = hf.layers("num_hidden_layers")
    types = hf.layer_types(num_layers) or _pattern(num_layers, hf.length("sliding_window_pattern", 6))
    head_dim, max_position = head_dim_of(hf), hf.length("max_position_embeddings", 131072)
    nested = hf.section("rope_parameters") or HfConfig({}, hf.at("rope_parameters"))
    ropes = tuple(
        read_rope(hf, parameters, theta=theta, head_dim=head_dim, max_position=max_position)
        for parameters, theta in (
            (
                _updated(nested.section("full_attention"), hf.section("rope_scaling")),
                hf.positive("rope_theta", 1e6),
            ),
            (nested.section("sliding_attention"), hf.positive("rope_local_base_freq", 10000.0)),
        )
    )
    return _gemma(
        hf,
        "gemma3",
        max_position=131072,
        rope=ropes[0],
        ropes=ropes,
        layer_ropes=tuple(int(t == "sliding_attention") for t in types),
        block=Block(norms=PRE_NORMS + POST_NORMS, qk_norm=True, activation=_activation(hf)),
        layer_windows=windows_of(types, hf.window(4096)),
        layer_attn_scales=(hf.positive("query_pre_attn_scalar", 256) ** -0.5,) * num_layers,
        final_softcap=_cap(hf, "final_logit_softcapping", 0.0),
    )


def _updated(parameters: HfConfig | None, scaling: HfConfig | None) -> HfConfig | None:
    """As in transformers, `rope_scaling` goes over the new parameters of the global layers, key by key."""
    if parameters is None or scaling is None:
        return parameters or scaling
    return HfConfig({**parameters.values, **scaling.values}, scaling.source)


_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""Of transformers' Gemma3TextConfig: the multimodal models' `text_config` states only what differs."""


def _text_half(values: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of a Gemma3Config, as a Gemma3TextConfig; of the latter, a copy."""
    text = values.get("text_config")
    if text is None:
        return dict(values)
    inherited = (
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
    )
    return {key: values[key] for key in inherited if key in values} | dict(text)


def _relayer_gemma3(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A text model: what an export holds of a multimodal one."""
    result = relayer_types(_text_half(values), config)
    if "text_config" in values:
        result |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return result


def _gemma(hf: HfConfig, family: str, *, max_position: int, **changes: Any) -> ModelConfig:
    hf.refuse("use_bidirectional_attention")
    bias = hf.flag("attention_bias", False)
    values: dict[str, Any] = {
        "head_dim": head_dim_of(hf, 256),
        "default_max_position": max_position,
        "norm_offset": 1.0,
        "embedding_scale": hf.integer("hidden_size") ** 0.5,
        "qkv_bias": bias,
        "o_bias": bias,
        "tied_embeddings": hf.flag("tie_word_embeddings", True),
    }
    return llama_config(hf, family=family, **{**values, **changes})


def _activation(hf: HfConfig) -> str:
    return hf.activation("gelu_pytorch_tanh", "hidden_activation")


def _pattern(num_layers: int, period: int) -> tuple[str, ...]:
    return tuple("sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers))


def _cap(hf: HfConfig, key: str, default: float) -> float:
    return hf.nonnegative(key, 0.0 if hf.has(key) else default)


# Multimodal checkpoints keep the text model below these names; their vision towers are not read.
_RENAMES = (
    ("", ""),
    BARE,
    ("", "language_model."),
    ("model.", "model.language_model."),
    ("model.", "language_model."),
)
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.")

FAMILIES = (
    Family("gemma", ("gemma",), gemma1_config, llama_params),
    Family("gemma2", ("gemma2",), gemma2_config, llama_params, relayer=relayer_types),
    Family(
        "gemma3",
        ("gemma3_text", "gemma3"),
        gemma3_config,
        llama_params,
        _RENAMES,
        _OTHER_TOWERS,
        _relayer_gemma3,
    ),
)
