"""Prompts in blocks of their own, and the means of hidden states: the same numbers in any company."""

import jax
import numpy as np
import pytest

from jaxchat import model
from jaxchat.engine.blocks import BLOCKS, block_of, computed_alike
from jaxchat.engine.session import ContextOverflowError, Engine
from jaxchat.layer_plan import LayerPlan

LENGTHS = (1, 5, 16, 17, 63, 64, 80, 300)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return Engine(*tiny_model("llama", vocab_size=67, max_position_embeddings=512))


def texts(rng):
    return [rng.integers(0, 67, length).tolist() for length in LENGTHS]


def session_of(engine, ids, batch=8):
    session = engine.session(LayerPlan.identity(engine.config.num_layers), batch=batch)
    for row, own in enumerate(ids):
        session.set_ids(own, row)
    return session


def blocks(length):
    at = [0]
    while at[-1] < length:
        at.append(min(at[-1] + block_of(length - at[-1]), length))
    return at


def test_blocks_cover_a_text_and_only_the_last_is_not_full():
    for length in (1, 15, 16, 17, 300, 1023, 1024, 5000):
        sizes = np.diff(blocks(length)).tolist()
        assert sum(sizes) == length
        assert set(sizes[:-1]) <= set(BLOCKS)
        assert sizes == sorted(sizes, reverse=True)


def test_what_two_texts_compute_alike_are_the_blocks_that_both_have(rng):
    for one, other, common in rng.integers(0, 700, (300, 3)).tolist():
        common = min(one, other, common)
        both = [a for a, b in zip(blocks(one), blocks(other), strict=False) if a == b <= common]
        assert computed_alike(one, other, common) == both[-1]
    assert computed_alike(37, 37, 37) == 37


def test_a_cache_is_to_the_last_bit_what_it_is_alone(engine, rng):
    ids = texts(rng)
    session = session_of(engine, ids)
    session.prefill_alike(range(8))
    assert session.cached == [length - 1 for length in LENGTHS]
    for row, own in enumerate(ids):
        alone = session_of(engine, [[], own])
        alone.prefill_alike([1])
        for part, expected in zip(session.cached_rows(row)[:2], alone.cached_rows(1)[:2], strict=True):
            np.testing.assert_array_equal(part, expected)


def test_the_logits_after_such_a_cache_are_the_models(engine, rng):
    ids = texts(rng)
    session = session_of(engine, ids)
    session.prefill_alike(range(8))
    logits = np.asarray(session.prefill())
    expected = np.asarray(session_of(engine, ids).prefill())
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_means_are_of_the_normed_hidden_states_of_all_tokens(engine, rng):
    ids = texts(rng)
    found = session_of(engine, ids).mean_rows(range(8))
    for own, mean in zip(ids, found, strict=True):
        session = session_of(engine, [own], batch=1)
        session._reserve(len(own))
        none, count = np.zeros(1, np.int32), np.full(1, len(own), np.int32)
        step = session.step(np.asarray([own], np.int32), none, count, count)
        hidden, _ = jax.jit(model.forward)(step, session._cache)
        assert mean.dtype == np.float32
        np.testing.assert_allclose(mean, np.asarray(hidden)[0].mean(0), atol=1e-5)
    again = session_of(engine, ids[::-1]).mean_rows(range(8))[::-1]
    np.testing.assert_array_equal(found, again)


def test_a_text_that_is_too_long_is_refused(engine):
    session = session_of(engine, [[1] * 513])
    for run in (session.prefill_alike, session.mean_rows):
        with pytest.raises(ContextOverflowError, match="513 tokens but the context holds 512"):
            run([0])
