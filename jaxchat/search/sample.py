"""What candidates are scored on: rows of tokens, and how what comes of them is a score. No devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxchat.analysis.sweep import Outcome, Windows
from jaxchat.errors import UsageError, option


class Row(NamedTuple):
    """Token ids, of which the continuation counts."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scores(NamedTuple):
    """A score an item, finite or NaN, and how much each counts: float64 [items]."""

    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """The score of all."""
        return float((self.values * self.weights).sum() / self.weights.sum())


@dataclass(frozen=True)
class Measure:
    """What a score is.

    Attributes:
      name: as it is asked for.
      unit: what stands behind a figure.
      higher: whether more is better.
      against_base: whether it compares with the base plan token by token.
    """

    name: str
    unit: str
    higher: bool
    against_base: bool = False

    def gain(self, values: np.ndarray, base: np.ndarray) -> np.ndarray:
        """How much better values are than the base's."""
        return (values - base) if self.higher else (base - values)


class Item(NamedTuple):
    """What has a score: a text, or a question with its answers.

    Attributes:
      rows: what is read for it.
      score: from what came of the rows, and how many tokens of each count, to the score and its weight.
    """

    rows: tuple[Row, ...]
    score: Callable[[Outcome, np.ndarray], tuple[float, float]]


@dataclass(frozen=True)
class Sample:
    """Items that candidates are scored on, and what their score is."""

    measure: Measure
    items: tuple[Item, ...]

    @property
    def rows(self) -> list[Row]:
        """What is read for all items, in order."""
        return [row for item in self.items for row in item.rows]

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return sum(len(row.context) + len(row.continuation) for row in self.rows)

    def scores(self, outcome: Outcome, tokens: np.ndarray) -> Scores:
        """The items' scores, of what came of all rows and how many tokens of each count."""
        found, start = [], 0
        for item in self.items:
            own = slice(start, start + len(item.rows))
            found.append(item.score(Outcome(*(part[own] for part in outcome)), tokens[own]))
            start = own.stop
        values, weights = np.array(found, np.float64).T
        return Scores(values, weights)

    def part(self, tokens: int) -> "Sample":
        """The first items, of about so many tokens; all if there are hardly more."""
        if self.tokens <= 1.5 * tokens:
            return self
        read, items = 0, []
        for item in self.items:
            items.append(item)
            read += sum(len(row.context) + len(row.continuation) for row in item.rows)
            if read >= tokens:
                break
        return Sample(self.measure, tuple(items))


LOSS = Measure("loss", "nats per token", higher=False)
KL = Measure("kl", "nats per token from the base plan", higher=False, against_base=True)
AGREEMENT = Measure("agreement", "of the tokens, the base plan's own choice", higher=True, against_base=True)
_PER_TOKEN: Mapping[str, Callable[[Outcome], np.ndarray]] = {
    "loss": lambda outcome: outcome.nats,
    "kl": lambda outcome: outcome.kl,
    "agreement": lambda outcome: outcome.agreed.astype(np.float64),
}
TEXT_MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in (LOSS, KL, AGREEMENT)}
"""What a text can be searched for. Agreement is how often a draft under the plan would be accepted."""


def text_sample(windows: Windows, measure: Measure) -> Sample:
    """Windows of a text as items, each counting as many times as it predicts tokens."""
    total = _PER_TOKEN[measure.name]

    def score(outcome: Outcome, tokens: np.ndarray) -> tuple[float, float]:
        return float(total(outcome)[0]) / int(tokens[0]), float(tokens[0])

    rows = [row[:length].tolist() for row, length in zip(windows.tokens, windows.lengths, strict=True)]
    return Sample(measure, tuple(Item((Row(tuple(ids[:1]), tuple(ids[1:])),), score) for ids in rows))


def split_windows(windows: Windows, share: float) -> tuple[Windows, Windows]:
    """The first windows of a text, for the search, and those after them, for the validation.

    Not every other one: neighbours are of one subject, and a plan that suits it would be found good twice.

    Raises:
      UsageError: there are not two windows.
    """
    count = len(windows.lengths)
    if count < 2:
        raise UsageError(
            "the text is too short to search on one part of it and to validate on another; give a longer "
            f"one, or a smaller {option('window')}"
        )
    first = min(max(round(count * share), 1), count - 1)
    return (
        Windows(windows.tokens[:first], windows.lengths[:first]),
        Windows(windows.tokens[first:], windows.lengths[first:]),
    )
