"""Attention over the KV cache and the writes to it: each implementation against float64, on random inputs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.cache_attention import QuantizedRows, cpu, reference

SHAPES = ((1, 8, 2, 16, 128), (3, 6, 3, 12, 96), (2, 4, 1, 64, 700), (1, 4, 4, 80, 1500), (2, 5, 5, 8, 64))
"""B, N, K, H, S: the blocks of 256 keys are met whole, in part and not at all."""
TOKENS = (1, 3, 17)
WINDOWS = (0, 1, 7, 600)
SOFTCAPS = (0.0, 30.0)
CACHES = (np.float32, ml_dtypes.bfloat16, np.uint16, np.int8)
"""uint16 holds the bits of bfloat16; int8 is codes with a scale for each row."""
SCALE = 0.3
SLOT, SLOTS = 1, 2
TOLERANCE = 2e-5  # of float32: scores up to 15 are off by some 4e-6, so are the weights of values up to 4


class Backend(NamedTuple):
    attend: "functools.partial"
    unwritten: float  # what lies in the rows that no query may see


@functools.cache
def backend_of(name):
    if name == "reference":
        return Backend(reference.attend, 1e30)  # they may be multiplied by 0
    return Backend(functools.partial(cpu.attend, isa=name), np.nan)  # it never reads them


@pytest.fixture(params=["reference", *native.instruction_sets()])
def backend(request):
    return backend_of(request.param)


def normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


class Case(NamedTuple):
    q: np.ndarray
    k: np.ndarray | QuantizedRows
    v: np.ndarray | QuantizedRows
    lengths: np.ndarray


def in_dtype(cache, dtype):
    """Float rows as a cache of `dtype` holds them."""
    if dtype == np.int8:
        scale = np.abs(cache).max(-1) * np.float32(1 / 127)
        with np.errstate(invalid="ignore"):
            codes = np.round(cache / np.where(scale > 0, scale, 1)[..., None])
            return QuantizedRows(np.where(np.isnan(codes), 99, codes).astype(np.int8), scale)
    return cache.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else cache.astype(dtype)


def in_float64(cache):
    if isinstance(cache, QuantizedRows):
        return np.asarray(cache.codes, np.float64) * np.asarray(cache.scale, np.float64)[..., None]
    cache = np.asarray(cache)
    return (cache.view(ml_dtypes.bfloat16) if cache.dtype == np.uint16 else cache).astype(np.float64)


def dtype_of(cache):
    return cache.codes.dtype if isinstance(cache, QuantizedRows) else cache.dtype


def make_case(rng, shape, t, dtype, unwritten, lengths=None):
    b, n, kv, h, s = shape
    if lengths is None:
        lengths = rng.integers(0, s - t + 1, b)
    caches = []
    for _ in range(2):
        cache = normal(rng, (SLOTS, b, kv, s, h))
        cache[1 - SLOT] = unwritten
        for row, length in enumerate(lengths):
            cache[:, row, :, length + t :] = unwritten
        caches.append(in_dtype(cache, dtype))
    return Case(normal(rng, (b, t, n, h)), *caches, np.asarray(lengths, np.int32))


def expected(case, window, softcap):
    """The definition in float64, one sequence at a time."""
    _, t, n, h = case.q.shape
    kv = case.k.shape[2]
    keys, values = in_float64(case.k), in_float64(case.v)
    out = np.empty(case.q.shape)
    for row, length in enumerate(case.lengths):
        k, v = (c[SLOT, row, :, : length + t] for c in (keys, values))  # [K, S, H]
        q = case.q[row].astype(np.float64).reshape(t, kv, n // kv, h)
        scores = np.einsum("tkgh,ksh->tkgs", q, k) * SCALE
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        position, key = np.arange(length, length + t)[:, None], np.arange(length + t)
        visible = (key <= position) & ((key > position - window) if window else True)
        scores = np.where(visible[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row] = np.einsum("tkgs,ksh->tkgh", weights, v).reshape(t, n, h)
    return out


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def attend_all(attend, cases, window):
    """Every case with every softcap, compiled together: compiling is most of the time."""
    return [
        attend(c.q, c.k, c.v, jnp.int32(SLOT), c.lengths, scale=SCALE, window=window, softcap=softcap)
        for c in cases
        for softcap in SOFTCAPS
    ]


def attend_one(attend, case, window=0, softcap=0.0):
    run = jax.jit(functools.partial(attend, softcap=softcap))
    arrays = jax.tree.map(jnp.asarray, (case.q, case.k, case.v))
    return np.asarray(run(*arrays, SLOT, jnp.asarray(case.lengths), scale=SCALE, window=window))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_what_its_definition_says(backend, rng, shape):
    cases = [make_case(rng, shape, t, dtype, backend.unwritten) for t in TOKENS for dtype in CACHES]
    for window in WINDOWS:
        found = iter(attend_all(backend.attend, jax.tree.map(jnp.asarray, cases), jnp.int32(window)))
        for case in cases:
            for softcap in SOFTCAPS:
                error = np.abs(np.asarray(next(found)) - expected(case, window, softcap)).max()
                what = f"T {case.q.shape[1]}, window {window}, softcap {softcap}, {dtype_of(case.k)}"
                assert error < TOLERANCE, f"{what}, lengths {case.lengths}: {error}"


@pytest.mark.parametrize("lengths", [[0, 0], [0, 63], [63, 5]], ids=str)
def test_first_and_last_rows_of_the_cache(backend, rng, lengths):
    case = make_case(rng, (2, 5, 5, 8, 64), 1, np.float32, backend.unwritten, lengths)
    assert np.abs(attend_one(backend.attend, case) - expected(case, 0, 0.0)).max() < TOLERANCE


def test_queries_of_padding_may_lie_beyond_the_cache(backend, rng):
    shape, real = (2, 4, 2, 16, 64), 4
    case = make_case(rng, shape, real, np.float32, backend.unwritten, [60, 20])
    padded = case._replace(q=np.concatenate([case.q, normal(rng, (2, 12, 4, 16))], axis=1))
    found = attend_one(backend.attend, padded)
    assert np.abs(found[:, :real] - expected(case, 0, 0.0)).max() < TOLERANCE


@pytest.mark.parametrize("t", TOKENS)
def test_a_nan_in_a_query_reaches_its_own_head_only(backend, rng, t):
    case = make_case(rng, (2, 6, 3, 16, 96), t, np.float32, backend.unwritten)
    good = attend_one(backend.attend, case)
    case.q[1, t - 1, 3, 5] = np.nan
    bad = attend_one(backend.attend, case)
    spoiled = np.zeros(good.shape[:3], bool)
    spoiled[1, t - 1, 3] = True
    assert np.isnan(bad[spoiled]).all()
    np.testing.assert_array_equal(bad[~spoiled], good[~spoiled])


# --- the native kernel's variants


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run")
def test_an_instruction_set_that_is_not_here_is_refused(rng):
    case = make_case(rng, SHAPES[0], 1, np.float32, 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="isa names no instruction set that runs here"):
        attend_one(functools.partial(cpu.attend, isa="mmx"), case)


def fixed_outputs(isa: str) -> list[np.ndarray]:
    """From fixed inputs, work enough to be shared among threads."""
    rng = np.random.default_rng(0)
    shapes = ((2, 8, 2, 64, 700), (1, 5, 5, 80, 1500))
    cases = [make_case(rng, shape, t, d, np.nan) for shape in shapes for t in (1, 17) for d in CACHES]
    attend = functools.partial(cpu.attend, isa=isa)
    return [np.asarray(y) for y in attend_all(attend, jax.tree.map(jnp.asarray, cases), jnp.int32(600))]


# --- write_rows

write_rows = jax.jit(reference.write_rows, donate_argnums=0)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("lengths", "new", "t"),
    [
        ([0, 37, 99], [1, 1, 0], 1),
        ([0, 14, 90], [17, 5, 0], 17),  # padding
        ([99, 95, 100], [1, 17, 3], 17),  # beyond the capacity
    ],
)
def test_rows_are_written_behind_those_there_are_and_nowhere_else(rng, dtype, lengths, new, t):
    capacity = 100
    cache = in_dtype(normal(rng, (SLOTS, 3, 2, capacity, 12)), dtype)
    rows = normal(rng, (3, t, 2, 12))
    rows[0, 0, 1] = 0
    wanted, added = jax.tree.leaves(jax.tree.map(np.copy, cache)), jax.tree.leaves(in_dtype(rows, dtype))
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for i in range(min(count, capacity - length)):
            for part, row in zip(wanted, added, strict=True):
                part[SLOT, b, :, length + i] = row[b, i]
    found = write_rows(jax.tree.map(jnp.asarray, cache), rows, SLOT, jnp.array(lengths), jnp.array(new))
    for part, expected in zip(jax.tree.leaves(found), wanted, strict=True):
        assert part.dtype == expected.dtype
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int8])
def test_rows_are_written_in_place(dtype):
    """Not in bfloat16, a whole cache of which XLA widens on CPU: it is kept as its bits there."""
    cache = jax.tree.map(jnp.asarray, in_dtype(np.zeros((SLOTS, 3, 2, 100, 12), np.float32), dtype))
    parts = jax.tree.leaves(jax.block_until_ready(cache))
    pointers = [part.unsafe_buffer_pointer() for part in parts]
    arguments = np.ones((3, 1, 2, 12), np.float32), SLOT, jnp.array([5, 0, 9]), jnp.array([1, 1, 0])
    compiled = write_rows.lower(cache, *arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < sum(part.nbytes for part in parts) / 4
    found = jax.tree.leaves(write_rows(cache, *arguments))
    assert all(part.is_deleted() for part in parts)
    assert [part.unsafe_buffer_pointer() for part in found] == pointers


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_element_in_8_bits_is_off_by_more_than_half_a_scale(rng, size):
    rows = normal(rng, (50, 3, 40)) * np.float32(size)
    rows[7] = 0
    found = jax.tree.map(np.asarray, reference.quantize_rows(jnp.asarray(rows)))
    assert found.codes.dtype == np.int8
    np.testing.assert_allclose(found.scale, np.abs(rows).max(-1) / 127, rtol=1e-6)
    error = np.abs(in_float64(found) - rows)
    assert (error <= 0.5001 * found.scale[..., None]).all()
    assert np.abs(found.codes[:7]).max() == 127  # all 8 bits are used
    assert not error[7].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_so_in_8_bits(bad):
    rows = np.ones((2, 4), np.float32)
    rows[0, 2] = bad
    found = reference.quantize_rows(jnp.asarray(rows))
    assert np.isfinite(found.scale).tolist() == [False, True]
