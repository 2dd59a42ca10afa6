"""The figures of `report.html`, as what plotly.js draws: plain dictionaries, one function a figure.

Where they stand and what is said about them is `page.py`'s. Needs neither plotly nor JAX.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.analysis import scales
from jaxchat.analysis.cells import finite
from jaxchat.analysis.measure import HALVES, Analysis, perplexity, repeated
from jaxchat.analysis.scales import TokenText, interval_text, is_bounded, number, percent
from jaxchat.evaluation.statistics import Estimate

Figure = dict[str, Any]
"""`data`, `layout` and `height`, in pixels, as plotly.js takes them."""

_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#7f8791"
_COLORS = {"attention": _BLUE, "mlp": _ORANGE, "both": _GREY}
_NAMES = {"attention": "attention", "mlp": "MLP", "both": "the whole layer"}
_DIVERGING = [[0.0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1.0, "#b2182b"]]
_PROBABILITY = [[0.0, "#f7fbff"], [0.5, "#9ecae1"], [1.0, "#2171b5"]]
_ROW = 22  # pixels of a row with text in it


def lines(*parts: str) -> str:
    """Text of somebody else in several lines, for plotly, which reads tags, links and entities in text."""
    return "<br>".join(html.escape(part, quote=False) for part in parts if part)


def shortened(text: str, length: int = 60) -> str:
    """A long plan's beginning."""
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def rys(result: Analysis) -> Figure:
    """Heat map: the ratio of perplexities with the slots i to j - 1 run twice."""
    slots = len(result.plan)
    grid, hover = np.full((slots, slots), np.nan), [[""] * slots for _ in range(slots)]
    for (i, j), nats in result.rys.items():
        grid[i, j - 1] = (nats - result.base) / math.log(2)
        hover[i][j - 1] = lines(
            f"slots {i} to {j - 1} run twice (i = {i}, j = {j})",
            f"plan {shortened(str(repeated(result.plan, i, j)))}",
            *_score_lines(result, nats),
        )
    reach = scales.reach_of(grid[np.isfinite(grid)])
    marks = scales.ratio_marks(reach)
    heat = {
        **_heat(grid, hover, range(1, slots + 1), range(slots), _DIVERGING),
        "zmin": -reach,
        "zmax": reach,
        "colorbar": _bar(
            "perplexity against the plan's own", [math.log2(r) for r in marks], map(scales.mark, marks)
        ),
    }
    lost = [(j, i) for (i, j), nats in result.rys.items() if not math.isfinite(nats)]
    layout = _layout("j: where the repeated block ends", "i: where the repeated block begins")
    layout["xaxis"] |= _whole_ticks(1, slots)
    layout["yaxis"] |= _whole_ticks(0, slots)
    data = [heat, *_crosses(lost, [hover[i][j - 1] for j, i in lost]), *_best(result, hover)]
    return {"data": data, "layout": layout, "height": _square(slots)}


