"""What layers do: every quantity against a slow, independent computation; the command as a process."""

import csv
import dataclasses
import importlib.util
import io
import json
import math
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchat
from jaxchat import analysis, analyze, model
from jaxchat.analysis import report, sweep
from jaxchat.checkpoints.write import convert
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.journal import Journal
from jaxchat.layer_plan import LayerPlan
from tests.analysis.models import SCALED, cosine, hidden_states, log_softmax, logits_of, random_ids
from tests.support.steps import step_of
from tests.support.tiny_chat import write_tiny_chat

COMMAND = [sys.executable, "-m", "jaxchat.analyze"]

pytestmark = pytest.mark.usefixtures("quick_compilation")


WINDOWS = analysis.cut_windows(random_ids(50), 16)  # the last of the four has two tokens


@pytest.fixture(scope="module")
def load(tiny_directory):
    """`load(model_type, **load arguments)`: a tiny random model, loaded once."""
    loaded = {}

    def make(model_type, **options):
        key = model_type, *sorted(options.items())
        if key not in loaded:
            directory = tiny_directory(model_type, num_hidden_layers=3) if model_type != "gpt2" else None
            loaded[key] = jaxchat.load(directory or tiny_directory("gpt2"), **options)
        return loaded[key]

    return make


def study(loaded, plan=None, **questions):
    """The analysis of `WINDOWS` in two groups, the second with two windows of padding."""
    asked = analysis.Questions(**questions)
    return analysis.analyze(loaded.engine, plan or loaded.plan, WINDOWS, asked, batch=3)


def scored(loaded, plan, windows=WINDOWS):
    """Nats per token under a plan, as the runtime scores the windows one by one."""
    rows = [row[:length] for row, length in zip(windows.tokens.tolist(), windows.lengths, strict=True)]
    scores = loaded.with_plan(plan).score(token_ids=rows)
    return -sum(score.total for score in scores) / windows.predicted


# --- the text


def test_windows_are_cut_from_the_text_in_order_and_what_predicts_nothing_is_left_out():
    windows = analysis.cut_windows(range(10, 19), 4)
    assert windows.tokens.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert windows.lengths.tolist() == [4, 4]
    assert windows.predicted == 6


def test_every_window_begins_with_bos_where_texts_do():
    windows = analysis.cut_windows(range(10, 17), 4, bos=1)
    assert windows.tokens.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 0, 0]]
    assert windows.lengths.tolist() == [4, 4, 2]
    assert windows.predicted == 7


@pytest.mark.parametrize(("ids", "length", "error"), [([5], 8, "too short: 1 token"), ([5, 6], 1, "^window")])
def test_texts_and_windows_that_predict_nothing_are_refused(ids, length, error):
    with pytest.raises(UsageError, match=error):
        analysis.cut_windows(ids, length)


# --- perplexities


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gpt2", {}),
        ("llama", {"kv_dtype": "int8"}),
        ("llama", {"quant": "int8", "kernels": "auto"}),
        ("llama", {"quant": "int8", "kernels": "reference"}),
    ],
)
def test_every_plan_has_the_perplexity_that_the_runtime_gives_it(load, model_type, options):
    loaded = load(model_type, **options)
    found = study(loaded, parts=("skip", "rys"))

    close = 1e-3 if "quant" in options else 1e-5  # quantized products of one row and of many differ
    assert found.base == pytest.approx(scored(loaded, "all"), rel=close)
    for layer in range(3):
        scales = {"attention": [layer, 0.0, 1.0], "mlp": [layer, 1.0, 0.0], "both": [layer, 0.0, 0.0]}
        for half, entry in scales.items():
            spec = json.dumps([entry if slot == layer else slot for slot in range(3)])
            assert found.skip[half][layer] == pytest.approx(scored(loaded, spec), rel=close)
    assert list(found.rys) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for (i, j), nats in found.rys.items():
        spec = ",".join(map(str, [*range(j), *range(i, 3)]))
        assert nats == pytest.approx(scored(loaded, spec), rel=close)


def test_a_native_checkpoint_gives_what_its_source_gives(load, tiny_directory, tmp_path):
    convert(tiny_directory("llama", num_hidden_layers=3), tmp_path / "native")
    native = jaxchat.load(tmp_path / "native")
    expected = study(load("llama"), parts=("rys",))
    assert study(native, parts=("rys",)).rys == pytest.approx(expected.rys, rel=1e-6)


def test_the_slots_of_a_plan_are_analyzed_where_one_is_the_base(load):
    loaded = load("gemma2")
    plan = LayerPlan.parse(SCALED, 3)
    found = study(loaded, plan)

    assert [slot.layer for slot in found.plan] == [0, 2, 1, 1, 0]  # the slot without effect is none
    assert found.base == pytest.approx(scored(loaded, SCALED), rel=1e-5)
    no_mlp = "[0, 2, [1, 0.5, 0.0], [1, 1.0, 0.0], 0]"
    assert found.skip["mlp"][2] == pytest.approx(scored(loaded, no_mlp), rel=1e-5)
    assert found.skip["mlp"][3] == pytest.approx(found.base, rel=1e-6)  # it had none
    twice = "[0, 2, [1, 0.5, 1.0], [1, 1.0, 0.0], 2, [1, 0.5, 1.0], [1, 1.0, 0.0], 0]"
    assert found.rys[1, 4] == pytest.approx(scored(loaded, twice), rel=1e-5)


