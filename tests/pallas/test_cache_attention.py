"""Attention over the KV cache and the writes to it: every backend against float64, on random inputs.

Backends for other hardware are interpreted; nothing here has run on a TPU or a GPU.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.cache_attention import cases, cpu, gpu, reference, tpu
from jaxchat.pallas.cache_attention.cases import (
    CACHES,
    NAMED,
    SCALE,
    SHAPES,
    SLOT,
    SLOTS,
    SOFTCAPS,
    TOKENS,
    WINDOWS,
    Case,
    drawn,
    in_cache,
    in_float64,
)
from tests.pallas.test_stacked_matmul import BACKENDS

TOLERANCE = 2e-5  # of float32: scores up to 15 are off by some 4e-6, so are the weights of values up to 4
NARROW = 3e-2  # of bfloat16 queries: so are scores and weights rounded


class Backend(NamedTuple):
    attend: Callable
    unwritten: float  # what lies in the rows that no query may see
    caches: tuple[str, ...] = CACHES
    interpreted: bool = False

    def queries(self, cache: str) -> str:
        """What queries over a cache are: with one of bfloat16, interpreted kernels multiply in that."""
        return "bfloat16" if self.interpreted and cache == "bfloat16" else "float32"

    def tolerance(self, cache: str) -> float:
        return NARROW if self.queries(cache) == "bfloat16" else TOLERANCE


@functools.cache
def backend_of(name: str) -> Backend:
    if name == "reference":
        return Backend(reference.attend, 1e30)  # they may be multiplied by 0
    if name in ("tpu", "gpu"):
        attend = functools.partial({"tpu": tpu, "gpu": gpu}[name].attend, interpret=True)
        return Backend(attend, np.nan, ("float32", "bfloat16", "int8"), True)
    return Backend(functools.partial(cpu.attend, isa=name), np.nan)  # it never reads them


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backend_of(request.param)


def normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def attend_all(attend, softcaps, inputs, windows, trees):
    """All are compiled together: compiling is most of the time."""
    return [
        attend(q, k, v, jnp.int32(SLOT), lengths, scale=SCALE, window=window, softcap=softcap, tree=tree)
        for softcap, (q, k, v, lengths), window, tree in zip(softcaps, inputs, windows, trees, strict=True)
    ]


def attend(backend, case: Case, inputs) -> np.ndarray:
    arrays = [jax.tree.map(jnp.asarray, tuple(inputs))]
    window, tree = jnp.int32(case.window), jax.tree.map(jnp.asarray, case.tree)
    return np.asarray(attend_all(backend.attend, (case.softcap,), arrays, [window], [tree])[0])


def check(backend, rng, chosen: list[tuple[Case, str]]):
    """Attention of each case over a form of the cache."""
    inputs = [
        cases.inputs(rng, case, cache, backend.unwritten, backend.queries(cache)) for case, cache in chosen
    ]
    softcaps = tuple(case.softcap for case, _ in chosen)
    windows = [jnp.int32(case.window) for case, _ in chosen]
    arrays = [jax.tree.map(jnp.asarray, tuple(given)) for given in inputs]
    trees = [jax.tree.map(jnp.asarray, case.tree) for case, _ in chosen]
    outputs = attend_all(backend.attend, softcaps, arrays, windows, trees)
    for y, (case, cache), given in zip(outputs, chosen, inputs, strict=True):
        error = np.abs(np.asarray(y, np.float64) - cases.expected(given, case)).max()
        assert error < backend.tolerance(cache), f"{case}, {cache}: {error}"


def test_attention_is_what_its_definition_says(backend, rng):
    """Every named case, over one form of the cache or another."""
    forms = [backend.caches[i % len(backend.caches)] for i in range(len(NAMED))]
    check(backend, rng, list(zip(NAMED.values(), rng.permutation(forms), strict=True)))


def test_samples_of_attention_are_what_their_definition_says(backend, rng):
    """For each number of tokens and form of the cache everything else is drawn; `-m full` takes all."""
    if backend.interpreted:
        pytest.skip("the named cases are theirs")
    chosen = []
    for tokens in TOKENS:
        for cache in backend.caches:
            shape, window = SHAPES[rng.integers(len(SHAPES))], int(rng.choice(WINDOWS))
            chosen.append((drawn(rng, shape, tokens, window, float(rng.choice(SOFTCAPS))), cache))
    check(backend, rng, chosen)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_attention(backend, rng, shape):
    tokens = TOKENS[:2] if backend.interpreted else TOKENS
    for window in WINDOWS:
        every = [(t, softcap, cache) for t in tokens for softcap in SOFTCAPS for cache in backend.caches]
        check(backend, rng, [(drawn(rng, shape, t, window, softcap), cache) for t, softcap, cache in every])


def test_first_and_last_rows_of_the_cache(backend, rng):
    lengths = (0, 0), (0, 63), (63, 5)
    check(backend, rng, [(Case(each, 1, 5, 5, 64, 8), "float32") for each in lengths])


@pytest.mark.parametrize("window", [0, 3])
def test_queries_of_padding_may_lie_beyond_the_cache(backend, rng, window):
    case = Case((60, 20), 4, 4, 2, 64, 16, window)
    # What the padding of a shorter sequence sees is multiplied by 0 in the blocks that others see.
    given = cases.inputs(rng, case, "float32", 1e30 if backend.interpreted else backend.unwritten)
    padded = given._replace(q=np.concatenate([given.q, normal(rng, (2, 12, 4, 16))], axis=1))
    found = attend(backend, case, padded)
    assert np.abs(found[:, :4] - cases.expected(given, case)).max() < TOLERANCE


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_nan_in_a_query_reaches_its_own_head_only(backend, rng, tokens):
    case = Case((40, 3), tokens, 6, 3, 96, 16)
    given = cases.inputs(rng, case, "float32", backend.unwritten)
    good = attend(backend, case, given)
    given.q[1, tokens - 1, 3, 5] = np.nan
    bad = attend(backend, case, given)
    spoiled = np.zeros(good.shape[:3], bool)
    spoiled[1, tokens - 1, 3] = True
    assert np.isnan(bad[spoiled]).all()
    np.testing.assert_array_equal(bad[~spoiled], good[~spoiled])


# --- the native kernel's variants


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run")
def test_an_instruction_set_that_is_not_here_is_refused(rng):
    case = NAMED["decode"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="isa names no instruction set that runs here"):
        attend(
            Backend(functools.partial(cpu.attend, isa="mmx"), 0), case, cases.inputs(rng, case, "float32", 0)
        )


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("name", ["tree, across blocks", "tree, window, soft-cap"])
def test_a_token_of_a_tree_is_attended_to_as_in_decoding_to_the_last_bit(isa, rng, cache, name):
    """So that behind it quantized weights meet the same activations, and round them alike."""
    backend, case = backend_of(isa), NAMED[name]
    given = cases.inputs(rng, case, cache, backend.unwritten)
    found = attend(backend, case, given)
    for token in (0, 1, 7, case.tokens - 1):
        alone, lengths = jax.tree.map(np.copy, given), []
        for row, length in enumerate(case.lengths):
            path = [token]
            while path[-1]:
                path.append(case.parents[row][path[-1]])
            for part, source in zip(jax.tree.leaves(alone[1:3]), jax.tree.leaves(given[1:3]), strict=True):
                for place, node in enumerate(reversed(path)):
                    part[SLOT, row, :, length + place] = source[SLOT, row, :, length + node]
            lengths.append(length + len(path) - 1)
        alone = alone._replace(q=given.q[:, token : token + 1], lengths=np.array(lengths, np.int32))
        one = dataclasses.replace(case, tokens=1, parents=())
        np.testing.assert_array_equal(attend(backend, one, alone)[:, 0], found[:, token])


def fixed_outputs(isa: str) -> list[np.ndarray]:
    """From fixed inputs, work enough to be shared among threads."""
    rng = np.random.default_rng(0)
    shapes = ((2, 8, 2, 64, 700), (1, 5, 5, 80, 1500))
    inputs = [
        tuple(cases.inputs(rng, drawn(rng, shape, t, 0, 0), cache, np.nan))
        for shape in shapes
        for t in (1, 17)
        for cache in CACHES
    ]
    softcaps, windows = (0.0, 30.0) * (len(inputs) // 2), [jnp.int32(600)] * len(inputs)
    arrays, nothing = jax.tree.map(jnp.asarray, inputs), [None] * len(inputs)
    return [np.asarray(y) for y in attend_all(backend_of(isa).attend, softcaps, arrays, windows, nothing)]


# --- write_rows

WRITERS = {
    "reference": (reference.write_rows, CACHES),
    "tpu": (functools.partial(tpu.write_rows, interpret=True), ("float32", "bfloat16", "int8")),
}


WRITES = [  # rows there are, new ones, tokens, capacity
    ([0, 37, 99], [1, 1, 0], 1, 100),
    ([0, 14, 90], [17, 5, 0], 17, 100),  # padding
    ([99, 95, 100], [1, 17, 3], 17, 100),  # beyond the capacity
    ([0, 14, 300], [40, 5, 0], 40, 333),
    ([90, 0], [8, 3], 16, 96),
]


@pytest.mark.parametrize("head_dim", [128, 20])  # on TPUs tiles of rows, and turned ones
@pytest.mark.parametrize("number", range(len(WRITES)))
@pytest.mark.parametrize("writer", WRITERS)
def test_rows_are_written_behind_those_there_are_and_nowhere_else(rng, writer, number, head_dim):
    """Each form of the cache meets some of the writes."""
    (write, forms), (lengths, new, tokens, capacity) = WRITERS[writer], WRITES[number]
    form = forms[(number + head_dim // 128) % len(forms)]
    cache = in_cache(normal(rng, (SLOTS, len(lengths), 2, capacity, head_dim)), form)
    rows = normal(rng, (len(lengths), tokens, 2, head_dim))
    rows[0, 0, 1] = 0
    wanted, added = jax.tree.leaves(jax.tree.map(np.copy, cache)), jax.tree.leaves(in_cache(rows, form))
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for i in range(min(count, capacity - length)):
            for part, row in zip(wanted, added, strict=True):
                part[SLOT, b, :, length + i] = row[b, i]
    found = jax.jit(write)(jax.tree.map(jnp.asarray, cache), rows, SLOT, jnp.array(lengths), jnp.array(new))
    for part, expected in zip(jax.tree.leaves(found), wanted, strict=True):
        assert part.dtype == expected.dtype
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("form", ["float32", "uint16", "int8"])
def test_rows_are_written_in_place(form):
    """Not in bfloat16, a whole cache of which XLA widens on CPU: it is kept as its bits there."""
    cache = jax.tree.map(jnp.asarray, in_cache(np.zeros((SLOTS, 3, 2, 100, 12), np.float32), form))
    parts = jax.tree.leaves(jax.block_until_ready(cache))
    pointers = [part.unsafe_buffer_pointer() for part in parts]
    arguments = np.ones((3, 1, 2, 12), np.float32), SLOT, jnp.array([5, 0, 9]), jnp.array([1, 1, 0])
    write_rows = jax.jit(reference.write_rows, donate_argnums=0)
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
