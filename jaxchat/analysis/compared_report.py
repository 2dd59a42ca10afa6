"""Plans compared with the base plan as rows of CSV, as JSON and as a table; all else is `report.py`'s."""

import math
from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from jaxchat.analysis.cells import SCORE, change, finite, plain_table, score
from jaxchat.analysis.compared import Candidates, Compared
from jaxchat.analysis.measure import Analysis, perplexity
from jaxchat.analysis.scales import TokenText, interval_text
from jaxchat.evaluation.statistics import Estimate

COLUMNS = ("layer_spec", "windows", *SCORE, "ratio_low", "ratio_high", "windows_better", "windows_worse",
           "kl_per_token", "same_next_token", "first_window", "first_position")  # fmt: skip
TOKEN_COLUMNS = ("layer_spec", "window", "position", "token", "text", "base_nats", "nats", "kl",
                 "base_prediction", "base_prediction_text", "prediction", "prediction_text")  # fmt: skip


def rows(result: Analysis) -> Iterable[tuple[Any, ...]]:
    """The `COLUMNS` of each plan; empty where nothing differs, nan of a plan that is not finite."""
    for compared in result.compared:
        found, first = compared.intervals, compared.first
        windows = len(set(compared.windows.tolist()))
        nats = math.nan if found is None else found.plan.value
        bounds: tuple[Any, ...] = (math.nan,) * 6
        if found is not None:
            ends = (perplexity(found.difference.low), perplexity(found.difference.high))
            means = (float(compared.kl.mean()), float(compared.agreed.mean()))
            bounds = (*ends, found.better, found.worse, *means)
        where = ("", "") if first is None else (int(compared.windows[first]), int(compared.places[first]))
        yield str(compared.plan), windows, *score(result, nats), *bounds, *where


def token_rows(result: Analysis, text_of: TokenText) -> Iterable[tuple[Any, ...]]:
    """The `TOKEN_COLUMNS` of each token that counts, plan after plan."""
    for compared in result.compared:
        spec = str(compared.plan)
        for place, token in enumerate(compared.tokens.tolist()):
            nats = (float(values[place]) for values in (compared.base_nats, compared.nats, compared.kl))
            base, guess = int(compared.base_best.ids[place, 0]), int(compared.best.ids[place, 0])
            where = int(compared.windows[place]), int(compared.places[place])
            said = base, text_of(base), guess, text_of(guess)
            yield spec, *where, token, text_of(token), *nats, *said


def as_json(compared: Compared, text_of: TokenText | None) -> dict[str, Any]:
    """One plan: means with their intervals, the first disagreement, the ten largest divergences."""
    found, first = compared.intervals, compared.first
    return {
        "layer_spec": str(compared.plan),
        "finite": found is not None,
        "nats_per_token": None if found is None else _interval(found.plan),
        "base_nats_per_token": None if found is None else _interval(found.base),
        "difference": None if found is None else _interval(found.difference),
        "kl_per_token": None if found is None else float(compared.kl.mean()),
        "same_next_token": None if found is None else float(compared.agreed.mean()),
        "first_disagreement": None if first is None else _token_json(compared, first, text_of),
        "largest_divergences": [_token_json(compared, token, text_of) for token in compared.largest(10)],
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    """A mean over windows; bounds that are not finite are null, of one window both."""
    found = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "windows": estimate.items}
    return {name: finite(value) for name, value in found.items()}


def _token_json(compared: Compared, token: int, text_of: TokenText | None) -> dict[str, Any]:
    def said(best: Candidates) -> dict[str, Any]:
        probability = finite(math.exp(float(best.logprobs[token, 0])))
        return _with_text(int(best.ids[token, 0]), text_of) | {"probability": probability}

    return {
        "window": int(compared.windows[token]),
        "position": int(compared.places[token]),
        **_with_text(int(compared.tokens[token]), text_of),
        "kl": finite(float(compared.kl[token])),
        "base": said(compared.base_best),
        "plan": said(compared.best),
    }


def _with_text(token: int, text_of: TokenText | None) -> dict[str, Any]:
    return {"token": token} | ({"text": text_of(token)} if text_of else {})


def table(result: Analysis) -> Table:
    """What a terminal shows: `first` is the window and the position in it where they first disagree."""
    table = plain_table()
    for name in ("perplexity", "95 % interval", "same token", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("--compare")
    for compared in result.compared:
        found, first = compared.intervals, compared.first
        spec = Text(str(compared.plan), overflow="ellipsis", no_wrap=True)
        where = "never" if first is None else f"{compared.windows[first]}:{compared.places[first]}"
        cells = ("not finite", "", "")
        if found is not None:
            agreed = f"{100 * compared.agreed.mean():.1f} %"
            cells = (change(result, found.plan.value), interval_text(found.difference), agreed)
        table.add_row(*cells, where, spec)
    return table
