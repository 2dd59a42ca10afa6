"""`ModelConfig` is the same for every spelling of a `config.json`, and refuses what it does not know."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.config import MAX_LAYERS, ModelConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config, relayered_config
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


def test_gpt2_keys_may_have_their_general_names():
    names = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
    }
    own = read("gpt2-plain")
    values = {key: {"n_layer": own.num_layers, "n_head": own.num_heads, "n_embd": own.hidden_size,
                    "n_positions": own.max_position_embeddings}[key] for key in names}  # fmt: skip
    assert read("gpt2-plain", **dict.fromkeys(names), **{names[key]: values[key] for key in names}) == own
    assert read("gpt2-plain", n_positions=None, n_ctx=own.max_position_embeddings) == own
    longer = relayered_config(
        {"model_type": "gpt2", "vocab_size": 9, "num_hidden_layers": 2, "n_head": 2, "n_embd": 8},
        read_config({"model_type": "gpt2", "vocab_size": 9, "n_layer": 5, "n_head": 2,
                                         "n_embd": 8}),
        source="config.json",
    )  # fmt: skip
    assert (longer["n_layer"], "num_hidden_layers" in longer) == (5, False)


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
        ("llama-plain", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama-plain", {"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ("llama-plain", {"num_key_value_heads": 4}, "6 attention heads"),
        ("llama-plain", {"hidden_act": "swiglu2"}, "activation 'swiglu2'"),
        ("llama-plain", {"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ("llama-plain", {"rope_scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ("llama-plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("mistral-window", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2-plain", {"layer_types": ["full_attention"]}, "layer_types are 1; expected 4"),
        (
            "qwen2-plain",
            {"layer_types": ["linear_attention"] * 4},
            "layer_types: 'linear_attention' is not supported",
        ),
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


# --- values of any kind

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e9, 1e300, 0.5])
    | st.floats()
    | st.text(max_size=5)
)
_WILD = _SCALARS | st.lists(_SCALARS, max_size=5) | st.dictionaries(st.text(max_size=3), _SCALARS, max_size=3)


def _places(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


_PLACES = [(case, place) for case in CASES for place in _places(CASES[case])]


@example(("gemma3_text-plain", ("sliding_window_pattern",)), 0)
@given(st.sampled_from(_PLACES), _WILD)
@settings(max_examples=400, deadline=2000)
def test_any_value_of_any_key_is_read_or_refused_by_the_name_of_the_file(where, value):
    case, place = where
    values = copy.deepcopy(CASES[case])
    holder = values
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    try:
        config = read_config(values)
    except JaxchatError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert said.startswith("config.json")
        return
    assert len(config.layer_windows) == config.num_layers <= MAX_LAYERS
    assert sum(param.rows(config) for param in parameter_table(config)) < MAX_LAYERS * 20


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "use_sliding_window"])
def test_a_switch_is_true_or_false_and_nothing_that_counts_as_one(key):
    for case in ("llama-plain", "qwen2-plain", "qwen3-plain"):
        if key in read_keys(case):
            with pytest.raises(JaxchatError, match=f"{key} is 'false'; expected true or false"):
                read(case, **{key: "false"})
    assert read("llama-plain", attention_bias=0) == read("llama-plain", attention_bias=False)


def read_keys(case: str) -> set[str]:
    """The keys that a family asks for."""
    asked = set()

    class Noting(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

    read_config(Noting(CASES[case]))
    return asked


def test_what_no_int32_holds_is_as_long_a_context_as_there_is():
    assert read("llama-plain", max_position_embeddings=10**30).max_position_embeddings == 2**31 - 1


def test_a_beginning_of_text_that_the_vocabulary_does_not_have_is_refused_and_below_0_is_none():
    with pytest.raises(JaxchatError, match="bos_token_id is 97; expected an id below vocab_size, 97"):
        read("llama-plain", bos_token_id=97)
    assert read("llama-plain", bos_token_id=-1, eos_token_id=[-1, 3]).eos_ids == (3,)


# --- both spellings at once, and layer types where they are not expected


def test_of_both_rope_keys_the_one_that_users_add_is_followed_and_a_difference_is_said(caplog):
    new, old = {"rope_type": "default", "rope_theta": 2e4}, {"type": "linear", "factor": 4.0}
    found = read("llama-plain", rope_parameters=new, rope_scaling=old)
    assert found == read("llama-plain", rope_scaling=old)
    assert "rope_scaling is followed, and not rope_parameters" in caplog.text
    caplog.clear()
    read("llama-plain", rope_parameters=new, rope_scaling=new)
    assert not caplog.text


def test_rope_parameters_by_layer_type_are_refused_where_the_family_has_none():
    with pytest.raises(UsageError, match=r"config\.json: rope_parameters\.full_attention"):
        read("llama-plain", rope_parameters={"full_attention": {"rope_type": "default"}})


def test_a_mistral_configuration_with_layer_types_is_a_ministral_one():
    types = ["full_attention", "sliding_attention"] * 2
    assert read("mistral-window", layer_types=types).layer_windows == (0, 7, 0, 7)
    assert read("mistral-window", layer_types=None).layer_windows == (7, 7, 7, 7)