def _best(result: Analysis, hover: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    best = next(iter(result.best_repeats()), None)
    if best is None or not result.improves(result.rys[best]):
        return []
    i, j = best
    marker = {"symbol": "star", "size": 13, "color": "gold", "line": {"color": "black", "width": 1}}
    return [{"type": "scatter", "mode": "markers", "x": [j], "y": [i], "marker": marker, "name": "best",
             "hoverinfo": "text", "hovertext": [hover[i][j - 1]]}]  # fmt: skip


def angular(result: Analysis) -> Figure:
    """Heat map: angular distance over blocks of every start and length."""
    assert result.angular is not None
    slots = len(result.plan)
    grid, hover = np.full((slots, slots), np.nan), [[""] * slots for _ in range(slots)]
    for length in range(1, slots + 1):
        for start, value in enumerate(np.diagonal(result.angular, length).tolist()):
            grid[length - 1, start] = value
            layers = f"{result.plan.slots[start].layer} to {result.plan.slots[start + length - 1].layer}"
            hover[length - 1][start] = lines(
                f"{length} {'slot' if length == 1 else 'slots'} from {start} on (layers {layers})",
                f"angular distance {value:.4f}",
            )
    heat = _heat(grid, hover, range(slots), range(1, slots + 1), "Viridis")
    heat |= {"reversescale": True, "colorbar": _bar("angular distance")}
    unit = _unit(result)
    layout = _layout(f"first {unit} of the block", f"length of the block ({unit}s)")
    layout["xaxis"] |= _whole_ticks(0, slots)
    layout["yaxis"] |= _whole_ticks(1, slots)
    return {"data": [heat], "layout": layout, "height": _square(slots)}


def influence(result: Analysis) -> Figure:
    """Bars: Block Influence."""
    assert result.influence is not None
    values = result.influence.tolist()
    pairs = zip(_labels(result), values, strict=True)
    hover = [lines(label, f"block influence {value:.4f}") for label, value in pairs]
    layout = _layout(_slot_title(result), "1 \N{MINUS SIGN} cos(input, output)")
    layout["xaxis"] |= _slot_ticks(result)
    return {"data": [_bars(values, hover, "influence", _BLUE)], "layout": layout, "height": 320}


def skip(result: Analysis) -> Figure:
    """Bars: the change of perplexity without a slot, or half of it; logarithmic beyond 1 %."""
    data, lost, drawn = [], [], [0.0]
    for half in HALVES:
        nats = result.skip[half].tolist()
        changes = [result.ratio(value) - 1 for value in nats]
        hover = [
            lines(f"{label} without {_NAMES[half]}", *_score_lines(result, value))
            for label, value in zip(_labels(result), nats, strict=True)
        ]
        heights = [_symlog(change) if math.isfinite(change) else None for change in changes]
        data.append(_bars(heights, hover, f"without {_NAMES[half]}", _COLORS[half]))
        drawn += [change for change in changes if math.isfinite(change)]
        lost += [(slot, hover[slot]) for slot, change in enumerate(changes) if not math.isfinite(change)]
    top = 1.08 * _symlog(max(drawn))
    data += _crosses([(slot, top) for slot, _ in lost], [text for _, text in lost])
    layout = _layout(_slot_title(result), "change of perplexity")
    layout["xaxis"] |= _slot_ticks(result)
    ticks = scales.symlog_ticks(min(drawn), max(drawn))
    layout["yaxis"] |= _ticks(map(_symlog, ticks), (scales.mark(1 + change) for change in ticks))
    return {"data": data, "layout": layout | {"barmode": "group"}, "height": 400}


def _symlog(change: float) -> float:
    return math.copysign(math.log10(1 + abs(change) / scales.SMALL), change)


def halves(result: Analysis) -> Figure:
    """Three rows of bars: the norm of what each half adds, its cosine, its effect on the right logit."""
    found = result.contributions
    assert found is not None
    rows = (
        (found.norm, "norm ratio", "norm of what it adds, against the stream: {:.4f}"),
        (found.cosine, "cosine", "cosine of what it adds and the stream: {:+.4f}"),
        (found.logit, "effect on logit", "direct effect on the right token's logit: {:+.4f}"),
    )
    data = []
    layout = _layout("", "")
    for row, (values, title, words) in enumerate(rows):
        axis = "" if row == 0 else str(row + 1)
        for half, numbers in values.items():
            hover = [
                lines(f"{label}: {_NAMES[half]}", words.format(value))
                for label, value in zip(_labels(result), numbers.tolist(), strict=True)
            ]
            bars = _bars(numbers.tolist(), hover, _NAMES[half], _COLORS[half])
            bars |= {"yaxis": f"y{axis}", "legendgroup": half, "showlegend": row == 0}
            data.append(bars)
        low = 1 - (row + 1) / 3 + 0.03
        layout[f"yaxis{axis}"] = _axis(title) | {"domain": [low, low + 0.27], "zeroline": True}
    steps = [float(f"{digit}e{power}") for power in range(-4, 5) for digit in (1, 2, 5)]
    layout["yaxis"] |= {"type": "log", **_ticks(steps, (f"{step:g}" for step in steps))}
    layout["xaxis"] |= {
        **_slot_ticks(result),
        "title": {"text": _slot_title(result), "standoff": 10},
        "anchor": "y3",
    }
    return {"data": data, "layout": layout | {"barmode": "group"}, "height": 680}


def lens(result: Analysis, text_of: TokenText) -> Figure:
    """Table: the most probable next token at each slot and position; beside it the text's perplexity."""
    found, nats = result.lens, result.lens_nats
    assert found is not None
    assert nats is not None
    rows, columns, k = found.ids.shape
    labels = scales.depth_labels(result)
    cells, hover = [], []
    for row in range(rows):
        guesses = [int(found.ids[row, column, 0]) for column in range(columns)]
        words = [lines(scales.short_token(text_of(guess))) for guess in guesses]
        right = [guess == target for guess, target in zip(guesses, found.targets, strict=True)]
        cells.append([f"<b>{word}</b>" if bold else word for word, bold in zip(words, right, strict=True)])
        hover.append([_lens_hover(result, labels[row], row, column, k, text_of) for column in range(columns)])
    names = [lines(scales.short_token(text_of(token))) for token in found.inputs]
    heat = _heat(np.exp(found.logprobs[..., 0]), hover, range(columns), range(rows), _PROBABILITY)
    heat |= {"text": cells, "texttemplate": "%{text}", "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1}
    top = {"lenmode": "pixels", "len": min(220, 60 + _ROW * rows), "y": 1, "yanchor": "top"}
    heat |= {"colorbar": _bar("probability") | top, "textfont": {"size": 12}}
    where = f"positions {found.positions[0]} to {found.positions[-1]}"
    layout = _layout(f"token that is read, {where}", "read after")
    layout["xaxis"] |= _ticks(range(columns), names) | {"domain": [0, 0.77], "showgrid": False}
    layout["yaxis"] |= _ticks(range(rows), labels) | {"showgrid": False, "range": [-0.5, rows - 0.5]}
    layout["xaxis2"] = _axis("perplexity of the text") | {
        "domain": [0.8, 1],
        "type": "log",
        "exponentformat": "power",
    }
    layout["showlegend"] = False
    return {"data": [heat, _depths(result, labels)], "layout": layout, "height": 150 + _ROW * rows}


def _lens_hover(result: Analysis, label: str, row: int, column: int, k: int, text_of: TokenText) -> str:
    found = result.lens
    assert found is not None
    guesses = [
        f"{100 * math.exp(logprob):.1f} % {whole(text_of, token)}"
        for token, logprob in zip(
            found.ids[row, column, : min(k, 10)], found.logprobs[row, column], strict=False
        )
    ]
    target = found.targets[column]
    follows = "nothing: the window ends" if target is None else whole(text_of, target)
    read = whole(text_of, found.inputs[column])
    return lines(f"{label}, position {found.positions[column]}: {read}", *guesses, f"what follows: {follows}")


def whole(text_of: TokenText, token: int) -> str:
    """A token in a sentence, in quotation marks that are rare in texts."""
    text = shortened(scales.whole_token(text_of(int(token))), 40)
    return (
        f"\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}{text}\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    )


def _depths(result: Analysis, labels: Sequence[str]) -> dict[str, Any]:
    assert result.lens_nats is not None
    values = result.lens_nats.tolist()
    pairs = zip(labels, values, strict=True)
    hover = [lines(f"read after {label}", *_score_lines(result, nats)) for label, nats in pairs]
    return {
        "type": "scatter", "mode": "lines+markers", "xaxis": "x2", "yaxis": "y",
        # Beyond exp(700) a browser has no number.
        "x": [perplexity(nats) if nats < 700 else None for nats in values],
        "y": list(range(len(values))), "line": {"color": _BLUE}, "hoverinfo": "text", "hovertext": hover,
    }  # fmt: skip


def comparison(result: Analysis, names: Sequence[str]) -> Figure:
    """A forest plot: how each plan compared changes the perplexity, with its interval."""
    known = [(n, c.intervals.difference) for n, c in zip(names, result.compared, strict=True) if c.intervals]
    rows = range(len(known))
    ends = [_percents(found) for _, found in known]
    hover = [
        lines(name, f"change {percent(perplexity(found.value))}", f"95 % interval {interval_text(found)}",
              f"{found.items} {'window' if found.items == 1 else 'windows'}")
        for name, found in known
    ]  # fmt: skip
    arms = {
        "array": [high - value for _, value, high in ends],
        "arrayminus": [value - low for low, value, _ in ends],
    }
    points = {
        "type": "scatter", "mode": "markers", "x": [value for _, value, _ in ends], "y": list(rows),
        "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 6, **arms},
        "marker": {"size": 10, "color": _BLUE}, "hoverinfo": "text", "hovertext": hover,
    }  # fmt: skip
    layout = _layout("change of perplexity from the base plan (%)", "")
    layout["xaxis"] |= {"zeroline": True, "zerolinecolor": "#555", "zerolinewidth": 2}
    layout["yaxis"] |= _ticks(rows, [lines(shortened(name, 40)) for name, _ in known])
    layout["yaxis"] |= {"range": [len(known) - 0.5, -0.5]}
    return {"data": [points], "layout": layout, "height": 120 + 40 * len(known)}


def _percents(difference: Estimate) -> tuple[float, float, float]:
    """Low, value and high of a difference of nats as changes in percent; without bounds, the value itself."""
    value = difference.value
    ends = (difference.low, value, difference.high) if is_bounded(difference) else (value, value, value)
    low, value, high = (100 * math.expm1(min(nats, 50)) for nats in ends)
    return low, value, high


# --- pieces


def _score_lines(result: Analysis, nats: float) -> tuple[str, ...]:
    if not math.isfinite(nats):
        return ("not finite: the logits hold NaN or infinity",)
    ratio = result.ratio(nats)
    return (
        f"perplexity {number(perplexity(nats))}, {percent(ratio)} ({scales.times(ratio)} times)",
        f"{nats:.4f} nats a token",
    )


def _unit(result: Analysis) -> str:
    return "layer" if scales.is_plain(result) else "slot"


def _labels(result: Analysis) -> list[str]:
    return scales.depth_labels(result)[1:]


def _slot_title(result: Analysis) -> str:
    plain = scales.is_plain(result)
    return "layer" if plain else f"layer in each of the plan's {len(result.plan)} slots"


def _slot_ticks(result: Analysis) -> dict[str, Any]:
    slots = len(result.plan)
    shown = range(0, slots, -(-slots // 40))
    ticks = _ticks(shown, [str(result.plan.slots[slot].layer) for slot in shown])
    return ticks | {"range": [-0.7, slots - 0.3]}


def _ticks(places: Any, names: Any) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": list(places), "ticktext": list(names)}


def _whole_ticks(first: int, count: int) -> dict[str, Any]:
    """Of so many whole numbers from `first` on, as many as there is room for."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**6) if count <= 20 * step)
    places = [place for place in range(first, first + count) if step == 1 or place % step == 0]
    return _ticks(places, map(str, places))


def _square(slots: int) -> int:
    return min(max(420, 160 + 16 * slots), 820)


def _heat(grid: np.ndarray, hover: Any, x: Any, y: Any, colors: Any) -> dict[str, Any]:
    return {
        "type": "heatmap", "z": _numbers(grid), "x": list(x), "y": list(y), "hovertext": hover,
        "hoverinfo": "text", "hoverongaps": False, "colorscale": colors,
    }  # fmt: skip


def _numbers(grid: np.ndarray) -> list[list[float | None]]:
    """To five digits, None where there is none."""
    return [[float(f"{v:.5g}") if math.isfinite(v) else None for v in row] for row in grid.tolist()]


def _bars(values: Sequence[float | None], hover: Sequence[str], name: str, color: str) -> dict[str, Any]:
    return {
        "type": "bar", "x": list(range(len(values))), "y": list(map(finite, values)), "name": name,
        "hoverinfo": "text", "hovertext": list(hover), "marker": {"color": color},
    }  # fmt: skip


def _crosses(places: Sequence[tuple[float, float]], hover: Sequence[str]) -> list[dict[str, Any]]:
    if not places:
        return []
    x, y = zip(*places, strict=True)
    marker = {"symbol": "x-thin-open", "size": 9, "color": "black", "line": {"width": 2}}
    return [{"type": "scatter", "mode": "markers", "x": x, "y": y, "name": "not finite", "marker": marker,
             "hoverinfo": "text", "hovertext": list(hover)}]  # fmt: skip


def _bar(title: str, places: Any = (), names: Any = ()) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0}
    return bar | (_ticks(places, names) if places else {})


def _axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 10},
        "gridcolor": "#e6e8eb",
        "zeroline": False,
        "automargin": True,
    }


def _layout(x: str, y: str) -> dict[str, Any]:
    layout: Mapping[str, Any] = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"size": 13, "color": "#222"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest", "plot_bgcolor": "white", "xaxis": _axis(x), "yaxis": _axis(y),
    }  # fmt: skip
    return dict(layout)