def test_what_a_repeat_is_called_is_what_the_notation_of_rys_means():
    base = LayerPlan.identity(8)
    assert analysis.repeated(base, 3, 7) == LayerPlan.parse("(3,7)", 8)
    assert [slot.layer for slot in analysis.repeated(base, 3, 7)] == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]


def test_a_sample_of_the_repeats_repeats_with_its_seed():
    everything = analysis.repeats(10)
    assert len(everything) == 55
    first = analysis.repeats(10, sample=12, seed=1)
    assert len(first) == 12
    assert first == analysis.repeats(10, sample=12, seed=1) != analysis.repeats(10, sample=12, seed=2)
    assert set(first) <= set(everything)
    assert analysis.repeats(10, sample=99) == everything


# --- one executable, shared prefixes, groups of windows


def test_one_executable_serves_the_whole_analysis(load):
    loaded = load("llama")
    windows = analysis.cut_windows(random_ids(44), 11)  # a shape of its own: nothing was compiled for it
    steps, states = sweep._outcome._cache_size(), sweep._states._cache_size()
    found = analysis.analyze(loaded.engine, loaded.plan, windows, batch=2)
    assert len(found.rys) == 6
    assert sweep._outcome._cache_size() == steps + 1
    assert sweep._states._cache_size() == states + 1


def test_a_plan_starts_from_the_hidden_states_after_the_slots_it_shares_with_the_base(load):
    loaded = load("llama")
    sweeping = analysis.Sweep(loaded.engine, loaded.plan, WINDOWS, max_slots=6)
    for spec, shared in (("0:2,0:3", 2), ("0:3", 3), ("1,2", 0), ("[0, [1, 0.0, 1.0], 2]", 1), ("0:3,2", 3)):
        plan = LayerPlan.parse(spec, 3)
        assert sweeping.shared(plan) == shared
        np.testing.assert_allclose(sweeping.nats(plan), sweeping.nats(plan, start=0), rtol=1e-6)
    with pytest.raises(UsageError, match="room for 6"):
        sweeping.nats(LayerPlan.parse("0:3,0:3,0", 3))


def test_shared_slots_are_not_run_again(load):
    loaded = load("llama")
    sweeping = analysis.Sweep(loaded.engine, loaded.plan, WINDOWS, max_slots=6)
    expected = sweeping.nats(loaded.plan, start=2)
    sweeping.states = sweeping.states.at[:2].set(jnp.nan)
    np.testing.assert_array_equal(sweeping.nats(loaded.plan, start=2), expected)


def test_results_do_not_depend_on_how_windows_are_grouped(load):
    loaded = load("llama")
    one, three, all_at_once = (
        analysis.analyze(loaded.engine, loaded.plan, WINDOWS, batch=batch) for batch in (1, 3, None)
    )
    for other in (three, all_at_once):
        assert other.rys == pytest.approx(one.rys, rel=1e-5)
        np.testing.assert_allclose(other.influence, one.influence, rtol=1e-4)
        np.testing.assert_allclose(other.angular, one.angular, atol=1e-6)


def test_hidden_states_are_held_for_as_many_windows_as_fit_the_budget(load):
    engine, plan = load("llama").engine, LayerPlan.identity(3)
    windows = analysis.cut_windows(random_ids(7 * 1024), 1024)
    each = 4 * 1024 * 24 * 4  # P + 1 states of T tokens, D = 24, float32
    assert analysis.windows_at_once(engine, plan, windows) == 7
    assert analysis.windows_at_once(engine, plan, windows, mebibytes=2 * each >> 20) == 1
    assert analysis.windows_at_once(engine, plan, windows, mebibytes=(5 * each >> 20) + 1) == 4  # 4 + 3


