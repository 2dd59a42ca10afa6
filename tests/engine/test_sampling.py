"""Sampling is a distribution: each parameter means its definition, alone and combined, in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.engine.sampling import SamplingParams, adjust_logits, filter_logits, sample
from jaxchat.errors import UsageError

BATCH, VOCAB = 6, 97
COMPILED = jax.jit(sample)
FILTER = jax.jit(filter_logits)

FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {
        "temperature": [0.5, 0.0, 1.0, 2.0, 1.0, 1.0],
        "top_k": [0, 3, 3, 9, 0, 1],
        "top_p": [1, 1, 0.5, 1, 0.5, 1],
    },
]
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]},
]


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(scale=3.0, size=(BATCH, VOCAB)).astype(np.float32)


@pytest.fixture
def history():
    """prompt_mask bool [B, V], counts int32 [B, V]."""
    rng = np.random.default_rng(1)
    return rng.random((BATCH, VOCAB)) < 0.3, rng.poisson(0.4, (BATCH, VOCAB)).astype(np.int32)


def no_history(batch=BATCH, vocab=VOCAB):
    return np.zeros((batch, vocab), bool), np.zeros((batch, vocab), np.int32)


def keys(batch=BATCH, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def reference_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definitions, for one sequence [V], in float64 and by sorting."""
    logits = logits.astype(np.float64)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = softmax(logits / temperature)
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    reached = np.searchsorted(np.cumsum(probs[order]), top_p)  # the first prefix that holds top_p
    probs[order[reached + 1 :]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


def per_row(settings):
    return [{k: np.broadcast_to(v, BATCH)[row] for k, v in settings.items()} for row in range(BATCH)]


def kept(probs, **settings):
    """Which token ids are left of a distribution given as probabilities."""
    filtered = FILTER(jnp.log(jnp.array([probs], jnp.float32)), SamplingParams.make(1, **settings))
    return np.flatnonzero(filtered[0] > -np.inf).tolist()


# --- definitions


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_filters_match_their_definitions(logits, settings):
    filtered = FILTER(logits, SamplingParams.make(BATCH, **settings))
    expected = [
        reference_distribution(row, **one) for row, one in zip(logits, per_row(settings), strict=True)
    ]
    np.testing.assert_array_equal(filtered > -np.inf, np.array(expected) > 0)
    np.testing.assert_allclose(jax.nn.softmax(filtered), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
def test_penalties_match_their_definitions(logits, history, settings):
    prompt_mask, counts = history
    adjusted = adjust_logits(logits, SamplingParams.make(BATCH, **settings), prompt_mask, counts)
    expected = logits.astype(np.float64)
    for row, one in enumerate(per_row(settings)):
        for token in range(VOCAB):
            logit, count = expected[row, token], counts[row, token]
            if prompt_mask[row, token] or count:
                penalty = one.get("repetition_penalty", 1.0)
                logit = logit / penalty if logit > 0 else logit * penalty
            logit -= (
                one.get("presence_penalty", 0.0) * (count > 0) + one.get("frequency_penalty", 0.0) * count
            )
            expected[row, token] = logit
    np.testing.assert_allclose(adjusted, expected, rtol=1e-6, atol=1e-6)


def test_penalties_that_are_off_change_no_bit(logits, history):
    np.testing.assert_array_equal(adjust_logits(logits, SamplingParams.make(BATCH), *history), logits)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [0]),
        (0.5, [0]),
        (0.51, [0, 1]),
        (0.75, [0, 1]),
        (0.76, [0, 1, 2]),
        (0.875, [0, 1, 2]),
        (0.876, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, expected):
    assert kept([0.5, 0.25, 0.125, 0.125], top_p=top_p) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [0, 1, 2, 3]),  # all tokens tied with the second
        ({"top_p": 0.4}, [0, 1]),  # of tied tokens as many as needed, lowest ids
        ({"top_p": 0.5}, [0, 1, 2]),
        ({"min_p": 0.5}, [0, 1, 2, 3]),
        ({"temperature": 0.0}, [0]),
    ],
)
def test_ties(settings, expected):
    assert kept([0.25, 0.1875, 0.1875, 0.1875, 0.09375, 0.09375], **settings) == expected


def test_top_p_is_taken_of_what_top_k_left():
    # 0.5 and 0.3 are renormalized to 0.625 and 0.375: the first alone reaches 0.6.
    assert kept([0.5, 0.3, 0.2], top_p=0.6) == [0, 1]
    assert kept([0.5, 0.3, 0.2], top_p=0.6, top_k=2) == [0]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_at_least_the_top_token_is_left(settings):
    assert kept([0.2, 0.5, 0.3], **settings) == [1]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    filtered = FILTER(jnp.array([[50.0, 60.0, 59.0]]), SamplingParams.make(1, temperature=1e-37))
    assert jax.nn.softmax(filtered).tolist() == [[0.0, 1.0, 0.0]]


