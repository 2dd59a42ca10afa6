"""GGUF metadata as Hugging Face configurations: keys, what names imply, and what is refused."""

from collections.abc import Mapping
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxchat.config import ModelConfig
from jaxchat.errors import JaxchatError
from jaxchat.families import parameter_table, read_config
from jaxchat.families.gguf import ARCHITECTURES, architecture_of, hugging_face_config
from jaxchat.families.gguf_keys import NEUTRAL, GgufModel
from jaxchat.families.gguf_tensors import place_of, rotated_heads, unpermuted
from jaxchat.families.rope import KINDS
from tests.support.gguf_models import llama3_divisors

KEYS: dict[str, Any] = {
    "block_count": 12,
    "context_length": 4096,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "attention.layer_norm_epsilon": 9.999999747378752e-06,
}
TOKENS = ["<s>", "</s>", "a", "<|eot_id|>"]


def model(
    architecture: str = "llama",
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    **others: Any,
) -> GgufModel:
    """A file of 4 tokens; keys of None are absent, those with a point in front have no prefix."""
    keys = {**KEYS, **({"attention.head_count_kv": 4} if architecture == "gpt2" else {}), **(changes or {})}
    metadata = {"general.architecture": architecture, "tokenizer.ggml.tokens": TOKENS}
    metadata |= {k[1:] if k[0] == "." else f"{architecture}.{k}": v for k, v in keys.items() if v is not None}
    arrays = {"token_embd.weight": np.zeros((4, 64)), **(tensors or {})}
    shapes = {name: np.shape(values) for name, values in arrays.items()}
    return GgufModel(metadata | others, shapes, lambda name: np.asarray(arrays[name]), "m.gguf")


def config(*arguments: Any, **keywords: Any) -> ModelConfig:
    return read_config(hugging_face_config(model(*arguments, **keywords)), source="m.gguf")


