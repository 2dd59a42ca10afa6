"""The TPU kernels compute what the definitions say, interpreted on CPU, and compile for absent chips.

Interpreting copies a whole stack on every grid step: everything is tiny. Nothing here has run on a TPU.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxchat import model, quant
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.pallas.backends import REFERENCE, Kernels, pallas_tpu, select
from jaxchat.pallas.cache_attention import tpu as attention
from jaxchat.pallas.cache_attention.reference import QuantizedRows, quantize_rows
from jaxchat.pallas.stacked_matmul import tpu as matmul
from jaxchat.quant import QuantFormat
from tests.support.steps import step_of

ROOT = Path(__file__).parents[2]
LAYERS = 2

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORMATS = (
    "int4", "int4:64:affine", "int4:128:f32", "int4:channel", "int4:channel:affine",
    "int8", "int8:64", "int8:128:affine", "int8:channel",
)  # fmt: skip


def random(shape, dtype=np.float32):
    rng = np.random.default_rng(np.random.SeedSequence())  # fresh in every run
    return jnp.asarray(rng.standard_normal(shape), dtype)


def quantized(shape, fmt):
    """A quantized weight with a group of zeros, as jax arrays, and its values in float64."""
    w = np.array(random(shape))
    w[..., 0, :32] = 0
    q = quant.quantize(w, QuantFormat.parse(fmt), name="w")
    return jax.tree.map(jnp.asarray, q), quant.dequantize(q).astype(np.float64)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def product(x, w, layer=1, interpret=True):
    return jax.jit(functools.partial(matmul.stacked_matmul, interpret=interpret))(x, w, layer)


# --- stacked_matmul

# float32 is exact but for its sums; bfloat16 rounds weights (many rows) to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}


@pytest.mark.parametrize(
    ("m", "o", "i", "dtype"),
    [(1, 200, 1100, "bfloat16"), (3, 129, 300, "float32"), (70, 40, 300, "bfloat16")],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_prepared_weights_give_the_product_of_their_values(fmt, m, o, i, dtype):
    q, values = quantized((LAYERS, o, i), fmt)
    w = matmul.prepare({"w": q})["w"]
    x = random((m, i), dtype)
    assert w.shape == (LAYERS, o, i)
    assert relative_error(product(x, w), np.asarray(x, np.float64) @ values[1].T) < TOLERANCE[dtype]


@pytest.mark.parametrize("fmt", ["int8", "int8:128:affine", "int8:channel:affine"])
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (35, "float32")])
def test_an_embedding_is_its_own_output_head(fmt, m, dtype):
    q, values = quantized((301, 1100), fmt)
    embedding = matmul.prepare({"embed.weight": q})["embed.weight"]
    x = random((m, 1100), dtype)
    y = product(x, jax.tree.map(lambda part: part[None], embedding), 0)
    assert relative_error(y, np.asarray(x, np.float64) @ values.T) < TOLERANCE[dtype]
    for ids in (jnp.array([[7]]), jnp.array([[0, 300], [5, 5]]), jnp.int32(300)):
        np.testing.assert_array_equal(embedding[ids], np.float32(values)[ids])


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "o", "i"), [(1, 300, 1100), (3, 129, 40)])
def test_float_weights_are_read_as_they_lie(weights, dtype, m, o, i):
    w, x = random((LAYERS, o, i), weights), random((m, i), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)[1].T
    assert relative_error(product(x, w), expected) < TOLERANCE[dtype]


def test_unprepared_4_bit_weights_are_right_too():
    q, values = quantized((LAYERS, 24, 64), "int4:affine")
    x = random((2, 3, 64))
    assert relative_error(product(x, q), np.asarray(x, np.float64) @ values[1].T) < TOLERANCE["float32"]


@pytest.mark.parametrize("fmt", ["int4", "int8:channel"])
def test_a_nan_reaches_its_own_row_of_the_product_only(fmt):
    q, _ = quantized((LAYERS, 140, 300), fmt)
    y = product(random((3, 300)).at[1, 299].set(jnp.nan), matmul.prepare({"w": q})["w"])
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[jnp.array([0, 2])]).all()


def test_scales_widen_from_float16_bits_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    finite = np.isfinite(halves)
    widened = np.asarray(matmul._widen_scales(jnp.asarray(bits)))[finite]
    np.testing.assert_array_equal(widened, halves[finite].astype(np.float32))


def test_prepared_bytes_are_the_true_ones():
    q, _ = quantized((LAYERS, 256, 512), "int4:64")
    assert matmul.prepare({"w": q})["w"].nbytes == q.nbytes


# --- cache attention

SLOTS = 2


def attend_float64(q, k, v, slot, lengths, scale, window, softcap):
    """The definition, one query at a time."""
    k, v = (c.codes * np.asarray(c.scale)[..., None] if isinstance(c, QuantizedRows) else c for c in (k, v))
    q, k, v = (np.asarray(a, np.float64) for a in (q, k[slot], v[slot]))
    out = np.zeros(q.shape)
    per_kv = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        last = int(lengths[b]) + t
        first = max(0, last - window + 1) if window else 0
        keys, values = (c[b, n // per_kv, first : last + 1] for c in (k, v))
        scores = keys @ q[b, t, n] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values / weights.sum()
    return out


def poisoned_cache(lengths, t, kv, s, h, dtype):
    """A cache whose rows beyond what the queries may see are NaN."""
    cache = np.array(random((SLOTS, len(lengths), kv, s, h), np.float32))
    for b, length in enumerate(lengths):
        cache[:, b, :, length + t :] = np.nan
    cache[0] = np.nan  # another slot
    return quantize_rows(jnp.asarray(cache)) if dtype == "int8" else jnp.asarray(cache, dtype)


ATTENTION_CASES = {
    # lengths, T, N, K, S, H, window, softcap
    "decode": ([5, 130, 0], 1, 4, 2, 300, 64, 0, 0.0),
    "decode, wide heads": ([5, 130], 1, 4, 4, 144, 128, 0, 0.0),
    "decode, window": ([290, 3], 1, 6, 2, 300, 10, 7, 0.0),
    "decode, window, several blocks": ([1000, 700], 1, 2, 1, 1100, 128, 200, 0.0),
    "decode, soft-cap": ([17], 1, 2, 1, 96, 16, 0, 5.0),
    "prefill": ([0, 9], 16, 4, 2, 64, 24, 0, 0.0),
    "prefill, several blocks": ([600, 3], 40, 4, 1, 700, 128, 0, 0.0),
    "prefill, window, soft-cap": ([600, 3], 33, 2, 2, 700, 12, 50, 8.0),
    "prefill, blocks of queries": ([1, 30], 70, 32, 1, 128, 16, 0, 0.0),
}


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        ("float32", "float32", 1e-5),
        ("bfloat16", "bfloat16", 2e-2),
        ("float32", "int8", 1e-5),
    ],
)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_sees_what_its_definition_says(case, dtype, kv_dtype, tolerance):
    lengths, t, n, kv, s, h, window, softcap = ATTENTION_CASES[case]
    k, v = (poisoned_cache(lengths, t, kv, s, h, kv_dtype) for _ in range(2))
    q = random((len(lengths), t, n, h), dtype)
    attend = jax.jit(functools.partial(attention.attend, softcap=softcap, interpret=True))
    y = attend(q, k, v, 1, jnp.array(lengths), scale=0.1, window=window)
    expected = attend_float64(q, k, v, 1, lengths, 0.1, window, softcap)
    assert np.abs(np.asarray(y) - expected).max() < tolerance


def test_queries_beyond_the_cache_are_harmless():
    k, v = (poisoned_cache([60], 4, 1, 64, 16, np.float32) for _ in range(2))
    q = random((1, 16, 2, 16))
    attend = functools.partial(attention.attend, scale=0.1, softcap=0.0, interpret=True)
    y = attend(q, k, v, 1, jnp.array([60]), window=jnp.int32(3))  # 4 real tokens and 12 of padding
    expected = attend_float64(q[:, :4], k, v, 1, [60], 0.1, 3, 0.0)
    assert np.abs(np.asarray(y)[:, :4] - expected).max() < 1e-5


@pytest.mark.parametrize("h", [128, 20])  # tiles of rows, and turned ones
@pytest.mark.parametrize(
    ("lengths", "new", "t", "s"),
    [([0, 37, 99], [1, 1, 0], 1, 100), ([0, 14, 300], [40, 5, 0], 40, 333), ([90, 0], [8, 3], 16, 96)],
)
def test_rows_are_written_behind_those_there_are_and_nowhere_else(lengths, new, t, s, h):
    cache, rows = random((SLOTS, len(lengths), 2, s, h)), random((len(lengths), t, 2, h))
    expected = np.array(cache)
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for i in range(min(count, s - length)):
            expected[1, b, :, length + i] = rows[b, i]
    write = jax.jit(functools.partial(attention.write_rows, interpret=True))
    np.testing.assert_array_equal(write(cache, rows, 1, jnp.array(lengths), jnp.array(new)), expected)
    found = write(quantize_rows(cache), rows, 1, jnp.array(lengths), jnp.array(new))
    for part, wanted in zip(found, quantize_rows(jnp.asarray(expected)), strict=True):
        np.testing.assert_array_equal(part, wanted)


# --- races


def test_the_kernels_have_no_races():
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    q, values = quantized((LAYERS, 300, 256), "int4:affine")
    x = random((3, 256))
    y = product(x, matmul.prepare({"w": q})["w"], interpret=params)
    assert relative_error(y, np.asarray(x, np.float64) @ values[1].T) < TOLERANCE["float32"]
    assert not races_found()

    cache, rows = random((SLOTS, 2, 1, 160, 128)), random((2, 20, 1, 128))
    lengths, new = jnp.array([130, 7]), jnp.array([20, 18])
    written = attention.write_rows(cache, rows, 1, lengths, new, interpret=params)
    plain = attention.write_rows(cache, rows, 1, lengths, new, interpret=True)
    np.testing.assert_array_equal(written, plain)
    assert not races_found()

    query = random((2, 20, 2, 128))
    attend = functools.partial(attention.attend, scale=0.1, window=jnp.int32(0), softcap=0.0)
    y = attend(query, written, written, 1, lengths, interpret=params)
    expected = attend_float64(query, written, written, 1, lengths, 0.1, 0, 0.0)
    assert np.abs(np.asarray(y)[0] - expected[0]).max() < 1e-5
    assert not races_found()


def races_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


# --- the whole model


def interpreted():
    kernels = pallas_tpu()
    wrap = functools.partial
    return Kernels(
        "pallas, interpreted",
        stacked_matmul=wrap(kernels.stacked_matmul, interpret=True),
        decode_attention=wrap(kernels.decode_attention, interpret=True),
        prefill_attention=wrap(kernels.prefill_attention, interpret=True),
        write_rows=wrap(kernels.write_rows, interpret=True),
        prepare=kernels.prepare,
    )


def quantize_params(config, params, fmt):
    """Parameters as loading with `--quant` gives them."""
    out = {}
    for param in parameter_table(config):
        value, chosen = params[param.name], quant.format_for(param, QuantFormat.parse(fmt))
        if chosen is not None:
            value = quant.quantize(np.asarray(value), chosen, name=param.name)
        out[param.name] = jax.tree.map(jnp.asarray, value)
    return out


def two_steps(config, params, kernels):
    """Logits after a ragged prefill, and after one more token of each sequence."""
    float32 = jnp.dtype(jnp.float32)
    params = kernels.prepare(params)
    forward = jax.jit(model.forward)
    cache = empty_cache(config, slots=3, batch=2, capacity=32, dtype=float32)
    plan, out = LayerPlan.identity(config.num_layers).arrays(config.num_layers), []
    for tokens, lengths, new in (
        ([[3, 1, 4, 1], [5, 9, 0, 0]], [0, 0], [4, 2]),
        ([[2], [6]], [4, 2], [1, 1]),
    ):
        tokens, lengths, new = (np.array(a, np.int32) for a in (tokens, lengths, new))
        step = step_of(config, params, plan, tokens, lengths, new, lengths + new, kernels=kernels)
        hidden, cache = forward(step, cache)
        out.append(model.logits(step, hidden[jnp.arange(2), new - 1]))
    return np.asarray(out)


def test_a_model_computes_the_same_with_either_kernels(tiny_model):
    config, params = tiny_model("gemma2")  # windows, soft-caps, and a head that is the 8-bit embedding
    params = quantize_params(config, params, "int4:affine")
    expected = two_steps(config, params, REFERENCE)
    assert np.abs(two_steps(config, params, interpreted()) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_tpu_takes_the_pallas_kernels_by_default():
    assert select("auto", "tpu") is pallas_tpu()


# --- sharded: in a subprocess with four devices

SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.pallas import test_tpu_kernels as t
from jaxchat.pallas.cache_attention import tpu as attention
from jaxchat.pallas.stacked_matmul import tpu as matmul
mesh = jax.make_mesh((1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
def place(tree, *spec):
    def put(a):
        split = [s if s and n % 4 == 0 else None for s, n in zip(spec, a.shape)]
        return jax.device_put(a, NamedSharding(mesh, P(*split)))
    return jax.tree.map(put, tree)
rows, columns = (None, "model"), (None, None, "model")
for fmt, o, i, spec in (
    ("int4", 300, 256, rows), ("int8:channel", 200, 512, rows),
    ("int4:affine", 200, 1024, columns), ("int8:channel", 40, 512, columns), ("int8", 200, 160, columns),
):
    q, values = t.quantized((2, o, i), fmt)
    w = matmul.prepare({"w": place(q, *spec)})["w"]
    assert ("model" in w.axes) == (i != 160)
    x = t.random((2, 3, i))
    y = t.product(place(x), w)
    assert t.relative_error(y, np.asarray(x, np.float64) @ values[1].T) < 2e-6, (fmt, spec)
q, values = t.quantized((304, 128), "int8")
w = jax.tree.map(lambda a: a[None], matmul.prepare({"embed.weight": place(q, "model")})["embed.weight"])
x = t.random((2, 128))
assert t.relative_error(t.product(place(x), w, 0), np.asarray(x, np.float64) @ values.T) < 2e-6
for kv in (4, 2):
    spec = (None, None, "model") if kv == 4 else ()
    cache, rows, q = t.random((2, 2, kv, 64, 16)), t.random((2, 5, kv, 16)), t.random((2, 5, 8, 16))
    lengths, new = jnp.array([3, 40]), jnp.array([5, 5])
    def step(cache, rows, q, **options):
        cache = attention.write_rows(cache, rows, 1, lengths, new, **options)
        return attention.attend(q, cache, cache, 1, lengths, scale=0.1, window=0, softcap=0.0, **options)
    step = jax.jit(functools.partial(step, interpret=True))
    for cache in (cache, t.quantize_rows(cache))[: 2 if kv == 4 else 1]:
        error = jnp.abs(step(place(cache, *spec), place(rows), place(q)) - step(cache, rows, q)).max()
        assert error < 1e-6, (kv, error)
print("ok")
"""


