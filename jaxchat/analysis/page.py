"""An analysis as one interactive HTML file, `report.html`, that reads nothing from anywhere else.

Its figures are `page_figures.py`'s, how it looks and what moves is in `page.css` and `page.js`. plotly.js
comes from the Python package plotly (the `analyze` extra), which has it whole: compressed, it is 2 MB.
"""

import base64
import gzip
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from jaxchat.analysis import page_figures, page_words, scales
from jaxchat.analysis.compared import Candidates, Compared
from jaxchat.analysis.contributions import Contributions
from jaxchat.analysis.measure import Analysis, perplexity
from jaxchat.analysis.page_figures import Figure, shortened, whole
from jaxchat.analysis.scales import TokenText, interval_text, is_bounded, number, percent

STRIP = 4096
"""Tokens of a text that are shown coloured; the figures are of all of it."""
_CANDIDATES = 5
_LARGEST = 10
# Nothing but what stands in the file runs or is shown, whatever a token's text makes of the page.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


class Section(NamedTuple):
    """A part of the page."""

    key: str
    title: str
    body: str  # HTML


def page(result: Analysis, facts: Mapping[str, str], text_of: TokenText | None = None) -> str:
    """The page.

    Args:
      result: the analysis.
      facts: what was measured on what, by name; `model` is in the title.
      text_of: a token id -> its text; default the ids.
    """
    text_of = text_of or (lambda token: f"[{token}] ")
    figures: dict[str, Figure] = {}
    sections = list(_sections(result, text_of, figures))
    shown = [_strip(compared) for compared in result.compared]
    ids = sorted({token for strip in shown for token in _ids_of(strip)})
    data = {
        "figures": figures,
        "strips": shown,
        "texts": {token: _in_text(text_of(token)) for token in ids},
        "words": {token: whole(text_of, token) for token in ids},
    }
    title = _escaped(f"{facts.get('model', '')}: what its layers do")
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n<body>",
            f"<h1>{title}</h1>\n{_facts(facts)}",
            '<p id="problem"></p>',
            "<nav>" + " ".join(f'<a href="#{s.key}">{s.title}</a>' for s in sections) + "</nav>",
            *(f'<section id="{s.key}">\n<h2>{s.title}</h2>\n{s.body}\n</section>' for s in sections),
            '<div id="hover"></div>',
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f'<script type="text/plain" id="plotly">{_plotly()}</script>',
            f"<script>\n{_file('page.js')}</script>\n</body>\n</html>\n",
        )
    )


def _sections(result: Analysis, text_of: TokenText, figures: dict[str, Figure]) -> Iterator[Section]:
    """What was measured, in the order of the page; fills in the figures."""
    own = number(perplexity(result.base))

    def drawn(key: str, figure: Figure, *, square: bool = False) -> str:
        figures[key] = {"data": figure["data"], "layout": figure["layout"]}
        kind = "figure square" if square else "figure"
        return f'<div class="{kind}" data-figure="{key}" style="height: {figure["height"]}px"></div>'

    names = [_name(compared) for compared in result.compared]
    yield Section("plans", "Plans compared", _plans(result, names, drawn))
    for place, (name, compared) in enumerate(zip(names, result.compared, strict=True)):
        body = _disagreements(compared, place, text_of)
        yield Section(f"text-{place}", f"On the text: {_escaped(shortened(name, 30))}", body)
    if result.influence is not None:
        body = _p(page_words.INFLUENCE) + drawn("influence", page_figures.influence(result))
        yield Section("influence", "Influence", body)
    if result.skip:
        body = _p(page_words.SKIP.format(own=own)) + drawn("skip", page_figures.skip(result))
        yield Section("skip", "Layers left out", body)
    if result.contributions is not None:
        body = _contributions(result.contributions) + drawn("halves", page_figures.halves(result))
        yield Section("halves", "What halves add", body)
    if result.rys:
        how = page_words.RYS.format(own=own, tried=len(result.rys), total=result.rys_total)
        yield Section("rys", "Repeats", _p(how) + drawn("rys", page_figures.rys(result), square=True))
    if result.angular is not None:
        body = _p(page_words.ANGULAR) + drawn("angular", page_figures.angular(result), square=True)
        yield Section("angular", "Angular distance", body)
    if result.lens is not None:
        body = _p(page_words.LENS) + drawn("lens", page_figures.lens(result, text_of))
        yield Section("lens", "Logit lens", body)


