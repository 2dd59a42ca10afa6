"""Bytes, operations and speed of a decode step, against numbers worked out by hand."""

import pytest

from jaxchat.analysis import cost
from jaxchat.errors import UsageError
from jaxchat.families import count_parameters, parameter_table, read_config
from jaxchat.layer_plan import LayerPlan
from tests.analysis.test_show import LLAMA3_8B

CONFIG = read_config(LLAMA3_8B)
ATTENTION = 2 * 4096 * 4096 + 2 * 1024 * 4096  # q and o, k and v
MLP = 3 * 14336 * 4096
HEAD = 128256 * 4096


def plan(spec):
    return LayerPlan.parse(spec, 32)


def weight_bytes(spec, config=CONFIG):
    sizes = {param.name: 2 * count_of(param, config) for param in parameter_table(config)}
    return cost.weight_bytes_read(config, plan(spec), sizes)


def count_of(param, config):
    total = 1
    for size in param.layer_shape(config):
        total *= size
    return total


def test_a_step_reads_every_weight_but_the_embedding_of_which_it_reads_a_row():
    assert weight_bytes("all") == 2 * (count_parameters(CONFIG) - HEAD)


def test_a_tied_head_is_read():
    tied = read_config({**LLAMA3_8B, "tie_word_embeddings": True})
    assert weight_bytes("all", tied) == 2 * count_parameters(tied)


def test_a_layer_is_read_as_often_as_it_runs_and_a_half_scaled_by_0_is_not():
    rest = 2 * (HEAD + 4096)
    assert weight_bytes("0,0,0") - rest == 3 * 2 * (ATTENTION + MLP + 2 * 4096)
    assert weight_bytes("[[3, 1, 0]]") - rest == 2 * (ATTENTION + 4096)
    assert weight_bytes("[[3, 0, 1]]") - rest == 2 * (MLP + 4096)
    assert weight_bytes("[0, [3, 0, 0]]") == weight_bytes("0")


def test_attention_reads_the_keys_and_values_of_its_slots_within_their_windows():
    row = 2 * 8 * 128 * 2
    assert cost.kv_bytes_read(CONFIG, plan("[0, [1, 0, 1], 2, [3, 0, 0]]"), 10, "bfloat16") == 2 * 10 * row
    windowed = read_config(
        {**LLAMA3_8B, "model_type": "gemma2", "sliding_window": 4, "head_dim": 128, "num_hidden_layers": 32}
    )
    assert cost.kv_bytes_read(windowed, plan("0,1"), 10, "bfloat16") == (4 + 10) * row
    with_scales = 2 * 8 * (128 + 4)
    assert cost.kv_bytes_read(CONFIG, plan("0"), 10, "int8") == 10 * with_scales


def test_a_token_takes_two_operations_a_weight_and_four_a_head_dimension_and_key():
    products = 32 * (ATTENTION + MLP) + HEAD
    assert cost.flops_per_token(CONFIG, plan("all"), 0) == 2 * products
    attention = 32 * 4 * 32 * 128 * 1000
    assert cost.flops_per_token(CONFIG, plan("all"), 1000) == 2 * products + attention
    assert cost.flops_per_token(CONFIG, plan("[[0, 0, 1]]"), 1000) == 2 * (MLP + HEAD)


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("h200", 4.8e12),
        ("RTX4090", 1.008e12),
        ("tpu7x", 3.7e12),
        ("61.4 GB/s", 61.4e9),
        ("61.4", 61.4e9),
        (".5gb/s", 0.5e9),
        ("1.2TB/s", 1.2e12),
    ],
)
def test_a_device_is_a_name_or_a_bandwidth(text, bandwidth):
    assert cost.device(text).bandwidth == pytest.approx(bandwidth)


@pytest.mark.parametrize("text", ["h300", "", "0", "-5", "5 MB/s", "1e9", "nan", "9" * 400])
def test_what_is_no_device_is_an_error_that_lists_them(text):
    with pytest.raises(UsageError, match=r"choose one of a100, .*v6e, tpu7x, or give its memory bandwidth"):
        cost.device(text)
