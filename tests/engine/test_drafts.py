"""With a draft, right or wrong, tokens are those without; what is kept of a draft is what the rules say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.draft_use import TREE_25, TreeShape, chain, read_draft, read_shape
from jaxchat.engine import session as engine_module
from jaxchat.engine.acceptance import TOP_K, TYPICAL_ALPHA, TYPICAL_THRESHOLD, Draws, accept
from jaxchat.engine.generation import Generation, Limits, generate
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from tests.engine.test_engine import DYNAMIC, LONGROPE
from tests.support.drafts import KnowingDraft

MAX_LENGTH = 64
pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [1, 40, 7, 22, 63, 9, 30, 5], [7], [3, 3, 3, 8, 2]
VARIANTS = {
    "llama": ("llama", {}, {}),
    "longrope": ("phi3", LONGROPE, {}),  # rotations change at 24 tokens
    "dynamic": ("llama", DYNAMIC, {}),  # and with every token after 24
    "int8": ("llama", {}, {"kv_dtype": "int8"}),
    "bfloat16": ("llama", {}, {"kv_dtype": "bfloat16"}),
    "reference": ("llama", {}, {"kernels": "reference"}),
    "gemma3": ("gemma3_text", {}, {}),  # windows
    "gpt2": ("gpt2", {}, {}),  # learned positions
}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(engine_module, "MIN_CAPACITY", 32)
    monkeypatch.setattr(engine_module, "PREFILL_BUCKETS", (16,))


@pytest.fixture
def engines(tiny_model):
    """`engines(variant, **options)`: one without a draft, and what makes one with it."""

    def make(variant="llama", **more):
        model_type, overrides, options = VARIANTS[variant]
        config, params = tiny_model(model_type, **overrides)
        options = {"max_length": MAX_LENGTH, **options, **more}
        return Engine(config, params, **options), lambda draft: Engine(config, params, draft=draft, **options)

    return make


def started(engine, prompts=PROMPTS, plan="all"):
    session = engine.session(LayerPlan.parse(plan, engine.config.num_layers), batch=len(prompts), max_slots=6)
    for row, ids in enumerate(prompts):
        session.set_ids(ids, row)
    return session


def texts_of(session, **options):
    """What each sequence becomes, with logprobs, and why it ends."""
    running = generate(session, **options)
    logprobs = [[] for _ in session.ids]
    for token in running:
        logprobs[token.row].append(token.logprob)
    return [list(ids) for ids in session.ids], logprobs, running


def every_place(row, step):
    """All places of the tree in turn, each sequence elsewhere."""
    return (step * 7 + row * 11) % len(TREE_25.parents)


def sampled(batch, **options):
    return SamplingParams.make(batch, temperature=1.0, **options)


@pytest.mark.parametrize(
    "variant",
    [v if v in ("llama", "longrope", "int8") else pytest.param(v, marks=pytest.mark.full) for v in VARIANTS],
)
def test_a_draft_that_is_right_anywhere_or_nowhere_changes_nothing(engines, variant):
    """Greedy and sampled, to the end of the context; the sequences accept different numbers."""
    plain, with_draft = engines(variant)
    for options in (
        {},
        {"params": sampled(3, repetition_penalty=1.2, frequency_penalty=0.3, top_p=0.9), "seeds": [5, 6, 7]},
    ):
        expected, logprobs, before = texts_of(started(plain), **options)
        draft = KnowingDraft(TREE_25, expected, every_place)
        found, same, running = texts_of(started(with_draft(draft)), **options)
        assert found == expected
        assert running.finish_reasons == before.finish_reasons == ["context"] * 3
        for ours, theirs in zip(same, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        if variant != "dynamic":  # where half of the tokens are one at a time
            assert running.tally.tokens > 1.5 * running.tally.steps
        told = [place for row, at, count in draft.observed for place in range(at, at + count) if row == 0]
        if variant != "longrope":  # where all is computed anew at 24 tokens
            assert told == list(range(len(told)))  # each position once, none left out


@pytest.mark.parametrize("depth", range(6))
def test_as_many_tokens_are_accepted_as_are_right(engines, depth):
    plain, with_draft = engines()
    expected, *_ = texts_of(started(plain), max_new_tokens=25)
    place = next(node for node, own in enumerate(TREE_25.depths) if own == depth)
    draft = KnowingDraft(TREE_25, expected, lambda row, step: place)
    found, _, running = texts_of(started(with_draft(draft)), max_new_tokens=25)
    assert found == expected
    whole = 24 // (depth + 1)  # steps of all three sequences that are not cut short
    assert running.tally.steps >= 3 * whole
    assert running.tally.tokens >= 3 * whole * (depth + 1)
    if depth == 0:
        assert running.tally.tokens == running.tally.steps == 3 * 24


@pytest.mark.parametrize("plan", ["0,1,1,2", "[0, [1, 0.0, 0.7], [2, 1.0, 0.0], 1]"])
def test_drafts_work_under_any_plan_and_after_its_change(engines, plan):
    plain, with_draft = engines()
    session = started(plain)
    first, *_ = texts_of(session, max_new_tokens=9)
    session.set_plan(LayerPlan.parse(plan, 3))
    expected, *_ = texts_of(session, max_new_tokens=20)
    assert [ids[: len(before)] for ids, before in zip(expected, first, strict=True)] == first
    session = started(with_draft(KnowingDraft(TREE_25, expected, every_place)))
    assert texts_of(session, max_new_tokens=9)[0] == first
    session.set_plan(LayerPlan.parse(plan, 3))
    assert texts_of(session, max_new_tokens=20)[0] == expected


def test_stop_ids_and_lengths_end_a_sequence_within_a_step(engines):
    plain, with_draft = engines()
    whole, *_ = texts_of(started(plain), max_new_tokens=12)
    draft = KnowingDraft(chain(5), whole, lambda row, step: 5)
    limits = [Limits(4), Limits(12, frozenset({whole[1][-4]})), None]
    for engine in (plain, with_draft(draft)):
        session = started(engine)
        running = Generation(session, SamplingParams.make(3, temperature=0.0), [0, 0, 0], limits)
        tokens = list(running)
        assert [t.id for t in tokens if t.row == 0] == whole[0][len(PROMPTS[0]) :][:4]
        assert running.finish_reasons[0] == "length"
        assert running.finish_reasons[1] == "stop"
        assert session.ids[1][-1] == whole[1][-4]
        assert session.ids[2] == list(PROMPTS[2])
        assert all(session.cached[row] == len(session.ids[row]) - 1 for row in (0, 1))
        # And what follows goes on from there.
        assert texts_of(session, max_new_tokens=3)[0][0] == whole[0][: len(PROMPTS[0]) + 7]


def test_a_full_context_drops_the_oldest_tokens_as_without(engines):
    plain, with_draft = engines(max_length=24)
    options = {"max_new_tokens": 40, "overflow": "truncate_oldest"}
    session = started(plain)
    expected = [(token.row, token.id) for token in generate(session, **options)]
    # What it knows does not fit after a truncation: all is wrong from there on.
    draft = KnowingDraft(TREE_25, [[0] * 99] * 3, every_place, changes=True)
    found = [(token.row, token.id) for token in generate(started(with_draft(draft)), **options)]
    for row in range(3):
        assert [i for r, i in found if r == row] == [i for r, i in expected if r == row]


def test_what_a_consumer_changes_within_a_step_counts(engines):
    """It restricts a draw, rolls back and goes on elsewhere, and ends one: as without a draft."""
    plain, with_draft = engines()
    whole, *_ = texts_of(started(plain), max_new_tokens=30)
    outcomes = []
    draft = KnowingDraft(chain(5), whole, lambda row, step: 5, changes=True)
    for engine in (plain, with_draft(draft)):
        session, seen = started(engine), []
        running = generate(session, max_new_tokens=30)
        for row, token, _ in running:
            seen.append((row, token))
            count = sum(r == row for r, _ in seen)
            if row == 0 and count == 4:
                allowed = np.zeros(67, bool)
                allowed[[11, 12]] = True
                running.allow(0, allowed)
            if row == 1 and count == 5:
                session.set_ids([*session.ids[1][:-2], 17, 18], 1)
            if row == 2 and count == 3:
                running.stop(2)
        outcomes.append([[token for r, token in seen if r == row] for row in range(3)])
        assert outcomes[-1][0][4] in (11, 12)
        assert session.ids[2] == [*PROMPTS[2], *outcomes[-1][2]]
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][2]) == 3


def test_a_rollback_and_a_new_text_are_as_without(engines):
    plain, with_draft = engines()
    texts = []
    draft = KnowingDraft(TREE_25, [[0] * 99], every_place, changes=True)
    for engine in (plain, with_draft(draft)):
        session = started(engine, [PROMPTS[0]])
        texts_of(session, max_new_tokens=10)
        session.rollback(12)
        texts_of(session, max_new_tokens=7)
        session.set_ids([*session.ids[0][:9], 4, 5])
        texts_of(session, max_new_tokens=7)
        rows = session.cached_rows()
        other = started(engine, [[1]])
        other.restore(session.ids[0], rows)
        texts.append((session.ids[0], texts_of(other, max_new_tokens=8)[0]))
    assert texts[0] == texts[1]


def test_broken_logits_are_refused_with_a_draft_too(tiny_model):
    config, params = tiny_model("llama")
    broken = {**params, "norm.weight": params["norm.weight"] * np.nan}
    draft = KnowingDraft(chain(2), [[1] * 99], lambda row, step: 2, changes=True)
    session = started(Engine(config, broken, max_length=32, draft=draft), [[1, 2]])
    with pytest.raises(JaxchatError, match="not finite"):
        list(generate(session, max_new_tokens=3))
    session = started(Engine(config, params, max_length=32, draft=draft), [[1, 2]])
    running = iter(generate(session, max_new_tokens=9))
    next(running)
    session.engine.params = broken
    with pytest.raises(JaxchatError, match="not finite"):
        list(running)


# --- acceptance, alone

SMALL = TreeShape((0, 0, 1, 0, 3, 3))  # 1 and 3 follow 0; 2 follows 1; 4 and 5 follow 3


def draws_of(batch, vocabulary, **options):
    params = SamplingParams.make(batch, **options)
    zeros = jnp.zeros((batch, vocabulary), jnp.int32)
    return Draws(
        params, jnp.arange(batch, dtype=jnp.uint32), jnp.full(batch, 9), zeros > 0, zeros, zeros == 0
    )


def accepted(rule, logits, tokens, batch, new=None, **options):
    """`accept` over `SMALL`, of the same logits [T, V] and tokens [T] in every sequence."""
    both = [jnp.broadcast_to(jnp.asarray(part), (batch, *np.shape(part))) for part in (logits, tokens)]
    new = jnp.full(batch, len(tokens)) if new is None else new
    hidden = jnp.broadcast_to(jnp.arange(len(tokens), dtype=jnp.float32)[:, None], (batch, len(tokens), 2))
    return jax.tree.map(
        np.asarray,
        accept(rule, SMALL, both[0], hidden, both[1], new, draws_of(batch, np.shape(logits)[1], **options)),
    )


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.full)])
def test_what_is_sampled_through_a_tree_is_distributed_as_the_model_says(rng, count):
    """The first, second and third tokens, by chi-square, of a tree with siblings."""
    logits = np.clip(rng.standard_normal((6, 5)).astype(np.float32), -1.5, 1.5)
    logits[[0, 0, 3], [2, 0, 3]] += 1.5  # so that enough draws come to the third token
    tokens = np.array([4, 2, 1, 0, 3, 0], np.int32)
    kept = accepted("lossless", logits, tokens, count, temperature=1.0)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    first = np.bincount(kept.tokens[:, 0], minlength=5)
    assert chi_square(first, p[0] * count) < 30  # of 4 degrees of freedom: once in 200,000
    for token, node in ((2, 1), (0, 3)):
        chosen = kept.tokens[:, 0] == token
        assert (kept.number[chosen] >= 2).all()
        second = np.bincount(kept.tokens[chosen, 1], minlength=5)
        assert chi_square(second, p[node] * chosen.sum()) < 30
    assert (kept.number[~np.isin(kept.tokens[:, 0], (2, 0))] == 1).all()
    third = kept.tokens[(kept.tokens[:, 0] == 0) & (kept.tokens[:, 1] == 3), 2]
    assert chi_square(np.bincount(third, minlength=5), p[4] * len(third)) < 30


def chi_square(found, expected):
    return (np.square(found - expected) / expected).sum()


def test_the_chi_square_would_tell_a_biased_rule(rng):
    """A rule that is not lossless fails the test above."""
    logits = np.zeros((6, 5), np.float32)
    tokens = np.array([4, 2, 1, 0, 3, 0], np.int32)
    kept = accepted("typical", logits, tokens, 2000, temperature=1.0)
    assert chi_square(np.bincount(kept.tokens[:, 0], minlength=5), np.full(5, 400.0)) > 1000


def test_a_kept_path_has_its_tokens_states_and_logprobs():
    logits = np.full((6, 7), -5.0, np.float32)
    tokens = np.array([6, 2, 1, 5, 3, 4], np.int32)
    for node, token in ((0, 5), (3, 4), (5, 1)):
        logits[node, token] = 5
    kept = accepted("lossless", logits, tokens, 2, new=jnp.array([6, 5]), temperature=0.0)
    assert kept.number.tolist() == [3, 2]  # in the second the last place of the tree does not count
    assert kept.tokens[0].tolist() == [5, 4, 1]
    assert kept.tokens[1, :2].tolist() == [5, 4]
    assert kept.path[0].tolist() == [0, 3, 5]
    assert kept.computed[0].tolist() == [6, 5, 4]
    assert kept.hidden[0, :, 0].tolist() == [0, 3, 5]
    expected = 5 - np.log(np.exp(5) + 6 * np.exp(-5))
    np.testing.assert_allclose(kept.logprobs[0], expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["typical", "top_k"])
def test_lossy_rules_accept_the_longest_path_of_what_they_say(rng, rule):
    for _ in range(20):
        logits = rng.standard_normal((6, 9)).astype(np.float32) * rng.uniform(0.5, 4)
        tokens = rng.integers(0, 9, 6).astype(np.int32)
        p = np.exp(np.float64(logits))
        p /= p.sum(-1, keepdims=True)
        least = np.minimum(TYPICAL_THRESHOLD, TYPICAL_ALPHA * np.exp((p * np.log(p)).sum(-1)))
        if rule == "top_k":
            least = np.sort(p, -1)[:, -TOP_K] * (1 - 1e-6)
        best = [0]
        for node in range(1, 6):
            path = [node]
            while path[0]:
                path.insert(0, SMALL.parents[path[0]])
            if all(p[a, tokens[b]] > least[a] for a, b in itertools.pairwise(path)):
                best = max(best, path, key=len)
        kept = accepted(rule, logits, tokens, 1, temperature=1.0)
        assert kept.path[0, : len(best)].tolist() == best
        assert kept.tokens[0, : len(best) - 1].tolist() == [tokens[node] for node in best[1:]]


# --- text forms


def test_the_tree_of_25_is_that_of_its_authors():
    assert len(TREE_25.parents) == 26
    assert [TREE_25.depths.count(depth) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert TREE_25.parents[:6] == (0, 0, 1, 2, 3, 4)  # the likeliest path is in place
    assert [len(TREE_25.children[node]) for node in TREE_25.children[0]] == [3, 2, 2, 1]
    assert TREE_25.cut(4).depth == 4
    assert len(TREE_25.cut(4).parents) == 24
    assert TREE_25.cut(1).parents == (0, 0, 0, 0, 0)


def test_drafts_have_text_forms():
    assert read_draft("chimera:a:b").path == "a:b"
    assert read_shape("25") is None
    assert read_shape("chain:31").depth == 31
    for text in ("chain:0", "chain:32", "chain:-1", "26", "tree", "chain:٣٣", ""):
        with pytest.raises(UsageError, match=r"draft_tree is .*; expected 25"):
            read_shape(text)
    for text in ("chimera", "chimera:", "medusa:x", ":x", ""):
        with pytest.raises(UsageError, match=r"draft is .*; expected chimera:DIR"):
            read_draft(text)
    with pytest.raises(UsageError, match="draft_accept is 'often'; expected one of lossless, typical, top_k"):
        read_draft("chimera:x", accept="often")
