"""The GPU kernels serve whole models, and compile for GPUs that are absent.

That they compute what the definitions say is in test_stacked_matmul.py and test_cache_attention.py.

Interpreting copies a whole stack on every grid step: everything is tiny. Nothing here has run on a GPU.
"""

import functools
import importlib.util
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import model
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.pallas.backends import REFERENCE, Kernels, pallas_gpu, select
from jaxchat.pallas.cache_attention import gpu as attention
from jaxchat.pallas.cache_attention.tree import Tree
from jaxchat.pallas.stacked_matmul import gpu as matmul
from jaxchat.pallas.stacked_matmul.cases import stack
from tests.pallas.test_tpu_kernels import check_embedding, quantize_params, run_python, two_steps
from tests.support.steps import step_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


# --- stacked_matmul: beside the battery in test_stacked_matmul.py


def test_prepared_weights_stand_for_a_whole_stack_in_as_many_bytes(rng):
    for fmt in ("int4:64", "int8:128:affine"):
        w = jax.tree.map(jnp.asarray, stack(rng, fmt, (33, 300)).w)
        prepared = matmul.prepare(w, "weight", False)
        assert prepared.shape == w.shape
        assert prepared.nbytes == w.nbytes


@pytest.mark.parametrize("fmt", ["int8", "int4:affine"])
def test_an_embedding_is_looked_up_and_is_the_output_head(rng, fmt):
    check_embedding(rng, matmul, fmt, (301, 90), [((1,), "float32")], lambda w, ids: w[ids])


@given(st.integers(1, 200_000), st.integers(1, 40_000), st.sampled_from([1, 2, 4, 16]), st.integers(1, 8))
def test_programs_cover_every_row_and_column_with_blocks_of_powers_of_two(rows, columns, width, m):
    sizes = matmul._Sizes.choose(rows, columns, width, m)
    for block in (sizes.row_block, sizes.column_block):
        assert block & (block - 1) == 0
    covered = sizes.splits * sizes.steps * sizes.column_block
    assert columns <= covered
    assert (sizes.splits - 1) * sizes.steps * sizes.column_block < columns  # no program without work
    assert sizes.ragged == (covered != columns)


def test_weights_on_several_gpus_are_refused():
    spread = types.SimpleNamespace(sharding=types.SimpleNamespace(device_set={0, 1}))
    with pytest.raises(UsageError, match="runs on one GPU; on several give"):
        matmul.prepare(spread, "weight", False)


# --- the whole model


def test_a_model_computes_the_same_with_either_kernels(tiny_model, monkeypatch):
    monkeypatch.setattr(matmul, "_MAX_ROWS", 2)  # so that prefill is as it is with a longer prompt
    config, params = tiny_model("gemma2")  # windows, soft-caps, and a head that is the 8-bit embedding
    params = quantize_params(config, params, "int8")
    kernels = pallas_gpu()
    wrap = functools.partial
    interpreted = Kernels(
        "pallas, interpreted",
        stacked_matmul=wrap(kernels.stacked_matmul, interpret=True),
        decode_attention=wrap(kernels.decode_attention, interpret=True),
        prefill_attention=wrap(kernels.prefill_attention, interpret=True),
        prepare=kernels.prepare,
    )
    expected = two_steps(config, params, REFERENCE)
    assert np.abs(two_steps(config, params, interpreted) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_gpu_takes_the_pallas_kernels_only_when_asked():
    assert select("auto", "gpu") is REFERENCE  # they have not been measured
    assert select("pallas", "gpu") is pallas_gpu()


# --- for GPUs that are not here


def lowered(function, *arguments):
    """What XLA for CUDA is given."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("fmt", ["int4:128:f32", "int4:channel:affine", "int8", "q5_k", "q6_k"])
def test_products_lower_for_cuda_and_take_the_whole_stack(rng, fmt):
    w = matmul.prepare(jax.tree.map(jnp.asarray, stack(rng, fmt, (301, 1100), layers=5).w), "weight", False)
    x = jax.ShapeDtypeStruct((3, 1100), jnp.bfloat16)
    text = lowered(matmul.stacked_matmul, x, w, jnp.int32(2))
    call = next(line for line in text.splitlines() if "triton" in line)
    assert f"tensor<5x301x{w.words.shape[-1] // 4}x4xi32>" in call
    assert "dynamic_slice" not in text


@pytest.mark.parametrize(("t", "is_tree"), [(1, False), (100, False), (26, True)])
def test_attention_lowers_for_cuda_and_takes_the_whole_cache(t, is_tree):
    cache = jax.ShapeDtypeStruct((7, 2, 3, 130, 20), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((2, t, 15, 20), jnp.bfloat16)
    attend = functools.partial(attention.attend, scale=0.1, window=jnp.int32(0), softcap=50.0)
    if is_tree:
        words = jnp.ones((2, t), jnp.int32)
        attend = functools.partial(attend, tree=Tree(words, words))
    text = lowered(attend, q, cache, cache, jnp.int32(3), jnp.zeros(2, jnp.int32))
    call = next(line for line in text.splitlines() if "triton" in line)
    assert call.count("tensor<7x2x3x130x20xbf16>") == 2


needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    or shutil.which("ptxas") is None,
    reason='needs the CUDA compiler: pip install "jaxchat[cuda]", and ptxas',
)


def compiled_for_sm_90(*flags):
    # Three layers: copying a large weight of one would show.
    command = ["-m", "benchmarks.aot", "--target", "sm_90", "--shape", "llama-3-8b", "--layers", "3"]
    return json.loads(run_python([*command, *flags]))


# Prefill dequantizes one layer's weight at a time: the largest is the MLP's.
DEQUANTIZED = 2 * 14336 * 4096 * 4


@needs_cuda
@pytest.mark.parametrize("quantization", ["int4", "int8:channel", "int4:128:affine", "none"])
def test_steps_compile_for_sm_90_and_copy_no_weights(quantization):
    result = compiled_for_sm_90("--quant", quantization, "--context", "512")
    assert result["ok"]
    assert result["decode"]["large_copies"] == 0
    assert result["decode"]["temp_bytes"] < 16 << 20
    assert result["prefill"]["temp_bytes"] < DEQUANTIZED


@needs_cuda
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_steps_for_sm_90_do_not_copy_the_cache(kv_dtype):
    result = compiled_for_sm_90("--quant", "int8", "--kv_dtype", kv_dtype, "--context", "32768")
    for step, activations in ((result["decode"], 16 << 20), (result["prefill"], DEQUANTIZED)):
        assert step["large_copies"] == 0
        assert step["temp_bytes"] < activations
        assert step["alias_bytes"] > 0  # the cache


def test_no_conditional_returns_the_cache(tiny_model):
    # XLA for GPU copies what a branch changes.
    config, params = tiny_model("llama")
    cache = empty_cache(config, slots=7, batch=1, capacity=77, dtype=jnp.dtype(jnp.float32))
    shape = "x".join(map(str, cache.k.shape))
    plan = LayerPlan.identity(config.num_layers).arrays(7)
    step = step_of(config, params, plan, jnp.zeros((1, 4), jnp.int32), *[jnp.ones(1, jnp.int32)] * 3)
    text = lowered(model.forward, step, cache)
    results = re.findall(r"^ *}\) : \(tensor<i32>\) -> (.*)", text, re.MULTILINE)
    assert len(results) >= 3
    assert f"tensor<{shape}xf32>" in text
    assert not any(shape in result for result in results)
