"""An analysis as CSV, as JSON, and as the tables a terminal shows. Pictures are `plots.py`'s."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxchat.analysis import compared_report
from jaxchat.analysis.cells import SCORE, change, finite, plain_table, score
from jaxchat.analysis.contributions import ADDING, Contributions
from jaxchat.analysis.measure import Analysis, perplexity, repeated
from jaxchat.analysis.scales import TokenText, number

SHOWN = 10
"""Layers that the most and the least important are."""
REPEATS = 5
"""Repeats that are listed."""


def csv_files(result: Analysis, text_of: TokenText | None = None) -> dict[str, str]:
    """File name -> contents, of what was measured. Perplexities that are not finite are `nan` or `inf`.

    Args:
      result: the analysis.
      text_of: adds tokens as text.
    """
    files = {"layers.csv": _csv(_layer_columns(result), _layer_rows(result))}
    if result.angular is not None:
        files["angular.csv"] = _csv(("start", "length", "first_layer", "distance"), _angular_rows(result))
    if result.rys:
        files["rys.csv"] = _csv(("i", "j", "layer_spec", "slots", *SCORE), _rys_rows(result))
    if result.compared:
        files["compare.csv"] = _csv(compared_report.COLUMNS, compared_report.rows(result))
        tokens = compared_report.token_rows(result, text_of or (lambda _: ""))
        files["compare_tokens.csv"] = _csv(compared_report.TOKEN_COLUMNS, tokens)
    if result.lens_nats is not None:
        rows = ((slots, *score(result, nats)) for slots, nats in enumerate(result.lens_nats))
        files["lens.csv"] = _csv(("slots_run", *SCORE), rows)
    if result.lens is not None:
        header = ("slots_run", "position", "token", "text", "next", "rank", "prediction", "prediction_text",
                  "probability")  # fmt: skip
        files["lens_tokens.csv"] = _csv(header, _lens_rows(result, text_of or (lambda _: "")))
    return files


def as_json(result: Analysis, text_of: TokenText | None = None) -> dict[str, Any]:
    """All that was measured as JSON values; figures that are not finite are null."""
    lens = None
    if result.lens is not None:
        lens = {
            "positions": result.lens.positions,
            "tokens": result.lens.inputs,
            "next": result.lens.targets,
            "top_ids": result.lens.ids.tolist(),
            "top_probabilities": np.exp(result.lens.logprobs).tolist(),
            "texts": _texts(result, text_of) if text_of else None,
        }
    return {
        "layer_spec": str(result.plan),
        "windows": result.windows,
        "predicted_tokens": result.predicted,
        "perplexity": finite(perplexity(result.base)),
        "nats_per_token": finite(result.base),
        "slots": [
            dict(zip(_layer_columns(result), map(finite, row), strict=True)) for row in _layer_rows(result)
        ],
        "angular_distance": None if result.angular is None else result.angular.tolist(),
        "rys": [
            {"i": i, "j": j, "perplexity": finite(perplexity(nats)), "ratio": finite(result.ratio(nats))}
            for (i, j), nats in result.rys.items()
        ],
        "rys_total": result.rys_total,
        "compared": [compared_report.as_json(compared, text_of) for compared in result.compared],
        "direct_logit": None if result.contributions is None else _direct_logit(result.contributions),
        "lens_nats_per_token": None
        if result.lens_nats is None
        else [finite(nats) for nats in result.lens_nats.tolist()],
        "lens": lens,
    }


def tables(result: Analysis) -> Group:
    """What a person wants to know first: the layers that matter, the best repeats, other plans."""
    without = "; below, without a layer or half of it, and the change" if result.skip else ""
    parts: list[Any] = [Text(f"Perplexity {number(perplexity(result.base))}{without}")]
    ranking = result.ranking()
    if len(ranking) > 2 * SHOWN:
        most, least = ranking[:SHOWN], ranking[: -SHOWN - 1 : -1]
        parts += [_title(f"The {SHOWN} most important layers"), _ranking_table(result, most)]
        parts += [_title(f"The {SHOWN} least important layers"), _ranking_table(result, least)]
    elif ranking:
        parts += [_title("All layers, the most important first"), _ranking_table(result, ranking)]
    if result.rys:
        tried = f"{len(result.rys)} of {result.rys_total}" if len(result.rys) < result.rys_total else "all"
        best = result.best_repeats()
        better = [pair for pair in best if result.improves(result.rys[pair])]
        what = "The best repeats" if better else "No repeat improves on the plan; the least harmful"
        parts += [_title(f"{what}, of {tried} (i, j): slots i to j - 1 run twice")]
        parts += [_repeats_table(result, (better or best)[:REPEATS])]
    if result.compared:
        parts += [
            _title("Plans compared, and where they first disagree (window:position)"),
            compared_report.table(result),
        ]
    return Group(*parts)


# --- rows

_ADDED = ("norm_ratio", "cosine", "direct_logit")


def _layer_columns(result: Analysis) -> tuple[str, ...]:
    influence = ("influence",) if result.influence is not None else ()
    skips = tuple(f"skip_{half}_{column}" for half in result.skip for column in SCORE)
    halves = tuple(f"{half}_{what}" for half in ADDING for what in _ADDED) if result.contributions else ()
    return ("slot", "layer", "attn_scale", "mlp_scale", *influence, *skips, *halves)


def _layer_rows(result: Analysis) -> Iterable[tuple[Any, ...]]:
    for place, slot in enumerate(result.plan):
        influence = (float(result.influence[place]),) if result.influence is not None else ()
        skips = (value for nats in result.skip.values() for value in score(result, nats[place]))
        added = () if result.contributions is None else _added(result.contributions, place)
        yield (place, slot.layer, slot.attn_scale, slot.mlp_scale, *influence, *skips, *added)


def _added(found: Contributions, slot: int) -> Iterable[float]:
    """The columns `_ADDED` of each half of a slot."""
    return (
        float(values[half][slot]) for half in ADDING for values in (found.norm, found.cosine, found.logit)
    )


def _angular_rows(result: Analysis) -> Iterable[tuple[Any, ...]]:
    assert result.angular is not None
    slots = result.plan.slots
    for length in range(1, len(slots) + 1):
        for start in range(len(slots) - length + 1):
            yield start, length, slots[start].layer, float(result.angular[start, start + length])


def _rys_rows(result: Analysis) -> Iterable[tuple[Any, ...]]:
    for (i, j), nats in result.rys.items():
        plan = repeated(result.plan, i, j)
        yield i, j, str(plan), len(plan), *score(result, nats)


def _lens_rows(result: Analysis, text_of: TokenText) -> Iterable[tuple[Any, ...]]:
    lens = result.lens
    assert lens is not None
    for slots, (ids, logprobs) in enumerate(zip(lens.ids.tolist(), lens.logprobs.tolist(), strict=True)):
        for column, position in enumerate(lens.positions):
            token, following = lens.inputs[column], lens.targets[column]
            for rank, (guess, logprob) in enumerate(zip(ids[column], logprobs[column], strict=True)):
                yield (slots, position, token, text_of(token), "" if following is None else following, rank,
                       guess, text_of(guess), math.exp(logprob))  # fmt: skip


def _direct_logit(found: Contributions) -> dict[str, float | None]:
    """What is no half's: the logit as a whole, and what embedding and bias add to it."""
    parts = {"total": found.total, "embedding": found.embedding, "bias": found.bias}
    return {name: finite(value) for name, value in parts.items()}


