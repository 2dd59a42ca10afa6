"""x @ w[layer].T over a stack of weights: every implementation against float64, on random inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.stacked_matmul import cpu, reference
from jaxchat.quant import QuantizedTensor, dequantize

FLOATS = ("float32", "bfloat16", "float16")
KINDS = (*FLOATS, 8, 4)
GROUPS = (32, 64, 128, 0)  # 0: one group a row
SHAPES = ((64, 128), (33, 172), (100, 96), (257, 1056), (7, 31), (1, 1))  # O, I
LAYERS = 3

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROUNDING = 1e-6
"""Error of float32 sums, relative to the norms of x and of the weight's row."""


def rounded(steps):
    """The same for x in integers up to `steps` per 32 values: half a step each: sqrt(32) / 2 in norm."""
    return 32**0.5 / 2 / steps + ROUNDING


class Implementation(NamedTuple):
    run: Callable
    rows: tuple[int, ...]  # of x, to be tested
    fine: float = ROUNDING  # error where 8-bit weights meet a few tokens of a sequence
    coarse: float = ROUNDING  # with 4-bit weights, or many tokens
    bfloat16: float = ROUNDING  # where bfloat16 weights meet many tokens

    def tolerance(self, x, w):
        few = x.ndim == 2 or x.shape[-2] < cpu.FEW_TOKENS
        if not isinstance(w, QuantizedTensor):
            return self.bfloat16 if w.dtype == np.uint16 and not few else ROUNDING
        return self.fine if few and w.bits == 8 else self.coarse


def native_matmul(isa):
    bfloat16 = 2**-9 + ROUNDING if native.multiplies_bfloat16(isa) else ROUNDING
    run = jax.jit(functools.partial(cpu.stacked_matmul, isa=isa))
    rows = (1, 2, 3, 5, 8, 9, 16, 23, 40)
    return Implementation(run, rows, fine=rounded(16256), coarse=rounded(127), bfloat16=bfloat16)


@pytest.fixture(params=["reference", *native.instruction_sets()])
def matmul(request):
    if request.param == "reference":
        return Implementation(jax.jit(reference.stacked_matmul), rows=(1, 3, 16))
    return native_matmul(request.param)


class Case(NamedTuple):
    """A stack of weights [L, O, I]."""

    w: np.ndarray | QuantizedTensor  # numpy
    values: np.ndarray  # float64
    norms: np.ndarray  # [L, O]: what errors are relative to

    def arrays(self):
        return jax.tree.map(jnp.asarray, self.w)


