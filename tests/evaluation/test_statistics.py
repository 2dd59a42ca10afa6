"""Intervals that hold what they promise, and the best of many that is not better than it is."""

import numpy as np
import pytest
from scipy import stats

from jaxchat.evaluation.statistics import adjusted, best_of, compare, estimate, mcnemar, proportion

POPULATIONS = {
    "scores of a text": (lambda random: random.exponential(1.0, 60), 1.0),
    "right or wrong": (lambda random: (random.random(150) < 0.3).astype(float), 0.3),
    "right or wrong, against another": (
        lambda random: (random.random(200) < 0.12).astype(float) - (random.random(200) < 0.08),
        0.04,
    ),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_an_interval_of_95_percent_covers_the_truth_as_often(name):
    draw, truth = POPULATIONS[name]
    random = np.random.default_rng(0)
    trials = 2000
    found = [estimate(draw(random), resamples=400, seed=number) for number in range(trials)]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 0.93 <= covered / trials <= 0.97


def test_a_weighted_interval_covers_the_truth(rng):
    trials, covered = 400, 0
    for number in range(trials):
        tokens = rng.integers(20, 200, 80)
        nats = 2.0 + rng.normal(0, 0.3, 80)  # a token, of each text
        one = estimate(nats, tokens, resamples=400, seed=number)
        covered += one.low <= 2.0 <= one.high
    assert covered / trials > 0.9


def test_error_is_the_standard_error_of_the_mean(rng):
    values = rng.normal(size=50)
    one = estimate(values)
    assert one.value == pytest.approx(values.mean(), abs=1e-12)
    assert one.error == pytest.approx(stats.sem(values))
    assert estimate(values, np.full(50, 7.0)) == pytest.approx(one)
    assert estimate(values, seed=1) != one


def test_the_interval_is_the_bootstrap_t_of_the_items_drawn_anew(rng):
    values = rng.exponential(size=40)
    one = estimate(values, resamples=4000)
    t = []
    for _ in range(4000):
        drawn = rng.choice(values, 40)
        t.append((drawn.mean() - values.mean()) / stats.sem(drawn))
    low, high = np.percentile(t, [2.5, 97.5])
    assert one.low == pytest.approx(values.mean() - high * stats.sem(values), abs=0.05)
    assert one.high == pytest.approx(values.mean() - low * stats.sem(values), abs=0.15)


def test_few_items_say_how_little_they_tell():
    assert estimate(np.array([])).items == 0
    assert not estimate(np.array([])).excludes_zero
    assert not estimate(np.array([1.0])).excludes_zero
    assert estimate(np.ones(9))[:4] == (1, 0, 1, 1)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_of_few_items_the_interval_is_students(rng, count):
    values = rng.normal(size=count)
    one = estimate(values)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("bad", [np.array([np.nan, 1]), np.ones((2, 2))])
def test_what_is_no_list_of_numbers_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        estimate(bad)


def test_paired_items_are_compared_one_by_one(rng):
    hard = rng.normal(0, 5, 300)  # what items differ by, which both scores share
    both = compare(hard + rng.normal(0.2, 0.3, 300), hard)
    assert both.difference.excludes_zero
    assert both.difference.value == pytest.approx(0.2, abs=0.1)
    assert both.p_value is None
    assert not compare(hard, hard).difference.excludes_zero


@pytest.mark.parametrize("count", [40, 200])
@pytest.mark.parametrize("discordant", [0.02, 0.2])
def test_the_interval_of_two_shares_covers_their_difference(count, discordant):
    random = np.random.default_rng(0)
    trials, covered = 1000, 0
    for _ in range(trials):
        kind = random.choice(
            4, count, p=[discordant * 0.7, discordant * 0.3, 0.5 - discordant / 2, 0.5 - discordant / 2]
        )
        values, others = ((kind == 0) | (kind == 2)).astype(float), ((kind == 1) | (kind == 2)).astype(float)
        found = compare(values, others, resamples=2).difference
        covered += found.low <= 0.4 * discordant <= found.high
    assert covered / trials >= 0.93


def test_the_interval_of_two_shares_is_newcombes():
    """Newcombe 1998, Statistics in Medicine 17, table II: 36, 12, 2, 0 of 50."""
    values = np.repeat([1.0, 1, 0, 0], [36, 12, 2, 0])
    others = np.repeat([1.0, 0, 1, 0], [36, 12, 2, 0])
    found = compare(values, others).difference
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_mcnemar_is_the_binomial_test_of_items_that_differ():
    right = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0.0])
    other = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0.0])
    both = compare(right, other)
    assert (both.wins, both.losses) == (6, 1)
    assert both.p_value == mcnemar(6, 1) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(0, 0) == 1


def test_the_best_of_many_equal_candidates_is_not_called_better():
    random = np.random.default_rng(3)
    trials, naive, corrected = 200, 0, 0
    for number in range(trials):
        gains = random.normal(0, 1, (30, 80))
        best = gains[gains.mean(1).argmax()]
        naive += bool(estimate(best, resamples=300).low > 0)
        corrected += best_of(gains, resamples=200, seed=number) < 0.05
    assert naive / trials > 0.3  # the winner's curse
    assert corrected / trials <= 0.08


def test_a_candidate_that_is_better_is_found_among_many(rng):
    gains = rng.normal(0, 1, (30, 80))
    gains[4] += 1
    assert best_of(gains) < 0.01
    assert best_of(np.zeros((3, 9))) == 1


def test_several_intervals_are_wider_each():
    assert adjusted(0.95, 5) == pytest.approx(0.99)
    assert adjusted(0.95, 1) == pytest.approx(0.95)


def test_a_share_of_few_items_is_as_sure_as_promised():
    for count, truth in ((8, 0.2), (30, 0.9), (200, 0.5)):
        random = np.random.default_rng(0)
        found = [proportion((random.random(count) < truth).astype(float)) for _ in range(1000)]
        covered = sum(one.low <= truth <= one.high for one in found)
        assert 0.92 <= covered / 1000 <= 0.985
    none = proportion(np.zeros(4))
    assert none.value == none.low == 0
    assert none.high == pytest.approx(1.96**2 / (4 + 1.96**2), abs=1e-3)  # Wilson's, of no success
    assert proportion(np.array([])).items == 0
