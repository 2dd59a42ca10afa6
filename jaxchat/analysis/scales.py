"""How figures are scaled and worded, whatever they are drawn on: ticks, changes of perplexity, tokens."""

import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxchat.analysis.measure import Analysis, perplexity
from jaxchat.evaluation.statistics import Estimate

TokenText = Callable[[int], str]
"""A token id -> its text."""

RATIOS = (
    *(0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    *(1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1e3, 1e4, 1e6),
)  # ticks of the scale of ratios
SMALL = 0.01  # changes up to here are drawn in proportion, larger ones logarithmically


def symlog_ticks(low: float, high: float) -> list[float]:
    """Changes of perplexity at which an axis has marks: from 1 % to twice, and then ten, a hundred times."""
    upper = [SMALL, 0.1, 1.0, *(10.0**power - 1 for power in range(1, 16, 1 if high < 1e4 else 2))]
    return [*(-change for change in upper[:3] if -change >= low), 0.0, *(c for c in upper if c <= high)]


def is_plain(result: Analysis) -> bool:
    """Whether the plan is the model's layers in order, so that slots are layers."""
    return all(slot.layer == number for number, slot in enumerate(result.plan))


def depth_labels(result: Analysis) -> list[str]:
    """What the residual stream has been through: the embedding, then each slot."""
    slots = result.plan.slots
    if is_plain(result):
        return ["embedding", *(f"layer {slot.layer}" for slot in slots)]
    return ["embedding", *(f"slot {number} (layer {slot.layer})" for number, slot in enumerate(slots))]


def from_base(result: Analysis) -> str:
    """The title of an axis of changes."""
    return f"change of perplexity from the plan's own {perplexity(result.base):.4g}"


def times(value: float, _: Any = None) -> str:
    """Three significant digits, as an axis takes them."""
    return f"{value:.3g}" if 1e-3 < value < 1e3 else f"{value:,.0f}" if 1e3 <= value < 1e5 else f"{value:.0e}"


def reach_of(logs: np.ndarray) -> float:
    """How far a scale of log2 ratios goes up and down so that four fifths of them are told apart."""
    if not logs.size:
        return 1.0
    most, usual = float(np.abs(logs).max()), float(np.quantile(np.abs(logs), 0.8))
    return max(most if most < 2 * usual else 1.5 * usual, 1e-3)


def ratio_marks(reach: float) -> list[float]:
    """Ratios that a scale of log2 ratios from -reach to reach is marked with."""
    far = [ratio for ratio in RATIOS if 0.13 * reach < abs(math.log2(ratio)) <= reach]
    return [*[r for r in far if r < 1][:5], 1.0, *[r for r in far if r > 1][-5:]]


def percent(ratio: float) -> str:
    """A ratio as a change: +3.7 %, +250 %, and from tenfold on times so much."""
    if abs(ratio - 1) < 1e-9:
        return "0 %"
    if ratio >= 10:
        return f"\N{MULTIPLICATION SIGN}{times(ratio)}"
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 2 else f"{100 * (ratio - 1):+,.0f} %"


def mark(ratio: float) -> str:
    """The same for a mark of a scale: +5 %."""
    change = 100 * (ratio - 1)
    return percent(ratio) if ratio >= 10 or abs(change) < 1e-9 else f"{change:+,.3g} %"


def short_token(text: str) -> str:
    """A token's text in a cell: visible, and short."""
    escaped = whole_token(text)
    return escaped if len(escaped) <= 9 else escaped[:8] + "\N{HORIZONTAL ELLIPSIS}"


def whole_token(text: str) -> str:
    """A token's text with blanks, line breaks and what has no form of its own made visible."""
    visible = text.replace(" ", "\N{MIDDLE DOT}").replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\\t")
    return "".join(c if unicodedata.category(c)[0] not in "CZ" else f"\\x{ord(c):02x}" for c in visible)


def is_bounded(estimate: Estimate) -> bool:
    """Whether there is an interval: of one window there is none."""
    return math.isfinite(estimate.low) and math.isfinite(estimate.high)


def interval_text(difference: Estimate) -> str:
    """The interval of a difference of nats as one of changes of perplexity."""
    if not is_bounded(difference):
        return "none: too few windows"
    return f"{percent(perplexity(difference.low))} to {percent(perplexity(difference.high))}"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:#.4g}"