def _texts(result: Analysis, text_of: TokenText) -> dict[str, str]:
    """Token id -> text, of every token the lens mentions."""
    lens = result.lens
    assert lens is not None
    known = {*lens.inputs, *(t for t in lens.targets if t is not None), *lens.ids.reshape(-1).tolist()}
    return {str(token): text_of(token) for token in sorted(known)}


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


# --- tables

_WITHOUT = {"attention": "no attention", "mlp": "no MLP", "both": "no layer"}


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _ranking_table(result: Analysis, slots: Sequence[int]) -> Table:
    table = plain_table()
    plain = all(slot.layer == number for number, slot in enumerate(result.plan))
    for name in ("rank", "layer") if plain else ("rank", "slot", "layer"):
        table.add_column(name, justify="right")
    if result.influence is not None:
        table.add_column("influence", justify="right")
    for half in result.skip:
        table.add_column(_WITHOUT[half], justify="right")
    rank_of = {slot: rank for rank, slot in enumerate(result.ranking(), 1)}
    for slot in slots:
        cells = [str(rank_of[slot]), str(slot), str(result.plan.slots[slot].layer)]
        if plain:
            del cells[2]
        if result.influence is not None:
            cells.append(f"{result.influence[slot]:.4f}")
        cells += [change(result, float(nats[slot])) for nats in result.skip.values()]
        table.add_row(*cells)
    return table


def _repeats_table(result: Analysis, pairs: Sequence[tuple[int, int]]) -> Table:
    table = plain_table()
    for name in ("i", "j", "slots", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("--layer_spec")
    for i, j in pairs:
        plan = repeated(result.plan, i, j)
        spec = Text(str(plan), overflow="ellipsis", no_wrap=True)
        table.add_row(str(i), str(j), str(len(plan)), change(result, result.rys[i, j]), spec)
    return table
