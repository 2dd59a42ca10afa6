"""x @ w[layer].T over a stack of weights: every backend against float64, on random inputs.

Backends for other hardware are interpreted; nothing here has run on a TPU or a GPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.stacked_matmul import cases, cpu, gpu, reference, tpu
from jaxchat.pallas.stacked_matmul.cases import FLOATS, KINDS, SHAPES, Case, Stack, normal
from jaxchat.quant import QuantFormat, QuantizedTensor, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROUNDING = 1e-6
"""Error of float32 sums, relative to the norms of x and of the weight's row."""

NARROW = 2**-8 + ROUNDING
"""The same where one side is rounded to bfloat16."""


def rounded(steps):
    """The same for x in integers up to `steps` per 32 values: half a step each: sqrt(32) / 2 in norm."""
    return 32**0.5 / 2 / steps + ROUNDING


FINE, COARSE = rounded(16256), rounded(127)
"""Of the native kernels: a few tokens and 8-bit weights, and other quantized weights or many tokens."""


class Backend(NamedTuple):
    run: Callable
    tolerance: Callable[[Case], float]
    prepare: Callable[[Any], Any] = lambda w: w
    kinds: tuple[str, ...] = KINDS
    bfloat16: str = "uint16"  # the type of an array of them
    interpreted: bool = False

    def weights(self, w: Any) -> Any:
        """Weights in the form the backend reads."""
        if isinstance(w, np.ndarray) and w.dtype.name == "bfloat16":
            w = w.view(self.bfloat16)
        return self.prepare(jax.tree.map(jnp.asarray, w))


def in_bfloat16(case: Case) -> float:
    return NARROW if case.dtype == "bfloat16" else ROUNDING


def native_tolerance(isa: str, case: Case) -> float:
    if case.weights not in FLOATS:
        return FINE if case.weights.startswith("int8") and not case.many else COARSE
    if case.weights == "bfloat16" and case.many and native.multiplies_bfloat16(isa):
        return NARROW
    return in_bfloat16(case) if math.prod(case.lead) > cpu.MAX_FLOAT_ROWS else ROUNDING


@functools.cache
def backend_of(name: str) -> Backend:
    if name == "reference":
        return Backend(reference.stacked_matmul, in_bfloat16)
    if name == "tpu":
        run = functools.partial(tpu.stacked_matmul, interpret=True)
        kinds = tuple(kind for kind in KINDS if kind != "float16")
        return Backend(run, in_bfloat16, lambda w: tpu.prepare(w, "weight", False), kinds, "bfloat16", True)
    if name == "gpu":
        run = functools.partial(gpu.stacked_matmul, interpret=True)

        def tolerance(case: Case) -> float:  # few rows: weights are not rounded, whatever x is
            return in_bfloat16(case) if math.prod(case.lead) > gpu._MAX_ROWS else ROUNDING

        return Backend(run, tolerance, lambda w: gpu.prepare(w, "weight", False), KINDS, "bfloat16", True)
    run = functools.partial(cpu.stacked_matmul, isa=name)
    return Backend(run, functools.partial(native_tolerance, name))


