"""Figures as cells of tables, whichever these are: perplexities, changes, what is not finite."""

import math
from typing import Any

from rich import box
from rich.table import Table

from jaxchat.analysis.measure import Analysis, perplexity
from jaxchat.analysis.scales import number

SCORE = ("perplexity", "ratio", "nats_per_token")
"""The columns of a perplexity."""


def score(result: Analysis, nats: float) -> tuple[float, float, float]:
    """The columns `SCORE`."""
    return perplexity(float(nats)), result.ratio(float(nats)), float(nats)


def finite(value: Any) -> Any:
    """A value as JSON has it: null for what is no finite number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table() -> Table:
    """A table in the style of all of them."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def change(result: Analysis, nats: float) -> str:
    """A perplexity, and how it compares with the base plan's: "12.30  +14 %", "9,870  x803"."""
    if math.isnan(nats):
        return "not finite"
    ratio = result.ratio(nats)
    if ratio < 10:
        words = f"{100 * (ratio - 1):+.{1 if abs(ratio - 1) < 0.1 else 0}f} %"
    else:
        words = f"x{number(ratio)}"
    return f"{number(perplexity(nats))}  {words}"