def test_a_mesh_of_four_computes_what_one_device_does():
    done = run_python(["-c", SHARDED], XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done == "ok"


def run_python(arguments, **environment):
    """The last line of a Python process's output; libtpu may abort a process that asks for too much."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **environment}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


# --- ahead of time

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jaxchat[tpu]"'
)


@needs_libtpu
@pytest.mark.parametrize(
    ("shape", "quantization", "kv_dtype", "target", "mesh"),
    [
        *(
            ("llama-3-8b", "int4", "bfloat16", target, mesh)
            for target in ("v5e", "v6e", "tpu7x")
            for mesh in ("1x1", "2x2")
        ),
        ("llama-3-8b", "none", "bfloat16", "v5e", "2x2"),
        ("llama-3-8b", "none", "bfloat16", "v6e", "1x1"),
        ("tinyllama-1.1b", "int8", "bfloat16", "v6e", "1x1"),
        ("tinyllama-1.1b", "int8", "int8", "v5e", "2x2"),
        ("qwen2.5-0.5b", "int4:64", "int8", "v5e", "1x1"),
        ("qwen2.5-0.5b", "int8:channel", "bfloat16", "v5e", "2x2"),
    ],
)
def test_steps_compile_ahead_of_time_and_copy_neither_weights_nor_cache(
    shape, quantization, kv_dtype, target, mesh
):
    # Three layers, and a cache long enough that copying it, or a large weight, would show.
    command = ["-m", "benchmarks.aot", "--target", target, "--mesh", mesh, "--shape", shape]
    command += ["--quant", quantization, "--kv_dtype", kv_dtype, "--layers", "3", "--context", "32768"]
    result = json.loads(run_python(command))
    assert result["ok"]
    for step, activations in ((result["decode"], 4 << 20), (result["prefill"], 48 << 20)):
        assert step["large_copies"] == 0
        assert step["temp_bytes"] < activations
        assert step["alias_bytes"] > 0  # the cache
    assert result["draw"]["large_copies"] == 0
    assert result["draw"]["temp_bytes"] < 4 << 20


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
def test_kernels_compile_for_every_format_and_odd_shapes(target):
    assert (
        run_python(["-c", f"from tests.pallas import test_tpu_kernels as t; t.compile_kernels({target!r})"])
        == "ok"
    )


def compile_kernels(target):
    """In a subprocess: compiles the kernels for one chip; a copy of an operand would show as temporaries."""
    from jax.sharding import SingleDeviceSharding

    from benchmarks import aot

    jax.config.update("jax_platforms", "cpu")
    here = SingleDeviceSharding(aot.devices_of(aot.TARGETS[target], "1x1")[0])

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def check(function, *arguments, donate=(), limit=1 << 20):
        compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < limit, (function, arguments)

    scalar = abstract((), jnp.int32)
    for fmt in (*FORMATS, "int8:channel:affine", "none"):
        for m, o, i in ((1, 32001, 1100), (3, 896, 896), (40, 4864, 896)):
            if fmt == "none":
                w = (
                    abstract((1, o, i), jnp.bfloat16)
                    if i % 128 == 0
                    else abstract((1, o, 1152), jnp.bfloat16)
                )
            else:
                parts = quant.empty((8, o, i), QuantFormat.parse(fmt))
                parts = jax.tree.map(lambda part: abstract(part.shape, part.dtype), parts)
                w = matmul.prepare({"w": parts})["w"]
            check(matmul.stacked_matmul, abstract((m, w.shape[-1]), jnp.bfloat16), w, scalar)
    for b, t, n, kv, s, h, softcap in (
        (1, 1, 32, 8, 2048, 128, 0.0),
        (2, 16, 14, 2, 1024, 64, 0.0),
        (3, 1, 8, 4, 1000, 256, 50.0),
    ):
        shape, lengths = (4, b, kv, s, h), abstract((b,), jnp.int32)
        codes = QuantizedRows(abstract(shape, jnp.int8), abstract(shape[:-1], jnp.float32))

        def step(q, rows, k, v, slot, lengths, scale, window, softcap=softcap):
            k, v = (attention.write_rows(c, rows, slot, lengths, lengths) for c in (k, v))
            return attention.attend(q, k, v, slot, lengths, scale=scale, window=window, softcap=softcap), k, v

        for cache in (abstract(shape, jnp.bfloat16), codes):
            check(
                step,
                abstract((b, t, n, h), jnp.bfloat16), abstract((b, t, kv, h), jnp.bfloat16), cache, cache,
                scalar, lengths, abstract((), jnp.float32), scalar, donate=(2, 3),
            )  # fmt: skip
    print("ok")