def float_case(rng, dtype, shape):
    w = normal(rng, (LAYERS, *shape))
    if dtype == "bfloat16":  # an engine keeps its bits on CPU
        w = (w.view(np.uint32) >> 16).astype(np.uint16)
        values = (w.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        w = w.astype(dtype)
        values = w.astype(np.float64)
    return Case(w, values, np.linalg.norm(values, axis=-1))


def quantized_case(rng, bits, shape, group=32, affine=False, scale_dtype="float16"):
    """Random codes, not those of any quantizer: every bit pattern occurs. The padding holds codes too."""
    rows, columns = shape
    group = group or -(-columns // 32) * 32
    padded = -(-columns // group) * group
    low, high, dtype, width = (-128, 128, np.int8, padded) if bits == 8 else (0, 256, np.uint8, padded // 2)
    scales = (rng.standard_normal((LAYERS, rows, padded // group)) * 1e-2).astype(scale_dtype)
    mins = (rng.standard_normal(scales.shape) * 1e-1).astype(scale_dtype) if affine else None
    codes = rng.integers(low, high, (LAYERS, rows, width), dtype=dtype)
    w = QuantizedTensor(codes=codes, scales=scales, mins=mins, bits=bits, group=group, columns=columns)
    return Case(w, *values_and_norms(w))


def values_and_norms(w):
    values = dequantize(w).astype(np.float64)
    norms = np.linalg.norm(values, axis=-1)
    if w.affine:  # code * scale and the offset may cancel
        mins = np.repeat(w.mins.astype(np.float64), w.group, axis=-1)[..., : w.columns]
        norms = norms + 2 * np.linalg.norm(mins, axis=-1)
    return values, norms


def case_of(rng, kind, shape, **form):
    return (float_case if kind in FLOATS else quantized_case)(rng, kind, shape, **form)


def assert_product(matmul, y, x, case, layer):
    x64 = x.astype(np.float64)
    error = np.abs(np.asarray(y) - x64 @ case.values[layer].T)
    bound = matmul.tolerance(x, case.w) * np.linalg.norm(x64, axis=-1, keepdims=True) * case.norms[layer]
    form = case.w.format_name if isinstance(case.w, QuantizedTensor) else case.w.dtype
    worst = (error / np.maximum(bound, 1e-35)).max()  # below are no outputs that float32 could hold well
    assert worst <= 1, f"{form} {case.w.shape}, x {x.shape}: {worst} x the bound"


def check(matmul, rng, cases, rows):
    """Products with [rows, I] or [1, rows, I]. All are compiled together: compiling is most of the time."""
    leads = [((m,) if rng.random() < 0.5 else (1, m), case) for case in cases for m in rows]
    pairs = [(normal(rng, (*lead, case.w.shape[-1])), case) for lead, case in leads]

    @jax.jit
    def run(inputs, weights, layer):
        return [matmul.run(x, w, layer) for x, w in zip(inputs, weights, strict=True)]

    layer = int(rng.integers(LAYERS))
    outputs = run([x for x, _ in pairs], [case.arrays() for _, case in pairs], jnp.int32(layer))
    for y, (x, case) in zip(outputs, pairs, strict=True):
        assert_product(matmul, y, x, case, layer)


def normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_weights(matmul, rng, dtype, shape):
    check(matmul, rng, [float_case(rng, dtype, shape)], matmul.rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(matmul, rng, bits, affine, shape):
    forms = [(group, scales) for group in GROUPS for scales in ("float16", "float32")]
    cases = [quantized_case(rng, bits, shape, group, affine, scales) for group, scales in forms]
    # The scales' type and the number of rows are independent: each form meets half of the row counts.
    check(matmul, rng, cases[0::2], matmul.rows[0::2])
    check(matmul, rng, cases[1::2], matmul.rows[1::2])


def test_a_vocabulary_of_odd_size(matmul, rng):
    shape = (32001, 64)
    check(matmul, rng, [quantized_case(rng, 4, shape), float_case(rng, "bfloat16", shape)], rows=(1, 9))


@pytest.mark.parametrize("lead", [(2, 1), (2, 3), (2, 2, 3)], ids=str)
def test_leading_axes_of_x(matmul, rng, lead):
    case = quantized_case(rng, 4, (10, 64))
    x = normal(rng, (*lead, 64))
    y = matmul.run(x, case.arrays(), jnp.int32(2))
    assert y.shape == (*lead, 10)
    assert_product(matmul, y, x, case, 2)


LEADS = [(1,), (5,), (12,), (1, 33)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_a_bad_activation_spoils_its_own_row_and_no_other(matmul, rng, lead, kind, bad):
    w = case_of(rng, kind, (40, 100)).arrays()
    x = normal(rng, (*lead, 100))
    good = np.asarray(matmul.run(x, w, jnp.int32(0)))
    row = lead[-1] // 2
    spoiled = x.copy()
    spoiled[..., row, rng.integers(100)] = bad
    y = np.asarray(matmul.run(spoiled, w, jnp.int32(0)))
    assert not np.isfinite(y[..., row, :]).any()
    others = np.arange(lead[-1]) != row
    np.testing.assert_array_equal(y[..., others, :], good[..., others, :])


@pytest.mark.parametrize("part", ["scales", "mins"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_a_bad_scale_spoils_its_own_output_and_no_other(matmul, rng, lead, bits, part):
    case = quantized_case(rng, bits, (40, 100), affine=True)
    x = normal(rng, (*lead, 100))
    good = np.asarray(matmul.run(x, case.arrays(), jnp.int32(1)))
    spoiled = getattr(case.w, part).copy()
    spoiled[1, 7, 2] = np.nan
    spoiled[0] = np.nan  # another layer: never read
    w = dataclasses.replace(case.w, **{part: spoiled})
    y = np.asarray(matmul.run(x, jax.tree.map(jnp.asarray, w), jnp.int32(1)))
    assert np.isnan(y[..., 7]).all()
    others = np.arange(40) != 7
    np.testing.assert_array_equal(y[..., others], good[..., others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_zeros_give_exact_zeros(matmul, rng, lead, kind):
    w = case_of(rng, kind, (40, 100)).arrays()
    x = normal(rng, (*lead, 100))
    np.testing.assert_array_equal(matmul.run(np.zeros_like(x), w, jnp.int32(0)), 0)
    np.testing.assert_array_equal(matmul.run(x, jax.tree.map(jnp.zeros_like, w), jnp.int32(0)), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_very_small_and_very_large_activations(matmul, rng, lead, magnitude, kind):
    case = case_of(rng, kind, (40, 100))
    x = normal(rng, (*lead, 100)) * np.float32(magnitude)
    assert_product(matmul, matmul.run(x, case.arrays(), jnp.int32(0)), x, case, 0)


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_subnormal_float16_scales(matmul, rng, lead):
    w = quantized_case(rng, 4, (40, 100)).w
    scales = rng.integers(1, 1024, w.scales.shape).astype(np.uint16).view(np.float16)
    w = dataclasses.replace(w, scales=scales)
    case = Case(w, *values_and_norms(w))
    x = normal(rng, (*lead, 100))
    assert_product(matmul, matmul.run(x, case.arrays(), jnp.int32(0)), x, case, 0)


# ---------------------------------------------------------------- the native kernels' variants


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run")
def test_an_instruction_set_that_is_not_here_is_refused(rng):
    w = case_of(rng, "float32", (40, 100)).arrays()
    with pytest.raises(jax.errors.JaxRuntimeError, match="isa names no instruction set that runs here"):
        jax.block_until_ready(cpu.stacked_matmul(normal(rng, (1, 100)), w, jnp.int32(0), isa="mmx"))


def fixed_outputs(isa: str) -> list[np.ndarray]:
    """Of products large enough to be shared among threads, from fixed inputs."""
    rng = np.random.default_rng(0)
    inputs, weights = [], []
    for kind in KINDS:
        for lead in ((1,), (9,), (1, 40)):
            few = kind not in FLOATS or lead[-1] <= cpu.MAX_FLOAT_ROWS
            if few or (kind == "bfloat16" and len(lead) == 2 and native.multiplies_bfloat16(isa)):
                inputs.append(normal(rng, (*lead, 300)))
                weights.append(case_of(rng, kind, (1001, 300)).arrays())

    @jax.jit
    def run(inputs, weights):
        return [cpu.stacked_matmul(x, w, jnp.int32(2), isa=isa) for x, w in zip(inputs, weights, strict=True)]

    return [np.asarray(y) for y in run(inputs, weights)]
