"""An analysis as pictures: bars by layer, heat maps of blocks and repeats, the logit lens.

Importing it needs matplotlib (the `analyze` extra); drawing uses no window system and no global state.
"""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jaxchat.analysis.measure import Analysis, perplexity
from jaxchat.analysis.scales import (
    SMALL,
    TokenText,
    depth_labels,
    from_base,
    is_plain,
    mark,
    percent,
    ratio_marks,
    reach_of,
    short_token,
    symlog_ticks,
    times,
)

_DPI = 110
_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#7f8791"
_HALF_COLORS = {"attention": _BLUE, "mlp": _ORANGE, "both": _GREY}
_HALF_LABELS = {"attention": "without its attention", "mlp": "without its MLP", "both": "without the layer"}
_WRITTEN = 9  # up to so many slots, cells have their figures in them


def png_files(
    result: Analysis, name: str, text_of: TokenText | None = None, *, of: str = ""
) -> dict[str, bytes]:
    """File name -> PNG, of what was measured.

    Args:
      result: the analysis.
      name: of the model, for the titles.
      text_of: a token id -> its text, for the lens; default the ids.
      of: the text's name, for what stands below the titles.
    """
    figures: dict[str, Figure] = {}
    if result.influence is not None:
        figures["influence.png"] = influence_figure(result, name)
    if result.skip:
        figures["skip.png"] = skip_figure(result, name)
    if result.angular is not None:
        figures["angular.png"] = angular_figure(result, name)
    if result.rys:
        figures["rys.png"] = rys_figure(result, name)
    if result.lens is not None:
        figures["lens.png"] = lens_figure(result, name, text_of or str)
    for figure in figures.values():
        figure.suptitle(f"{figure.get_suptitle()}\n{_caption(result, of)}", fontsize=10, parse_math=False)
    return {file: _png(figure) for file, figure in figures.items()}


def influence_figure(result: Analysis, name: str) -> Figure:
    """Bars: Block Influence of every slot."""
    assert result.influence is not None
    figure, axes = _figure(_width(result), 3.6, f"{name}: how much each layer changes its input")
    axes.bar(range(len(result.plan)), result.influence, color=_BLUE, width=0.8)
    axes.set_ylabel("block influence: 1 - cos(input, output)")
    _slot_ticks(axes, result)
    _bare(axes)
    return figure


def skip_figure(result: Analysis, name: str) -> Figure:
    """Bars: how perplexity changes without a slot's attention, its MLP or both; logarithmic beyond 1 %."""
    figure, axes = _figure(_width(result), 4.0, f"{name}: perplexity without a layer, or half of it")
    bar = 0.8 / len(result.skip)
    axes.set_yscale("symlog", linthresh=SMALL, linscale=0.5)
    lost = []
    for number, (half, nats) in enumerate(result.skip.items()):
        changes = np.array([result.ratio(value) - 1 for value in nats.tolist()])
        x = np.arange(len(changes)) + (number - (len(result.skip) - 1) / 2) * bar
        finite = np.isfinite(changes)
        axes.bar(x[finite], changes[finite], bar, color=_HALF_COLORS[half], label=_HALF_LABELS[half])
        lost += x[~finite].tolist()
    if lost:
        above = axes.get_xaxis_transform()
        axes.scatter(lost, [0.97] * len(lost), marker="x", color="black", s=18, transform=above,
                     label="not finite")  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(from_base(result))
    axes.yaxis.set_major_locator(FixedLocator(symlog_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda change, _: mark(1 + change)))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=9)
    _slot_ticks(axes, result)
    _bare(axes)
    return figure