def test_a_greedy_sequence_takes_the_first_of_tied_tokens_whatever_the_filters():
    logits = jnp.zeros((2, 8))
    params = SamplingParams.make(2, temperature=[0.0, 1.0], top_k=3, top_p=0.01, min_p=1.0)
    assert (FILTER(logits, params) > -np.inf).sum(axis=-1).tolist() == [1, 1]
    assert COMPILED(keys(2), logits, params, *no_history(2, 8))[0][0] == 0


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {}], ids=str)
def test_tokens_forbidden_by_the_caller_stay_forbidden(settings):
    assert kept([0.6, 0.0, 0.4, 0.0], **settings) == [0, 2]


# --- the draw


def frequencies(row, settings, draws=200_000):
    tokens, _ = COMPILED(
        jax.random.split(jax.random.key(7), draws),
        jnp.broadcast_to(jnp.asarray(row, jnp.float32), (draws, len(row))),
        SamplingParams.make(draws, **settings),
        *no_history(draws, len(row)),
    )
    return np.bincount(tokens, minlength=len(row)) / draws


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
# Tokens are drawn by blocks of 256: part of one, two and a part.
@pytest.mark.parametrize(("vocab", "draws", "scale"), [(12, 40_000, 1.5), (700, 20_000, 0.7)])
def test_draws_follow_the_distribution(settings, vocab, draws, scale):
    row = np.random.default_rng(3).normal(scale=scale, size=vocab)
    expected = reference_distribution(row, **settings)
    observed = frequencies(row, settings, draws)
    assert observed[expected == 0].sum() == 0
    support = expected > 0
    chi2 = draws * ((observed - expected)[support] ** 2 / expected[support]).sum()
    # Chi-square with k degrees of freedom has mean k and variance 2k: 5 sigma.
    freedom = support.sum() - 1
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom)


def test_the_softmax_is_not_applied_twice():
    # chatllm.cpp's top-p draws from softmax(softmax(logits)): 0.006 instead of 0.066 for the top token here.
    row = np.zeros(160)
    row[0] = np.log(0.066 / (1 - 0.066) * 159)
    observed = frequencies(row, {"top_p": 0.9999}, draws=40_000)
    assert observed[0] == pytest.approx(0.066, abs=0.006)


def test_greedy_takes_the_argmax_of_the_penalised_logits():
    logits = np.array([[2.0, 1.9, 0.0]], np.float32)
    prompt_mask, counts = no_history(1, 3)
    counts[0, 0] = 1
    params = SamplingParams.make(1, temperature=0.0, frequency_penalty=0.2)
    tokens, logprobs = sample(keys(1), logits, params, prompt_mask, counts)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, [np.log(softmax(logits[0]))[1]], rtol=1e-6)


def test_logprobs_are_those_of_the_model_before_penalties_temperature_and_filters(logits, history):
    params = SamplingParams.make(BATCH, temperature=2.0, top_k=3, repetition_penalty=2.0)
    tokens, logprobs = COMPILED(keys(), logits, params, *history)
    expected = [
        np.log(softmax(row.astype(np.float64)))[token] for row, token in zip(logits, tokens, strict=True)
    ]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)
    assert tokens.dtype == jnp.int32
    assert logprobs.dtype == jnp.float32


def test_a_sequence_does_not_depend_on_its_neighbours(logits, history):
    settings = {
        "temperature": [1.0, 0.0, 2.0, 0.8, 1.0, 5.0],
        "top_k": [0, 0, 7, 0, 0, 0],
        "top_p": [1, 1, 1, 0.9, 0.7, 1],
    }
    together, _ = COMPILED(keys(), logits, SamplingParams.make(BATCH, **settings), *history)
    for row, one in enumerate(per_row(settings)):
        at = slice(row, row + 1)
        params = SamplingParams.make(1, **{k: v.item() for k, v in one.items()})
        alone, _ = COMPILED(keys()[at], logits[at], params, history[0][at], history[1][at])
        assert alone[0] == together[row]


