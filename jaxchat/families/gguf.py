"""GGUF models as data: their metadata as a Hugging Face `config.json`, and where our parameters are in them.

A row of `ARCHITECTURES` for each `general.architecture` that is read, with what the name implies and no key
says. Sources: llama.cpp's conversion/*.py and src/models/*.cpp. The file format is in `checkpoints/`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.config import (
    EMBED,
    FINAL_NORM,
    HEAD,
    LAYERS,
    MAX_LAYERS,
    ModelConfig,
    Param,
    RopeConfig,
    size_of,
)
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families.rope import KINDS
from jaxchat.typed import INT32, Count, Finite, checked
from jaxchat.visible import shown

_ADVICE = "take another file of the model, or convert it again"


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds, as far as a configuration needs it.

    Attributes:
      metadata: its keys and values.
      shapes: the shape of each tensor, the slowest dimension first.
      values: the numbers of a tensor by its name; of small ones only is it asked.
      where: names the file in messages.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    values: Callable[[str], np.ndarray]
    where: str


class _Keys:
    """The keys of an architecture, read type by type; errors name the file and the key."""

    def __init__(self, model: GgufModel):
        self.model, self.prefix = model, str(model.metadata.get("general.architecture"))
        self._read: set[str] = set()

    def at(self, key: str) -> str:
        """Names a key in messages."""
        return f"{self.model.where}: {self.prefix}.{key}"

    def get(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        self._read.add(key)
        return self.model.metadata.get(f"{self.prefix}.{key}")

    def _uniform(self, key: str) -> Any:
        """A value; of a list with one for each layer the one that all have."""
        found = self.get(key)
        if not isinstance(found, list):
            return found
        if any(other != found[0] for other in found) or not found:
            raise UsageError(
                f"{self.at(key)} is {shown(found)}: layers that differ in it are not supported for this "
                "architecture"
            )
        return found[0]

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = INT32) -> int:
        """A whole number; without a default the key must be there."""
        found = self._uniform(key)
        if found is None:
            if default is not None:
                return default
            vocabulary = "" if self.model.shapes else " (the file has no tensors: a vocabulary?)"
            raise JaxchatError(f"{self.at(key)} is missing{vocabulary}; {_ADVICE}")
        found = checked(found, Count, where=self.at(key), advice=_ADVICE)
        if not low <= found <= high:
            raise JaxchatError(f"{self.at(key)} is {found}; expected {low} to {high}; {_ADVICE}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, with no more digits than its float32 has: 1e-05, and not 9.99999974e-06."""
        found = self._uniform(key)
        if found is None and default is not None:
            return default
        if found is None:
            raise JaxchatError(f"{self.at(key)} is missing; {_ADVICE}")
        value = float(checked(found, Finite, where=self.at(key), advice=_ADVICE))
        return float(str(np.float32(value))) if float(np.float32(value)) == value else value

    def text(self, key: str, default: str) -> str:
        """A text."""
        found = self.get(key)
        return default if found is None else checked(found, str, where=self.at(key), advice=_ADVICE)

    def refuse_others(self) -> None:
        """Refuses what would change the model and was not read: see `_NEUTRAL`."""
        for key, neutral in _NEUTRAL.items():
            found = self.model.metadata.get(f"{self.prefix}.{key}")
            if key not in self._read and found is not None and found not in neutral:
                raise UsageError(
                    f"{self.at(key)} is {shown(found)}, which is not supported for this architecture"
                )


_OFF = (0, False)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": _OFF,
    "attention.scale": _OFF,
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": _OFF,
    "attention.clamp_kqv": _OFF,
    "attention.max_alibi_bias": _OFF,
    "attention.causal": (True,),
    "attention.shared_kv_layers": _OFF,
    "attention.key_length_swa": (),
    "attention.value_length_swa": (),
    "attention.q_lora_rank": _OFF,
    "attention.kv_lora_rank": _OFF,
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    "router_logit_softcapping": _OFF,
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "embedding_length_per_layer_input": _OFF,
    "pooling_type": _OFF,
    "use_parallel_residual": _OFF,
    "nextn_predict_layers": _OFF,
    "rope.dimension_sections": ([0, 0, 0, 0], []),
    "rope.freq_base_swa": (),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": _OFF,
    "rope.scaling.alpha": _OFF,
    "rope.scaling.attn_factor": (0, 1),
    "ssm.inner_size": _OFF,
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that change a model -> the values with which they do not. An architecture may read them itself."""


# --- the configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A `general.architecture`.

    Attributes:
      name: as files have it.
      config: its keys as those of a Hugging Face configuration, without what they share.
      model_type: the Hugging Face `model_type`; `config` may give another.
      class_name: transformers' class, for `architectures`.
      permuted: the rows of each query and key head are stored in pairs of what is rotated together, and not
        in two halves as in Hugging Face's layout.
      norm_offset: what is added to the stored norms.
      is_tied: an output head that equals the embedding is a copy of it.
    """

    name: str
    config: Callable[[_Keys], dict[str, Any]]
    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: float = 0.0
    is_tied: bool = False