# --- plans compared


def _plans(result: Analysis, names: Sequence[str], drawn: Any) -> str:
    if not names:
        return _p(page_words.NO_PLANS.format(own=number(perplexity(result.base))))
    header = ("plan", "perplexity", "95 % interval", "change", "95 % interval", "windows", "better / worse",
              "KL (nats a token)", "same next token")  # fmt: skip
    rows = [
        _base_row(result),
        *(_row(shortened(n, 120), c) for n, c in zip(names, result.compared, strict=True)),
    ]
    figure = ""
    if any(compared.intervals for compared in result.compared):
        figure = drawn("plans", page_figures.comparison(result, names))
    return _p(page_words.PLANS) + _table(header, rows) + figure


def _base_row(result: Analysis) -> tuple[str, ...]:
    known = next((c.intervals for c in result.compared if c.intervals), None)
    interval = "" if known is None else _perplexities(known.base)
    own = number(perplexity(result.base))
    plan = f"{shortened(str(result.plan), 120)} (base)"
    return (plan, own, interval, "", "", str(result.windows), "", "", "")


def _row(name: str, compared: Compared) -> tuple[str, ...]:
    windows = str(len(set(compared.windows.tolist())))
    found = compared.intervals
    if found is None:
        return (name, "not finite", "", "", "", windows, "", "", "")
    return (
        name,
        number(perplexity(found.plan.value)),
        _perplexities(found.plan),
        percent(perplexity(found.difference.value)),
        interval_text(found.difference),
        windows,
        f"{found.better} / {found.worse}",
        f"{compared.kl.mean():.4f}",
        f"{100 * compared.agreed.mean():.1f} %",
    )


def _perplexities(estimate: Any) -> str:
    if not is_bounded(estimate):
        return "none: too few windows"
    return f"{number(perplexity(estimate.low))} to {number(perplexity(estimate.high))}"


def _name(compared: Compared) -> str:
    return str(compared.plan)


# --- where two plans disagree


def _disagreements(compared: Compared, place: int, text_of: TokenText) -> str:
    limit = ""
    if len(compared.tokens) > STRIP:
        limit = _p(f"The first {STRIP:,} of {len(compared.tokens):,} tokens are shown; the list is of all.")
    legend = (
        '<div class="legend">0 <i></i> '
        f"{_most(compared):.3g} nats and more (in proportion to the square root) "
        '<b>another token</b> <u>the first</u> <s class="lost">not finite</s></div>'
    )
    strip = f'<div class="strip" data-strip="{place}"></div>'
    first, largest = _first(compared, text_of), _largest(compared, text_of)
    parts = (
        _p(page_words.DISAGREEMENTS),
        first,
        limit,
        "" if compared.lost.all() else legend,
        strip,
        largest,
    )
    return "".join(parts)


def _first(compared: Compared, text_of: TokenText) -> str:
    plan = f"Plan {shortened(_name(compared), 200)}."
    first = compared.first
    if first is None:
        return _p(f"{plan} They agree on the most probable token everywhere.")
    where = f"window {compared.windows[first]}, position {compared.places[first]}"
    if compared.lost[first]:
        return _p(f"{plan} Its logits are not finite from the token at {where} on.")
    base, other = (
        f"{whole(text_of, best.ids[first, 0])} ({100 * math.exp(best.logprobs[first, 0]):.1f} %)"
        for best in (compared.base_best, compared.best)
    )
    said = f"the base says {base}, the plan {other}; the text has {whole(text_of, compared.tokens[first])}"
    return _p(f"{plan} They first disagree at {where}: {said}.")


def _largest(compared: Compared, text_of: TokenText) -> str:
    def best(found: Candidates, token: int) -> str:
        return f"{whole(text_of, found.ids[token, 0])} {100 * math.exp(found.logprobs[token, 0]):.1f} %"

    rows = [
        (
            _context(compared, token, text_of), str(compared.windows[token]), str(compared.places[token]),
            f"{compared.kl[token]:.3g}", best(compared.base_best, token), best(compared.best, token),
        )
        for token in compared.largest(_LARGEST)
    ]  # fmt: skip
    header = ("token, and what stands before it", "window", "position", "KL (nats)", "base says", "plan says")
    return "" if not rows else "<h3>The largest divergences</h3>" + _table(header, rows)


