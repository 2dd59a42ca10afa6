"""The TPU kernels have no races, serve whole models and meshes, and compile for absent chips.

That they compute what the definitions say is in test_stacked_matmul.py and test_cache_attention.py.

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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxchat import model, quant
from jaxchat.engine.session import prepared
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.mixed import MixedTensor
from jaxchat.pallas.backends import REFERENCE, Kernels, pallas_tpu, select
from jaxchat.pallas.cache_attention import tpu as attention
from jaxchat.pallas.cache_attention.cases import SCALE, SLOT, Case, expected, inputs
from jaxchat.pallas.cache_attention.reference import QuantizedRows
from jaxchat.pallas.cache_attention.tree import Tree
from jaxchat.pallas.embedding.tpu import embedding_rows
from jaxchat.pallas.stacked_matmul import tpu as matmul
from jaxchat.pallas.stacked_matmul.cases import error, normal, stack
from jaxchat.pallas.tpu_weights import widen_scales
from jaxchat.quant import QuantFormat
from tests.pallas.test_cache_attention import TOLERANCE
from tests.pallas.test_stacked_matmul import NARROW, ROUNDING
from tests.support.steps import step_of

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORMATS = (
    "int4", "int4:64:affine", "int4:128:f32", "int4:channel", "int4:channel:affine",
    "int8", "int8:64", "int8:128:affine", "int8:channel",
    "int5", "int5:64:affine", "int5:channel:affine", "q4_k", "q5_k", "q6_k",
)  # fmt: skip


def product(x, w, layer=1, interpret=True):
    return jax.jit(functools.partial(matmul.stacked_matmul, interpret=interpret))(x, w, layer)


def laid_out(stack):
    return matmul.prepare(jax.tree.map(jnp.asarray, stack.w), "weight", False)


# --- stacked_matmul: beside the battery in test_stacked_matmul.py


@pytest.mark.parametrize(("fmt", "more"), [("int4:64", 0), ("int5", 0), ("q4_k", 0), ("q6_k", 0.01)])
def test_prepared_weights_stand_for_a_whole_stack_in_as_many_bytes(rng, fmt, more):
    weights = stack(rng, fmt, (256, 2048))
    assert laid_out(weights).shape == weights.w.shape
    assert weights.w.nbytes <= laid_out(weights).nbytes <= weights.w.nbytes * (1 + more)


def check_embedding(rng, matmul, fmt, shape, leads, rows):
    """Rows are those of the values; so is the product, of the embedding as the output head."""
    matrix = stack(rng, fmt, shape, layers=1)
    w = jax.tree.map(lambda part: jnp.asarray(part[0]), matrix.w)
    embedding = matmul.prepare(w, "embedding", True)
    for ids in (jnp.array([[7]]), jnp.array([[0, shape[0] - 1], [5, 5]]), jnp.int32(shape[0] - 1)):
        np.testing.assert_array_equal(rows(embedding, ids), np.float32(matrix.values[0])[ids])
    head = jax.tree.map(lambda part: part[None], embedding)
    for lead, dtype in leads:
        x = normal(rng, (*lead, shape[1]), dtype)
        y = jax.jit(functools.partial(matmul.stacked_matmul, interpret=True))(x, head, 0)
        assert error(y, x, matrix, 0) < (NARROW if dtype == "bfloat16" else ROUNDING)


@pytest.mark.parametrize(
    "fmt", ["int8", "int8:128:affine", "int8:channel:affine", "int4:128", "int5:channel", "q4_k", "q6_k"]
)
def test_an_embedding_is_its_own_output_head(rng, fmt):
    rows = functools.partial(embedding_rows, interpret=True)
    check_embedding(rng, matmul, fmt, (301, 1100), [((1,), "bfloat16"), ((35,), "float32")], rows)


def test_unprepared_4_bit_weights_are_right_too(rng):
    weights, x = stack(rng, "int4:affine", (24, 64)), normal(rng, (2, 3, 64))
    assert error(product(x, jax.tree.map(jnp.asarray, weights.w)), x, weights, 1) < ROUNDING


def test_scales_widen_from_float16_bits_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    finite = np.isfinite(halves)
    widened = np.asarray(widen_scales(jnp.asarray(bits)))[finite]
    np.testing.assert_array_equal(widened, halves[finite].astype(np.float32))


# --- races


def test_the_kernels_have_no_races(rng):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    weights, x = stack(rng, "int4:affine", (300, 256)), normal(rng, (3, 256))
    assert error(product(x, laid_out(weights), interpret=params), x, weights, 1) < ROUNDING
    assert not races_found()

    case = Case((130, 7), 20, 2, 1, 160, 128)
    given = inputs(rng, case, "float32", 0)
    rows = normal(rng, (2, 20, 1, 128))
    lengths, new = jnp.asarray(given.lengths), jnp.array([20, 18])
    written = attention.write_rows(jnp.asarray(given.k), rows, SLOT, lengths, new, interpret=params)
    plain = attention.write_rows(jnp.asarray(given.k), rows, SLOT, lengths, new, interpret=True)
    np.testing.assert_array_equal(written, plain)
    assert not races_found()

    attend = functools.partial(attention.attend, scale=SCALE, window=jnp.int32(0), softcap=0.0)
    y = attend(given.q, written, written, SLOT, lengths, interpret=params)
    wanted = expected(given._replace(k=np.asarray(written), v=np.asarray(written)), case)
    assert np.abs(np.asarray(y) - wanted).max() < TOLERANCE
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
        embedding_rows=wrap(kernels.embedding_rows, interpret=True),
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
    params = prepared(kernels, config, params)
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


@pytest.mark.parametrize("fmt", ["int4:affine", "q5_k"])
def test_a_model_computes_the_same_with_either_kernels(tiny_model, fmt):
    config, params = tiny_model("gemma2")  # windows, soft-caps, and a head that is the embedding
    params = quantize_params(config, params, fmt)
    expected = two_steps(config, params, REFERENCE)
    assert np.abs(two_steps(config, params, interpreted()) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_tpu_takes_the_pallas_kernels_by_default():
    assert select("auto", "tpu") is pallas_tpu()


# --- sharded over four devices


@pytest.fixture(scope="module")
def place():
    """`place(tree, *axes)`: arrays on a mesh of four, split over the axes named where they divide evenly."""
    if len(jax.devices("cpu")) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh(
        (1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4]
    )

    def put(a, spec):
        split = [axis if axis and n % 4 == 0 else None for axis, n in zip(spec, a.shape, strict=False)]
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*split)))

    return lambda tree, *spec: jax.tree.map(lambda a: put(a, spec), tree)


ROWS, COLUMNS = (None, "model"), (None, None, "model")


@pytest.mark.parametrize(
    ("fmt", "shape", "spec"),
    [
        ("int4", (300, 256), ROWS),
        ("int8:channel", (200, 512), ROWS),
        ("int4:affine", (200, 1024), COLUMNS),
        ("int8:channel", (40, 512), COLUMNS),
        ("q4_k", (200, 1024), COLUMNS),
        ("q6_k", (300, 256), ROWS),
        ("int5", (40, 2048), COLUMNS),
        ("int8", (200, 160), COLUMNS),  # five groups: not split
    ],
)
def test_products_of_split_weights_are_those_of_whole_ones(rng, place, fmt, shape, spec):
    weights, x = stack(rng, fmt, shape), normal(rng, (2, 3, shape[1]))
    w = matmul.prepare(place(weights.w, *spec), "weight", False)
    assert ("model" in w.axes) == (shape[1] != 160)
    assert error(product(place(x), w), x, weights, 1) < ROUNDING


@pytest.mark.parametrize("fmt", ["int8", "q6_k"])
def test_an_embedding_split_over_a_mesh_is_the_output_head(rng, place, fmt):
    matrix, x = stack(rng, fmt, (304, 128), layers=1), normal(rng, (2, 128))
    parts = place(jax.tree.map(lambda part: part[0], matrix.w), "model")
    embedding = matmul.prepare(parts, "embedding", True)
    ids = np.array([[0, 75, 76], [303, 200, 152]], np.int32)
    rows = jax.jit(functools.partial(embedding_rows, interpret=True))(embedding, place(ids))
    np.testing.assert_array_equal(rows, np.float32(matrix.values[0])[ids])
    head = jax.tree.map(lambda part: part[None], embedding)
    assert error(product(place(x), head, 0), x, matrix, 0) < ROUNDING


@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("kv_heads", [4, 2])  # split, and on every device
def test_attention_over_a_split_cache_is_that_over_a_whole_one(rng, place, kv_heads, cache):
    case = Case((3, 40), 5, 8, kv_heads, 64, 16, parents=((0, 0, 0, 1, 2), (0, 0, 1, 2, 3)))
    given, tree = inputs(rng, case, cache, 0), jax.tree.map(jnp.asarray, case.tree)
    rows, new = normal(rng, (2, 5, kv_heads, 16)), jnp.array([5, 5])

    @jax.jit
    def step(cache, rows, q):
        cache = attention.write_rows(cache, rows, SLOT, given.lengths, new, interpret=True)
        options = {"scale": SCALE, "window": 0, "softcap": 0.0, "tree": tree, "interpret": True}
        return attention.attend(q, cache, cache, SLOT, given.lengths, **options)

    found = step(place(given.k, None, None, "model"), place(rows), place(given.q))
    whole = step(jax.tree.map(jnp.asarray, given.k), rows, given.q)
    assert np.abs(np.asarray(found) - np.asarray(whole)).max() < 1e-6


def run_python(arguments, **environment):
    """The last line of a Python process's output; libtpu may abort a process that asks for too much."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    # libtpu locks a file against a second process, as if both had a TPU to share.
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    environment = {**os.environ, **ours, **environment}
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
        ("qwen2.5-0.5b", "q5_k", "bfloat16", "v6e", "1x1"),
        ("llama-3-8b", "q4_k", "bfloat16", "v5e", "2x2"),
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
                w = matmul.prepare(parts, "weight", False)
            check(matmul.stacked_matmul, abstract((m, w.shape[-1]), jnp.bfloat16), w, scalar)
    for fmt in ("int4:128", "int5:channel", "q4_k", "q6_k"):
        w = jax.tree.map(
            lambda part: abstract(part.shape, part.dtype), quant.empty((32001, 1100), QuantFormat.parse(fmt))
        )
        for ids in ((1, 1), (3, 40)):
            check(embedding_rows, matmul.prepare(w, "embedding", True), abstract(ids, jnp.int32))
    formats = [QuantFormat.parse(fmt) for fmt in ("q4_k", "q6_k")]
    parts = [
        jax.tree.map(lambda part: abstract(part.shape, part.dtype), quant.empty((4, 4864, 896), fmt))
        for fmt in formats
    ]
    mixed = pallas_tpu().prepared(
        MixedTensor(parts=tuple(parts), part=(0, 1) * 4, row=(0, 0, 1, 1, 2, 2, 3, 3)), "weight", False
    )
    check(
        lambda x, w, layer: pallas_tpu().matmuls(x, [w], [layer]),
        abstract((1, 896), jnp.bfloat16),
        mixed,
        scalar,
    )
    for b, t, n, kv, s, h, softcap, is_tree in (
        (1, 1, 32, 8, 2048, 128, 0.0, False),
        (2, 16, 14, 2, 1024, 64, 0.0, False),
        (3, 1, 8, 4, 1000, 256, 50.0, False),
        (2, 26, 14, 2, 1024, 64, 0.0, True),
    ):
        tree = Tree(*[abstract((b, t), jnp.int32)] * 2) if is_tree else None
        shape, lengths = (4, b, kv, s, h), abstract((b,), jnp.int32)
        codes = QuantizedRows(abstract(shape, jnp.int8), abstract(shape[:-1], jnp.float32))

        def step(q, rows, k, v, slot, lengths, scale, window, tree, softcap=softcap):
            k, v = (attention.write_rows(c, rows, slot, lengths, lengths) for c in (k, v))
            options = {"scale": scale, "window": window, "softcap": softcap, "tree": tree}
            return attention.attend(q, k, v, slot, lengths, **options), k, v

        for cache in (abstract(shape, jnp.bfloat16), codes):
            check(
                step,
                abstract((b, t, n, h), jnp.bfloat16), abstract((b, t, kv, h), jnp.bfloat16), cache, cache,
                scalar, lengths, abstract((), jnp.float32), scalar, tree, donate=(2, 3),
            )  # fmt: skip
    print("ok")