def test_logits_of_a_large_vocabulary_are_computed_in_parts(load, monkeypatch):
    engine = load("llama").engine
    x = jax.random.normal(jax.random.key(0), (2, 9, 24))
    places = sweep._places(analysis.Windows(np.arange(20).reshape(2, 10), np.array([10, 10])), 18)
    arguments = (step_of(engine.config, engine.params, *[None] * 5), x, places, None)
    expected = sweep._token_outcomes(*arguments)
    shapes = []
    monkeypatch.setattr(sweep, "_LOGITS", 67 * 7)  # at most seven of the 18 tokens at a time
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda *a: shapes.append(a[-1].shape) or logits(*a))
    for found, whole in zip(sweep._token_outcomes(*arguments), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert shapes == [(6, 24)]


# --- what comes of the tokens that count


def counting(rng, share=0.4):
    return WINDOWS._replace(scored=rng.random(WINDOWS.tokens.shape) < share)


@pytest.mark.parametrize(("model_type", "spec"), [("llama", "0,1,1"), ("gemma2", SCALED), ("gpt2", "0,2")])
def test_an_outcome_is_that_of_the_tokens_that_count_alone(load, rng, model_type, spec):
    loaded, windows = load(model_type), counting(rng)
    plan = LayerPlan.parse(spec, 3)
    sweeping = analysis.Sweep(loaded.engine, loaded.plan, windows, max_slots=6, against_base=True)
    ((_, found),) = sweeping.outcomes([plan])
    for row, length in enumerate(windows.lengths):
        tokens = windows.tokens[row, :length].tolist()
        counted = [place for place in range(1, length) if windows.scored[row, place]]
        base, other = (log_softmax(logits_of(loaded, one, tokens)) for one in (loaded.plan, plan))
        before = [place - 1 for place in counted]
        targets = windows.tokens[row, counted]
        assert found.nats[row] == pytest.approx(-other[before, targets].sum(), abs=2e-3)
        kl = (np.exp(base[before]) * (base[before] - other[before])).sum()
        assert found.kl[row] == pytest.approx(kl, abs=2e-3)
        assert found.agreed[row] == (base[before].argmax(-1) == other[before].argmax(-1)).sum()
        assert found.greedy[row] == (other[before].argmax(-1) == targets).all()


def test_a_plan_against_itself_has_no_divergence(load, rng):
    loaded, windows = load("llama"), counting(rng)
    sweeping = analysis.Sweep(loaded.engine, loaded.plan, windows, against_base=True)
    ((_, found),) = sweeping.outcomes([loaded.plan])
    np.testing.assert_allclose(found.kl, 0, atol=1e-5)
    assert found.agreed.sum() == windows.predicted


def test_slots_that_plans_begin_with_alike_are_run_once(load, rng, monkeypatch):
    loaded, windows = load("llama"), counting(rng)
    sweeping = analysis.Sweep(loaded.engine, loaded.plan, windows, max_slots=6)
    specs = ["1,0,2,1,1", "0:3,2", "1,0,2,0", "1,0,2,1", "2", "0:3", "1,0,2,0"]
    plans = [LayerPlan.parse(spec, 3) for spec in specs]
    ran = []
    run = sweeping._run

    def noting(plan, x, start, stop, *, score):
        ran.append(stop - start)
        return run(plan, x, start, stop, score=score)

    monkeypatch.setattr(sweeping, "_run", noting)
    found = dict(sweeping.outcomes(plans))
    assert sorted(found) == list(range(7))
    # 0:3 and 0:3,2 add one slot to the base; 1,0,2 is run once, then 0, none, 1, 1; and 2.
    assert sum(ran) == 1 + 3 + 1 + 1 + 1 + 1
    for number, plan in enumerate(plans):
        np.testing.assert_allclose(found[number].nats, sweeping.nats(plan, start=0), rtol=1e-5)


def test_sweeps_of_one_room_share_their_executable(load):
    loaded = load("llama")
    few, many = (WINDOWS._replace(scored=np.arange(16)[None] < n * np.ones((4, 1))) for n in (4, 9))
    for windows in (few, many):
        sweeping = analysis.Sweep(loaded.engine, loaded.plan, windows, room=40)
        sweeping.nats(loaded.plan)
        compiled = sweep._outcome._cache_size()
        sweeping.nats(LayerPlan.parse("2,1", 3))
        assert sweep._outcome._cache_size() == compiled
    assert sweeping.places.rows.shape == (40,)


# --- hidden states


@pytest.mark.parametrize(("model_type", "spec"), [("llama", "all"), ("gemma2", SCALED), ("gpt2", "2,0,1")])
def test_influence_and_angular_distance_against_numpy(load, model_type, spec):
    loaded = load(model_type)
    plan = LayerPlan.parse(spec, 3)
    found = study(loaded, plan, parts=("influence", "angular"))
    rows = [row[:n] for row, n in zip(WINDOWS.tokens.tolist(), WINDOWS.lengths, strict=True)]
    states = [hidden_states(loaded, plan, row) for row in rows]

    cosines = np.concatenate([cosine(x[:-1], x[1:]) for x in states], axis=1)
    np.testing.assert_allclose(found.influence, 1 - cosines.mean(1), atol=1e-5)
    slots = len(plan.executed())
    for first in range(slots):
        for length in range(1, slots - first + 1):
            angles = [np.arccos(cosine(x[first, -1], x[first + length, -1])) / np.pi for x in states]
            assert found.angular[first, first + length] == pytest.approx(np.mean(angles), abs=1e-5)


def test_the_lens_reads_what_the_model_would_say_if_it_ended_there(load):
    loaded = load("gemma2")  # with soft-capped logits
    found = study(loaded, parts=("lens",), lens_positions=(-4, None), top_k=3)

    for slots, spec in enumerate(["[[0, 0, 0]]", "0", "0,1", "all"]):
        assert found.lens_nats[slots] == pytest.approx(scored(loaded, spec), rel=1e-5)
    row = WINDOWS.tokens[0].tolist()
    assert (found.lens.positions, found.lens.inputs) == ([12, 13, 14, 15], row[12:])
    assert found.lens.targets == [*row[13:], None]
    step = step_of(loaded.config, loaded.engine.params, *[None] * 5)  # final norm and head alone
    for slots, states in enumerate(hidden_states(loaded, loaded.plan, row)):
        hidden = model.final_norm(step, jnp.asarray(states[12:], jnp.float32))
        logits = model.logits(step, hidden)
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        best = np.argsort(-logprobs, axis=-1)[:, :3]
        np.testing.assert_array_equal(found.lens.ids[slots], best)
        np.testing.assert_allclose(
            found.lens.logprobs[slots], np.take_along_axis(logprobs, best, -1), rtol=1e-4
        )


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_influence_and_angular_distance_against_transformers(load, tiny_directory, model_type):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded = load(model_type)
    directory = (
        tiny_directory("gpt2") if model_type == "gpt2" else tiny_directory(model_type, num_hidden_layers=3)
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layers = reference.transformer.h if model_type == "gpt2" else reference.model.layers
    seen = []  # transformers' own last hidden state is after the final norm
    layers[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )

    row = WINDOWS.tokens[:1, :16]
    with torch.no_grad():
        output = reference(torch.tensor(row), output_hidden_states=True)
    x = np.stack([state[0].numpy().astype(np.float64) for state in (*output.hidden_states[:-1], seen[0])])
    windows = analysis.Windows(row, np.array([16], np.int32))
    asked = analysis.Questions(parts=("influence", "angular"))
    found = analysis.analyze(loaded.engine, loaded.plan, windows, asked)

    np.testing.assert_allclose(found.influence, 1 - cosine(x[:-1], x[1:]).mean(1), atol=1e-5)
    angles = [[np.arccos(np.clip(cosine(a, b), -1, 1)) / np.pi for b in x[:, -1]] for a in x[:, -1]]
    np.testing.assert_allclose(found.angular, angles, atol=1e-4)
    logprobs = torch.log_softmax(output.logits[0], -1)[torch.arange(15), torch.tensor(row[0, 1:]).long()]
    assert found.base == pytest.approx(-float(logprobs.mean()), rel=1e-5)


# --- bad requests and broken models


def test_questions_that_make_no_sense_are_refused(load):
    loaded = load("llama")
    with pytest.raises(UsageError, match="unknown part 'colour'; expected some of influence,"):
        analysis.Questions(parts=("colour",))
    with pytest.raises(UsageError, match=r"^rys_sample is 0"):
        analysis.Questions(rys_sample=0)
    with pytest.raises(UsageError, match="selects none of the first window's 16 tokens"):
        study(loaded, lens_positions=(40, None))
    with pytest.raises(UsageError, match=r"^top_k is 68; expected 1 to 67"):
        study(loaded, top_k=68)
    with pytest.raises(UsageError, match="executes no slot"):
        analysis.analyze(loaded.engine, LayerPlan.parse("[[0, 0, 0]]", 3), WINDOWS)
    with pytest.raises(UsageError, match="token id 70 is not in the vocabulary: expected 0 to 66"):
        analysis.analyze(loaded.engine, loaded.plan, analysis.cut_windows([5, 70], 8))
    with pytest.raises(UsageError, match=r"^window is 97, but the model's context holds 96"):
        analysis.analyze(loaded.engine, loaded.plan, analysis.cut_windows(random_ids(97), 97))


def test_a_model_whose_logits_are_not_finite_is_refused(load):
    loaded = load("llama")
    params = {**loaded.engine.params, "norm.weight": loaded.engine.params["norm.weight"] * jnp.nan}
    broken = jaxchat.Engine(loaded.config, params)
    with pytest.raises(JaxchatError, match="logits are not finite"):
        analysis.analyze(broken, loaded.plan, WINDOWS, batch=3)


# --- reports


@pytest.fixture(scope="module")
def found(load):
    """A whole analysis."""
    return study(load("llama"))


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_holds_every_figure(found):
    files = report.csv_files(found, text_of=lambda token: f"<{token}>")
    layers, repeats = rows_of(files["layers.csv"]), rows_of(files["rys.csv"])
    assert [row["layer"] for row in layers] == ["0", "1", "2"]
    assert float(layers[1]["influence"]) == found.influence[1]
    assert float(layers[2]["skip_mlp_nats_per_token"]) == found.skip["mlp"][2]
    assert float(layers[2]["skip_mlp_ratio"]) == pytest.approx(math.exp(found.skip["mlp"][2] - found.base))
    assert [(row["i"], row["j"], row["layer_spec"]) for row in repeats[:3]] == [
        ("0", "1", "0,0:3"), ("0", "2", "0,1,0:3"), ("0", "3", "0:3,0:3")
    ]  # fmt: skip
    assert float(repeats[1]["perplexity"]) == pytest.approx(math.exp(found.rys[0, 2]))
    blocks = {(row["start"], row["length"]): float(row["distance"]) for row in rows_of(files["angular.csv"])}
    assert len(blocks) == 6
    assert blocks["1", "2"] == found.angular[1, 3]
    tokens = rows_of(files["lens_tokens.csv"])
    assert len(tokens) == 4 * 12 * 5
    assert tokens[0]["text"] == f"<{found.lens.inputs[0]}>"
    assert len(rows_of(files["lens.csv"])) == 4


def test_a_repeat_of_the_report_can_be_given_back_as_a_layer_spec(load, found):
    row = min(rows_of(report.csv_files(found)["rys.csv"]), key=lambda row: float(row["perplexity"]))
    assert scored(load("llama"), row["layer_spec"]) == pytest.approx(float(row["nats_per_token"]), rel=1e-5)


def test_figures_that_are_not_finite_are_null_nan_and_last(found):
    broken = dataclasses.replace(found, rys={**found.rys, (0, 2): math.nan, (1, 3): 800.0})
    broken.skip["both"] = np.array([3.0, math.nan, 9.0])
    assert broken.ranking() == [1, 2, 0]
    values = json.loads(json.dumps(report.as_json(broken), allow_nan=False))
    assert values["rys"][1] == {"i": 0, "j": 2, "perplexity": None, "ratio": None}
    assert values["slots"][1]["skip_both_perplexity"] is None
    repeats = rows_of(report.csv_files(broken)["rys.csv"])
    assert (repeats[1]["perplexity"], repeats[4]["perplexity"]) == ("nan", "inf")


def test_tables_show_ten_of_the_most_and_the_least_important_layers(load, capsys):
    from rich.console import Console

    loaded = load("llama")
    plan = LayerPlan.parse("0:3,0:3,0:3,0:3,0:3,0:3,0:3,0:3", 3)
    many = study(loaded, plan, parts=("influence",))
    Console(width=80).print(report.tables(many))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ranked = [line for line in lines if len(line) == 4 and line[0].isdigit()]
    assert [int(line[0]) for line in ranked] == [*range(1, 11), *range(24, 14, -1)]
    slots = [int(line[1]) for line in ranked]
    order = np.argsort(-many.influence, kind="stable").tolist()
    assert slots == order[:10] + order[:-11:-1]


def test_plots_say_what_their_axes_are_and_survive_any_token(found, recwarn):
    plots = pytest.importorskip("jaxchat.analysis.plots")
    files = plots.png_files(
        found, "tiny", text_of=lambda token: ["$x", "\x00", "東", " a\n", "long " * 9][token % 5]
    )
    assert set(files) == {"influence.png", "skip.png", "angular.png", "rys.png", "lens.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in files.values())
    assert not recwarn.list
    repeats = plots.rys_figure(found, "tiny")
    axes, bar = repeats.axes
    assert "repeated block ends" in axes.get_xlabel()
    assert "repeated block begins" in axes.get_ylabel()
    assert "perplexity" in bar.get_ylabel()
    shown = axes.images[0].get_array()
    assert shown[1, 2] == pytest.approx((found.rys[1, 3] - found.base) / math.log(2))
    assert np.ma.getmaskarray(shown)[2, 0]  # j must be above i
    distances = plots.angular_figure(found, "tiny").axes[0].images[0].get_array()
    assert distances[1, 0] == pytest.approx(found.angular[0, 2])  # length 2, from 0 on


# --- the journal


def test_a_journal_gives_back_what_was_added(tmp_path):
    journal = Journal(tmp_path / "journal", {"--window": "8"})
    journal["a"] = 1.5
    journal["b"] = [[1, None]]
    journal.close()
    assert dict(Journal(tmp_path / "journal", {"--window": "8"})) == {"a": 1.5, "b": [[1, None]]}


def test_a_line_that_was_cut_short_is_dropped_and_written_anew(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, {})
    journal["a"], journal["b"] = 1, 2
    journal.close()
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path, {})
    assert dict(again) == {"a": 1}
    again["b"] = 3
    again.close()
    assert dict(Journal(path, {})) == {"a": 1, "b": 3}


def test_a_journal_of_something_else_is_refused_by_name(tmp_path):
    Journal(tmp_path / "journal", {"--model": "ab", "--window": "8"}).close()
    with pytest.raises(
        UsageError, match=r"--window is 9 now and was 8; give another directory, or delete .*/journal"
    ):
        Journal(tmp_path / "journal", {"--model": "ab", "--window": "9"})


def test_two_may_not_write_one_journal(tmp_path):
    first = Journal(tmp_path / "journal", {})
    with pytest.raises(UsageError, match="another run is writing"):
        Journal(tmp_path / "journal", {})
    first.close()
    Journal(tmp_path / "journal", {})


@pytest.mark.parametrize("content", [b"# notes\n", b"[1]\n", b"{}\nnull\n", b'{}\n["a"]\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(JaxchatError, match=r"/journal:[12].*; delete the file, or give another directory"):
        Journal(path, {})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**9, "has the token id 1e\\+09; expected some of 0 to"),
        (-1, "has the token id -1"),
        (1.5, "has the token id 1.5"),
        (None, "has the token id nan"),
        (10**30, "has the token id 1e\\+30"),
        ("a", "expected numbers of the shape"),
    ],
)
def test_token_ids_of_a_journal_that_was_edited_are_refused(load, value, message):
    loaded, known = load("llama"), {}
    questions = analysis.Questions(parts=("lens",))
    analysis.analyze(loaded.engine, loaded.plan, WINDOWS, questions, batch=3, results=known)
    (name,) = [name for name in known if " top " in name]
    known[name][0][1][0][0] = value
    with pytest.raises(analysis.KnownResultError, match=message):
        analysis.analyze(loaded.engine, loaded.plan, WINDOWS, questions, batch=3, results=known)


# --- the command


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny-chat")


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a little model. " * 30)
    return path


def main(*arguments):
    return analyze.main(["analyze", *map(str, arguments)])


def test_files_tables_and_a_second_run_that_computes_nothing(chat_model, story, tmp_path, capsys):
    arguments = ("-m", chat_model, "--text", story, "--out", tmp_path / "out", "--window", "32")
    assert main(*arguments, "--parts", "skip,rys,lens") == 0
    first = capsys.readouterr()
    assert "41 windows, 1249 predicted tokens, 3 slots\n" in first.err
    assert "All layers, the most important first" in first.out
    assert re.search(r"(The best repeats|No repeat improves .* least harmful), of all \(i, j\)", first.out)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"journal.jsonl", "layers.csv", "rys.csv", "lens.csv", "lens_tokens.csv", "analysis.json",
                     "skip.png", "rys.png", "lens.png", "report.html"}  # fmt: skip
    values = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert values["model"] == "tiny-chat"
    assert len(values["rys"]) == 6
    assert values["lens"]["texts"][str(values["lens"]["tokens"][-1])] == "t"  # "a lit|tle"

    # More is asked for: what is known stays.
    assert main(*arguments, "--noplots", "--parts", "influence,skip,rys") == 0
    second = capsys.readouterr()
    assert "; 21 results are there already" in second.err
    assert "1 results in" in second.err
    assert second.out.splitlines()[-1].startswith(f"{tmp_path / 'out'}: layers.csv, rys.csv, analysis.json")


