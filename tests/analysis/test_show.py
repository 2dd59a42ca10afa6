"""`--show` and the numbers in it: parameters as the seed counts them, memory, and the table of slots."""

import dataclasses
import json

import pytest

from jaxchat.analysis import show
from jaxchat.errors import UsageError
from jaxchat.families import read_config
from jaxchat.layer_plan import LayerPlan

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SELF_MERGE = "0:8,4:12,8:16,12:20,16:24,20:28,24:32"
PRUNED = "0:10,10:20:2,20:"


@pytest.fixture
def describe(tmp_path):
    """`describe(config.json contents, plan, ...)`, through a directory that holds nothing else."""

    def make(config, spec=None, **options):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return show.describe_directory(tmp_path, spec, **options)

    return make


@pytest.mark.parametrize(
    ("spec", "slots", "parameters", "short"),
    [
        (None, 32, 8_030_261_248, "8.0B"),
        (SELF_MERGE, 56, 13_264_949_248, "13.3B"),
        (PRUNED, 27, 6_939_701_248, "6.9B"),
    ],
)
def test_parameters_of_llama3_8b_are_those_of_the_seed(describe, spec, slots, parameters, short):
    report = describe(LLAMA3_8B, spec)
    assert (report.slots, report.parameters) == (slots, parameters)
    assert report.stored_parameters == 8_030_261_248
    assert f"{parameters:,} ({short}) as run" in show.render(report)


def test_tied_embeddings_count_once(describe):
    untied, tied = describe(LLAMA3_8B), describe({**LLAMA3_8B, "tie_word_embeddings": True})
    assert untied.parameters - tied.parameters == 128256 * 4096


def test_an_identity_slot_counts_but_has_no_kv_cache(describe):
    report = describe(LLAMA3_8B, "[0, [1, 0.0, 0.0], [2, 0.0, 1.0]]")
    assert (report.slots, report.executed_slots, report.allocated_slots) == (3, 2, 32)
    assert [row.kind for row in report.layers] == ["global", "skipped", "global"]
    assert "3 slots over 32 source layers, 1 of them skipped" in show.render(report)


def test_bytes_of_weights_and_of_the_kv_cache(describe):
    report = describe(LLAMA3_8B, SELF_MERGE, max_length=1000)
    assert report.weight_bytes["bfloat16"] == 2 * 8_030_261_248
    assert report.weight_bytes["float32"] == 2 * report.weight_bytes["float16"]
    per_token = 56 * 2 * 8 * 128  # slots, keys and values, heads, head size
    scales = 56 * 2 * 8 * 4  # a float32 a row of a head
    sizes = {"float32": 4 * per_token, "bfloat16": 2 * per_token, "int8": per_token + scales}
    assert report.kv_bytes_per_token == sizes
    assert report.kv_bytes["bfloat16"] == 1000 * 2 * per_token
    assert "bfloat16 15.0 GiB (as stored)" in show.render(report)


def test_a_plan_shorter_than_the_model_shows_the_room_kept_for_other_plans(describe):
    report = describe(LLAMA3_8B, PRUNED)
    assert report.kv_bytes_allocated["float32"] * 27 == report.kv_bytes["float32"] * 32
    assert "with room for every plan of its layers" in show.render(report)


def test_windows_follow_the_source_layer_not_the_slot(describe):
    config = {
        **LLAMA3_8B,
        "model_type": "gemma3_text",
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 6,
    }
    report = describe(config, "2,3,5,0")
    assert [(r.layer, r.kind, r.window) for r in report.layers] == [
        (2, "global", None),
        (3, "sliding", 512),
        (5, "global", None),
        (0, "sliding", 512),
    ]
    assert "        1          3  sliding      512" in show.render(report).splitlines()


def table_rows(report):
    lines = show.render(report).splitlines()
    return lines[lines.index("") + 2 :]


def test_every_slot_of_a_usual_plan_is_shown(describe):
    assert len(table_rows(describe(LLAMA3_8B, SELF_MERGE))) == 56


def test_a_long_uniform_plan_is_shown_in_runs(describe):
    rows = table_rows(describe({**LLAMA3_8B, "num_hidden_layers": 80}, "0:50,20:"))
    assert [row.split() for row in rows] == [
        ["0-49", "0-49", "global", "-"],
        ["50-109", "20-79", "global", "-"],
    ]


def test_a_long_plan_with_scales_is_shown_in_full(describe):
    spec = json.dumps([*range(79), [79, 0.5, 1.0]])
    rows = table_rows(describe({**LLAMA3_8B, "num_hidden_layers": 80}, spec))
    assert len(rows) == 80
    assert rows[-1].split() == ["79", "79", "global", "-", "0.5", "1"]


def test_the_report_as_json_has_every_field(describe):
    report = describe(LLAMA3_8B, PRUNED)
    values = json.loads(json.dumps(show.as_json(report)))
    assert values.keys() == {field.name for field in dataclasses.fields(show.Report)}
    assert values["layers"][10] == {
        "slot": 10, "layer": 10, "kind": "global", "window": None, "attn_scale": 1.0, "mlp_scale": 1.0,
        "source": None,
    }  # fmt: skip


def test_a_context_longer_than_the_learned_positions_is_refused():
    config = read_config(
        {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    )
    with pytest.raises(UsageError, match=r"max_length is 17, .* at most 16"):
        show.describe(config, LayerPlan.identity(1), name="x", max_length=17)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1000, "1.0K"), (5_103_360, "5.1M"), (13_264_949_248, "13.3B")]
)
def test_short_counts(count, text):
    assert show.short_count(count) == text


@pytest.mark.parametrize(("count", "text"), [(1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_short_bytes(count, text):
    assert show.short_bytes(count) == text