def angular_figure(result: Analysis, name: str) -> Figure:
    """Heat map: angular distance over blocks of every start and length, each length's least one marked."""
    assert result.angular is not None
    slots = len(result.plan)
    grid = np.full((slots, slots), np.nan)
    for length in range(1, slots + 1):
        grid[length - 1, : slots - length + 1] = np.diagonal(result.angular, length)
    figure, axes = _square(slots, f"{name}: how much a block of layers changes the last token")
    image = axes.imshow(grid, origin="lower", cmap="viridis_r", extent=_cells(0, 1, slots))
    closest = np.nanargmin(grid, axis=1)
    axes.scatter(
        closest + (0.3 if slots <= _WRITTEN else 0), np.arange(slots) + (1.3 if slots <= _WRITTEN else 1),
        s=_marker(slots), color="white", edgecolors="black", linewidths=0.8, label="least of its length",
    )  # fmt: skip
    _write_cells(axes, grid, 0, 1, "{:.2f}".format, lambda value: bool(value > np.nanmean(grid)))
    unit = "layer" if is_plain(result) else "slot"
    axes.set_xlabel(f"first {unit} of the block")
    axes.set_ylabel(f"length of the block ({unit}s)")
    axes.legend(loc="upper right", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("angular distance, input to output (0.5 = orthogonal)", fontsize=9)
    return figure


def rys_figure(result: Analysis, name: str) -> Figure:
    """Heat map: perplexity with the slots i to j - 1 run twice, over the base plan's; the best marked."""
    slots = len(result.plan)
    grid = np.full((slots, slots), np.nan)
    for (i, j), nats in result.rys.items():
        grid[i, j - 1] = (nats - result.base) / math.log(2)
    unit = "layers" if is_plain(result) else "slots"
    figure, axes = _square(slots, f"{name}: perplexity with {unit} i to j - 1 run twice")
    logs = grid[np.isfinite(grid)]
    reach = reach_of(logs)
    cmap = colormaps["RdBu_r"].with_extremes(bad="#ececec")
    norm = TwoSlopeNorm(0, -reach, reach)
    image = axes.imshow(grid, origin="lower", cmap=cmap, norm=norm, extent=_cells(1, 0, slots))
    _write_cells(axes, grid, 1, 0, lambda value: percent(2**value), lambda value: abs(value) > 0.6 * reach)
    best = next(iter(result.best_repeats()), None)
    if best is not None and result.improves(result.rys[best]):
        (i, j), ratio = best, result.ratio(result.rys[best])
        shift = 0.3 if slots <= _WRITTEN else 0
        axes.scatter(
            [j + shift], [i + shift], marker="*", s=3 * _marker(slots), color="gold", edgecolors="black",
            linewidths=0.8, label=f"best: ({i}, {j}), {percent(ratio)}",
        )  # fmt: skip
        axes.legend(loc="upper left", fontsize=8)
    else:
        axes.set_title("no repeat improves on the plan", fontsize=9)
    axes.set_xlabel("j: where the repeated block ends")
    axes.set_ylabel("i: where the repeated block begins")
    beyond = "max" if (logs > reach).any() else "neither"
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend=beyond)
    marks = ratio_marks(reach)
    bar.set_ticks([math.log2(ratio) for ratio in marks], labels=[mark(ratio) for ratio in marks])
    bar.set_label(from_base(result), fontsize=9)
    return figure


def lens_figure(result: Analysis, name: str, text_of: TokenText) -> Figure:
    """Table: the most probable next token at each slot and position, coloured by its probability.

    Beside it the perplexity of the whole text, read at each slot.
    """
    lens, nats = result.lens, result.lens_nats
    assert lens is not None
    assert nats is not None
    rows, columns = lens.ids.shape[:2]
    figure = Figure(figsize=(4.6 + 0.75 * columns, 1.8 + 0.27 * rows), layout="constrained")
    figure.suptitle(f"{name}: the next token as each layer would have it (logit lens)", fontsize=11)
    table, curve = figure.subplots(1, 2, sharey=True, width_ratios=[0.75 * columns, 1.9])
    probabilities = np.exp(lens.logprobs[..., 0])
    image = table.imshow(probabilities, origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            guess = int(lens.ids[row, column, 0])
            table.text(
                column, row, short_token(text_of(guess)), ha="center", va="center", fontsize=8,
                parse_math=False,
                color="white" if probabilities[row, column] > 0.6 else "black",
                fontweight="bold" if guess == lens.targets[column] else "normal",
            )  # fmt: skip
    labels = [short_token(text_of(token)) for token in lens.inputs]
    table.set_xticks(range(columns), labels, fontsize=8, parse_math=False)
    first, last = lens.positions[0], lens.positions[-1]
    table.set_xlabel(
        f"token that is read, at positions {first} to {last}; bold: right about the next; "
        "\N{MIDDLE DOT} is a space, \N{RETURN SYMBOL} a line break"
    )
    table.set_yticks(range(rows), depth_labels(result), fontsize=8)
    table.set_ylabel("read after")
    _draw_depths(curve, nats)
    curve.grid(axis="x", alpha=0.3)
    curve.tick_params(axis="y", length=0)
    curve.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=[table, curve], shrink=0.9, label="probability", pad=0.02)
    return figure