def test_a_recipe_is_analyzed_like_its_layer_spec(chat_model, story, tmp_path):
    recipe = tmp_path / "longer.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: tiny, layer_range: [0, 2]}]\n"
        "  - sources: [{model: tiny, layer_range: [1, 3]}]\n"
    )
    same = ("--text", story, "--max_tokens", "90", "--parts", "rys", "--noplots")
    assert main("--recipe", recipe, "--model_path", f"tiny={chat_model}", *same, "--out", tmp_path / "a") == 0
    assert main("-m", chat_model, "--layer_spec", "0:2,1:3", *same, "--out", tmp_path / "b") == 0
    first, second = (json.loads((tmp_path / out / "analysis.json").read_text()) for out in "ab")
    assert first.pop("model") == "longer"
    assert second.pop("model") == "tiny-chat"
    assert len(first["rys"]) == 10
    assert first == second


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--text", "", "0 tokens, and predicting one takes two; give a longer text"),
        ("--text", "a", "1 token, and predicting one takes two"),
        ("--token_ids", "5", "1 token, and predicting one takes two"),
        ("--token_ids", "5 70000", "entry 1 is '70000'; expected a token id of this model, 0 to "),
    ],
)
def test_a_text_that_predicts_nothing_is_named(chat_model, flag, content, message, tmp_path, capsys):
    file = tmp_path / "short.txt"
    file.write_text(content)
    assert main("-m", chat_model, flag, file, "--out", tmp_path / "out") == 2
    assert f"{flag} {file}: {message}" in capsys.readouterr().err