def error_of(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(JaxchatError) as caught:
        config(*arguments, **keywords)
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what the name says and no key


def windows(pattern: str, window: int) -> tuple[int, ...]:
    """`LLG` -> window, window, 0, over twelve layers."""
    return tuple(window if letter == "L" else 0 for letter in (pattern * 12)[:12])


IMPLIED: dict[str, dict[str, Any]] = {
    "llama": {"activation": "silu", "model_type": "llama"},
    "mistral3": {"activation": "silu", "model_type": "mistral"},
    "qwen2": {"activation": "silu", "qkv_bias": True},
    "qwen3": {"activation": "silu", "qk_norm": True},
    "gemma": {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": 8.0,
        "layer_attn_scales": (32**-0.5,) * 12,
    },
    "gemma2": {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": 8.0,
        "softcap": 50.0,
        "final_softcap": 30.0,
        "layer_windows": windows("LG", 4096),
        "layer_attn_scales": (32**-0.5,) * 12,
    },
    "gemma3": {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": 8.0,
        "qk_norm": True,
        "final_softcap": 0.0,
        "layer_windows": windows("LLLLLG", 512),
        "layer_ropes": (1, 1, 1, 1, 1, 0) * 2,
        "layer_attn_scales": (32**-0.5,) * 12,
    },
    "phi3": {"activation": "silu"},
    "gpt2": {"activation": "gelu_tanh", "mlp": "plain", "learned_positions": True, "norm": "layernorm"},
}
WINDOW = {"gemma3": {"attention.sliding_window": 512}}
PERMUTED = ("llama", "mistral3")
SHIFTED = ("gemma", "gemma2", "gemma3")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architectures_name_implies(name: str):
    found = config(name, WINDOW.get(name))
    for field, expected in IMPLIED[name].items():
        holder = found if hasattr(found, field) else found.block
        assert getattr(holder, field) == expected, field
    if not WINDOW.get(name) and name != "gemma2":
        assert found.layer_windows == (0,) * 12
    assert found.norm_eps == 1e-5
    row = ARCHITECTURES[name]
    assert row.permuted is (name in PERMUTED)
    assert bool(row.norm_offset) is (name in SHIFTED)


def test_every_family_that_is_read_has_an_architecture():
    from jaxchat.families import FAMILIES

    families = {config(name, WINDOW.get(name)).family for name in ARCHITECTURES}
    assert families == {family.name for family in FAMILIES}


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_their_width(name: str, layers: int):
    changes = {"block_count": layers, **WINDOW.get(name, {})}
    assert config(name, changes).layer_attn_scales == (16**-0.5,) * layers
    assert config(name, {**changes, "block_count": layers - 1}).layer_attn_scales[0] == 32**-0.5


def test_only_queries_and_keys_are_rotated():
    found = config("llama", {"attention.head_count_kv": 2}, {"blk.0.attn_q.bias": np.zeros(128)})
    heads = {p.layer_name: rotated_heads(p, found) for p in parameter_table(found)}
    assert {name: count for name, count in heads.items() if count} == {
        "q.weight": 4,
        "q.bias": 4,
        "k.weight": 2,
        "k.bias": 2,
    }


def test_pairs_become_halves():
    rows = np.asarray([["a0", "b0", "a1", "b1", "a2", "b2"], ["c0", "d0", "c1", "d1", "c2", "d2"]]).reshape(
        12, 1
    )
    assert "".join(unpermuted(rows, 2)[:, 0]) == "a0a1a2b0b1b2c0c1c2d0d1d2"


# --- keys


@pytest.mark.parametrize(
    ("name", "changes", "field", "expected"),
    [
        ("llama", {"attention.head_count_kv": None}, "num_kv_heads", 4),
        ("llama", {"attention.key_length": None, "attention.value_length": None}, "head_dim", 16),
        ("llama", {"feed_forward_length": [96] * 12}, "intermediate_size", 96),
        ("llama", {"attention.sliding_window": 77}, "layer_windows", (77,) * 12),
        ("llama", {"attention.sliding_window": 77}, "model_type", "mistral"),
        ("mistral3", {"attention.sliding_window": 9}, "layer_windows", (9,) * 12),
        (
            "mistral3",
            {"attention.sliding_window": 9, "attention.sliding_window_pattern": [True, False, False] * 4},
            "layer_windows",
            windows("LGG", 9),
        ),
        ("gemma2", {"attention.sliding_window": 5}, "layer_windows", windows("LG", 5)),
        ("gemma2", {"attention.sliding_window_pattern": 3}, "layer_windows", windows("LLG", 4096)),
        ("gemma2", {"final_logit_softcapping": 7.5}, "final_softcap", 7.5),
        ("gemma3", {}, "layer_windows", (0,) * 12),
        ("phi3", {"attention.sliding_window": 2047}, "layer_windows", (2047,) * 12),
        ("phi3", {"attention.sliding_window": 0}, "layer_windows", (0,) * 12),
        ("qwen2", {"attention.sliding_window": 4096}, "layer_windows", (0,) * 12),
        ("llama", {"rope.dimension_sections": [0, 0, 0, 0], "expert_count": 0}, "num_layers", 12),
        ("llama", {"tensor_data_layout": "Meta AI original pth"}, "num_layers", 12),
    ],
)
def test_keys_are_read(name: str, changes: dict[str, Any], field: str, expected: Any):
    assert getattr(config(name, changes), field) == expected


def test_the_vocabulary_is_the_embeddings_or_stated_or_the_list_of_tokens():
    assert config(changes={"vocab_size": 9}).vocab_size == 4
    assert config(changes={"vocab_size": 9}, tensors={"token_embd.weight": np.zeros((8, 64))}).vocab_size == 8
    bare = model(changes={"vocab_size": 9})
    assert hugging_face_config(GgufModel(bare.metadata, {}, bare.values, "m"))["vocab_size"] == 9
    assert hugging_face_config(GgufModel(model().metadata, {}, bare.values, "m"))["vocab_size"] == 4


@pytest.mark.parametrize(
    ("ids", "bos", "eos"),
    [
        ({}, None, ()),
        ({"bos_token_id": 0, "eos_token_id": 1}, 0, (1,)),
        ({"bos_token_id": 4294967295, "eos_token_id": -1}, None, ()),
        ({"bos_token_id": 4, "eos_token_id": True}, None, ()),
        ({"eos_token_id": 1, "eot_token_id": 3, "eom_token_id": 1}, None, (1, 3)),
        ({"eos_token_id": 1, "token_type": [3, 3, 1, 3]}, None, (1, 3)),
        ({"eos_token_id": 1, "token_type": [3, 3, 1, 1]}, None, (1,)),
        ({"model": "llama", "eos_token_id": 3}, 1, (3,)),
        ({"eos_token_id": 1, "tokens": [[1], {}, 7, "<|im_end|>"], "token_type": [3] * 4}, None, (1, 3)),
    ],
)
def test_special_tokens_are_read(ids: dict[str, Any], bos: int | None, eos: tuple[int, ...]):
    found = config(changes={f".tokenizer.ggml.{key}": value for key, value in ids.items()})
    assert (found.bos_id, found.eos_ids) == (bos, eos)


# --- rotary embeddings


def frequencies(found: ModelConfig, length: int = 100) -> np.ndarray:
    (rope,) = found.ropes
    return np.asarray(KINDS[rope.kind].frequencies(rope, np.asarray([length])), np.float64).reshape(-1)


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}


