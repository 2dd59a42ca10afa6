"""Searches for layer plans: moves, scores, budgets, stages, and verdicts that do not believe in luck."""

import dataclasses
import json
import math

import numpy as np
import pytest

import jaxchat
from jaxchat.analysis import cut_windows
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.evaluation.run import evaluate
from jaxchat.evaluation.tasks import prepare
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.search import decode_cost, ladder, report, sample, surrogate, validation
from jaxchat.search.decode_cost import measured_cost, relative_cost
from jaxchat.search.moves import KINDS, Move, disjoint, neighbours, plan_of
from jaxchat.search.run import Question, local_scorers, search
from jaxchat.search.sample import KL, LOSS, TEXT_MEASURES, Item, Row, Sample, Scores
from jaxchat.search.scorer import Scorer
from jaxchat.search.tasks import split_items, task_sample
from jaxchat.search.trials import Budget, Trials
from tests.support.tiny_chat import write_tiny_chat

BASE = LayerPlan.identity(6)


def spec(text, layers=6):
    return LayerPlan.parse(text, layers)


# --- moves


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("repeat", "0,1,2,1,2,3,4,5"),
        ("drop", "0,3,4,5"),
        ("reverse", "0,2,1,3,4,5"),
        ("whisper", "[0,1,2,[1,1,0.2],[2,1,0.2],3,4,5]"),
        ("repeat attention", "[0,1,2,[1,1,0],[2,1,0],3,4,5]"),
        ("repeat MLP", "[0,1,2,[1,0,1],[2,0,1],3,4,5]"),
        ("drop attention", "[0,[1,0,1],[2,0,1],3,4,5]"),
        ("drop MLP", "[0,[1,1,0],[2,1,0],3,4,5]"),
    ],
)
def test_a_move_is_made_of_a_block_of_slots(kind, expected):
    assert plan_of(BASE, (Move(1, 3, kind),)) == spec(expected)


def test_every_kind_of_move_is_tested():
    marks = test_a_move_is_made_of_a_block_of_slots.pytestmark[0].args[1]
    assert {kind for kind, _ in marks} == set(KINDS)


def test_moves_of_other_blocks_are_made_together():
    genes = disjoint([Move(4, 6, "drop"), Move(0, 2, "repeat")])
    assert plan_of(BASE, genes) == spec("0,1,0,1,2,3")
    assert disjoint([Move(0, 3, "drop"), Move(2, 4, "repeat")]) is None
    assert plan_of(BASE, (Move(0, 6, "drop"),)) is None


def test_neighbours_are_a_step_away_and_within_the_plan():
    near = neighbours((Move(0, 2, "repeat"), Move(2, 3, "drop")), 6)
    assert (Move(0, 1, "repeat"), Move(2, 3, "drop")) in near
    assert (Move(0, 2, "drop"), Move(2, 3, "drop")) in near
    assert (Move(0, 2, "repeat"),) in near
    for genes in near:
        assert all(0 <= move.start < move.stop <= 6 for move in genes)
        assert disjoint(genes) == genes
    assert neighbours((), 6) == []


# --- scores


@pytest.fixture(scope="module")
def model(tiny_directory):
    return jaxchat.load(tiny_directory("llama", num_hidden_layers=3))


def texts(rng, lengths):
    return [tuple(rng.integers(3, 67, n).tolist()) for n in lengths]


def test_scores_of_a_text_are_those_of_the_library(model, rng):
    windows = cut_windows(rng.integers(3, 67, 150).tolist(), 20)
    plans = [spec(text, 3) for text in ("all", "0,1,1,2", "0,2", "2,1,0")]
    scorer = Scorer(model.engine, model.plan, sample.text_sample(windows, LOSS), max_slots=6)
    for plan, scores in zip(plans, scorer.scores(plans), strict=True):
        for row, length, value in zip(windows.tokens, windows.lengths, scores.values, strict=True):
            expected = model.with_plan(plan).score(token_ids=[row[:length].tolist()])[0]
            assert value == pytest.approx(-expected.total / (length - 1), abs=1e-4)
        assert scores.weights.tolist() == (windows.lengths - 1).tolist()