def test_a_text_that_the_tokenizer_does_not_know_says_so(shared_data, tmp_path, capsys):
    craft, file = shared_data / "models" / "CraftGPT-hf", tmp_path / "quotes.txt"
    file.write_text("he said \N{LEFT DOUBLE QUOTATION MARK}no\N{RIGHT DOUBLE QUOTATION MARK} and left")
    assert main("-m", craft, "--text", file, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{file}: 21 characters became 1 token, the unknown one" in error
    assert "does not know '\N{LEFT DOUBLE QUOTATION MARK}'" in error


def test_only_repeats_that_improve_are_called_best(found, capsys):
    from rich.console import Console

    worse = dataclasses.replace(found, rys=dict.fromkeys(found.rys, found.base + 0.1))
    better = dataclasses.replace(worse, rys={**worse.rys, (1, 2): found.base - 0.1})
    for result, title, rows in ((worse, "No repeat improves", 5), (better, "The best repeats", 1)):
        Console(width=100).print(report.tables(result))
        _, _, table = capsys.readouterr().out.partition(title)
        assert len([line for line in table.splitlines() if re.match(r" *\d+ +\d+ +\d+ ", line)]) == rows
    plots = pytest.importorskip("jaxchat.analysis.plots")
    assert plots.rys_figure(worse, "tiny").axes[0].get_legend() is None
    assert "no repeat improves" in plots.rys_figure(worse, "tiny").axes[0].get_title()
    assert "best: (1, 2), -9.5 %" in plots.rys_figure(better, "tiny").axes[0].get_legend().texts[0].get_text()


def test_plots_name_their_text_and_one_point_does_not_stretch_a_scale(found):
    plots = pytest.importorskip("jaxchat.analysis.plots")
    nats = np.array(found.lens_nats)
    nats[0] = nats[1:].max() + 20
    nan = {half: np.where(np.arange(len(n)) == 0, np.nan, n) for half, n in found.skip.items()}
    wild = dataclasses.replace(found, lens_nats=nats, skip=nan)
    curve = plots.lens_figure(wild, "tiny", str).axes[1]
    assert curve.get_xlim()[1] < math.exp(nats[1:].max() + 5)
    assert len(curve.texts) == 1
    axes = plots.skip_figure(wild, "tiny").axes[0]
    tops = [bar.get_height() for bars in axes.containers for bar in bars]
    assert max(tops) == pytest.approx(max(found.ratio(n) - 1 for half in nan.values() for n in half[1:]))
    assert f"ids.txt, {found.predicted} tokens" in plots._caption(found, "ids.txt")


def test_every_window_begins_as_texts_do_for_the_tokenizer(tmp_path, story, shared_data):
    stories = shared_data / "models" / "stories260K-hf"
    arguments = ("--text", story, "--out", tmp_path / "out", "--window", "20", "--max_tokens", "99")
    assert main("-m", stories, *arguments, "--parts", "lens", "--lens_positions", ":3", "--noplots") == 0
    values = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert values["lens"]["tokens"][0] == 1
    assert values["predicted_tokens"] == 98  # the BOS of each window is read, not predicted


def test_token_ids_need_no_tokenizer(tiny_directory, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("5, 6 7\n" * 20)
    model_directory = tiny_directory("gemma2", num_hidden_layers=3)
    arguments = ("-m", model_directory, "--out", tmp_path / "out", "--parts", "lens,angular")
    assert main(*arguments, "--token_ids", tmp_path / "ids.txt") == 0
    assert "1 windows, 59 predicted tokens" in capsys.readouterr().err
    assert (tmp_path / "out" / "angular.png").exists()
    assert main(*arguments, "--text", tmp_path / "ids.txt") == 2
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "no text: give a file with --text"),
        (["-m", "MODEL", "--recipe", "STORY", "--out", "OUT"], "--model cannot be combined with --recipe"),
        (["-m", "MODEL", "--model_path", "a=b", "--out", "OUT"], "--model_path needs --recipe"),
        (["-m", "MODEL", "--out", "OUT"], "no text: give a file with --text"),
        (
            ["-m", "MODEL", "--text", "STORY", "--token_ids", "STORY", "--out", "OUT"],
            "--text cannot be combined with --token_ids",
        ),
        (["-m", "MODEL", "--text", "STORY"], "no --out"),
        (["-m", "nowhere", "--text", "STORY", "--out", "OUT"], "nowhere: no such model directory"),
        (["-m", "MODEL", "--text", "nowhere", "--out", "OUT"], "--text nowhere: No such file"),
        (["-m", "MODEL", "--token_ids", "STORY", "--out", "OUT"], "entry 0 is 'Once'; expected a token id"),
        (
            ["-m", "MODEL", "--token_ids", "STORY", "--out", "OUT", "--nospecial_tokens"],
            "--nospecial_tokens needs --text",
        ),
        (["-m", "MODEL", "--text", "STORY", "--out", "STORY"], "File exists; give a directory to write to"),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--parts", "rys,x"], "unknown part 'x'"),
        (
            ["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--lens_positions", "3"],
            "expected a slice START:STOP",
        ),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--window", "97"], "context holds 96 tokens"),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--window", "1"], "--window"),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--layer_spec", "9"], "layer 9 is out of range"),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--widnow", "9"], "did you mean --window?"),
        (["-m", "MODEL", "STORY"], "unexpected argument"),
        (
            ["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--compare", "0:2", "--compare", "0:x"],
            "--compare '0:x': ",
        ),
        (
            ["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--compare", "0,9"],
            "--compare '0,9': layer 9 is out of range",
        ),
        (["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--compare", ""], "--compare '': "),
        (
            ["-m", "MODEL", "--text", "STORY", "--out", "OUT", "--compare", "@nowhere"],
            "--compare '@nowhere': ",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, error, chat_model, story, tmp_path, capsys):
    known = {"MODEL": chat_model, "STORY": story, "OUT": tmp_path / "out"}
    assert main(*(known.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxchat: error: ")
    assert error in captured.err.splitlines()[0]


def test_results_of_another_model_are_not_mixed_in(chat_model, story, tmp_path, capsys):
    arguments = ("--text", story, "--out", tmp_path / "out", "--parts", "skip", "--noplots")
    assert main("-m", chat_model, *arguments) == 0
    before = (tmp_path / "out" / "journal.jsonl").read_bytes()
    assert main("-m", write_tiny_chat(tmp_path / "other", seed=5), *arguments) == 2
    assert "results of another run: --model is" in capsys.readouterr().err
    assert main("-m", chat_model, *arguments, "--layer_spec", "::-1") == 2
    assert "--layer_spec is 2::-1 now and was all" in capsys.readouterr().err
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("missing", "flag", "what"),
    [
        ("matplotlib", "--noplots", "the plots need matplotlib"),
        ("plotly", "--nohtml", "report.html needs plotly"),
    ],
)
def test_without_an_extra_one_line_says_so_before_anything_is_loaded(
    chat_model, story, tmp_path, capsys, monkeypatch, missing, flag, what
):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else known(name))
    arguments = ("-m", chat_model, "--text", story, "--out", tmp_path / "out", "--parts", "influence")
    assert main(*arguments) == 1
    error = capsys.readouterr().err
    assert what in error
    assert f"pip install 'jaxchat[analyze]', or give {flag}" in error
    assert not (tmp_path / "out").exists()
    assert main(*arguments, flag) == 0
    assert "layers.csv" in capsys.readouterr().out