@pytest.mark.parametrize("original", [8192, 64, 131072])
def test_llama_3s_divisors_become_its_parameters(original: int):
    parameters = {**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": original}
    divisors = llama3_divisors(32, parameters)
    found = config(changes={"rope.freq_base": 500000.0}, tensors={"rope_freqs.weight": divisors})
    expected = read_config(
        {**hugging_face_config(model()), "rope_theta": 500000.0, "rope_parameters": parameters}
    )
    assert found.ropes[0].kind == "llama3"
    assert np.array_equal(frequencies(found), frequencies(expected))


def test_any_other_divisors_divide_the_frequencies():
    divisors = np.linspace(1, 3, 16).astype(np.float32)
    found = config(tensors={"rope_freqs.weight": divisors})
    np.testing.assert_allclose(frequencies(found) * divisors, frequencies(config()), rtol=1e-6)
    np.testing.assert_allclose(frequencies(found, length=4096) * divisors, frequencies(config()), rtol=1e-6)
    assert found.ropes[0].attention_factor == 1.0
    assert config(tensors={"rope_freqs.weight": np.ones(16, np.float32)}).ropes == config().ropes


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none", "factor": 8.0}, {"kind": "default"}),
        ({"type": "linear", "factor": 8.0}, {"kind": "linear", "factor": 8.0}),
        ({"factor": 8.0}, {"kind": "linear", "factor": 8.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024, "yarn_beta_fast": 16.0},
            {
                "kind": "yarn",
                "factor": 4.0,
                "original_max_position": 1024,
                "beta_fast": 16.0,
                "beta_slow": 1.0,
            },
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024, "yarn_attn_factor": 0.75},
            {"attention_factor": 0.75},
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024, "yarn_log_multiplier": 1.0},
            {"attention_factor": 1.0},
        ),
    ],
)
def test_rope_scaling_is_read(keys: dict[str, Any], expected: dict[str, Any]):
    found = config("mistral3", {f"rope.scaling.{key}": value for key, value in keys.items()}).ropes[0]
    assert {field: getattr(found, field) for field in expected} == expected


def test_gemma_3_scales_its_global_layers_only():
    changes = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 5000.0}
    full, local = config("gemma3", {**changes, **WINDOW["gemma3"]}).ropes
    assert (full.kind, full.factor, full.theta) == ("linear", 8.0, 1e6)
    assert (local.kind, local.theta) == ("default", 5000.0)


def test_longrope_is_read_with_its_tensors():
    factors = {"rope_factors_long.weight": np.full(8, 2.5), "rope_factors_short.weight": np.ones(8)}
    changes = {"rope.dimension_count": 16, "rope.scaling.attn_factor": 1.25}
    changes |= {"rope.scaling.original_context_length": 1024}
    found = config("phi3", changes, factors).ropes[0]
    assert (found.kind, found.dim, found.original_max_position) == ("longrope", 16, 1024)
    assert (found.long_factor, found.short_factor) == ((2.5,) * 8, (1.0,) * 8)
    assert found.attention_factor == 1.25