def _context(compared: Compared, token: int, text_of: TokenText) -> str:
    same = [t for t in range(max(token - 6, 0), token) if compared.windows[t] == compared.windows[token]]
    before = "".join(scales.whole_token(text_of(int(compared.tokens[t]))) for t in same)
    return f"\N{HORIZONTAL ELLIPSIS}{before[-48:]} {whole(text_of, compared.tokens[token])}"


def _most(compared: Compared) -> float:
    """The divergence that has the strongest colour: of the hundredth token, or so, of the largest."""
    known = sorted(compared.kl[~compared.lost].tolist())
    return max(known[int(0.99 * (len(known) - 1))], 1e-6) if known else 1e-6


def _strip(compared: Compared) -> dict[str, Any]:
    """What `page.js` draws; None for what is not finite."""

    def candidates(best: Candidates, token: int) -> list[list[Any]]:
        ids, logprobs = best.ids[token, :_CANDIDATES], best.logprobs[token, :_CANDIDATES]
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        return [[id_, _probability(-logprob)] for id_, logprob in pairs]

    tokens: list[dict[str, Any]] = [
        {
            "id": int(compared.tokens[token]), "window": int(compared.windows[token]),
            "place": int(compared.places[token]),
            "differs": not (compared.agreed[token] or compared.lost[token]),
            "kl": None if compared.lost[token] else float(f"{compared.kl[token]:.4g}"),
            "own": [_probability(float(nats[token])) for nats in (compared.base_nats, compared.nats)],
            "base": candidates(compared.base_best, token), "plan": candidates(compared.best, token),
        }
        for token in range(min(len(compared.tokens), STRIP))
    ]  # fmt: skip
    shown = max((token["window"] for token in tokens), default=-1) + 1
    given = compared.given[:shown].tolist()
    return {"tokens": tokens, "first": compared.first, "most": _most(compared), "given": given}


def _probability(nats: float) -> float | None:
    return round(math.exp(-nats), 4) if math.isfinite(nats) else None


def _ids_of(strip: Mapping[str, Any]) -> Iterator[int]:
    yield from strip["given"]
    for token in strip["tokens"]:
        yield token["id"]
        yield from (pair[0] for side in ("base", "plan") for pair in token[side])


# --- what halves add


def _contributions(found: Contributions) -> str:
    halves = {half: float(values.sum()) for half, values in found.logit.items()}
    bias = f", the final norm's bias {found.bias:+.3f}" if found.bias else ""
    return _p(page_words.HALVES) + _p(
        f"The logit is {found.total:+.3f}: the embedding adds {found.embedding:+.3f}, attention "
        f"{halves['attention']:+.3f}, MLPs {halves['mlp']:+.3f}{bias}."
    )


# --- HTML


def _facts(facts: Mapping[str, str]) -> str:
    rows = (f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, whose first column is text."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ['class="text"', *[""] * (len(cells) - 1)]
        found = (f"<{tag} {kind}>{_escaped(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(found)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>\n{row(header, "th")}\n{body}\n</table></div>'


def _p(text: str) -> str:
    return f"<p>{_escaped(text)}</p>\n"


def _escaped(text: str) -> str:
    """Anybody's text in HTML, what cannot be seen made visible."""
    return html.escape("".join(c if c in " \t\n" else scales.whole_token(c) for c in text))


def _in_text(text: str) -> str:
    """A token's text where it runs on: blanks and line breaks are those."""
    broken = text.replace("\n", "\N{RETURN SYMBOL}\n")
    return "".join(c if c in " \n" else scales.whole_token(c) for c in broken)


def _json(data: Any) -> str:
    """JSON that cannot end the script it stands in: `<`, `>` and `&` are escapes, as is all beyond ASCII."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    """plotly.js, compressed, as base64."""
    from plotly.offline import get_plotlyjs  # an optional extra

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _file(name: str) -> str:
    return resources.files("jaxchat.analysis").joinpath(name).read_text(encoding="utf-8")
