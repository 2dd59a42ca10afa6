"""`ModelConfig` is the same for every spelling of a `config.json`, and refuses what it does not know."""

import dataclasses
from typing import Any

import pytest

from jaxchat.config import ModelConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import read_config
from tests.support.parity_cases import CASES


def read(case: str, **changes: Any) -> ModelConfig:
    """A parity case's configuration with keys changed; `...` removes one."""
    values = {**CASES[case], **changes}
    return read_config({key: value for key, value in values.items() if value is not ...})


def same_rope(case: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    absent = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"), ...)
    return read(case, **{**absent, **old}) == read(case, **{**absent, **new})


# --- one rotary embedding, old and new


def test_rope_theta_may_stand_beside_or_inside_the_rope_parameters():
    assert same_rope(
        "llama-plain", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )


def test_absent_rope_keys_mean_plain_rope_with_base_10000():
    for absent in ({}, {"rope_scaling": None}, {"rope_parameters": {}}):
        assert same_rope(
            "llama-plain", absent, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        )


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling_of_old_files_reads_like_rope_parameters(scaling: dict[str, Any]):
    new = {"rope_parameters": {**scaling, "rope_theta": 2e4}}
    assert same_rope("llama-plain", {"rope_theta": 2e4, "rope_scaling": scaling}, new)
    older = {key: value for key, value in scaling.items() if key != "rope_type"}
    assert same_rope(
        "llama-plain",
        {"rope_theta": 2e4, "rope_scaling": {**older, "type": scaling["rope_type"]}},
        new,
    )


def test_trained_context_of_a_scaled_rope_defaults_to_the_longest_context():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert same_rope(
        "llama-plain",
        {"rope_scaling": scaling},
        {"rope_scaling": {**scaling, "original_max_position_embeddings": 128}},
    )


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_names_longrope_in_three_ways(name: str):
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
    outside = {"original_max_position_embeddings": 32}
    assert same_rope(
        "phi3-plain",
        {**outside, "rope_theta": 200.0, "rope_scaling": {"type": name, **factors}},
        {**outside, "rope_parameters": {"rope_type": "longrope", "rope_theta": 200.0, **factors}},
    )


def test_phi3_rotated_fraction_may_stand_beside_or_inside_the_rope_parameters():
    assert same_rope(
        "phi3-partial-rotary",
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    )


def test_longrope_attention_factor_follows_from_the_extension_of_the_context():
    config = read("phi3-longrope-long", original_max_position_embeddings=32)
    assert config.ropes[0].attention_factor == pytest.approx((1 + 2 / 5) ** 0.5)  # log(128/32) / log(32)


def test_gemma3_rope_of_old_files_reads_like_one_dictionary_for_each_layer_type():
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    bases = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert read("gemma3_text-plain", rope_parameters=new) == read("gemma3_text-plain", **old, **bases)
    assert read("gemma3_text-plain", rope_parameters=new) == read("gemma3_text-plain", **old)


# --- windows


def test_gemma_layer_patterns_read_like_explicit_layer_types():
    s, f = "sliding_attention", "full_attention"
    assert read("gemma2-plain") == read("gemma2-plain", layer_types=[s, f, s, f])
    assert read("gemma3_text-plain") == read("gemma3_text-plain", layer_types=[s, s, f, s])
    assert read("gemma3_text-plain", sliding_window_pattern=...) == read(
        "gemma3_text-plain", layer_types=[s, s, s, s]
    )


def test_qwen_window_switch_reads_like_explicit_layer_types():
    s, f = "sliding_attention", "full_attention"
    assert read("qwen2-windows") == read("qwen2-windows", max_window_layers=..., layer_types=[f, f, s, s])
    assert read("qwen2-window-switched-off") == read("qwen2-plain")


def test_mistral_without_a_window_key_has_4096_and_with_null_none():
    assert read("mistral-window", sliding_window=...).layer_windows == (4096,) * 4
    assert read("mistral-window", sliding_window=None).layer_windows == (0,) * 4


# --- what configuration files leave out


def test_multimodal_gemma3_files_state_only_what_differs_from_the_defaults():
    """As google/gemma-3-4b-it does: whatever else its text half needs is a default of Gemma3TextConfig."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    assert config.layer_windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert config.layer_attn_scales == (1 / 16,) * 34
    assert [rope.theta for rope in config.ropes] == [1e6, 1e4]
    assert [rope.factor for rope in config.ropes] == [8.0, 1.0]
    assert config.tied_embeddings
    assert config.eos_ids == (1, 106)


def test_null_key_value_heads_mean_as_many_as_heads():
    for case in ("llama-plain", "mistral-window", "ministral-mixed-layers", "qwen2-plain", "phi3-plain"):
        assert read(case, num_key_value_heads=None).num_kv_heads == 6


def test_absent_mistral_key_value_heads_are_eight():
    assert read("mistral-window", num_key_value_heads=..., num_attention_heads=16).num_kv_heads == 8


def test_gpt2_feed_forward_width_defaults_to_four_times_the_model_width():
    assert read("gpt2-plain", n_inner=None) == read("gpt2-plain", n_inner=144) == read("gpt2-plain")


def test_tied_embeddings_default_by_family():
    tied = {case for case in CASES if case.endswith("-plain") and read(case).tied_embeddings}
    assert tied == {"gemma-plain", "gemma2-plain", "gemma3_text-plain", "gpt2-plain"}


def test_one_end_token_or_several():
    assert read("llama-plain", eos_token_id=7).eos_ids == (7,)
    assert read("llama-plain", eos_token_id=[7, 9]).eos_ids == (7, 9)
    assert read("llama-plain", eos_token_id=None).eos_ids == ()


# --- refusals


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("llama-plain", {"model_type": "mamba"}, "model_type 'mamba'"),
        ("llama-plain", {"hidden_size": ...}, "'hidden_size' is missing"),
        ("llama-plain", {"num_hidden_layers": "4"}, "'num_hidden_layers' is '4'"),
        ("llama-plain", {"num_key_value_heads": 4}, "6 attention heads"),
        ("llama-plain", {"hidden_act": "swiglu2"}, "activation 'swiglu2'"),
        ("llama-plain", {"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ("llama-plain", {"rope_scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ("llama-plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("mistral-window", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2-plain", {"layer_types": ["full_attention"]}, "1 layer_types for 4 layers"),
        ("qwen2-plain", {"layer_types": ["linear_attention"] * 4}, "layer type 'linear_attention'"),
        ("phi3-longrope-short", {"head_dim": 8}, "expected 4, half the rotated dimensions"),
        ("gpt2-plain", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_file_and_the_key(
    case: str, changes: dict[str, Any], named: str
):
    with pytest.raises((JaxchatError, UsageError), match=r"^config\.json: ") as refusal:
        read(case, **changes)
    assert named in str(refusal.value)


def test_configs_are_hashable_and_compare_by_value():
    configs = {read(case) for case in CASES}
    assert dataclasses.replace(read("llama-plain")) in configs
