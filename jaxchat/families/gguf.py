"""GGUF architectures as data: what a model's keys, and its architecture's name, say as a `config.json`.

A row of `ARCHITECTURES` for each `general.architecture` that is read, with what the name implies and no key
says. Sources: llama.cpp's conversion/*.py and src/models/*.cpp. Where the parameters are is in
`gguf_tensors.py`, the file format in `checkpoints/`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.config import MAX_LAYERS
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families.gguf_keys import ADVICE, GgufModel, Keys
from jaxchat.families.gguf_rope import rope_scaling
from jaxchat.families.gguf_tensors import EMBEDDING, OUTPUT
from jaxchat.typed import checked
from jaxchat.visible import shown


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
    config: Callable[[Keys], dict[str, Any]]
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
    keys = Keys(model)
    values = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        **architecture.config(keys),
        "vocab_size": _vocab_size(keys),
        "tie_word_embeddings": OUTPUT not in model.shapes if model.shapes else architecture.is_tied,
        **_special_ids(model),
    }
    keys.refuse_others()
    return values


def _vocab_size(keys: Keys) -> int:
    """That of the embedding; where there is none, as stated, or else of the list of tokens."""
    stated = keys.integer("vocab_size", 0, low=0)
    if (shape := keys.model.shapes.get(EMBEDDING)) is not None:
        return shape[0]
    tokens = keys.model.metadata.get("tokenizer.ggml.tokens")
    return stated or (len(tokens) if isinstance(tokens, list) else 0) or keys.integer("vocab_size")


def _heads(keys: Keys) -> dict[str, int]:
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


def _decoder(keys: Keys, *, theta: float = 10000.0, **implied: Any) -> dict[str, Any]:
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
    if scaling := rope_scaling(keys, values["rope_theta"], rotated, values["max_position_embeddings"]):
        values["rope_scaling"] = scaling
    return values


def _llama(keys: Keys) -> dict[str, Any]:
    """Also Mistral: with a window, which its maker applies, and llama.cpp not to this architecture."""
    if window := keys.integer("attention.sliding_window", 0, low=0):
        return {**_mistral(keys), "sliding_window": window, "architectures": ["MistralForCausalLM"]}
    mlp = _have_biases(keys, "ffn_up", "ffn_down")
    return _decoder(keys, hidden_act="silu", attention_bias=_have_biases(keys, *_ATTENTION), mlp_bias=mlp)


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")


def _have_biases(keys: Keys, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in keys.model.shapes for name in names)


def _mistral(keys: Keys) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window", 0, low=0) or None
    values = _decoder(keys, model_type="mistral", hidden_act="silu", sliding_window=window)
    return values | _layer_types(keys, values, None)


def _qwen2(keys: Keys) -> dict[str, Any]:
    keys.get("attention.sliding_window")  # of what `use_sliding_window` leaves off
    return _decoder(keys, hidden_act="silu", use_sliding_window=False)


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {**_qwen2(keys), "attention_bias": _have_biases(keys, *_ATTENTION)}


def _gemma(keys: Keys, **implied: Any) -> dict[str, Any]:
    gelu, bias = "gelu_pytorch_tanh", _have_biases(keys, *_ATTENTION)
    return _decoder(keys, hidden_act=gelu, hidden_activation=gelu, attention_bias=bias, **implied)


def _gemma2(keys: Keys) -> dict[str, Any]:
    values = _gemma(
        keys,
        sliding_window=keys.integer("attention.sliding_window", 4096),
        attn_logit_softcapping=keys.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=keys.number("final_logit_softcapping", 30.0),
    )
    return values | _gemma_scale(values, big=46) | _layer_types(keys, values, 2)


def _gemma3(keys: Keys) -> dict[str, Any]:
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


def _phi3(keys: Keys) -> dict[str, Any]:
    context = keys.integer("context_length")
    return {
        **_decoder(keys, hidden_act="silu", partial_rotary_factor=1.0),
        "sliding_window": keys.integer("attention.sliding_window", 0, low=0) or None,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    heads = _heads(keys)
    if heads["num_key_value_heads"] != heads["num_attention_heads"]:
        raise JaxchatError(
            f"{keys.at('attention.head_count_kv')} is {heads['num_key_value_heads']}; expected as many as "
            f"attention.head_count, {heads['num_attention_heads']}; {ADVICE}"
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


def _layer_types(keys: Keys, values: Mapping[str, Any], period: int | None) -> dict[str, list[str]]:
    """Which layers have the window: as the file says, or else all but each `period`th."""
    found, count = keys.get("attention.sliding_window_pattern"), values["num_hidden_layers"]
    if isinstance(found, list):
        local = checked(found, list[bool], where=keys.at("attention.sliding_window_pattern"), advice=ADVICE)
        if len(local) != count:
            raise JaxchatError(
                f"{keys.at('attention.sliding_window_pattern')} has {len(local)} entries for {count} layers; "
                f"{ADVICE}"
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
    limit = model.shapes.get(EMBEDDING, (len(tokens),))[0]
    defaults = {"bos": 1, "eos": 2} if model.metadata.get("tokenizer.ggml.model") == "llama" else {}

    def token(name: str) -> int | None:
        found = model.metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        return found if type(found) is int and 0 <= found < limit else None

    types = model.metadata.get("tokenizer.ggml.token_type")
    marked = types if isinstance(types, list) and len(types) == len(tokens) else []
    ends = [
        number
        for number, (text, kind) in enumerate(zip(tokens, marked, strict=False))
        if kind in _MARKED and isinstance(text, str) and text in _ENDS and number < limit
    ]
    eos = [found for name in ("eos", "eot", "eom") if (found := token(name)) is not None]
    ids = list(dict.fromkeys((*eos, *ends)))
    return {"bos_token_id": token("bos"), "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