def test_scores_of_rows_of_any_length_are_those_of_continuations(model, rng):
    """Questions whose answers have several tokens, in groups of several shapes, read anew or kept."""

    def nats(outcome, tokens):
        return float(outcome.nats.sum()), float(len(tokens))

    pairs = [tuple(texts(rng, (a, b))) for a, b in rng.integers(1, 16, (40, 2)).tolist()]
    items = tuple(Item(tuple(Row(*pair) for pair in pairs[i : i + 2]), nats) for i in range(0, 40, 2))
    plans = [spec(text, 3) for text in ("1,2", "0,1,2,2")]
    for mebibytes in (1024, 0):
        scorer = Scorer(model.engine, model.plan, Sample(LOSS, items), max_slots=6, mebibytes=mebibytes)
        found = scorer.scores(plans)
        for plan, scores in zip(plans, found, strict=True):
            totals = [-one.total for one in model.with_plan(plan).loglikelihoods(pairs)]
            np.testing.assert_allclose(scores.values, np.reshape(totals, (20, 2)).sum(1), atol=1e-3)
            assert set(scores.weights) == {2}


def test_a_plan_agrees_with_itself_and_has_no_divergence(model, rng):
    windows = cut_windows(rng.integers(3, 67, 60).tolist(), 20)
    for measure, value in ((TEXT_MEASURES["kl"], 0), (TEXT_MEASURES["agreement"], 1)):
        scorer = Scorer(model.engine, model.plan, sample.text_sample(windows, measure), max_slots=6)
        same, other = scorer.scores([model.plan, spec("0,2", 3)])
        np.testing.assert_allclose(same.values, value, atol=1e-5)
        assert measure.gain(other.values, same.values).mean() < 0


def test_a_small_part_of_a_sample_is_its_first_items(rng):
    windows = cut_windows(rng.integers(3, 67, 400).tolist(), 20)
    whole = sample.text_sample(windows, LOSS)
    assert whole.part(90).items == whole.items[:5]
    assert whole.part(350) is whole  # it would be hardly less


def test_search_and_validation_have_no_window_in_common(rng):
    windows = cut_windows(range(100), 10)
    first, second = sample.split_windows(windows, 0.3)
    assert np.concatenate([first.tokens, second.tokens]).tolist() == windows.tokens.tolist()
    assert len(first.lengths) == 3
    with pytest.raises(UsageError, match="too short to search on one part"):
        sample.split_windows(cut_windows(range(10), 10), 0.5)


def test_an_item_beyond_the_context_is_refused(model):
    item = Item((Row((1,), tuple([5] * 5000)),), lambda outcome, tokens: (0.0, 1.0))
    with pytest.raises(UsageError, match="an item has 5001 tokens"):
        Scorer(model.engine, model.plan, Sample(LOSS, (item,)), max_slots=6)


def test_cost_counts_the_weights_that_a_token_reads(model):
    cost = relative_cost(model.engine, model.plan)
    assert cost(model.plan) == 1
    more, less = cost(spec("0,1,2,2", 3)) - 1, 1 - cost(spec("0,1", 3))
    assert more == pytest.approx(less)
    halves = [cost(spec(text, 3)) - 1 for text in ("[0,1,2,[2,1,0]]", "[0,1,2,[2,0,1]]")]
    assert sum(halves) == pytest.approx(more)


def test_measured_cost_is_a_time_for_every_half_that_runs_and_is_kept(model, monkeypatch):
    seconds = {(1, 1): 0.1 + 3 * (0.2 + 0.5), (1, 0): 0.1 + 3 * 0.2, (0, 1): 0.1 + 3 * 0.5}

    def stepper(engine, plan, context):
        slot = plan.slots[0]
        return lambda: seconds[slot.attn_scale, slot.mlp_scale]

    monkeypatch.setattr(decode_cost, "_stepper", stepper)
    results = {}
    cost = measured_cost(model.engine, model.plan, results)
    assert results["decode seconds"] == pytest.approx([0.1, 0.2, 0.5])
    assert cost(model.plan) == 1
    assert cost(spec("[0, 1, [2, 1, 0], 2, [1, 0, 1]]", 3)) == pytest.approx((0.1 + 4 * 0.2 + 4 * 0.5) / 2.2)
    monkeypatch.setattr(decode_cost, "_measured", None)
    assert measured_cost(model.engine, model.plan, results)(spec("0", 3)) == pytest.approx(0.8 / 2.2)
    with pytest.raises(JaxchatError, match="decode seconds"):
        measured_cost(model.engine, model.plan, {"decode seconds": [1, "x", 2]})


def test_the_time_of_decode_steps_is_measured(model):
    results = {}
    cost = measured_cost(model.engine, model.plan, results)
    assert all(value >= 0 for value in results["decode seconds"])
    assert cost(model.plan) == 1


# --- trials and their budget


