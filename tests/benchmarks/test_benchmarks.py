"""The benchmarks run as commands and end with one JSON line. Figures are checked for sense, not for speed."""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common, llama_cpp
from jaxchat import quant
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.quant import QuantFormat

_ROOT = Path(__file__).parents[2]
_SMALL = ("--shape", "tiny", "--prompt", "20", "--new", "4", "--bandwidth_mib", "16")


def _run(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *args],
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _here(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, where nothing is counted that others have done before."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(f"benchmarks.{module}").main(list(args))
        except SystemExit as left:  # argparse
            code = left.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def _json_line(module: str, *args: str, run: Callable[..., Any] = _here) -> dict[str, Any]:
    done = run(module, *_SMALL, *args)
    assert done.returncode == 0, done.stderr
    table, _, line = done.stdout.strip().rpartition("\n")
    assert "machine" in table
    return json.loads(line)


def test_decode_reports_speed_bandwidth_and_memory():
    result = _json_line("decode", "--batch", "2", "--layer_spec", "0:4,2:4", run=_run)

    assert (result["shape"], result["dtype"], result["batch"]) == ("tiny", "bfloat16", 2)
    assert result["quant"] == "none"
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
    assert result["batch_1_decode_tok_s"] > 0
    assert result["batch_speedup"] > 0
    assert result["prefill_tok_s"] > 0
    assert result["compile_s"] > 0
    assert 0 <= result["temp_bytes"] < 1 << 24
    assert result["peak_rss_bytes"] > 1 << 24
    assert {"jax", "device", "cpu", "cores"} <= result.keys()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_decode_counts_the_bytes_of_quantized_weights(kernels: str):
    result = _json_line("decode", "--quant", "int4", "--kernels", kernels)

    config, fmt = common.shape_config("tiny"), QuantFormat.parse("int4")
    params = common.random_params(config, "bfloat16", fmt)
    embedding = params["embed.weight"].nbytes  # of which a step reads a row
    assert result["weight_bytes_per_token"] == sum(value.nbytes for value in params.values()) - embedding
    # 4.5 bits for the rows of 48 and 88, padded to 64 and 96; 8.5 for the head's.
    assert 0.5 < result["weight_bytes_per_token"] / (sum(v.size for v in params.values()) - 101 * 48) < 1
    assert result["quant"] == "int4"
    assert result["kernels"] in (("reference",) if kernels == "reference" else ("native", "reference"))
    assert bool(result["instruction_set"]) == (result["kernels"] == "native")
    assert result["batch_speedup"] == 1
    assert "peer" not in result
    assert result["decode_tok_s"] > 0


def test_adapters_are_timed_beside_the_same_weights():
    flags = ("--shape", "tiny", "--prompt", "20", "--new", "4", "--pairs", "2")
    done = _here("adapters", *flags, "--quant", "int4", "--rank", "3", "--loaded", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert (result["rank"], result["loaded"], result["columns"]) == (3, 3, 16)
    config = common.shape_config("tiny")
    numbers = sum(sum(p.layer_shape(config)) for p in parameter_table(config) if p.role == "weight")
    assert result["adapter_mb"] * 1e6 == numbers * config.num_layers * 16 * 2  # float16 beside int4
    assert min(result["decode_ratio"], result["prefill_ratio"]) > 0


def test_decode_runs_beside_llama_cpp():
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    result = _json_line("decode", "--quant", "int4", "--batch", "2", "--peer", "llama.cpp")

    peer = result["peer"]
    assert peer["quant"] == "Q4_0"
    assert min(peer[name] for name in ("decode_tok_s", "prefill_tok_s", "load_s", "file_bytes")) > 0
    assert peer["version"]
    assert min(result["decode_ratio"], result["prefill_ratio"]) > 0


def test_decode_runs_a_file():
    result = _json_line("decode", "--gguf", "Q8_0")
    assert (result["quant"], result["decode_tok_s"] > 0) == ("Q8_0", True)


@pytest.mark.full
def test_start_converts_a_file():
    small = ("--shape", "tiny", "--new", "4", "--max_length", "64")
    done = _here("start", *small, "--gguf", "Q8_0", "--converted")
    assert json.loads(done.stdout.splitlines()[-1])["converted"], done.stderr


def test_plan_runs_on_quantized_weights():
    result = _json_line("plan", "--plans", "2", "--layer_spec", "0:4,2:4", "--quant", "int8", run=_run)

    assert result["quant"] == "int8"
    assert result["extra_weight_bytes"] == 0
    assert result["plans"][0]["same_tokens"]
    assert result["plain_xla"]["ratio"] > 0


def test_plan_reports_one_compilation_no_extra_weights_and_the_tokens_of_the_unrolled_checkpoint():
    result = _json_line("plan", "--plans", "5", "--layer_spec", "0:4,2:4", "--layer_spec", "::2", run=_run)

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
        ("decode", ("--quant", "int3"), "unknown quantization 'int3'"),
        ("decode", ("--peer", "llama.cpp", "--peer_python", "no/python"), "cannot run no/python"),
        ("decode", ("--peer", "llama.cpp", "--layer_spec", "::2"), "leave --layer_spec out"),
        ("plan", ("--layer_spec", "x"), "x"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(module: str, args: tuple[str, ...], expected: str):
    done = _here(module, *_SMALL, *args)

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


def test_random_weights_differ_between_tensors_and_layers():
    params = common.random_params(common.shape_config("tiny"), "bfloat16")
    assert params["layers.q.weight"].dtype == jnp.uint16
    q, o = np.asarray(params["layers.q.weight"]), np.asarray(params["layers.o.weight"])
    assert len(np.unique(q)) > 100
    assert not np.array_equal(q[0], q[1])
    assert not np.array_equal(q, o)


@pytest.mark.parametrize(
    "name", ["int8", "int8:channel", "int4", "int4:64", "int4:32:affine", "q8_0", "int4:f32"]
)
def test_random_quantized_weights_are_centred_and_of_the_right_size(name: str):
    config, fmt = common.shape_config("tiny"), QuantFormat.parse(name)
    params = common.random_params(config, "bfloat16", fmt)

    down = jax.tree.map(np.asarray, params["layers.down.weight"])
    assert params["layers.attn_norm.weight"].dtype == jnp.uint16
    assert (down.shape, down.bits, down.affine) == ((4, 48, 88), fmt.bits, fmt.affine)
    assert (quant.unpack_codes(down)[..., 88:] == 0).all()
    w = quant.dequantize(down)
    assert abs(w.mean()) < 0.1 * w.std()
    assert 0.8 < w.std() * math.sqrt(88) < 1.2
    assert not np.array_equal(w[0], w[1])
    up = quant.dequantize(jax.tree.map(np.asarray, params["layers.up.weight"]))
    assert not np.array_equal(w.reshape(-1)[: 88 * 48], up.reshape(-1)[: 88 * 48])


def test_gathered_params_unroll_quantized_stacks():
    params = common.random_params(common.shape_config("tiny"), "bfloat16", QuantFormat.parse("int4"))
    unrolled = common.gathered_params(params, [2, 0, 2])

    q, stack = unrolled["layers.q.weight"], params["layers.q.weight"]
    assert q.shape == (3, *stack.shape[1:])
    for part, whole in zip(jax.tree.leaves(q), jax.tree.leaves(stack), strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(whole)[[2, 0, 2]])
    assert unrolled["embed.weight"] is params["embed.weight"]


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        ("Q4_K_M", ("Q6_K", "Q4_K", "Q8_0")),
        ("Q4_0", ("Q6_K", "Q4_0", "Q4_0")),
        ("Q8_0", ("Q8_0", "Q8_0", "Q8_0")),
        ("BF16", ("BF16", "BF16", "BF16")),
        ("F16", ("F16", "F16", "F16")),
    ],
)
def test_the_model_for_llama_cpp_has_the_shape_and_the_types_its_quantizer_picks(
    tmp_path: Path, kind: str, types: tuple[str, str, str]
):
    gguf = pytest.importorskip("gguf")
    config = {**common.SHAPES["tiny"], "hidden_size": 256, "intermediate_size": 288}
    llama_cpp.write_model(tmp_path / "model.gguf", config, kind)

    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 4 * 9 + 3
    found = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    ours = tuple(found[f"{name}.weight"] for name in ("output", "token_embd", "blk.3.ffn_down"))
    assert ours == types  # rows of 288 are no whole number of K-quants' blocks
    assert found["blk.3.ffn_norm.weight"] == "F32"
    if kind == "Q4_K_M":
        assert [found[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    for name, columns in (("blk.0.ffn_down.weight", 288), ("output.weight", 256)):
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert values.shape[-1] == columns
        assert 0.8 < values.std() * math.sqrt(columns) < 1.2


def test_a_peer_without_llama_cpp_is_one_clear_error():
    if importlib.util.find_spec("llama_cpp") is not None:
        pytest.skip("llama_cpp is installed")
    done = _run("decode", *_SMALL, "--peer", "llama.cpp")

    assert done.returncode == 2
    assert "No module named" in done.stderr
    assert "--peer_python" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("sample", [pytest.param((), marks=pytest.mark.full), ("--sample", "4")])
def test_sweep_compiles_once_and_sharing_changes_no_score(sample: tuple[str, ...]):
    done = _run("sweep", "--shape", "tiny", "--tokens", "24", "--bandwidth_mib", "16", *sample)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])

    assert (result["layers"], result["plans"], result["measured_plans"]) == (4, 10, 4 if sample else 10)
    assert result["compilations"] == 1
    assert (result["slots"], result["slots_without_sharing"]) == (30, 60)
    assert result["largest_relative_difference"] < 1e-6
    assert result["hidden_state_bytes"] == 5 * 24 * 48 * 4
    assert result["plans_per_s"] == pytest.approx(10 / result["sweep_s"])
    assert result["speedup"] == pytest.approx(result["sweep_s_without_sharing"] / result["sweep_s"])


@pytest.mark.parity
def test_training_is_compared_with_peft_step_by_step():
    done = _run(
        "training", "--shape", "tiny", "--rank", "4", "--batch", "2", "--length", "16", "--steps", "5"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["largest_loss_difference"] < 1e-4
    assert result["ratio"] > 0
    assert result["peer"].startswith("peft")
