"""The benchmarks run as commands and end with one JSON line. Figures are checked for sense, not for speed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common
from jaxchat.layer_plan import LayerPlan

_ROOT = Path(__file__).parents[1]
_SMALL = ("--shape", "tiny", "--prompt", "20", "--new", "4", "--bandwidth_mib", "16")


def _run(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *args],
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _json_line(module: str, *args: str) -> dict[str, Any]:
    done = _run(module, *_SMALL, *args)
    assert done.returncode == 0, done.stderr
    table, _, line = done.stdout.strip().rpartition("\n")
    assert "machine" in table
    return json.loads(line)


def test_decode_reports_speed_bandwidth_and_memory():
    result = _json_line("decode", "--batch", "2", "--layer_spec", "0:4,2:4")

    assert (result["shape"], result["dtype"], result["batch"]) == ("tiny", "bfloat16", 2)
    assert (result["prompt"], result["new"]) == (20, 4)
    assert (result["layers"], result["slots"]) == (4, 6)
    step_bytes = result["weight_bytes_per_token"] + 2 * result["kv_bytes_per_token"]
    assert math.isclose(
        result["roofline_tok_s"], 2 * result["read_bandwidth_gb_s"] * 1e9 / step_bytes, rel_tol=1e-6
    )
    assert math.isclose(
        result["roofline_fraction"], result["decode_tok_s"] / result["roofline_tok_s"], rel_tol=1e-6
    )
    assert result["decode_tok_s"] > 0
    assert result["prefill_tok_s"] > 0
    assert result["compile_s"] > 0
    assert 0 <= result["temp_bytes"] < 1 << 24
    assert result["peak_rss_bytes"] > 1 << 24
    assert {"jax", "device", "cpu", "cores"} <= result.keys()


def test_plan_reports_one_compilation_no_extra_weights_and_the_tokens_of_the_unrolled_checkpoint():
    result = _json_line("plan", "--plans", "5", "--layer_spec", "0:4,2:4", "--layer_spec", "::2")

    assert result["decode_compilations"] == 1
    assert result["prefill_compilations"] == 1
    assert result["compilations_after_first_plan"] == 0
    assert result["extra_weight_bytes"] == 0
    assert result["switch_us"] > 0
    assert [case["slots"] for case in result["plans"]] == [6, 2]
    assert all(case["same_tokens"] and case["ratio"] > 0 for case in result["plans"])
    assert result["plain_xla"]["same_tokens"]


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        ("decode", ("--new", "1"), "--new is 1; it must be at least 2"),
        ("decode", ("--layer_spec", "0:4,9"), "layer 9 is out of range"),
        ("plan", ("--layer_spec", "x"), "x"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(module: str, args: tuple[str, ...], expected: str):
    done = _run(module, *_SMALL, *args)

    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_the_bytes_a_step_reads_follow_the_plan():
    config = common.shape_config("tiny")
    params = common.random_params(config, "float32")
    layer = sum(v.nbytes for n, v in params.items() if n.startswith("layers.")) // config.num_layers
    rest = params["norm.weight"].nbytes + params["lm_head.weight"].nbytes

    def step_bytes(spec: str) -> int:
        return common.weight_bytes_per_step(config, params, LayerPlan.parse(spec, config.num_layers))

    assert step_bytes("all") == 4 * layer + rest
    assert step_bytes("0,0,0") == 3 * layer + rest
    attention, mlp = step_bytes("[[1, 1, 0]]") - rest, step_bytes("[[1, 0, 1]]") - rest
    assert 0 < attention < layer
    assert attention + mlp == layer
    itemsize, context = 4, 10
    one_slot = 2 * config.num_kv_heads * config.head_dim * itemsize * context
    plan = LayerPlan.parse("[0, [1, 0, 1], 2]", config.num_layers)
    assert common.kv_bytes_per_step(config, plan, context, itemsize) == 2 * one_slot


def test_random_weights_differ_between_tensors_and_layers():
    params = common.random_params(common.shape_config("tiny"), "bfloat16")
    assert params["layers.q.weight"].dtype == jnp.uint16
    q, o = np.asarray(params["layers.q.weight"]), np.asarray(params["layers.o.weight"])
    assert len(np.unique(q)) > 100
    assert not np.array_equal(q[0], q[1])
    assert not np.array_equal(q, o)