# --- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("bloom", {}, "general.architecture is 'bloom', which is not supported; supported: gemma, gemma2, "),
        ("llama", {".general.type": "adapter"}, "an adapter (LoRA) and not a model"),
        ("clip", {}, "the part of a model that reads images or sound"),
        ("llama", {"expert_count": 8}, "llama.expert_count is 8, which is not supported"),
        ("llama", {"tensor_data_layout": "jploski"}, "llama.tensor_data_layout is 'jploski', which is not"),
        ("llama", {"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping is 50.0, which is not"),
        ("qwen2", {"rope.dimension_sections": [16, 24, 24, 0]}, "qwen2.rope.dimension_sections is [16, 24"),
        ("mistral3", {"attention.temperature_scale": 0.1}, "mistral3.attention.temperature_scale is 0.1"),
        ("llama", {"attention.causal": False}, "llama.attention.causal is False, which is not supported"),
        ("llama", {"attention.head_count_kv": [2] * 11 + [0]}, "llama.attention.head_count_kv is [2, 2,"),
        ("llama", {"attention.head_count": [4] * 11 + [8]}, "layers that differ in it are not supported"),
        ("llama", {"feed_forward_length": [8] * 11 + [0]}, "llama.feed_forward_length is [8, 8,"),
        ("llama", {"attention.head_count": 0}, "llama.attention.head_count is 0; expected 1 to"),
        ("llama", {"attention.head_count_kv": 3}, "4 attention heads are not a multiple of 3"),
        (
            "llama",
            {"attention.value_length": 16},
            "attention.value_length is 16 and attention.key_length",
        ),
        ("llama", {"rope.dimension_count": 16}, "llama.rope.dimension_count is 16, of heads of 32"),
        ("llama", {"block_count": None}, "llama.block_count is missing; take another file"),
        ("llama", {"block_count": 1 << 31}, "llama.block_count is 2147483648"),
        ("llama", {"block_count": 5000}, "llama.block_count is 5000; expected 1 to 4096"),
        ("llama", {"block_count": "12"}, "llama.block_count is '12'; expected a whole number"),
        ("llama", {"context_length": True}, "llama.context_length is True; expected a whole number"),
        ("llama", {"attention.layer_norm_rms_epsilon": None}, "attention.layer_norm_rms_epsilon is missing"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        (
            "llama",
            {"rope.scaling.type": "magic"},
            "llama.rope.scaling.type is 'magic', which is not",
        ),
        ("phi3", {"rope.scaling.type": "longrope"}, "tensor rope_factors_long.weight is missing"),
        (
            "gemma3",
            {"attention.sliding_window_pattern": [True]},
            "window_pattern has 1 entries for 12",
        ),
        ("gpt2", {"attention.head_count_kv": 2}, "gpt2.attention.head_count_kv is 2; expected as many as"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(name: str, changes: dict[str, Any], says: str):
    assert says in error_of(name, changes)


ODD = [
    0,
    1,
    -1,
    3,
    1 << 31,
    (1 << 64) - 1,
    0.0,
    1e-40,
    -2.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    False,
    "",
]
ODD += [
    "none",
    "yarn",
    "linear",
    "longrope",
    "\x1b[2J" * 99,
    [],
    [0],
    [True] * 12,
    [1] * 12,
    [1.5],
    ["a"],
    [[1]],
]
ALL_KEYS = sorted({
    *KEYS, *NEUTRAL, "vocab_size", "rope.freq_base", "rope.dimension_count", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.scale_linear", ".tokenizer.ggml.tokens", ".general.type",
    ".tokenizer.ggml.token_type", ".tokenizer.ggml.eos_token_id", ".tokenizer.ggml.model",
    *(f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "yarn_beta_fast")),
})  # fmt: skip
TENSORS = {
    "rope_freqs.weight": [np.ones(16), np.full(16, np.inf), np.arange(1, 17), np.ones((4, 4))],
    "rope_factors_long.weight": [np.ones(16), np.full(16, 1e-30)],
    "rope_factors_short.weight": [np.ones(16), np.full(16, 1e30)],
}


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    st.sampled_from(list(ARCHITECTURES)),
    st.dictionaries(st.sampled_from(ALL_KEYS), st.sampled_from(ODD), min_size=1, max_size=4),
    st.fixed_dictionaries({}, optional={name: st.sampled_from(found) for name, found in TENSORS.items()}),
)
def test_whatever_the_keys_say_it_is_a_configuration_or_refused(
    name: str, changes: dict[str, Any], tensors: dict[str, np.ndarray]
):
    found = model(name, changes, tensors)
    try:
        read_config(hugging_face_config(found), source="m.gguf")
    except JaxchatError as error:
        refusal = str(error)
    else:
        refusal = "m.gguf: "
    assert refusal.startswith("m.gguf: ")
    assert refusal.isprintable()


def test_frequencies_that_do_not_fit_are_refused():
    assert "tensor rope_freqs.weight has the shape [7]; expected [16], half of the 32" in error_of(
        tensors={"rope_freqs.weight": np.ones(7)}
    )
    assert "tensor rope_freqs.weight has numbers that are not above 0" in error_of(
        tensors={"rope_freqs.weight": np.zeros(16)}
    )


def test_every_parameter_of_every_architecture_has_a_place():
    for name in ARCHITECTURES:
        found = config(name, WINDOW.get(name))
        tensors = {"blk.0.ffn_gate.weight": None} if found.block.mlp == "gated" else {}
        places = [place_of(param, 0, found, tensors) for param in parameter_table(found)]
        assert all(place.rows is None for place in places)
        assert len({place.tensor for place in places}) == len(places)
        assert architecture_of(model(name)) is ARCHITECTURES[name]
