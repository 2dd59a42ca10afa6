"""y + ((x @ a.T) * s) @ b over stacks: every backend against float64, on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.low_rank import cpu, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

BACKENDS = {"reference": lambda *args: reference.add_deltas(*args)}
if native.available():
    BACKENDS |= {
        isa: lambda *args, isa=isa: cpu.add_deltas(*args, isa=isa) for isa in native.instruction_sets()
    }

SHAPES = {  # lead, I, outputs, R
    "one token": ((1, 1), 64, (128, 32, 32), 8),
    "odd sizes": ((2, 1), 37, (51, 7), 3),
    "some tokens": ((2, 3), 100, (300,), 16),
    "many rows": ((3, 5), 20, (33, 64), 5),
    "no token axis": ((4,), 40, (70,), 8),
    "one of each": ((1, 1), 1, (1,), 1),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_deltas_are_added(backend, shape, dtype, rng):
    lead, inputs, outputs, rank = SHAPES[shape]
    x = rng.standard_normal((*lead, inputs), np.float32)
    ys = [rng.standard_normal((*lead, out), np.float32) for out in outputs]
    downs = [rng.standard_normal((3, rank, inputs)).astype(dtype) for _ in outputs]
    ups = [rng.standard_normal((3, rank, out)).astype(dtype) for out in outputs]
    scales = rng.standard_normal((lead[0], rank)).astype(np.float32)
    scales[:, ::3] = 0  # columns that nobody uses
    scales[-1] = 0  # a sequence that uses none
    found = jax.jit(BACKENDS[backend])(x, ys, downs, ups, jnp.int32(1), scales)
    for y, down, up, out in zip(ys, downs, ups, found, strict=True):
        along = scales.reshape(lead[0], *(1,) * (len(lead) - 1), rank).astype(np.float64)
        low = x.astype(np.float64) @ down[1].T.astype(np.float64) * along
        expected = y + low @ up[1].astype(np.float64)
        size = np.abs(y).max() + np.abs(low).max() * np.abs(up[1].astype(np.float64)).max() * rank
        np.testing.assert_allclose(out, expected, atol=1e-6 * size, rtol=0)
        np.testing.assert_array_equal(out[-1], y[-1])  # to the last bit


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_nobody_uses_are_not_read(backend, rng):
    if backend == "reference":
        pytest.skip("XLA multiplies all of them")
    x, y = rng.standard_normal((1, 1, 16), np.float32), rng.standard_normal((1, 1, 24), np.float32)
    down, up = (np.full((1, 4, size), np.nan, np.float32) for size in (16, 24))
    down[:, 1], up[:, 1] = 1, 1
    scales = np.array([[0, 1, 0, 0]], np.float32)
    (out,) = BACKENDS[backend](x, [y], [down], [up], jnp.int32(0), scales)
    np.testing.assert_allclose(out, y + x.sum(), rtol=1e-5, atol=1e-5)
