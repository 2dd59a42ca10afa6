"""Evaluations as a picture: scores with their intervals, and what has changed from a baseline.

Importing it needs matplotlib (the extra `eval`); drawing uses no window system and no global state.
"""

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxchat.evaluation.metrics import metric
from jaxchat.evaluation.report import Summary
from jaxchat.evaluation.statistics import Estimate

_DPI = 110
_BLUE, _GREEN, _RED, _GREY = "#3b6fb6", "#3f8f5f", "#c0504d", "#7f8791"


def png(results: Sequence[Summary], title: str) -> bytes:
    """A PNG: the headlines with their 95 % intervals and, with a baseline, their differences."""
    shown = [one for one in results if one.measured.task.metric in one.scores]
    compared = any(one.compared for one in shown)
    columns = 2 if compared else 1
    figure = Figure(figsize=(6.4 * columns, 1.6 + 0.42 * len(shown)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    _scores(axes[0], shown)
    if compared:
        _differences(axes[1], shown)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def _scores(axes: Axes, results: Sequence[Summary]) -> None:
    for row, one in enumerate(results):
        _point(axes, row, one.scores[one.measured.task.metric], _BLUE)
    _label(axes, results, "score, with its 95 % interval")


def _differences(axes: Axes, results: Sequence[Summary]) -> None:
    axes.axvline(0, color=_GREY, linewidth=1)
    for row, one in enumerate(results):
        name = one.measured.task.metric
        if name in one.compared:
            difference = one.compared[name].comparison.difference
            better = (difference.value > 0) == metric(name).higher_is_better
            _point(axes, row, difference, (_GREEN if better else _RED) if difference.excludes_zero else _GREY)
    _label(axes, results, "difference from the baseline, with its 95 % interval")


def _point(axes: Axes, row: int, score: Estimate, color: str) -> None:
    if math.isfinite(score.low):
        axes.plot([score.low, score.high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
    axes.plot([score.value], [row], "o", color=color, markersize=5)


def _label(axes: Axes, results: Sequence[Summary], text: str) -> None:
    names = [f"{one.measured.task.name[-40:]}\n{one.measured.task.metric}" for one in results]
    axes.set_yticks(range(len(results)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(text, fontsize=9)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
