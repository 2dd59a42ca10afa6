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
from jaxchat.visible import visible

_DPI = 110
_BLUE, _GREEN, _RED, _GREY = "#3b6fb6", "#3f8f5f", "#c0504d", "#7f8791"


def png(results: Sequence[Summary], title: str) -> bytes:
    """A PNG: the headlines with their 95 % intervals and, with a baseline, their differences.

    Scores of one kind share an axis.
    """
    kinds: dict[str, list[Summary]] = {}
    for one in results:
        if one.measured.task.metric in one.scores:
            kinds.setdefault(one.measured.task.metric, []).append(one)
    columns = 2 if any(one.compared for own in kinds.values() for one in own) else 1
    heights = [1 + len(own) for own in kinds.values()]
    figure = Figure(figsize=(6.4 * columns, 0.6 + 0.5 * sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(len(kinds), columns, squeeze=False, height_ratios=heights)
    for row, own in zip(axes, kinds.values(), strict=True):
        _scores(row[0], own)
        if columns == 2:
            _differences(row[1], own)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def _scores(axes: Axes, results: Sequence[Summary]) -> None:
    for row, one in enumerate(results):
        _point(axes, row, one.scores[one.measured.task.metric], _BLUE)
    _label(axes, results, "")


def _differences(axes: Axes, results: Sequence[Summary]) -> None:
    axes.axvline(0, color=_GREY, linewidth=1)
    for row, one in enumerate(results):
        name = one.measured.task.metric
        if name in one.compared:
            difference = one.compared[name].comparison.difference
            better = (difference.value > 0) == metric(name).higher_is_better
            _point(axes, row, difference, (_GREEN if better else _RED) if difference.excludes_zero else _GREY)
    _label(axes, results, ", difference from the baseline")


def _point(axes: Axes, row: int, score: Estimate, color: str) -> None:
    if math.isfinite(score.low):
        axes.plot([score.low, score.high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
    axes.plot([score.value], [row], "o", color=color, markersize=5)


def _label(axes: Axes, results: Sequence[Summary], text: str) -> None:
    names = [visible(one.measured.task.name)[-40:] for one in results]
    axes.set_yticks(range(len(results)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(f"{results[0].measured.task.metric}{text}, 95 % intervals", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