BACKENDS = ("reference", *native.instruction_sets(), "tpu", "gpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backend_of(request.param)


@functools.cache
def compiled(run):
    """Products of pairs of x and weights. All are compiled together: compiling is most of the time."""

    @jax.jit
    def products(pairs, layer):
        return [run(x, w, layer) for x, w in pairs]

    return products


def check(backend, rng, chosen: list[Case]):
    stacks = {key: cases.stack(rng, *key) for key in {(case.weights, case.shape): None for case in chosen}}
    inputs = [normal(rng, (*case.lead, case.shape[1]), case.dtype) for case in chosen]
    prepared = {key: backend.weights(stack.w) for key, stack in stacks.items()}
    pairs = [(x, prepared[case.weights, case.shape]) for x, case in zip(inputs, chosen, strict=True)]
    layer = int(rng.integers(2))
    outputs = compiled(backend.run)(pairs, jnp.int32(layer))
    for y, x, case in zip(outputs, inputs, chosen, strict=True):
        assert y.shape == (*case.lead, case.shape[0])
        assert y.dtype == jnp.float32
        error = cases.error(y, x, stacks[case.weights, case.shape], layer)
        assert error <= backend.tolerance(case), f"{case}: {error}"


def test_products_are_those_of_their_definition(backend, rng):
    """Of every kind a few; `-m full` takes all."""
    check(backend, rng, cases.sample(rng, backend.kinds, each=2 if backend.interpreted else 3))


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_products(backend, rng, kind, shape):
    if kind not in backend.kinds:
        pytest.skip("XLA's own")
    every = cases.every(kind, shape)
    check(backend, rng, every if not backend.interpreted else every[:: 5 if kind in FLOATS else 7])


def test_a_vocabulary_of_odd_size(backend, rng):
    if backend.interpreted:
        pytest.skip("too large to interpret; tests of one backend compile it")
    weights = ("int4", "bfloat16")
    check(backend, rng, [Case(form, (32001, 64), (m,)) for form in weights for m in (1, 9)])


def test_leading_axes_of_x(backend, rng):
    check(backend, rng, [Case("int4", (10, 64), lead) for lead in ((2, 1), (2, 3), (2, 2, 3))])


# ---------------------------------------------------------------- numbers that are not ordinary


SMALL = (40, 100)
PROBED = ("bfloat16", "int8", "int4:affine", "int5", "q4_k", "q6_k")
LEADS = ((1,), (5,), (12,), (1, 33))


class Probe:
    """A product of each kind with each of some x, compiled once for a backend: (number, case, stack, y)."""

    def __init__(self, backend, rng):
        self.backend = backend
        leads, kinds = LEADS, backend.kinds
        if backend.interpreted:  # which takes a second for each of them
            leads, kinds = ((5,), (1, 33)), tuple(kind for kind in PROBED if kind in kinds)
        self.cases = [Case(kind, SMALL, lead) for kind in kinds for lead in leads]
        self.x = [normal(rng, (*case.lead, SMALL[1])) for case in self.cases]
        drawn = {kind: cases.stack(rng, kind, SMALL) for kind in kinds}
        self.stacks = [drawn[case.weights] for case in self.cases]

    def run(self, xs=None, ws=None, layer=0):
        ws = [stack.w for stack in self.stacks] if ws is None else ws
        weights = [self.backend.weights(w) for w in ws]
        pairs = list(zip(self.x if xs is None else xs, weights, strict=True))
        return [np.asarray(y) for y in compiled(self.backend.run)(pairs, jnp.int32(layer))]


@pytest.fixture
def probe(backend, rng):
    return Probe(backend, rng)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_bad_activation_spoils_its_own_row_and_no_other(probe, rng, bad):
    xs = [x.copy() for x in probe.x]
    for x in xs:
        x[..., x.shape[-2] // 2, rng.integers(SMALL[1])] = bad
    for case, good, y in zip(probe.cases, probe.run(), probe.run(xs), strict=True):
        row = case.lead[-1] // 2
        assert not np.isfinite(y[..., row, :]).any(), case
        others = np.arange(case.lead[-1]) != row
        np.testing.assert_array_equal(y[..., others, :], good[..., others, :], str(case))


@pytest.mark.parametrize("part", ["scales", "mins", "super_scales", "super_mins"])
def test_a_bad_scale_spoils_its_own_output_and_no_other(probe, part):
    if probe.backend is backend_of("tpu"):
        pytest.skip("takes float16 scales for finite, as every quantizer's are")
    ws = [stack.w for stack in probe.stacks]
    for i, w in enumerate(ws):
        if isinstance(w, QuantizedTensor) and is_float(getattr(w, part)):
            spoiled = getattr(w, part).copy()
            spoiled[1, 7, 0] = np.nan
            spoiled[0] = np.nan  # another layer: never read
            ws[i] = dataclasses.replace(w, **{part: spoiled})
    found = probe.run(ws=ws, layer=1), probe.run(layer=1)
    for case, stack, w, y, good in zip(probe.cases, probe.stacks, ws, *found, strict=True):
        spoiled = np.arange(SMALL[0]) == (7 if w is not stack.w else -1)
        assert np.isnan(y[..., spoiled]).all(), case
        np.testing.assert_array_equal(y[..., ~spoiled], good[..., ~spoiled], str(case))


def is_float(part):
    return part is not None and np.issubdtype(part.dtype, np.floating)


def test_zeros_give_exact_zeros(probe):
    for case, y in zip(probe.cases, probe.run([np.zeros_like(x) for x in probe.x]), strict=True):
        np.testing.assert_array_equal(y, 0, str(case))
    zeros = [jax.tree.map(np.zeros_like, stack.w) for stack in probe.stacks]
    for case, y in zip(probe.cases, probe.run(ws=zeros), strict=True):
        np.testing.assert_array_equal(y, 0, str(case))


@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_very_small_and_very_large_activations(probe, magnitude):
    xs = [x * np.float32(magnitude) for x in probe.x]
    for case, stack, x, y in zip(probe.cases, probe.stacks, xs, probe.run(xs), strict=True):
        assert cases.error(y, x, stack, 0) <= probe.backend.tolerance(case), case


def test_subnormal_float16_scales(probe, rng):
    stacks = list(probe.stacks)
    for i, stack in enumerate(stacks):
        if isinstance(stack.w, QuantizedTensor):
            part = "super_scales" if stack.w.two_level else "scales"
            shape = getattr(stack.w, part).shape
            scales = rng.integers(1, 1024, shape).astype(np.uint16).view(np.float16)
            stacks[i] = cases.stack_of(dataclasses.replace(stack.w, **{part: scales}))
    found = probe.run(ws=[stack.w for stack in stacks])
    for case, stack, x, y in zip(probe.cases, stacks, probe.x, found, strict=True):
        assert cases.error(y, x, stack, 0) <= probe.backend.tolerance(case), case


def test_a_quantizers_own_codes(backend, rng):
    """With a group of zeros, as it gives them."""
    for fmt in ("int8", "int4:affine"):
        w = normal(rng, (2, *SMALL))
        w[..., 0, :32] = 0
        stack = cases.stack_of(quantize(w, QuantFormat.parse(fmt), name="w"))
        x = normal(rng, (3, SMALL[1]))
        (y,) = compiled(backend.run)([(x, backend.weights(stack.w))], jnp.int32(1))
        assert cases.error(y, x, stack, 1) <= backend.tolerance(Case(fmt, SMALL, (3,)))


# ---------------------------------------------------------------- the native kernels' variants


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run")
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("form", ["int4:affine", "int5:affine", "q4_k", "q5_k"])
def test_offsets_meet_x_as_the_codes_do(rng, isa, form):
    """Then what rounding x costs depends on the weights, and not on codes and offsets that nearly cancel."""
    w = quantize(normal(rng, (1, 64, 1024)), QuantFormat.parse(form), name="w")
    stack = cases.stack_of(w)
    stack = stack._replace(norms=np.linalg.norm(stack.values, axis=-1))
    typical = rounded(127) / 20  # rounding errors of opposite signs: measured 1 / 40 of the bound
    for lead in ((4,), (1, 40)):
        x = normal(rng, (*lead, 1024))
        y = cpu.stacked_matmul(x, jax.tree.map(jnp.asarray, w), jnp.int32(0), isa=isa)
        assert cases.error(y, x, stack, 0) <= typical


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run")
def test_an_instruction_set_that_is_not_here_is_refused(rng):
    with pytest.raises(jax.errors.JaxRuntimeError, match="isa names no instruction set that runs here"):
        jax.block_until_ready(
            cpu.stacked_matmul(normal(rng, (1, 100)), jnp.ones((1, 40, 100)), jnp.int32(0), isa="mmx")
        )


def fixed_outputs(isa: str) -> list[np.ndarray]:
    """Of products large enough to be shared among threads, from fixed inputs."""
    rng = np.random.default_rng(0)
    backend, pairs = backend_of(isa), []
    for kind in KINDS:
        for lead in ((1,), (9,), (1, 40)):
            few = kind not in FLOATS or math.prod(lead) <= cpu.MAX_FLOAT_ROWS
            if few or (kind == "bfloat16" and len(lead) == 2 and native.multiplies_bfloat16(isa)):
                stack: Stack = cases.stack(rng, kind, (1001, 300))
                pairs.append((normal(rng, (*lead, 300)), backend.weights(stack.w)))
    return [np.asarray(y) for y in compiled(backend.run)(pairs, jnp.int32(1))]
