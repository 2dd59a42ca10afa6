"""A plan against the base plan, token by token: how far apart, how sure that is, and where they first differ.

The tokens are scored by `sweep.py`; what is shown of it is `report.py`'s and `page.py`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.analysis.sweep import Sweep, Windows
from jaxchat.evaluation import statistics
from jaxchat.evaluation.statistics import Estimate
from jaxchat.layer_plan import LayerPlan


class Candidates(NamedTuple):
    """What a plan thinks most probable at N tokens."""

    ids: np.ndarray  # int32 [N, k]
    logprobs: np.ndarray  # float32 [N, k]


@dataclasses.dataclass(frozen=True)
class Compared:
    """A plan against the base plan on the N tokens that count, in the order of the text.

    Attributes:
      plan: what is compared.
      windows: int [N], the window of each token.
      places: int [N], where in its window it stands.
      tokens: int [N].
      given: int [W], the token that each window begins with, which nothing predicts.
      base_nats: float64 [N], its negative log-likelihood under the base plan.
      nats: float64 [N], the same under the plan; NaN where its logits are not finite.
      kl: float64 [N], the divergence KL(base || plan) of what is predicted there, in nats.
      base_best: the base plan's candidates.
      best: the plan's.
    """

    plan: LayerPlan
    windows: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    given: np.ndarray
    base_nats: np.ndarray
    nats: np.ndarray
    kl: np.ndarray
    base_best: Candidates
    best: Candidates

    @functools.cached_property
    def lost(self) -> np.ndarray:
        """bool [N], where the plan's logits are not finite."""
        return ~(np.isfinite(self.nats) & np.isfinite(self.kl))

    @functools.cached_property
    def agreed(self) -> np.ndarray:
        """bool [N], where both think the same token the most probable one."""
        return (self.base_best.ids[:, 0] == self.best.ids[:, 0]) & ~self.lost

    @property
    def first(self) -> int | None:
        """The first token at which they do not agree; None where there is none."""
        return None if self.agreed.all() else int(np.argmin(self.agreed))

    def largest(self, count: int) -> list[int]:
        """The tokens of the largest divergences, the largest first; without those that are lost."""
        known = np.where(self.lost, -math.inf, self.kl)
        order = np.argsort(-known, kind="stable")[:count].tolist()
        return [token for token in order if not self.lost[token]]

    @functools.cached_property
    def intervals(self) -> "Intervals | None":
        """Means over the text with their intervals; None of a plan that is not finite everywhere."""
        return None if self.lost.any() else _intervals(self)


class Intervals(NamedTuple):
    """Nats per token, and their 95 % intervals over windows, each of which weighs as much as its tokens."""

    base: Estimate
    plan: Estimate
    difference: Estimate  # plan less base, paired: the same windows
    better: int  # windows in which the plan has fewer nats
    worse: int


def _intervals(compared: Compared) -> Intervals:
    counts = np.bincount(compared.windows)
    kept = counts > 0

    def by_window(values: np.ndarray) -> np.ndarray:
        return np.bincount(compared.windows, values)[kept] / counts[kept]

    base, plan, weights = by_window(compared.base_nats), by_window(compared.nats), counts[kept]
    paired = statistics.compare(plan, base, weights)
    return Intervals(
        base=statistics.estimate(base, weights),
        plan=statistics.estimate(plan, weights),
        difference=paired.difference,
        better=paired.losses,
        worse=paired.wins,
    )


# --- as results of a group of windows: lists of numbers, token ids first


def shape(windows: Windows, k: int) -> tuple[int, ...]:
    """Of what `numbers` returns: 2 k rows of token ids, as many log-probabilities, and three of nats."""
    return (4 * k + 3, windows.predicted)


def numbers(sweep: Sweep, plan: LayerPlan, k: int) -> list[list[float]]:
    """What `read` takes, of one group of windows."""
    found = sweep.token_outcomes(plan, k)
    ids = [*found.base_ids.T.tolist(), *found.ids.T.tolist()]
    reals = (*found.base_logprobs.T, *found.logprobs.T, found.base_nats, found.nats, found.kl)
    return [*ids, *([_short(value) for value in row.tolist()] for row in reals)]


def _short(value: float) -> float:
    """To the digits that float32 has: half as long in a file."""
    return float(f"{value:.8g}")


def read(plan: LayerPlan, windows: Windows, parts: Sequence[Any], k: int) -> Compared:
    """The comparison that the numbers of all groups of windows are."""
    rows = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)
    base_ids, ids, base_logprobs, logprobs = rows[: 4 * k].reshape(4, k, -1).swapaxes(1, 2)
    owners, places = np.nonzero(windows.counted)
    base_nats, nats, kl = rows[4 * k :]
    return Compared(
        plan=plan,
        windows=owners,
        places=places,
        tokens=windows.tokens[owners, places],
        given=windows.tokens[:, 0],
        base_nats=base_nats,
        nats=nats,
        kl=np.maximum(kl, 0),  # rounding makes some of those that are 0 negative
        base_best=Candidates(base_ids.astype(np.int32), base_logprobs.astype(np.float32)),
        best=Candidates(ids.astype(np.int32), logprobs.astype(np.float32)),
    )
