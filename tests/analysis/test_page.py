"""report.html: what stands in it, that nothing of a text gets out of its place, that a browser draws it."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest

from jaxchat import analysis, analyze
from jaxchat.analysis.compared import Candidates, Compared
from jaxchat.analysis.contributions import Contributions
from jaxchat.analysis.page import STRIP, page
from jaxchat.layer_plan import LayerPlan
from tests.support.browser import Browser
from tests.support.tiny_chat import write_tiny_chat

pytest.importorskip("plotly")
HOSTILE = (
    "</script><script>document.title = 'taken'</script> <img src=x onerror=\"document.title='taken'\"> "
    "<a href='http://example.com'>l</a> &lt;b&gt; %{x} $x^2$ \u2028 \u202e \x1b[31m \x00 \N{GRINNING FACE} "
)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def data_of(text):
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def analysis_of(slots, *, tokens=6, windows=2, compared=("0",)):
    """An analysis of random figures, of any size."""
    rng = np.random.default_rng(0)
    plan = LayerPlan.identity(slots)
    values = {half: rng.normal(size=slots) for half in ("attention", "mlp")}
    best = Candidates(rng.integers(0, 50, (tokens, 5)).astype(np.int32), np.log(np.full((tokens, 5), 0.1)))
    other = Candidates(best.ids[:, ::-1], best.logprobs)
    nats = rng.random(tokens) + 3
    return analysis.Analysis(
        plan=plan,
        predicted=tokens,
        windows=windows,
        base=3.5,
        influence=rng.random(slots),
        angular=rng.random((slots + 1, slots + 1)),
        skip={half: rng.random(slots) + 3 for half in analysis.HALVES},
        rys={pair: 3 + rng.random() for pair in analysis.repeats(slots)},
        rys_total=len(analysis.repeats(slots)),
        lens_nats=rng.random(slots + 1) + 3,
        lens=analysis.Lens(
            positions=list(range(12)), inputs=[5] * 12, targets=[*[6] * 11, None],
            ids=rng.integers(0, 50, (slots + 1, 12, 5)).astype(np.int32),
            logprobs=np.log(rng.random((slots + 1, 12, 5))).astype(np.float32),
        ),
        contributions=Contributions(values, values, values, 0.5, 0.0, 3.0),
        compared=tuple(
            Compared(
                plan=LayerPlan.parse(spec, slots), windows=np.sort(np.arange(tokens) % windows),
                places=np.arange(tokens) + 1, tokens=np.arange(tokens) % 50, given=np.zeros(windows, int),
                base_nats=nats, nats=nats + rng.normal(size=tokens), kl=rng.random(tokens), base_best=best,
                best=other,
            )
            for spec in compared
        ),
    )  # fmt: skip


# --- what stands in the file


def test_nothing_of_a_text_or_a_name_gets_out_of_its_place():
    hostile = html.escape(HOSTILE)
    facts = {"model": HOSTILE, "command": HOSTILE}
    text = page(analysis_of(3), facts, lambda token: HOSTILE)
    assert text.count("<script") == text.count("</script") == 3
    assert "<img" not in text
    assert "<a href='" not in text
    assert not re.search("[\u2028\u202e\x1b\x00]", text)
    assert "http:" not in text.replace(hostile, "").split('id="data"')[0].replace("http://example.com", "")
    data = data_of(text)
    for figure in data["figures"].values():
        for word in re.findall(r"<[^>]*>", json.dumps(figure, ensure_ascii=False)):
            assert word in ("<br>", "<b>", "</b>")
    assert data["texts"]["5"] == HOSTILE.replace("\u2028", "\\x2028").replace("\u202e", "\\x202e").replace(
        "\x1b", "\\x1b"
    ).replace("\x00", "\\x00")


def test_the_file_refers_to_nothing_and_allows_nothing_outside_of_it():
    text = page(analysis_of(3), {"model": "tiny"})
    assert "default-src 'none'" in text
    without = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", text, flags=re.S)
    assert not re.search(r"https?:|src=|@import|url\(", without)
    assert len(text) < 2.2e6


def test_plotly_knows_every_attribute_of_the_figures():
    graph_objects = pytest.importorskip("plotly.graph_objects")
    figures = data_of(page(analysis_of(3), {"model": "tiny"}))["figures"]
    assert set(figures) == {"plans", "influence", "skip", "halves", "rys", "angular", "lens"}
    for figure in figures.values():
        graph_objects.Figure(figure)


def test_what_was_not_asked_for_is_not_there():
    whole = analysis_of(3, compared=())
    nothing = dict.fromkeys(("influence", "angular", "lens_nats", "lens", "contributions"))
    bare = dataclasses.replace(whole, skip={}, rys={}, **nothing)
    text = page(bare, {"model": "tiny"})
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Plans compared"]
    assert "perplexity is 33.12. No plan is compared with it: --compare SPEC adds one" in text
    assert data_of(text)["figures"] == {}


def test_the_first_disagreement_and_the_largest_divergences_are_named():
    found = analysis_of(3, tokens=30).compared[0]
    ids = found.base_best.ids.copy()
    ids[7:] = ids[7:, ::-1]
    kl = np.arange(30) / 100
    changed = dataclasses.replace(found, best=found.base_best._replace(ids=ids), kl=kl)
    text = html.unescape(page(dataclasses.replace(analysis_of(3), compared=(changed,)), {}, "<{}>".format))
    base, other = found.base_best.ids[7, 0], ids[7, 0]
    assert f"They first disagree at window 0, position 8: the base says ‹<{base}>› (10.0 %), " in text
    assert f"the plan ‹<{other}>› (10.0 %); the text has ‹<7>›." in text
    largest = text.split("The largest divergences")[1].split("</table>")[0]
    assert re.findall(r"<td >(0\.\d+)</td>", largest) == [f"{k / 100:.3g}" for k in range(29, 19, -1)]
    strip = data_of(page(dataclasses.replace(analysis_of(3), compared=(changed,)), {}))["strips"][0]
    assert strip["first"] == 7
    assert [token["differs"] for token in strip["tokens"][:9]] == [False] * 7 + [True] * 2
    assert strip["tokens"][3]["base"][0] == [int(found.base_best.ids[3, 0]), 0.1]


def test_one_window_has_no_interval_and_a_plan_that_is_not_finite_no_numbers():
    one = analysis_of(3, windows=1)
    text = page(one, {})
    assert "none: too few windows" in text
    broken = dataclasses.replace(one.compared[0], nats=np.full(6, np.nan), kl=np.full(6, np.nan))
    text = page(dataclasses.replace(one, compared=(broken,), skip={h: np.full(3, np.nan) for h in one.skip},
                                    rys={(0, 1): np.nan}), {})  # fmt: skip
    assert ">not finite<" in text
    assert "not finite from the token at window 0, position 1 on" in text
    data = data_of(text)
    assert [token["kl"] for token in data["strips"][0]["tokens"]] == [None] * 6
    assert [trace["name"] for trace in data["figures"]["rys"]["data"][1:]] == ["not finite"]


def test_eighty_layers_and_a_long_text_are_a_file_that_a_browser_can_take():
    result = analysis_of(80, tokens=STRIP + 10, windows=20)
    text = page(result, {"model": "large"})
    assert len(text) < 5e6
    assert len(data_of(text)["strips"][0]["tokens"]) == STRIP
    assert f"The first {STRIP:,} of {STRIP + 10:,} tokens are shown" in text


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def shown(browser, path):
    browser.problems.clear()
    browser.requests.clear()
    browser.open(path)
    browser.wait(
        f"location.href === {json.dumps(path.as_uri())} && document.body && document.body.dataset.drawn"
    )
    assert browser.run("document.getElementById('problem').textContent") == ""
    assert browser.problems == []
    assert browser.requests == [path.as_uri()]


def test_a_browser_draws_what_the_command_writes_without_a_network(browser, tmp_path, capsys):
    model = write_tiny_chat(tmp_path / "tiny-chat")
    story = tmp_path / "story.txt"
    story.write_text((HOSTILE.replace("\x00", "") + "Once upon a time there was a little model. ") * 4)
    arguments = ["-m", model, "--text", story, "--out", tmp_path / "out", "--window", "48", "--noplots"]
    arguments += ["--compare", "::-1", "--compare", "[0, [1, 3e38, 3e38], [1, 3e38, 3e38]]"]
    assert analyze.main(["analyze", *map(str, arguments)]) == 0
    assert re.search(r"report\.html \(2\.\d MB\)\n$", capsys.readouterr().out)
    shown(browser, tmp_path / "out" / "report.html")
    assert browser.run("document.title") == "tiny-chat: what its layers do"
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].map((f) => f.querySelectorAll(MARKS).length)"
    marks = browser.run(drawn.replace("MARKS", "'.heatmaplayer image, .point'"))
    assert len(marks) == 7
    assert all(marks)
    assert browser.run("document.querySelectorAll('img, section a, svg a').length") == 0
    assert HOSTILE[:30] in browser.run("document.querySelector('.strip').textContent")
    assert browser.run("document.querySelectorAll('.strip .first').length") == 2
    assert browser.run("document.querySelectorAll('.strip')[1].querySelectorAll('.lost').length") > 100


@pytest.mark.parametrize(
    ("figure", "element", "place", "words"),
    [
        ("rys", ".nsewdrag", (0.2, 0.85), "slots 0 to 0 run twice"),
        ("angular", ".nsewdrag", (0.15, 0.9), "angular distance"),
        ("influence", ".point path", (0.5, 0.5), "layer 0block influence"),
        ("skip", ".point path", (0.5, 0.5), "layer 0 without attention"),
        ("halves", ".subplot.xy3 .point path", (0.5, 0.5), "layer 0: attentiondirect effect"),
        ("lens", ".nsewdrag", (0.1, 0.5), "what follows"),
        ("plans", ".point", (0.5, 0.5), "95 % interval"),
    ],
)
def test_hovering_says_what_a_figure_shows(browser, written, figure, element, place, words):
    if browser.run("location.href") != written.as_uri():
        shown(browser, written)
    figure = f"[data-figure={figure}]"
    browser.point(f"{figure} {element}", *place)
    said = f"document.querySelector('{figure} .hoverlayer').textContent"
    browser.wait(f"{said}.includes({json.dumps(words)})", seconds=10)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of three layers."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(analysis_of(3), {"model": "tiny"}))
    return path


def test_hovering_over_the_text_shows_what_both_plans_think(browser, tmp_path):
    path = tmp_path / "report.html"
    result = analysis_of(3)
    path.write_text(page(result, {"model": "tiny"}, lambda token: f"<{token}>"))
    shown(browser, path)
    browser.point(".strip span[data-index='2']")
    browser.wait("getComputedStyle(document.getElementById('hover')).display === 'block'")
    text = browser.run("document.getElementById('hover').textContent")
    found = result.compared[0]
    assert text.startswith(f"‹<2>›  window 0, position 3KL(base || plan) {found.kl[2]:.3g}"[:30])
    for ids in (found.base_best.ids[2], found.best.ids[2]):
        assert all(f"‹<{token}>›" in text for token in ids)


def test_eighty_layers_are_drawn(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page(analysis_of(80, tokens=STRIP, windows=16), {"model": "large"}))
    shown(browser, path)
    assert browser.run("document.querySelectorAll('.js-plotly-plot').length") == 7