class Made:
    """Scores made up: `gain` of a plan on every item, with noise of a plan's own."""

    def __init__(self, gain, *, items=60, noise=0.0, seed=0):
        self.sample = Sample(
            LOSS, tuple(Item((Row((1,), (2,)),), lambda *_: (0.0, 1.0)) for _ in range(items))
        )
        self._gain, self._noise, self._seed = gain, noise, seed
        self.asked = []

    def scores(self, plans):
        self.asked += plans
        return [self._scores(plan) for plan in plans]

    def _scores(self, plan):
        count = len(self.sample.items)
        random = np.random.default_rng([self._seed, *str(plan).encode()])
        values = 3 - self._gain(plan) + self._noise * random.normal(size=count)
        return Scores(values, np.ones(count))


def made_search(gain, budget=None, results=None, *, noise=0.0, seed=0, items=60, **question):
    scorers = {
        name: Made(gain, noise=noise, seed=seed * 7 + number, items=items)
        for number, name in enumerate(("screen", "search", "validation"))
    }
    asked = Question(
        base=BASE,
        searched=scorers["search"].sample,
        validated=scorers["validation"].sample,
        probes={},
        cost=lambda plan: len(plan.executed()) / 6,
        max_slots=12,
        **question,
    )
    found = search(
        None, asked, budget or Budget(plans=150), {} if results is None else results,
        scorers=scorers, alike=np.abs(np.subtract.outer(np.arange(7), np.arange(7))),
    )  # fmt: skip
    return found, scorers, asked


def per_slot(plan):
    """Plans are better by 1 for a second layer 2 and for a missing layer 4; worse for all else."""
    times = np.zeros(6)
    for slot in plan.executed():
        times[slot.layer] += (slot.attn_scale + slot.mlp_scale) / 2
    return -float(np.abs(times - [1, 1, 2, 1, 0, 1]).sum())


def test_the_best_of_several_moves_together_is_found():
    found, _, _ = made_search(per_slot, noise=0.05)
    assert found.verdict.best.plan == spec("0,1,2,2,3,5")
    assert found.verdict.best.gain.difference.value == pytest.approx(2, abs=0.1)
    assert found.verdict.luck < 0.01


def test_a_budget_of_plans_is_kept_and_the_validation_comes_on_top():
    found, scorers, _ = made_search(per_slot, Budget(plans=40), noise=0.1)
    assert 40 <= len(scorers["screen"].asked) + len(scorers["search"].asked) <= 40 + 8
    assert len(scorers["validation"].asked) == 1 + len(found.verdict.candidates)
    assert found.verdict.candidates


def test_what_is_known_is_not_scored_again_and_the_end_is_the_same():
    results = {}
    whole, _, asked = made_search(per_slot, Budget(plans=90), results, noise=0.3)
    half = dict(list(results.items())[:50])
    again, scorers, _ = made_search(per_slot, Budget(plans=90), half, noise=0.3)
    scored = {str(plan) for plan in scorers["screen"].asked}
    assert not scored & {key.split(" ", 1)[1] for key in list(results)[:50] if key.startswith("screen")}
    assert again.verdict == whole.verdict
    assert report.plans_csv(again, asked) == report.plans_csv(whole, asked)
    assert report.as_json(again, {}) == report.as_json(whole, {})


def test_minutes_of_earlier_runs_count():
    found, scorers, _ = made_search(per_slot, Budget(minutes=1), {"seconds": 61.0})
    assert scorers["screen"].asked == scorers["search"].asked == [BASE]
    assert found.verdict.candidates == ()
    assert "No plan beats the base" in report.headline(found.verdict)


def test_a_search_whose_time_is_up_finds_again_what_it_had_found():
    results = {}
    whole, _, asked = made_search(per_slot, Budget(minutes=0.001), results, noise=0.3)
    assert whole.trials.spent >= 1
    again, scorers, _ = made_search(per_slot, Budget(minutes=0.001), results, noise=0.3)
    assert not any(made.asked for made in scorers.values())
    assert report.as_json(again, {}) == report.as_json(whole, {})
    assert report.plans_csv(again, asked) == report.plans_csv(whole, asked)


def test_a_result_that_is_none_is_refused_by_name():
    with pytest.raises(JaxchatError, match=r"the result 'screen all' is no list of scores"):
        made_search(per_slot, results={"screen all": [[1, 2], [1]]})
    with pytest.raises(JaxchatError, match=r"the result 'seconds' is \[1\], no number"):
        made_search(per_slot, results={"seconds": [1]})


