"""How sure a score is: intervals of means, paired comparisons, and the best of many. Knows no models.

A score is a mean over items; one of weight w counts w times, as a text of w tokens does in nats per token.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
_FEW = 10
"""Fewer items are too few to be drawn anew: Student's t it is."""
_ELEMENTS = 1 << 22
"""Random numbers drawn at once."""


class Estimate(NamedTuple):
    """A mean over items.

    Attributes:
      value: the mean; NaN of no items.
      error: its standard error.
      low, high: the interval that holds the true mean with `CONFIDENCE`, or what was asked for.
      items: how many there are.
    """

    value: float
    error: float
    low: float
    high: float
    items: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


class Comparison(NamedTuple):
    """A score against another on the same items.

    Attributes:
      difference: the score less the other's, with its interval.
      wins, losses: items that are better here, and there.
      p_value: of the exact test of McNemar that both are equally good, of items that are right or wrong; None
        of others.
    """

    difference: Estimate
    wins: int
    losses: int
    p_value: float | None


def estimate(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of items and its interval: a bootstrap-t (Efron and Tibshirani 1993, 12.5).

    It keeps what it promises of few and of skewed items, where percentiles of resampled means are too narrow.
    Of fewer than 10 items it is Student's t interval.

    Args:
      values: of the items, finite, [n].
      weights: of the items, at least 0; default 1 each.
      confidence: that the true mean is in the interval.
      resamples: how often the items are drawn anew.
      seed: of the draws: the same items give the same interval.
    """
    values, weights = _checked(values, weights)
    count = len(values)
    if count == 0:
        return Estimate(np.nan, np.nan, -np.inf, np.inf, 0)
    mean, error = (float(part[0]) for part in _mean_and_error(values[None], weights[None]))
    if count == 1:
        return Estimate(mean, np.nan, -np.inf, np.inf, 1)
    if error == 0:
        return Estimate(mean, 0.0, mean, mean, count)
    if count < _FEW:
        reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
        return Estimate(mean, error, mean - reach, mean + reach, count)
    drawn = _studentized(values, weights, mean, resamples, seed)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(mean, error, float(mean - high * error), float(mean - low * error), count)


def proportion(values: np.ndarray, *, confidence: float = CONFIDENCE) -> Estimate:
    """The share of items that are right, and its interval (Wilson 1927), which few or equal items widen.

    Args:
      values: of the items, 0 or 1, [n].
      confidence: that the true share is in the interval.
    """
    values, weights = _checked(values, None)
    count = len(values)
    if count == 0:
        return Estimate(np.nan, np.nan, -np.inf, np.inf, 0)
    low, high = stats.binomtest(int(values.sum()), count).proportion_ci(confidence, "wilson")
    mean, error = (float(part[0]) for part in _mean_and_error(values[None], weights[None]))
    return Estimate(mean, error if count > 1 else np.nan, float(low), float(high), count)


def compare(
    values: np.ndarray,
    others: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Two scores on the same items, [n] each, in the same order; see `estimate`.

    Of items that are right or wrong, and count alike, the interval is Newcombe's (1998, method 10): where few
    of them differ, resampling shows next to nothing of what could have been.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    wins, losses = int((values > others).sum()), int((values < others).sum())
    binary = bool(np.isin(values, (0, 1)).all() and np.isin(others, (0, 1)).all())
    if binary and len(values) > 1 and (weights is None or len(np.unique(weights)) == 1):
        difference = _paired_shares(values, others, confidence)
    else:
        settings: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
        difference = estimate(values - others, weights, **settings)
    return Comparison(difference, wins, losses, mcnemar(wins, losses) if binary else None)


def _paired_shares(values: np.ndarray, others: np.ndarray, confidence: float) -> Estimate:
    """The difference of two shares of the same items: see `compare`."""
    one, other = (proportion(part, confidence=confidence) for part in (values, others))
    both, neither = float((values * others).sum()), float(((1 - values) * (1 - others)).sum())
    wins, losses = float((values > others).sum()), float((values < others).sum())
    together = both * neither - wins * losses
    if together > 0:
        together = max(together - len(values) / 2, 0.0)
    spread = np.sqrt((both + wins) * (losses + neither) * (both + losses) * (wins + neither))
    phi = together / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0)))

    difference = one.value - other.value
    _, error = _mean_and_error((values - others)[None], np.ones_like(values)[None])
    low = difference - reach(one.value - one.low, other.high - other.value)
    high = difference + reach(one.high - one.value, other.value - other.low)
    return Estimate(difference, float(error[0]), low, high, len(values))


def mcnemar(wins: int, losses: int) -> float:
    """The exact p-value that as many or more discordant items fall to one side (McNemar 1947)."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def best_of(
    differences: np.ndarray, weights: np.ndarray | None = None, *, resamples: int = 2000, seed: int = 0
) -> float:
    """The p-value that the best of many candidates beats the base by luck: White's reality check (2000).

    Hansen's (2005) studentized form: the largest of the candidates' mean differences, each over its error,
    against the largest that resampled items of candidates as good as the base would show.

    Args:
      differences: of each candidate and item, what it gains over the base, [candidates, n].
      weights: of the items.
      resamples: how often the items are drawn anew.
      seed: of the draws.
    """
    differences = np.asarray(differences, np.float64)
    count = differences.shape[1]
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    mean, error = _mean_and_error(differences, np.broadcast_to(weights, differences.shape))
    moving = error > 0
    if not moving.any():
        return 1.0
    centred, scale = differences[moving] - mean[moving, None], error[moving]
    best = float((mean[moving] / scale).max())
    random = np.random.default_rng(seed)
    reached = 0
    for _ in range(resamples):
        drawn = np.bincount(random.integers(0, count, count), minlength=count) * weights
        total = drawn.sum()
        reached += bool(total and (centred @ drawn / total / scale).max() >= best)
    return (1 + reached) / (1 + resamples)


def adjusted(confidence: float, comparisons: int) -> float:
    """The confidence of each of several intervals that hold together with `confidence` (Bonferroni)."""
    return 1 - (1 - confidence) / max(comparisons, 1)


def _checked(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weights.shape:
        raise ValueError(f"values {values.shape} and weights {weights.shape} must be one list each, as long")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("values and weights must be finite, weights at least 0")
    return values[weights > 0], weights[weights > 0]


def _mean_and_error(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [rows, n]: the weighted means, and their errors as ratios of two sums (the delta method)."""
    total, count = weights.sum(1), (weights > 0).sum(1)
    mean = (values * weights).sum(1) / total
    squares = np.square((values - mean[:, None]) * weights).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(squares * count / (count - 1)) / total
    return mean, np.where(error > 1e-12 * np.abs(values).max(initial=0.0), error, 0.0)


def _studentized(
    values: np.ndarray, weights: np.ndarray, mean: float, resamples: int, seed: int
) -> np.ndarray:
    """(a resampled mean - the mean) / the resampled error; resamples without any spread are left out."""
    random, count = np.random.default_rng(seed), len(values)
    found = []
    at_once = max(_ELEMENTS // count, 1)
    for start in range(0, resamples, at_once):
        index = random.integers(0, count, (min(at_once, resamples - start), count))
        means, errors = _mean_and_error(values[index], weights[index])
        found.append((means - mean) / np.where(errors > 0, errors, np.nan))
    drawn = np.concatenate(found)
    drawn = drawn[np.isfinite(drawn)]
    return drawn if len(drawn) else np.array([-np.inf, np.inf])