def test_a_key_reproduces_its_draw_and_another_key_does_not(logits):
    params = SamplingParams.make(BATCH, temperature=10.0)
    first, again, other = (
        COMPILED(keys(seed=s), logits, params, *no_history())[0].tolist() for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_changing_parameters_compiles_nothing(logits, history):
    compiled = jax.jit(lambda *args: sample(*args))
    for settings in [*FILTERS, *PENALTIES]:
        compiled(keys(), logits, SamplingParams.make(BATCH, **settings), *history)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_nan_logits_are_not_hidden(logits, settings):
    logits[:, 5] = np.nan
    tokens, logprobs = COMPILED(keys(), logits, SamplingParams.make(BATCH, **settings), *no_history())
    assert np.isnan(logprobs).all()
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_a_nan_row_leaves_the_others_alone(logits):
    params = SamplingParams.make(BATCH, top_k=5, top_p=0.9)
    clean, _ = COMPILED(keys(), logits, params, *no_history())
    logits[2, 5] = np.nan
    tokens, logprobs = COMPILED(keys(), logits, params, *no_history())
    assert np.flatnonzero(np.isnan(logprobs)).tolist() == [2]
    assert np.delete(tokens, 2).tolist() == np.delete(clean, 2).tolist()


# --- validation


GREEDY = " (0 takes the most probable token)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, f"temperature is -0.1; expected a number, 0 or more{GREEDY}"),
        ({"temperature": float("nan")}, f"temperature is nan; expected a number, 0 or more{GREEDY}"),
        ({"temperature": 1e39}, f"temperature is 1e+39; expected a number, 0 or more{GREEDY}"),
        ({"temperature": "hot"}, f"temperature is 'hot'; expected a number, 0 or more{GREEDY}"),
        ({"temperature": None}, f"temperature is None; expected a number, 0 or more{GREEDY}"),
        ({"top_k": -1}, "top_k is -1; expected a whole number, 0 to 2147483647 (0 is off)"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number, 0 to 2147483647 (0 is off)"),
        ({"top_k": True}, "top_k is True; expected a whole number, 0 to 2147483647 (0 is off)"),
        ({"top_k": 2**31}, "top_k is 2147483648; expected a whole number, 0 to 2147483647 (0 is off)"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0, at most 1 (1 is off)"),
        ({"top_p": [0.5, 1.01]}, "top_p is 1.01; expected a number above 0, at most 1 (1 is off)"),
        ({"min_p": -0.5}, "min_p is -0.5; expected a number, 0 to 1 (0 is off)"),
        ({"min_p": 1.5}, "min_p is 1.5; expected a number, 0 to 1 (0 is off)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0 (1 is off)"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; expected a finite number (0 is off)"),
        (
            {"frequency_penalty": float("-inf")},
            "frequency_penalty is -inf; expected a finite number (0 is off)",
        ),
        ({"top_p": [0.5] * 3}, "top_p has values of shape (3,); expected one number or 2 of them"),
        ({"top_p": [0.5, [0.5]]}, "top_p is [0.5, [0.5]]; expected a number above 0, at most 1 (1 is off)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_parameter_is_named(settings, message):
    with pytest.raises(UsageError) as caught:
        SamplingParams.make(2, **settings)
    assert str(caught.value) == message


def test_one_number_serves_the_whole_batch():
    params = SamplingParams.make(3, temperature=0.5, top_k=[1, 2, 3])
    assert params.temperature.tolist() == [0.5, 0.5, 0.5]
    assert params.top_k.tolist() == [1, 2, 3]
    assert [p.dtype.name for p in params] == ["float32", "int32"] + ["float32"] * 5


# --- transformers


def warped(logits, *processors):
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(logits.copy())
    for processor in processors:
        scores = processor(torch.zeros((len(logits), 1), dtype=torch.long), scores)
    return scores.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_filters_equal_those_of_transformers(logits, temperature, tied):
    pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    if tied:
        logits = np.round(logits)  # bfloat16 models tie often
    for settings, processors in [
        ({}, []),
        ({"top_k": 7}, [hf.TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.07}, [hf.MinPLogitsWarper(0.07)]),
        (
            {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
            [hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02)],
        ),
    ]:
        expected = warped(logits, hf.TemperatureLogitsWarper(temperature), *processors)
        actual = FILTER(logits, SamplingParams.make(BATCH, temperature=temperature, **settings))
        expected -= expected.max(axis=-1, keepdims=True)
        if tied:  # transformers keeps as many of the tied tokens, but leaves which ones to an unstable sort
            actual, expected = np.sort(actual), np.sort(expected)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_repetition_penalty_equals_that_of_transformers(logits):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    ids = np.random.default_rng(2).integers(0, VOCAB, (BATCH, 40))
    prompt_mask, counts = no_history()
    for row in range(BATCH):
        prompt_mask[row, ids[row, :25]] = True
        np.add.at(counts[row], ids[row, 25:], 1)
    processor = hf.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
    actual = adjust_logits(logits, SamplingParams.make(BATCH, repetition_penalty=1.7), prompt_mask, counts)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