@pytest.mark.parametrize(("name", "bounds"), [("slots", {"max_slots": 6}), ("cost", {"max_cost": 1.0})])
def test_candidates_are_within_their_bounds(name, bounds):
    made = made_search(per_slot, **{**bounds})[0] if name == "cost" else None
    found = made or made_search_slots()
    for _, plan in found.trials.stages:
        assert len(plan.executed()) <= 6


def made_search_slots():
    scorers = {name: Made(per_slot) for name in ("screen", "search", "validation")}
    asked = Question(
        base=BASE, searched=scorers["search"].sample, validated=scorers["validation"].sample, probes={},
        cost=lambda plan: 1.0, max_slots=6,
    )  # fmt: skip
    return search(None, asked, Budget(plans=80), {}, scorers=scorers, alike=np.zeros((7, 7)))


def test_where_the_base_is_the_measure_only_cheaper_plans_are_tried():
    rungs = ladder.Ladder(
        base=BASE, measure=KL, distances=np.zeros((7, 7)), cost=lambda p: len(p.executed()) / 6, max_slots=12
    )
    assert rungs.allows(spec("0,1,2,3,4"))
    assert not rungs.allows(spec("5,4,3,2,1,0"))
    assert not rungs.allows(None)


def test_a_plan_that_is_not_finite_is_last_and_does_not_win():
    def gain(plan):
        return math.nan if len(plan) != 6 else 0.0

    found, _, _ = made_search(gain, Budget(plans=60), noise=0.1)
    assert all(len(one.plan) == 6 for one in found.verdict.candidates)
    nan = Scores(np.full(9, math.nan), np.ones(9))
    base = Scores(np.ones(9), np.ones(9))
    compared = validation.compared(LOSS, nan, base, 0.95)
    assert compared.difference.high == -math.inf
    assert compared.losses == 9
    assert not math.isfinite(validation.score_of(nan).value)


def test_a_base_that_is_not_finite_is_told():
    with pytest.raises(JaxchatError, match="logits are not finite"):
        made_search(lambda plan: math.nan)


def test_the_surrogate_goes_on_from_what_was_tried():
    found, _, _ = made_search(per_slot, Budget(plans=100), noise=0.05, surrogate=0)
    stages = list(found.trials.stages.values())
    assert stages.count("surrogate") > 0
    for (_, plan), stage in found.trials.stages.items():
        if stage == "surrogate":
            assert surrogate.plan_with(BASE, surrogate.counts_of(BASE, plan)) == plan
    assert surrogate.counts_of(BASE, spec("1,0,2,3,4,5")) is None
    assert surrogate.plan_with(BASE, [0] * 6) is None


# --- verdicts


@pytest.mark.parametrize("searches", [25, pytest.param(400, marks=pytest.mark.full)])
def test_of_plans_that_are_all_equal_hardly_any_search_claims_a_win(searches):
    """The winner's curse, and what is made of it: at most 5 % of searches say that a plan is better."""
    claimed, believed = 0, 0
    for number in range(searches):
        found, _, _ = made_search(
            lambda plan: 0.0, Budget(plans=80), noise=1.0, seed=number, items=50, candidates=4
        )
        claimed += found.verdict.best is not None
        believed += any(one.optimistic.difference.low > 0 for one in found.verdict.candidates)
    assert claimed <= 0.05 * searches
    assert believed > 0.2 * searches


def test_the_cheapest_of_the_good_are_validated_as_well():
    gains = {spec("0:6,5"): 0.3, spec("0:6,4"): 0.2, spec("0:5"): -0.1, spec("0:4"): -0.5, spec("0:3"): -0.9}
    plans = validation.chosen(gains, lambda plan: len(plan) / 6, 3)
    assert plans == [spec("0:6,5"), spec("0:6,4"), spec("0:5")]
    front = validation.pareto(gains, lambda plan: len(plan) / 6)
    assert front == [spec("0:3"), spec("0:4"), spec("0:5"), spec("0:6,5")]


def test_right_or_wrong_items_are_compared_by_mcnemar():
    accuracy = dataclasses.replace(LOSS, name="acc", higher=True)
    right, wrong = Scores(np.ones(20), np.ones(20)), Scores(np.zeros(20), np.ones(20))
    compared = validation.compared(accuracy, right, wrong, 0.95)
    assert compared.difference.value == 1
    assert compared.difference.low > 0.7
    assert compared.p_value == pytest.approx(2 * 0.5**20)


