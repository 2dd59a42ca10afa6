"""A search as pictures: what running or leaving out each block does, and gains against cost.

Importing it needs matplotlib; drawing uses no window system and no global state.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from jaxchat.layer_plan import LayerPlan
from jaxchat.search.ladder import SCREEN, SEARCH
from jaxchat.search.moves import Move, plan_of
from jaxchat.search.run import Found, Question
from jaxchat.search.sample import Scores
from jaxchat.search.validation import pareto

_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#7f8791"
_DPI = 110


def png_files(found: Found, question: Question, name: str) -> dict[str, bytes]:
    """File name -> PNG; `name` is the model's, for the titles."""
    figures = {
        "repeats.png": _blocks(found, question, "repeat", f"{name}: slots i to j - 1 run twice"),
        "drops.png": _blocks(found, question, "drop", f"{name}: without the slots i to j - 1"),
        "pareto.png": _front(found, question, name),
        "candidates.png": _candidates(found, name),
    }
    return {file: _png(figure) for file, figure in figures.items() if figure is not None}


def _gains(found: Found, question: Question, sample: str) -> dict[LayerPlan, float]:
    """The mean gain of every plan that was tried on a sample, NaN where its scores are not finite."""
    known: Mapping[LayerPlan, Scores] = found.trials.known(sample)
    base = known[question.base]

    def gain(scores: Scores) -> float:
        gains = question.measure.gain(scores.values, base.values)
        return float((gains * base.weights).sum() / base.weights.sum())

    return {plan: gain(scores) for plan, scores in known.items() if plan != question.base}


def _blocks(found: Found, question: Question, kind: str, title: str) -> Figure | None:
    slots = len(question.base)
    gains = _gains(found, question, SCREEN)
    grid = np.full((slots, slots), np.nan)
    for i in range(slots):
        for j in range(i + 1, slots + 1):
            plan = plan_of(question.base, (Move(i, j, kind),))
            if plan in gains:
                grid[i, j - 1] = gains[plan]
    known = grid[np.isfinite(grid)]
    if not len(known):
        return None
    reach = max(float(np.percentile(np.abs(known), 80)), 1e-6)
    side = min(max(4.2, 0.16 * slots + 2.4), 11)
    figure = Figure(figsize=(side + 1.2, side), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        grid, origin="lower", cmap=colormaps["RdBu"].with_extremes(bad="#ececec"),
        norm=TwoSlopeNorm(0, -reach, reach), extent=(0.5, slots + 0.5, -0.5, slots - 0.5),
    )  # fmt: skip
    axes.set_xlabel("j, the first slot behind the block")
    axes.set_ylabel("i, the first slot of the block")
    figure.suptitle(
        f"{title}\non the small sample, {len(known)} of {slots * (slots + 1) // 2} tried", fontsize=10
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="both")
    bar.set_label(f"gain, {question.measure.unit} (blue is better than the base)", fontsize=8)
    return figure


def _front(found: Found, question: Question, name: str) -> Figure:
    gains = {plan: gain for plan, gain in _gains(found, question, SEARCH).items() if math.isfinite(gain)}
    figure = Figure(figsize=(7.2, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    costs = [question.cost(plan) for plan in gains]
    axes.scatter(
        costs, list(gains.values()), s=12, color=_GREY, alpha=0.6, label="tried, on the search's items"
    )
    front = pareto({**gains, question.base: 0.0}, question.cost)
    axes.plot(
        [question.cost(plan) for plan in front], [gains.get(plan, 0.0) for plan in front], color=_BLUE,
        linewidth=1, marker="o", markersize=3, label="none is cheaper and better",
    )  # fmt: skip
    for number, one in enumerate(found.verdict.candidates):
        gain = one.gain.difference
        if math.isfinite(gain.value):
            label = "validated, with its interval" if not number else None
            _with_interval(axes, one.cost, gain.value, gain.low, gain.high, label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    low = min([one.gain.difference.value for one in found.verdict.candidates
               if math.isfinite(one.gain.difference.value)], default=0.0)  # fmt: skip
    axes.set_ylim(bottom=min(3 * min(low, -1e-3), -1e-3) if gains else None)
    axes.set_xlabel("cost of a token, in units of the base plan's")
    axes.set_ylabel(f"gain, {question.measure.unit}")
    axes.legend(frameon=False, fontsize=8)
    _bare(axes)
    figure.suptitle(f"{name}: gain against cost of {len(gains)} plans", fontsize=10)
    return figure


def _candidates(found: Found, name: str) -> Figure | None:
    candidates = [one for one in found.verdict.candidates if math.isfinite(one.gain.difference.value)]
    if not candidates:
        return None
    figure = Figure(figsize=(8.2, 1.4 + 0.5 * len(candidates)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(reversed(candidates)):
        for shift, gain, color in (
            (0.12, one.optimistic.difference, _GREY),
            (-0.12, one.gain.difference, _BLUE),
        ):
            if math.isfinite(gain.value):
                axes.plot([gain.low, gain.high], [number + shift] * 2, color=color, linewidth=2)
                axes.plot(gain.value, number + shift, "o", color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(candidates)), [_short(one.plan) for one in reversed(candidates)], fontsize=8)
    axes.set_xlabel(f"gain, {found.verdict.measure.unit}: grey on the search's items, blue validated")
    _bare(axes)
    figure.suptitle(
        f"{name}: the best of {found.verdict.tried} plans, before and after validation", fontsize=10
    )
    return figure


def _with_interval(axes: Axes, x: float, y: float, low: float, high: float, label: str | None) -> None:
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([x, x], [low, high], color=_ORANGE, linewidth=1.5)
    axes.plot(x, y, "o", color=_ORANGE, markersize=5, label=label)


def _short(plan: LayerPlan) -> str:
    text = str(plan)
    return text if len(text) <= 44 else f"{text[:41]}..."


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