def test_plans_compared_are_in_files_and_tables_and_are_not_measured_twice(
    chat_model, story, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ("-m", chat_model, "--text", story, "--out", out, "--window", "32", "--noplots", "--nohtml")
    arguments = (*arguments, "--parts", "halves", "--compare", "::-1")
    assert main(*arguments) == 0
    capsys.readouterr()
    # Longer than any repeat; one twice, spelled in two ways.
    assert main(*arguments, "--compare", "2,1,0", "--compare", "0:3,0:3,0:3") == 0
    captured = capsys.readouterr()
    assert "; 3 results are there already" in captured.err
    assert "jaxchat: 1 results in" in captured.err
    rows = rows_of((out / "compare.csv").read_text())
    assert [row["layer_spec"] for row in rows] == ["2::-1", "0:3,0:3,0:3"]
    values = json.loads((out / "analysis.json").read_text())
    for row, compared in zip(rows, values["compared"], strict=True):
        assert row["windows"] == "41"
        assert float(row["ratio_low"]) < float(row["ratio"]) < float(row["ratio_high"])
        assert math.exp(compared["difference"]["low"]) == float(row["ratio_low"])
        assert compared["first_disagreement"]["position"] == int(row["first_position"])
        assert len(compared["largest_divergences"]) == 10
        assert re.search(rf"^ .* {row['first_window']}:{row['first_position']}  {row['layer_spec']} *$",
                         captured.out, re.MULTILINE)  # fmt: skip
    tokens = rows_of((out / "compare_tokens.csv").read_text())
    assert len(tokens) == 2 * 1249
    mean = sum(float(row["nats"]) for row in tokens[:1249]) / 1249
    assert mean == pytest.approx(values["compared"][0]["nats_per_token"]["value"], rel=1e-6)
    slots = values["slots"]
    added = sum(slot[f"{half}_direct_logit"] for slot in slots for half in ("attention", "mlp"))
    direct = values["direct_logit"]
    assert added + direct["embedding"] + direct["bias"] == pytest.approx(direct["total"], abs=1e-4)


@pytest.mark.full  # a killed search, which uses the same journal, is tested always
def test_an_interrupted_or_killed_analysis_goes_on_where_it_stopped(chat_model, story, tmp_path):
    out, journal = tmp_path / "out", tmp_path / "out" / "journal.jsonl"
    arguments = ["-m", chat_model, "--text", story, "--window", "8", "--batch", "1", "--noplots"]
    arguments += ["--max_tokens", "600"]

    def stopped(signal_number, lines):
        process = subprocess.Popen([*COMMAND, *arguments, "--out", out], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    code, errors = stopped(signal.SIGINT, 20)
    assert code == 130
    assert f"interrupted; the results so far are in {journal}: run again to go on" in errors
    first = journal.read_bytes()
    known = len(first.splitlines()) - 1
    code, errors = stopped(signal.SIGKILL, known + 20)
    assert code == -signal.SIGKILL
    assert f"; {known} results are there already" in errors

    assert main(*arguments, "--out", out) == 0
    assert journal.read_bytes().startswith(first)
    assert main(*arguments, "--out", tmp_path / "whole") == 0
    resumed, whole = (json.loads((path / "analysis.json").read_text()) for path in (out, tmp_path / "whole"))
    # The processes above compiled with all optimizations, which round otherwise.
    for key in ("rys", "slots"):
        for ours, theirs in zip(resumed[key], whole[key], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert resumed["lens"]["tokens"] == whole["lens"]["tokens"]
    assert not list(out.glob(".*"))  # no temporary files are left