@pytest.mark.parametrize(("acceptance", "cost"), [(0.8, 0.5), (0.3, 0.9), (0.95, 0.1)])
def test_a_draft_gains_what_its_tokens_save(acceptance, cost, rng):
    """Against draws of how many tokens of a draft are kept."""
    gain, count = validation.draft_gain(acceptance, cost)
    kept = (np.cumprod(rng.random((20_000, count)) < acceptance, 1)).sum(1) + 1
    assert gain == pytest.approx(kept.mean() / (count * cost + 1), rel=0.03)
    assert validation.draft_gain(1, cost, 4) == (pytest.approx(5 / (4 * cost + 1)), 4)


# --- with a model


def test_a_layer_too_many_is_found_and_left_out(model, rng):
    """Of a base plan with a slot that spoils what the model says, by a text that the model says."""
    trained = jaxchat.load("box")
    text = trained.generate(
        ["Once upon a time", "There was a dog", "The girl", "One day, Tom"],
        max_new_tokens=160,
        temperature=0.8,
    )
    ids = [token for result in text for token in result.token_ids]
    windows = cut_windows(ids, 32)
    searched, validated = sample.split_windows(windows, 0.5)
    base = spec("[0, 1, 2, 3, [0, 4, 4], 4, 5, 6, 7]", 8)
    asked = Question(
        base=base,
        searched=sample.text_sample(searched, LOSS),
        validated=sample.text_sample(validated, LOSS),
        probes={"agreement": sample.text_sample(validated, TEXT_MEASURES["agreement"])},
        cost=relative_cost(trained.engine, base),
        max_slots=10,
        candidates=2,
    )
    found = search(trained.engine, asked, Budget(plans=60), {})
    best = found.verdict.best
    assert best is not None
    assert best.gain.difference.low > 0
    assert Slot(0, 4, 4) not in best.plan.executed()
    assert {name for name, _ in found.trials.stages} >= {"validation", "probe agreement"}
    assert best.probes[0].gain.difference.value < 0  # it says something else than the spoilt base
    text = report.markdown(found, asked, {"model": "box"})
    assert str(best.plan) in text
    assert "beats the base at 95 %" in text


def test_equal_samples_share_a_scorer(model, rng):
    windows = cut_windows(rng.integers(3, 67, 60).tolist(), 20)
    first, second = sample.split_windows(windows, 0.5)
    asked = Question(
        base=model.plan, searched=sample.text_sample(first, LOSS), validated=sample.text_sample(second, LOSS),
        probes={}, cost=len, max_slots=6,
    )  # fmt: skip
    scorers = local_scorers(model.engine, asked)
    assert scorers["screen"] is scorers["search"]
    assert Trials(scorers, Budget(plans=1), {}).spent == 0


# --- tasks


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return jaxchat.load(write_tiny_chat(tmp_path_factory.mktemp("chat")))


CHOICES = [
    {"question": f"What is {n}?", "choices": ["it", "a letter" + "x" * (n % 5)], "answer": n % 2}
    for n in range(12)
]
COMPLETIONS = [{"context": f"Of {n} it is", "continuation": " odd" if n % 2 else " even"} for n in range(9)]


@pytest.mark.parametrize(
    ("kind", "rows", "metric"),
    [
        ("choice", CHOICES, "acc"),
        ("choice", CHOICES, "acc_per_byte"),
        ("choice", CHOICES, "bits_per_byte"),
        ("completion", COMPLETIONS, "nats_per_token"),
        ("completion", COMPLETIONS, "acc"),
    ],
)
def test_items_of_a_task_score_as_in_an_evaluation(chat_model, tmp_path, kind, rows, metric):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (prepared,) = prepare(f"{kind}:{tmp_path / 'rows.jsonl'}")
    plan = spec("0,0,2", 3)
    scorer = Scorer(
        chat_model.engine, chat_model.plan, task_sample(chat_model, prepared, metric), max_slots=6
    )
    (scores,) = scorer.scores([plan])
    (measured,) = evaluate(chat_model.with_plan(plan), [prepared])
    figures = [outcome.figures[metric] for outcome in measured.outcomes]
    np.testing.assert_allclose(scores.values, [figure.value for figure in figures], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.weights, [figure.weight for figure in figures])


def test_items_of_a_task_are_drawn_for_search_and_validation(chat_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (prepared,) = prepare(f"choice:{tmp_path / 'rows.jsonl'}")
    whole = task_sample(chat_model, prepared)
    first, second = split_items(whole, 0.25, seed=1)
    assert len(first.items) == 3
    assert {*first.items, *second.items} == {*whole.items}
    assert split_items(whole, 0.25, seed=2)[0].items != first.items
    with pytest.raises(UsageError, match="has 1 item"):
        split_items(Sample(LOSS, whole.items[:1]), 0.5, seed=0)