def architecture_of(model: GgufModel) -> Architecture:
    """The architecture of a model.

    Raises:
      JaxchatError: the file is no model but an adapter, say.
      UsageError: the architecture is not supported (the message lists those that are).
    """
    name, kind = (model.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    for what in (name, kind):
        if isinstance(what, str) and what in _NO_MODELS:
            raise JaxchatError(f"{model.where}: {_NO_MODELS[what]}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UsageError(
            f"{model.where}: general.architecture is {shown(name)}, which is not supported; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


_NO_MODELS: Mapping[str, str] = {
    "adapter": "an adapter (LoRA) and not a model; give the model that it was made for",
    "mmproj": "the part of a model that reads images or sound; give the file of the language model",
    "clip": "the part of a model that reads images or sound; give the file of the language model",
    "imatrix": "an importance matrix, which is for quantizing; give the file of the model",
    "controlvector": "a control vector and not a model; give the file of the model",
}
"""`general.type` or `general.architecture` of what a GGUF file may be besides a model -> what to say."""


def hugging_face_config(model: GgufModel) -> dict[str, Any]:
    """The `config.json` of a model in Hugging Face's layout.

    Whether the head is tied is said as far as names tell: a head that is a copy counts as its own.

    Raises:
      JaxchatError: a key is missing or impossible.
      UsageError: something about the model is not supported; the message names the key.
    """
    architecture = architecture_of(model)
    keys = _Keys(model)
    values = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        **architecture.config(keys),
        "vocab_size": _vocab_size(keys),
        "tie_word_embeddings": _HEAD not in model.shapes if model.shapes else architecture.is_tied,
        **_special_ids(model),
    }
    keys.refuse_others()
    return values


_EMBED, _HEAD, _FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def _vocab_size(keys: _Keys) -> int:
    """That of the embedding; where there is none, as stated, or else of the list of tokens."""
    stated = keys.integer("vocab_size", 0, low=0)
    if (shape := keys.model.shapes.get(_EMBED)) is not None:
        return shape[0]
    tokens = keys.model.metadata.get("tokenizer.ggml.tokens")
    return stated or (len(tokens) if isinstance(tokens, list) else 0) or keys.integer("vocab_size")


def _heads(keys: _Keys) -> dict[str, int]:
    """The sizes of the attention, and which there must be."""
    heads, width = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", max(1, width // heads))
    if (value := keys.integer("attention.value_length", head_dim)) != head_dim:
        raise UsageError(
            f"{keys.at('attention.value_length')} is {value} and attention.key_length {head_dim}: heads "
            "whose values have another size than their keys are not supported"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _decoder(keys: _Keys, *, theta: float = 10000.0, **implied: Any) -> dict[str, Any]:
    """What Llama and its like share; `implied` is what an architecture's name says."""
    heads = _heads(keys)
    values = {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", high=MAX_LAYERS),
        **heads,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", theta),
        **implied,
    }
    rotated = keys.integer("rope.dimension_count", heads["head_dim"])
    if "partial_rotary_factor" in implied:
        values["partial_rotary_factor"] = rotated / heads["head_dim"]
    elif rotated != heads["head_dim"]:
        raise UsageError(
            f"{keys.at('rope.dimension_count')} is {rotated}, of heads of {heads['head_dim']}: heads that "
            "are rotated in part are not supported for this architecture"
        )
    if scaling := _rope_scaling(keys, values["rope_theta"], rotated, values["max_position_embeddings"]):
        values["rope_scaling"] = scaling
    return values


def _llama(keys: _Keys) -> dict[str, Any]:
    """Also Mistral: with a window, which its maker applies, and llama.cpp not to this architecture."""
    if window := keys.integer("attention.sliding_window", 0, low=0):
        return {**_mistral(keys), "sliding_window": window, "architectures": ["MistralForCausalLM"]}
    mlp = _have_biases(keys, "ffn_up", "ffn_down")
    return _decoder(keys, hidden_act="silu", attention_bias=_have_biases(keys, *_ATTENTION), mlp_bias=mlp)


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")


def _have_biases(keys: _Keys, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in keys.model.shapes for name in names)


def _mistral(keys: _Keys) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window", 0, low=0) or None
    values = _decoder(keys, model_type="mistral", hidden_act="silu", sliding_window=window)
    return values | _layer_types(keys, values, None)


def _qwen2(keys: _Keys) -> dict[str, Any]:
    keys.get("attention.sliding_window")  # of what `use_sliding_window` leaves off
    return _decoder(keys, hidden_act="silu", use_sliding_window=False)


def _qwen3(keys: _Keys) -> dict[str, Any]:
    return {**_qwen2(keys), "attention_bias": _have_biases(keys, *_ATTENTION)}


def _gemma(keys: _Keys, **implied: Any) -> dict[str, Any]:
    gelu, bias = "gelu_pytorch_tanh", _have_biases(keys, *_ATTENTION)
    return _decoder(keys, hidden_act=gelu, hidden_activation=gelu, attention_bias=bias, **implied)


def _gemma2(keys: _Keys) -> dict[str, Any]:
    values = _gemma(
        keys,
        sliding_window=keys.integer("attention.sliding_window", 4096),
        attn_logit_softcapping=keys.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=keys.number("final_logit_softcapping", 30.0),
    )
    return values | _gemma_scale(values, big=46) | _layer_types(keys, values, 2)


def _gemma3(keys: _Keys) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window", 0, low=0) or None
    values = _gemma(
        keys,
        theta=1e6,
        rope_local_base_freq=keys.number("rope.freq_base_swa", 10000.0),
        sliding_window=window,
        final_logit_softcapping=keys.number("final_logit_softcapping", 0.0) or None,
    )
    return values | _gemma_scale(values, big=62) | _layer_types(keys, values, 6 if window else 1)


def _gemma_scale(values: Mapping[str, Any], *, big: int) -> dict[str, Any]:
    """The model of 27B is told by its number of layers, as in llama.cpp: an even share of the width."""
    share = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": share if values["num_hidden_layers"] == big else values["head_dim"]}


def _phi3(keys: _Keys) -> dict[str, Any]:
    context = keys.integer("context_length")
    return {
        **_decoder(keys, hidden_act="silu", partial_rotary_factor=1.0),
        "sliding_window": keys.integer("attention.sliding_window", 0, low=0) or None,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
    }


def _gpt2(keys: _Keys) -> dict[str, Any]:
    heads = _heads(keys)
    if heads["num_key_value_heads"] != heads["num_attention_heads"]:
        raise JaxchatError(
            f"{keys.at('attention.head_count_kv')} is {heads['num_key_value_heads']}; expected as many as "
            f"attention.head_count, {heads['num_attention_heads']}; {_ADVICE}"
        )
    return {
        "n_embd": keys.integer("embedding_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "n_layer": keys.integer("block_count", high=MAX_LAYERS),
        "n_head": heads["num_attention_heads"],
        "n_positions": keys.integer("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _layer_types(keys: _Keys, values: Mapping[str, Any], period: int | None) -> dict[str, list[str]]:
    """Which layers have the window: as the file says, or else all but each `period`th."""
    found, count = keys.get("attention.sliding_window_pattern"), values["num_hidden_layers"]
    if isinstance(found, list):
        local = checked(found, list[bool], where=keys.at("attention.sliding_window_pattern"), advice=_ADVICE)
        if len(local) != count:
            raise JaxchatError(
                f"{keys.at('attention.sliding_window_pattern')} has {len(local)} entries for {count} layers; "
                f"{_ADVICE}"
            )
    elif found is None and period is None:
        return {}
    else:
        period = keys.integer("attention.sliding_window_pattern", period)
        local = [bool((layer + 1) % period) for layer in range(count)]
    return {"layer_types": [f"{'sliding' if is_local else 'full'}_attention" for is_local in local]}


ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="llama", config=_llama, model_type="llama", class_name="LlamaForCausalLM", permuted=True
        ),
        Architecture(
            name="mistral3",
            config=_mistral,
            model_type="mistral",
            class_name="MistralForCausalLM",
            permuted=True,
        ),
        Architecture(name="qwen2", config=_qwen2, model_type="qwen2", class_name="Qwen2ForCausalLM"),
        Architecture(name="qwen3", config=_qwen3, model_type="qwen3", class_name="Qwen3ForCausalLM"),
        Architecture(
            name="gemma",
            config=_gemma,
            model_type="gemma",
            class_name="GemmaForCausalLM",
            norm_offset=1.0,
            is_tied=True,
        ),
        Architecture(
            name="gemma2",
            config=_gemma2,
            model_type="gemma2",
            class_name="Gemma2ForCausalLM",
            norm_offset=1.0,
            is_tied=True,
        ),
        Architecture(
            name="gemma3",
            config=_gemma3,
            model_type="gemma3_text",
            class_name="Gemma3ForCausalLM",
            norm_offset=1.0,
            is_tied=True,
        ),
        Architecture(name="phi3", config=_phi3, model_type="phi3", class_name="Phi3ForCausalLM"),
        Architecture(
            name="gpt2", config=_gpt2, model_type="gpt2", class_name="GPT2LMHeadModel", is_tied=True
        ),
    )
}
"""`general.architecture` -> what it is."""


# --- rotary embeddings


def _rope_scaling(keys: _Keys, theta: float, dim: int, context: int) -> dict[str, Any]:
    """`rope_scaling`; empty where nothing is scaled."""
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    divisors = _factors(keys, _FREQUENCIES, dim)
    if divisors is not None and set(divisors) != {1.0}:
        if kind == "yarn":
            raise UsageError(
                f"{keys.at('rope.scaling.type')} is 'yarn', beside {_FREQUENCIES}: not supported"
            )
        if kind == "linear":
            divisors = tuple(divisor * factor for divisor in divisors)
        return _divided(divisors, theta, dim, context)
    if _LONG in keys.model.shapes or kind == "longrope":
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


def _factors(keys: _Keys, name: str, dim: int) -> tuple[float, ...] | None:
    """One number for each frequency, of a tensor; None where it is not there."""
    shape = keys.model.shapes.get(name)
    if shape is None:
        return None
    if shape != (dim // 2,):
        raise JaxchatError(
            f"{keys.model.where}: tensor {name} has the shape {list(shape)}; expected [{dim // 2}], half of "
            f"the {dim} rotated dimensions; {_ADVICE}"
        )
    found = keys.model.values(name).astype(np.float32)
    if not (np.isfinite(found) & (found > 0)).all():
        raise JaxchatError(f"{keys.model.where}: tensor {name} has numbers that are not above 0; {_ADVICE}")
    return tuple(float(str(value)) for value in found)


def _longrope(keys: _Keys, dim: int, context: int) -> dict[str, Any]:
    long, short = (_factors(keys, name, dim) for name in (_LONG, _SHORT))
    if long is None or short is None:
        missing = _LONG if long is None else _SHORT
        raise JaxchatError(f"{keys.model.where}: tensor {missing} is missing; {_ADVICE}")
    attention = keys.number("rope.scaling.attn_factor", 0.0)
    return {
        "rope_type": "longrope",
        "long_factor": list(long),
        "short_factor": list(short),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
        **({"attention_factor": attention} if attention else {}),
    }


def _yarn(keys: _Keys, factor: float, context: int) -> dict[str, Any]:
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
    wanted = np.asarray(divisors)
    for original in (8192, *(1 << bits for bits in range(5, 18))):
        rope = RopeConfig(
            kind="llama3", theta=theta, dim=dim, factor=max(divisors), original_max_position=original
        )
        default = KINDS["default"].frequencies(rope, None)
        if np.allclose(default / KINDS["llama3"].frequencies(rope, None), wanted, rtol=2e-5, atol=0):
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


# --- special tokens

_ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "< EOT >", "_<EOT>", "[EOT]", "<EOT>",
    "<｜end▁of▁sentence｜>", "<eos>",
})  # fmt: skip
"""Special tokens that end a text whatever a file says, as llama.cpp has them (llama-vocab.cpp)."""
_MARKED = (3, 4)  # control and user-defined, of `tokenizer.ggml.token_type`


def _special_ids(model: GgufModel) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id`; those of no token (-1, say) are left out."""
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    defaults = {"bos": 1, "eos": 2} if model.metadata.get("tokenizer.ggml.model") == "llama" else {}

    def token(name: str) -> int | None:
        found = model.metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        return found if type(found) is int and 0 <= found < len(tokens) else None

    types = model.metadata.get("tokenizer.ggml.token_type")
    marked = types if isinstance(types, list) and len(types) == len(tokens) else []
    ends = [
        number
        for number, (text, kind) in enumerate(zip(tokens, marked, strict=False))
        if kind in _MARKED and text in _ENDS
    ]
    eos = [found for name in ("eos", "eot", "eom") if (found := token(name)) is not None]
    ids = list(dict.fromkeys((*eos, *ends)))
    return {"bos_token_id": token("bos"), "eos_token_id": ids[0] if len(ids) == 1 else ids or None}


# --- the parameters

_STEMS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
"""What is in a layer, by our name and by GGUF's, which all architectures share."""
_GLOBAL: Mapping[str, str] = {
    EMBED: _EMBED,
    "positions.weight": "position_embd.weight",
    FINAL_NORM: "output_norm.weight",
    "norm.bias": "output_norm.bias",
    HEAD: _HEAD,
}
_QKV, _GATE_UP = ("N*H", "K*H", "K*H"), ("F", "F")
_FUSED: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "q": ("attn_qkv", 0, _QKV),
    "k": ("attn_qkv", 1, _QKV),
    "v": ("attn_qkv", 2, _QKV),
    "gate": ("ffn_up", 0, _GATE_UP),
    "up": ("ffn_up", 1, _GATE_UP),
}
"""Where a parameter is that has no tensor of its own: a part of another, and the sizes of all its parts."""

BUFFERS = frozenset({_FREQUENCIES, _LONG, _SHORT})
"""Tensors that are read with the configuration."""


class Place(NamedTuple):
    """Where a parameter of one layer is.

    Attributes:
      tensor: its name in the file.
      shape: of that tensor.
      rows: those of the parameter, first and last plus one; None is all.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None


def place_of(param: Param, index: int, config: ModelConfig, tensors: Mapping[str, Any]) -> Place:
    """Where a parameter is in a file that has these tensors, whose names only are looked at.

    Args:
      param: of the family's table.
      index: the layer.
      config: of the model.
      tensors: by name.
    """
    shape = param.layer_shape(config)
    if not param.per_layer:
        return Place(_GLOBAL[param.name], shape, None)
    stem, _, kind = param.layer_name.rpartition(".")
    own = f"blk.{index}.{_STEMS[stem]}.{kind}"
    gated = any(block.mlp == "gated" for block in config.blocks)
    if stem in ("gate", "up"):
        is_fused = gated and f"blk.{index}.ffn_gate.{kind}" not in tensors
    else:
        is_fused = stem in _FUSED and own not in tensors
    if not is_fused:
        return Place(own, shape, None)
    fused, part, parts = _FUSED[stem]
    name, sizes = f"blk.{index}.{fused}.{kind}", [size_of(term, config) for term in parts]
    if name not in tensors:
        return Place(own, shape, None)
    return Place(name, (sum(sizes), *shape[1:]), (sum(sizes[:part]), sum(sizes[: part + 1])))


def scale_of(tensor: str) -> str:
    """The tensor with the number by which another one's are multiplied, if the file has it (NVFP4)."""
    return f"{tensor.removesuffix('.weight')}.scale"


def input_scale_of(tensor: str) -> str:
    """The same of what the tensor is multiplied with, of which only kernels of few bits make use."""
    return f"{tensor.removesuffix('.weight')}.input_scale"


def permuted_heads(architecture: Architecture, param: Param, config: ModelConfig) -> int:
    """How many heads have their rows in pairs, to be put in order by `unpermuted`; 0 is none."""
    heads = {f"{LAYERS}q": config.num_heads, f"{LAYERS}k": config.num_kv_heads}
    return heads.get(param.name.rpartition(".")[0], 0) if architecture.permuted else 0


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] in halves: row 2 i + half of each head becomes row half * H/2 + i of it."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