def _draw_depths(curve: Axes, nats: np.ndarray) -> None:
    """The text's perplexity after each slot; what would stretch the scale is an arrow at its end."""
    known = nats[np.isfinite(nats)]
    usual = float(np.quantile(known, 0.8, method="lower")) if known.size else 0.0
    limit = usual + max(1.5, 0.5 * (usual - float(known.min()))) if known.size else 0.0
    inside = np.minimum(np.where(np.isfinite(nats), nats, limit), limit)
    curve.plot(np.exp(inside), range(len(nats)), marker="o", markersize=4, color=_BLUE)
    for row in np.flatnonzero(~(nats <= limit)).tolist():
        curve.plot([math.exp(limit)], [row], marker=">", markersize=7, color=_ORANGE, clip_on=False)
        beyond = times(perplexity(float(nats[row]))) if math.isfinite(nats[row]) else "not finite"
        curve.annotate(beyond, (math.exp(limit), row), (-8, 0), textcoords="offset points", ha="right",
                       va="center", fontsize=8, backgroundcolor="white")  # fmt: skip
    curve.set_xscale("log")
    curve.set_xlabel("perplexity of the text")


# --- pieces


def _caption(result: Analysis, of: str) -> str:
    """What was measured: the plan, the text, and how much of it."""
    plan = str(result.plan)
    plan = plan if len(plan) <= 32 else f"{plan[:31]}\N{HORIZONTAL ELLIPSIS}"
    name = of if len(of) <= 32 else f"{of[:31]}\N{HORIZONTAL ELLIPSIS}"
    text = f"{name}, " if of else ""
    return f"plan {plan}; {text}{result.predicted:,} tokens in {result.windows:,} windows"


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _square(slots: int, title: str) -> tuple[Figure, Axes]:
    side = _side(slots)
    figure, axes = _figure(side + 1.3, side + 0.2, title)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # Characters the font does not have become boxes; the CSV has them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(out, format="png", dpi=_DPI, bbox_inches="tight")
    return out.getvalue()


def _width(result: Analysis) -> float:
    return min(max(6.0, 2.0 + 0.34 * len(result.plan)), 18.0)


def _side(slots: int) -> float:
    return min(max(4.6, 1.8 + 0.18 * slots), 11.0)


def _marker(slots: int) -> float:
    """Area of a marker that fits a cell, in square points."""
    return min(max(0.25 * (50 * _side(slots) / slots) ** 2, 6.0), 60.0)


def _cells(x: float, y: float, count: int) -> tuple[float, float, float, float]:
    """The extent of an image whose cells are centred on the integers from (x, y) on."""
    return x - 0.5, x + count - 0.5, y - 0.5, y + count - 0.5


def _write_cells(
    axes: Axes,
    grid: np.ndarray,
    x: int,
    y: int,
    text: Callable[[float], str],
    is_dark: Callable[[float], bool],
) -> None:
    """Writes the figures into the cells where there is room."""
    if len(grid) > _WRITTEN:
        return
    for row, column in np.argwhere(np.isfinite(grid)).tolist():
        value = float(grid[row, column])
        color = "white" if is_dark(value) else "black"
        axes.text(x + column, y + row, text(value), ha="center", va="center", color=color, fontsize=7)


def _slot_ticks(axes: Axes, result: Analysis) -> None:
    slots = len(result.plan)
    shown = range(0, slots, -(-slots // 40))
    axes.set_xticks(shown, [str(result.plan.slots[slot].layer) for slot in shown], fontsize=8)
    axes.set_xlim(-0.7, slots - 0.3)
    axes.set_xlabel("layer" if is_plain(result) else f"layer in each of the plan's {slots} slots")


def _bare(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
