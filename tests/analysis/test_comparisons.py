"""What halves of layers add, and plans against the base plan token by token, against slow computations."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jaxchat
from jaxchat import analysis
from jaxchat.analysis import contributions
from jaxchat.errors import UsageError
from jaxchat.evaluation import statistics
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.layers.norms import NORMS
from tests.analysis.models import SCALED, cosine, hidden_states, log_softmax, logits_of, random_ids

pytestmark = pytest.mark.usefixtures("quick_compilation")

WINDOWS = analysis.cut_windows(random_ids(50), 16)  # the last of the four has two tokens
ROWS = [row[:length] for row, length in zip(WINDOWS.tokens.tolist(), WINDOWS.lengths, strict=True)]


@pytest.fixture(scope="module")
def load(tiny_directory):
    """`load(model_type)`: a tiny random model, loaded once."""
    loaded = {}

    def make(model_type):
        if model_type not in loaded:
            options = {} if model_type == "gpt2" else {"num_hidden_layers": 3}
            loaded[model_type] = jaxchat.load(tiny_directory(model_type, **options))
        return loaded[model_type]

    return make


def compare(loaded, *specs, **more):
    plans = [LayerPlan.parse(spec, loaded.config.num_layers) for spec in specs]
    asked = analysis.Questions(parts=("influence",), top_k=3)
    return analysis.analyze(loaded.engine, loaded.plan, WINDOWS, asked, compare=plans, batch=3, **more)


# --- what halves add


def half_steps(loaded, plan, row):
    """(half, slot, x, y), the stream and what is added to it, float64 [T, D]: of ever longer plans."""
    slots = plan.executed()
    states = hidden_states(loaded, plan, row)
    for number, slot in enumerate(slots):
        no_mlp = LayerPlan((*slots[:number], Slot(slot.layer, slot.attn_scale, 0.0)), plan.num_layers)
        between = hidden_states(loaded, no_mlp, row, len(slots))[-1] if slot.attn_scale else states[number]
        yield "attention", number, states[number], between - states[number]
        yield "mlp", number, between, states[number + 1] - between


def direct_effects(loaded, last, rows, targets):
    """What `rows` [T, D] add to the centred logits of the tokens that follow, float64 numpy throughout."""
    config, params = loaded.config, loaded.engine.params
    weight = np.asarray(params["norm.weight"], np.float64)
    if config.norm == "layernorm":
        rows, last = (x - x.mean(-1, keepdims=True) for x in (rows, last))
    else:
        weight = weight + config.norm_offset
    scale = np.sqrt((last**2).mean(-1, keepdims=True) + config.norm_eps)
    head = np.asarray(params["embed.weight" if config.tied_embeddings else "lm_head.weight"], np.float64)
    head = head - head.mean(0)
    return ((rows / scale * weight)[:-1] * head[targets]).sum(-1)


@pytest.mark.parametrize(
    ("model_type", "spec"),
    [("llama", "all"), ("gemma2", SCALED), ("gpt2", "1,0,1")],
)
def test_what_halves_add_against_numpy(load, model_type, spec):
    loaded = load(model_type)
    plan = LayerPlan.parse(spec, loaded.config.num_layers)
    asked = analysis.Questions(parts=("halves",))
    found = analysis.analyze(loaded.engine, plan, WINDOWS, asked, batch=3).contributions
    slots = len(plan.executed())

    sums = {half: np.zeros((slots, 3)) for half in contributions.ADDING}
    embedding = 0.0
    for row in ROWS:
        states, targets = hidden_states(loaded, plan, row), np.array(row[1:])
        embedding += direct_effects(loaded, states[-1], states[0], targets).sum()
        for half, number, x, y in half_steps(loaded, plan, row):
            adds = np.linalg.norm(y, axis=-1) > 0
            effect = direct_effects(loaded, states[-1], y, targets).sum()
            ratio = np.linalg.norm(y, axis=-1) / np.linalg.norm(x, axis=-1)
            angle = cosine(x[adds], y[adds]).sum()
            sums[half][number] += np.array([ratio.sum(), angle, effect])
    read, predicted = sum(map(len, ROWS)), WINDOWS.predicted
    for half in contributions.ADDING:
        expected = sums[half] / [read, read, predicted]
        np.testing.assert_allclose(found.norm[half], expected[:, 0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.cosine[half], expected[:, 1], atol=1e-4)
        np.testing.assert_allclose(found.logit[half], expected[:, 2], atol=1e-4)
    assert found.embedding == pytest.approx(embedding / predicted, abs=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_embedding_bias_and_all_halves_add_up_to_the_logit(load, model_type):
    loaded = load(model_type)
    asked = analysis.Questions(parts=("halves",))
    found = analysis.analyze(loaded.engine, loaded.plan, WINDOWS, asked, batch=2).contributions
    parts = found.embedding + found.bias + sum(values.sum() for values in found.logit.values())
    assert parts == pytest.approx(found.total, abs=1e-4)
    logits = [logits_of(loaded, loaded.plan, row) for row in ROWS]
    if cap := loaded.config.final_softcap:
        logits = [cap * np.arctanh(part / cap) for part in logits]
    centred = [
        part[np.arange(len(row) - 1), row[1:]] - part[:-1].mean(-1)
        for part, row in zip(logits, ROWS, strict=True)
    ]
    assert found.total == pytest.approx(np.concatenate(centred).mean(), abs=1e-3)
    assert (found.bias != 0) == ("norm.bias" in loaded.engine.params)


def test_every_kind_of_norm_has_its_scale_held():
    assert set(contributions.FROZEN) == set(NORMS)


# --- plans against the base plan


@pytest.mark.parametrize(("model_type", "spec"), [("llama", "0,1,1"), ("gemma2", SCALED), ("gpt2", "0")])
def test_tokens_under_two_plans_against_numpy(load, model_type, spec):
    loaded = load(model_type)
    (found,) = compare(loaded, spec).compared
    place = 0
    for number, row in enumerate(ROWS):
        base, other = (log_softmax(logits_of(loaded, plan, row))[:-1] for plan in (loaded.plan, found.plan))
        of = slice(place, place := place + len(row) - 1)
        targets = np.array(row[1:])
        assert found.windows[of].tolist() == [number] * len(targets)
        assert found.places[of].tolist() == list(range(1, len(row)))
        np.testing.assert_array_equal(found.tokens[of], targets)
        each = np.arange(len(targets))
        np.testing.assert_allclose(found.base_nats[of], -base[each, targets], rtol=1e-4)
        np.testing.assert_allclose(found.nats[of], -other[each, targets], rtol=1e-4)
        np.testing.assert_allclose(found.kl[of], (np.exp(base) * (base - other)).sum(-1), atol=1e-4)
        for best, logprobs in ((found.base_best, base), (found.best, other)):
            order = np.argsort(-logprobs, axis=-1)[:, :3]
            np.testing.assert_array_equal(best.ids[of], order)
            np.testing.assert_allclose(best.logprobs[of], np.take_along_axis(logprobs, order, -1), atol=1e-4)
        np.testing.assert_array_equal(found.agreed[of], base.argmax(-1) == other.argmax(-1))
    assert place == len(found.tokens) == WINDOWS.predicted
    assert found.first == int(np.flatnonzero(~found.agreed)[0])
    assert found.largest(4) == np.argsort(-found.kl)[:4].tolist()


def test_a_comparison_has_the_perplexities_that_the_analysis_gives_these_plans(load):
    loaded = load("llama")
    asked = analysis.Questions(parts=("rys",))
    plans = [
        analysis.repeated(loaded.plan, 0, 2),
        LayerPlan.parse("0:3,0:3,0:3,1", 3),
    ]  # longer than any repeat
    found = analysis.analyze(loaded.engine, loaded.plan, WINDOWS, asked, compare=plans, batch=3)
    first, longer = found.compared
    assert first.intervals.plan.value == pytest.approx(found.rys[0, 2], rel=1e-5)
    assert first.intervals.base.value == pytest.approx(found.base, rel=1e-5)
    alone = loaded.with_plan(longer.plan).score(token_ids=ROWS)
    assert longer.nats.sum() == pytest.approx(-sum(score.total for score in alone), rel=1e-5)


def test_intervals_are_paired_over_windows_that_weigh_as_much_as_their_tokens(load):
    (found,) = compare(load("llama"), "2,1,0").compared
    counts = np.array([len(row) - 1 for row in ROWS])
    sums = [np.bincount(found.windows, values) / counts for values in (found.nats, found.base_nats)]
    expected = statistics.compare(*sums, counts)
    assert found.intervals.difference == expected.difference
    assert found.intervals.difference.items == 4
    assert (found.intervals.worse, found.intervals.better) == (expected.wins, expected.losses)


def test_a_plan_compared_with_itself_never_disagrees(load):
    (found,) = compare(load("llama"), "all").compared
    assert found.first is None
    assert found.agreed.all()
    np.testing.assert_allclose(found.kl, 0, atol=1e-5)
    assert found.intervals.difference.value == pytest.approx(0, abs=1e-6)


def test_where_a_plan_is_not_finite_nothing_is_made_of_its_numbers(load):
    (found,) = compare(load("llama"), "0,1,1").compared
    nats = found.nats.copy()
    nats[5:] = np.nan
    broken = dataclasses.replace(found, nats=nats, kl=np.where(np.isnan(nats), np.nan, found.kl))
    assert broken.lost.tolist() == [False] * 5 + [True] * (len(nats) - 5)
    assert broken.intervals is None
    assert set(broken.largest(10)) == set(range(5))
    assert not broken.agreed[5:].any()


def test_a_plan_of_infinite_scales_is_not_finite_in_the_journal_and_after_it(load):
    results = {}
    spec = "[0, [1, 3e38, 3e38], [1, 3e38, 3e38], 2]"
    (found,) = compare(load("llama"), spec, results=results).compared
    assert found.lost.all()
    again = json.loads(json.dumps(results))
    (resumed,) = compare(load("llama"), spec, results=again).compared
    assert resumed.lost.all()
    assert again.keys() == results.keys()


def test_a_known_comparison_is_not_measured_again_and_another_is(load):
    loaded, results = load("llama"), {}
    (first,) = compare(loaded, "0,1,1", results=results).compared
    before = dict(results)
    again, other = compare(loaded, "0,1,1", "1,2", results=results).compared
    np.testing.assert_array_equal(again.kl, first.kl)
    assert sorted(set(results) - set(before)) == ["0 compare 1,2 top 3", "1 compare 1,2 top 3"]
    results["0 compare 1,2 top 3"][0][0] = 1e9
    with pytest.raises(analysis.KnownResultError, match=r"compare 1,2 top 3' has the token id 1e\+09"):
        compare(loaded, "1,2", results=results)
    assert math.isfinite(other.kl.sum())


def test_a_plan_of_another_model_is_refused(load):
    loaded = load("llama")
    with pytest.raises(UsageError, match="over 4 layers, the model has 3"):
        analysis.analyze(loaded.engine, loaded.plan, WINDOWS, compare=[LayerPlan.identity(4)])


def test_quantized_heads_are_read_as_the_model_reads_them(tiny_directory):
    directory = tiny_directory("llama", num_hidden_layers=3)
    asked = analysis.Questions(parts=("halves",))
    plain, quantized = (
        analysis.analyze(loaded.engine, loaded.plan, WINDOWS, asked).contributions
        for loaded in (jaxchat.load(directory), jaxchat.load(directory, quant="int8"))
    )
    parts = quantized.embedding + quantized.bias + sum(v.sum() for v in quantized.logit.values())
    assert parts == pytest.approx(quantized.total, abs=0.01)
    np.testing.assert_allclose(quantized.logit["mlp"], plain.logit["mlp"], atol=0.02)
    assert jnp.isfinite(quantized.total)
