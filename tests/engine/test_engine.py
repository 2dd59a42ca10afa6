"""The engine's invariants: whatever was computed in steps, in batches or beside others equals a fresh run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat import model
from jaxchat.engine import generation as generation_module
from jaxchat.engine import session as engine_module
from jaxchat.engine import steps as executables_module
from jaxchat.engine.generation import generate
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import ContextOverflowError, Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.layers.cache import KVCache, empty_cache
from tests.support.steps import step_of

MAX_LENGTH = 64
SLOTS = 6  # reserved in nearly every session here, so that all plans share executables

LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.0, 2.5, 4.0],
    },
    "original_max_position_embeddings": 24,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}
VARIANTS = {
    "llama": ("llama", {}),
    "gemma3": ("gemma3_text", {}),  # local and global layers
    "gpt2": ("gpt2", {}),  # learned positions
    "longrope": ("phi3", LONGROPE),  # rotations change at 24 tokens
    "dynamic": ("llama", DYNAMIC),  # rotations change with every token after 24
}
PLANS = ("all", "0,1,1,2", "2,0", "0:2,0:", "[0, [1, 0.0, 0.7], [2, 1.0, 0.0], 1]", "[[0, 0, 0], 2, 1]")
pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPT = [1, 40, 7, 22, 63, 9, 30, 5]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """One prompt bucket and a small first cache: few executables, and caches that outgrow it."""
    monkeypatch.setattr(engine_module, "MIN_CAPACITY", 32)
    monkeypatch.setattr(engine_module, "PREFILL_BUCKETS", (16,))


@pytest.fixture
def make_engine(tiny_model):
    def make(variant="llama", *, max_length=MAX_LENGTH, **options):
        model_type, overrides = VARIANTS[variant]
        return Engine(*tiny_model(model_type, **{**overrides, **options}), max_length=max_length)

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


def new_session(engine, *prompts, plan="all"):
    """A session of as many sequences as prompts."""
    plan = LayerPlan.parse(plan, engine.config.num_layers)
    session = engine.session(plan, batch=max(1, len(prompts)), max_slots=SLOTS)
    for row, ids in enumerate(prompts):
        session.set_ids(ids, row)
    return session


def generated(session, row=0, **options):
    """The ids that `generate` yields for one sequence."""
    return [token.id for token in generate(session, **options) if token.row == row]


def fresh_logits(engine, ids, plan="all"):
    return np.asarray(new_session(engine, ids, plan=plan).prefill()[0])


def assert_same_logits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.isfinite(expected).all()
    assert np.abs(actual - expected).max() <= 1e-5 * (expected.max() - expected.min())


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 67, count).tolist()


def executables():
    return executables_module.prefill._cache_size(), executables_module.decode._cache_size()


# --- incremental = one-shot

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20), st.integers(0, 9)),
        st.tuples(st.just("replace"), st.integers(0, 60), st.integers(1, 12)),
        st.tuples(st.just("generate"), st.integers(1, 14), st.integers(0, 1)),
        st.tuples(st.just("rollback"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("plan"), st.integers(0, len(PLANS) - 1), st.just(0)),
        st.tuples(st.just("prefill"), st.just(0), st.just(0)),
    ),
    min_size=2,
    max_size=10,
)


def apply_operation(session, plan, name, number, extra):
    """Changes the session the way a conversation does; returns the plan it now runs."""
    ids = list(session.ids[0])
    room = session.engine.max_length - len(ids)
    if name == "append":
        session.set_ids(ids + random_ids(min(number, room), seed=extra))
    elif name == "replace":
        keep = min(number, len(ids))
        session.set_ids((ids[:keep] + random_ids(extra, seed=number))[: session.engine.max_length])
    elif name == "generate" and ids and room:
        sampling = SamplingParams.make(1, temperature=float(extra))
        tokens = generated(session, max_new_tokens=min(number, room), params=sampling)
        assert session.ids[0] == ids + tokens
    elif name == "rollback":
        session.rollback(min(number, len(ids)))
    elif name == "plan":
        session.set_plan(LayerPlan.parse(PLANS[number], session.engine.config.num_layers))
        return PLANS[number]
    elif name == "prefill" and ids:
        session.prefill()
    return plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_history_of_a_session_gives_the_logits_and_continuation_of_a_fresh_one(make_engine, variant):
    engine = make_engine(variant)

    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(OPERATIONS)
    def check(operations):
        session, plan = new_session(engine, PROMPT), "all"
        for operation in operations:
            plan = apply_operation(session, plan, *operation)
        if not session.ids[0]:
            session.set_ids(PROMPT)
        ids = list(session.ids[0])
        fresh = new_session(engine, ids, plan=plan)
        assert_same_logits(session.prefill()[0], fresh.prefill()[0])
        assert generated(session, max_new_tokens=4) == generated(fresh, max_new_tokens=4)

    check()


@pytest.mark.parametrize("variant", ["llama", "longrope"])
def test_a_generation_across_cache_growth_and_a_change_of_rotation_equals_one_prefill_a_token(
    make_engine, variant
):
    engine = make_engine(variant)
    session = new_session(engine, PROMPT)
    tokens, ids = generated(session, max_new_tokens=30), list(PROMPT)  # 8 to 38 tokens: past 24 and past 32
    for token in tokens:
        assert token == fresh_logits(engine, ids).argmax()
        ids.append(token)
    assert session._cache.k.shape[3] == 64


def test_the_next_turn_of_a_dynamic_rope_chat_recomputes_keys_of_another_rotation(make_engine):
    session = new_session(make_engine("dynamic"), random_ids(20))
    generated(session, max_new_tokens=20)
    session.set_ids(session.ids[0] + [3, 4])
    assert_same_logits(session.prefill()[0], fresh_logits(session.engine, session.ids[0]))


@pytest.mark.parametrize("plan", ["all", "0:2,0:"])
def test_prompts_at_the_edges_of_the_chunk_buckets_equal_one_forward_pass(make_engine, monkeypatch, plan):
    monkeypatch.setattr(engine_module, "MIN_CAPACITY", 300)
    monkeypatch.setattr(engine_module, "PREFILL_BUCKETS", (16, 64, 256, 1024))
    engine, ids = make_engine("gemma3", max_length=300), random_ids(300)
    one_shot = forward_logits(engine, ids, LayerPlan.parse(plan, 3))
    for n in (1, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 256, 257, 300):
        assert_same_logits(fresh_logits(engine, ids[:n], plan), one_shot[n - 1])


@jax.jit(static_argnums=(0,))
def _forward(config, params, plan, tokens):
    count = tokens.shape[1]
    cache = empty_cache(config, slots=SLOTS, batch=1, capacity=count, dtype=jnp.float32)
    counts = jnp.full(1, count, jnp.int32)
    step = step_of(config, params, plan, tokens, jnp.zeros(1, jnp.int32), counts, counts)
    return model.logits(step, model.forward(step, cache)[0][0])


def forward_logits(engine, ids, plan):
    """float32 [len(ids), V] of one call of the model, without the engine."""
    tokens = np.asarray([ids], np.int32)
    return np.asarray(_forward(engine.config, engine.params, plan.arrays(SLOTS), tokens))


# --- rollback


def test_rollback_sets_a_length_and_copies_nothing(engine):
    session = new_session(engine, PROMPT)
    tokens = generated(session, max_new_tokens=8)
    before = [c.unsafe_buffer_pointer() for c in session._cache]
    session.rollback(len(PROMPT) + 3)
    assert session.ids[0] == PROMPT + tokens[:3]
    assert session.cached[0] == len(PROMPT) + 3
    assert generated(session, max_new_tokens=5) == tokens[3:]
    assert [c.unsafe_buffer_pointer() for c in session._cache] == before  # steps update in place as well


@pytest.mark.parametrize(
    ("part", "poison"),
    [
        ("k", np.nan),
        ("v", 1e30),
    ],
)
def test_stale_rows_are_never_read(engine, part, poison):
    session = new_session(engine, PROMPT)
    tokens = generated(session, max_new_tokens=8)
    session.rollback(len(PROMPT) + 2)
    stale = getattr(session._cache, part).at[:, :, :, session.cached[0] :].set(poison)
    session._cache = session._cache._replace(**{part: stale})
    assert generated(session, max_new_tokens=6) == tokens[2:]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_generation_left_midway_resumes_identically(engine, temperature):
    options = {"params": SamplingParams.make(1, temperature=temperature), "seeds": [11]}
    whole = generated(new_session(engine, PROMPT), max_new_tokens=9, **options)
    session = new_session(engine, PROMPT)
    steps = iter(generate(session, max_new_tokens=9, **options))
    first = [next(steps).id for _ in range(4)]
    steps.close()
    assert session.ids[0] == PROMPT + first
    assert first + generated(session, max_new_tokens=5, **options) == whole


def test_a_sequence_may_be_rolled_back_while_it_is_generated(engine):
    whole = generated(new_session(engine, PROMPT), max_new_tokens=6)
    session = new_session(engine, PROMPT)
    steps = iter(generate(session))
    assert [next(steps).id for _ in range(4)] == whole[:4]
    session.rollback(len(PROMPT) + 3)  # the token whose keys are not cached yet
    assert [next(steps).id for _ in range(2)] == whole[3:5]
    session.rollback(len(PROMPT) + 1)
    assert [next(steps).id for _ in range(5)] == whole[1:6]


def test_a_session_whose_cache_was_lost_in_an_interrupted_step_recomputes_it(engine):
    expected = generated(new_session(engine, PROMPT), max_new_tokens=6)
    session = new_session(engine, PROMPT)
    generated(session, max_new_tokens=3)
    for buffer in session._cache:  # what an exception between a step and its assignment leaves behind
        buffer.delete()
    assert expected[:3] + generated(session, max_new_tokens=3) == expected


def test_rollback_beyond_the_sequence_is_refused(engine):
    with pytest.raises(UsageError, match="cannot roll back to 9 tokens; the sequence has 8"):
        new_session(engine, PROMPT).rollback(9)


# --- batch = single

RAGGED = ([1, 40, 7], random_ids(18, seed=3), random_ids(9, seed=4))  # three sequences run as four rows


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
@pytest.mark.parametrize("temperature", [(0.0, 0.0, 0.0), (0.9, 0.0, 1.7)])
def test_each_sequence_of_a_ragged_batch_equals_its_single_run(make_engine, variant, temperature):
    engine, seeds = make_engine(variant), (5, 6, 7)
    singles = [
        generated(
            new_session(engine, ids),
            max_new_tokens=10,
            params=SamplingParams.make(1, temperature=t, top_p=0.9),
            seeds=[seed],
        )
        for ids, t, seed in zip(RAGGED, temperature, seeds, strict=True)
    ]
    stop = singles[1][4]  # sequence 1 ends there at the latest, the others where they happen to draw it
    session = new_session(engine, *RAGGED)
    generation = generate(
        session,
        max_new_tokens=10,
        params=SamplingParams.make(3, temperature=temperature, top_p=0.9),
        seeds=seeds,
        stop_ids=[stop],
    )
    tokens = list(generation)
    for row, single in enumerate(singles):
        expected = single[: single.index(stop) + 1] if stop in single else single
        assert [token.id for token in tokens if token.row == row] == expected
        assert session.ids[row] == RAGGED[row] + expected
        assert generation.finish_reasons[row] == ("stop" if stop in single else "length")
    # A sequence that ended early goes on as if it had been alone.
    assert_same_logits(session.prefill()[1], fresh_logits(engine, session.ids[1]))


def test_a_truncated_neighbour_does_not_touch_a_sequence(make_engine):
    # With dynamic RoPE, recomputing a sequence in the middle of its generation would rotate its keys anew.
    engine = make_engine("dynamic", max_length=32)
    prompts = random_ids(28, seed=5), random_ids(20, seed=6)
    singles = [
        generated(new_session(engine, ids), max_new_tokens=10, overflow="truncate_oldest") for ids in prompts
    ]
    session = new_session(engine, *prompts)
    tokens = list(generate(session, max_new_tokens=10, overflow="truncate_oldest"))
    assert [[token.id for token in tokens if token.row == row] for row in (0, 1)] == singles


def test_stop_ends_a_sequence_that_comes_later_in_the_same_step(engine):
    session = new_session(engine, PROMPT, [1, 2])
    generation = generate(session, max_new_tokens=5)
    for token in generation:
        if token.row == 0 and len(session.ids[0]) == len(PROMPT) + 3:
            generation.stop(1)
    assert len(session.ids[1]) == 2 + 2
    assert generation.finish_reasons == ["length", "stop"]


def test_a_sequence_that_ended_cannot_fail_its_neighbour(engine):
    # Rows without work run on token 0: broken values there are nobody's.
    broken = dict(engine.params)
    broken["embed.weight"] = broken["embed.weight"].at[0].set(np.nan)
    expected = generated(new_session(engine, PROMPT), max_new_tokens=6)
    assert 0 not in expected
    session = new_session(Engine(engine.config, broken, max_length=MAX_LENGTH), [1, 2], PROMPT)
    generation = generate(session, max_new_tokens=6)
    tokens = []
    for token in generation:
        generation.stop(0)
        tokens += [token.id] if token.row == 1 else []
    assert tokens == expected


# --- steps that begin before their tokens are read


@pytest.fixture
def begun(monkeypatch):
    """Which sequences every decode step computes."""
    steps, decode = [], executables_module.decode

    def spy(step, cache):
        steps.append(np.flatnonzero(step.new).tolist())
        return decode(step, cache)

    monkeypatch.setattr(executables_module, "decode", spy)
    return steps


def test_the_next_step_has_begun_when_a_token_comes(engine, begun):
    session = new_session(engine, PROMPT)
    after = [len(begun) for _ in generate(session, max_new_tokens=6)]
    # Not with the first token, which is not to wait for the step's compilation, and no step for nothing.
    assert after == [0, 2, 3, 4, 5, 5]


def test_no_step_begins_beyond_the_context(make_engine, begun):
    session = new_session(make_engine(max_length=12), PROMPT, PROMPT[:3])
    generation = generate(session)
    assert len(list(generation)) == 4 + 9
    assert generation.finish_reasons == ["context", "context"]
    assert begun == [[0, 1]] * 3 + [[1]] * 5


INTERFERENCES = {
    "rollback": lambda session, generation: session.rollback(len(session.ids[1]) - 3, 1),
    "the last token replaced": lambda session, generation: session.set_ids([*session.ids[1][:-1], 3], 1),
    "a token added": lambda session, generation: session.set_ids([*session.ids[1], 3], 1),
    "another prompt": lambda session, generation: session.set_ids([9, 8, 7], 1),
    "stop": lambda session, generation: generation.stop(1),
    "allow": lambda session, generation: generation.allow(1, np.arange(67) % 7 == 3),
    # At first another sequence, so that a step begins without the one whose last token is not to be its last.
    "uncount": lambda session, generation: generation.uncount(1 if generation.finish_reasons[1] else 0),
    "plan": lambda session, generation: session.set_plan(LayerPlan.parse("0,2,1", 3)),
    "shorter plan": lambda session, generation: session.set_plan(LayerPlan.parse("0,1", 3)),
    "prefill": lambda session, generation: session.prefill(),
    "score": lambda session, generation: session.score_rows([1]),
    "restore": lambda session, generation: session.restore(session.ids[1], session.cached_rows(1), 1),
    "cache lost": lambda session, generation: session.drop_cache(),
    "nothing": lambda session, generation: None,
}


@pytest.mark.parametrize("interfere", INTERFERENCES.values(), ids=INTERFERENCES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_the_consumer_changes_between_two_tokens_counts(engine, interfere, temperature, monkeypatch):
    def run():
        session = new_session(engine, PROMPT, PROMPT[:3], [5])
        params = SamplingParams.make(3, temperature=temperature, frequency_penalty=0.5)
        generation = generate(session, max_new_tokens=9, params=params, seeds=[1, 2, 3])
        tokens = []
        for token in generation:
            tokens.append((token.row, token.id, round(token.logprob, 4)))
            # After the second sequence's fourth token, and once more after its last.
            if token.row == 1 and sum(row == 1 for row, *_ in tokens) in (4, 9):
                interfere(session, generation)
        return tokens, session.ids, generation.finish_reasons

    ahead = run()
    monkeypatch.setattr(generation_module.Generation, "_run_ahead", lambda *_: None)
    assert ahead == run()


# --- two in one process, and plans


def test_interleaved_generations_of_two_plans_over_one_set_of_parameters_do_not_meet(engine):
    plans = ("all", "0,1,1,2")
    expected = [generated(new_session(engine, PROMPT, plan=plan), max_new_tokens=8) for plan in plans]
    assert expected[0] != expected[1]
    other = Engine(engine.config, engine.params, max_length=MAX_LENGTH)
    sessions = [new_session(e, PROMPT, plan=plan) for e, plan in zip((engine, other), plans, strict=True)]
    pairs = zip(*(generate(session, max_new_tokens=8) for session in sessions), strict=True)
    assert [[token.id for token in tokens] for tokens in zip(*pairs, strict=True)] == expected


def test_a_plan_changed_between_two_requests_equals_a_fresh_session(engine):
    session = new_session(engine, PROMPT)
    generated(session, max_new_tokens=5)
    for plan in PLANS:
        session.set_plan(LayerPlan.parse(plan, 3))
        session.set_ids(PROMPT)
        assert_same_logits(session.prefill()[0], fresh_logits(engine, PROMPT, plan))


def test_a_plan_with_more_slots_than_reserved_gets_a_larger_cache(engine):
    session = engine.session()
    session.set_ids(PROMPT)
    session.prefill()
    assert session._cache.k.shape[0] == 3
    plan = "0,1,1,1,2,2"
    session.set_plan(LayerPlan.parse(plan, 3))
    assert_same_logits(session.prefill()[0], fresh_logits(engine, PROMPT, plan))
    assert session._cache.k.shape[0] == 6


def test_reserved_slots_let_a_longer_plan_run_without_a_new_cache_or_executable(engine):
    session = new_session(engine, PROMPT)
    generated(session, max_new_tokens=2)
    reserved, compiled = session.cache_bytes, executables()
    session.set_plan(LayerPlan.parse("0,1,1,1,2,2", 3))
    generated(session, max_new_tokens=2)
    assert (session.cache_bytes, executables()) == (reserved, compiled)


def test_a_plan_whose_every_slot_is_the_identity_runs(engine):
    logits = fresh_logits(engine, PROMPT, "[[0, 0, 0], [1, 0, 0]]")
    assert_same_logits(logits, forward_logits(engine, PROMPT, LayerPlan.parse("[[2, 0, 0]]", 3))[-1])


def test_a_plan_over_another_number_of_layers_is_refused(engine):
    with pytest.raises(UsageError, match="the plan is over 4 layers, the model has 3"):
        engine.session(LayerPlan.identity(4))


# --- a plan changed in mid-conversation


@pytest.fixture
def computed(monkeypatch):
    """How many tokens of each sequence each call of the prefill computes."""
    calls, prefill = [], executables_module.prefill

    def spy(step, cache):
        calls.append(list(map(int, step.new)))
        return prefill(step, cache)

    monkeypatch.setattr(executables_module, "prefill", spy)
    return calls


def test_another_plan_runs_over_the_ids_that_were_there(engine, computed):
    session = new_session(engine, PROMPT, plan="0,1,1,2")
    generated(session, max_new_tokens=6)
    session.set_plan(LayerPlan.parse("0,1,1,0,1", 3))
    session.set_ids(session.ids[0] + [3, 4])
    computed.clear()
    logits = session.prefill()[0]
    assert computed == [[16]]
    assert_same_logits(logits, fresh_logits(engine, session.ids[0], "0,1,1,0,1"))


@pytest.mark.parametrize("plan", ["0,1", "0", "[0, [2, 0, 0], 1, 1]"])
def test_a_plan_that_the_old_one_begins_with_computes_nothing_anew(engine, computed, plan):
    session = new_session(engine, PROMPT, plan="0,1,1,2")
    generated(session, max_new_tokens=6)
    session.set_plan(LayerPlan.parse(plan, 3))
    computed.clear()
    assert_same_logits(session.prefill()[0], fresh_logits(engine, session.ids[0], plan))
    assert computed[0] == [1]  # the last token, for its logits


def test_going_back_to_a_longer_plan_computes_only_what_came_since(engine, computed):
    session = new_session(engine, PROMPT, plan="0,1,1,2")
    session.prefill()
    session.set_plan(LayerPlan.parse("0,1", 3))
    generated(session, max_new_tokens=4)  # 3 of them are cached
    session.set_plan(LayerPlan.parse("0,1,1,2", 3))
    computed.clear()
    assert_same_logits(session.prefill()[0], fresh_logits(engine, session.ids[0], "0,1,1,2"))
    assert computed[0] == [4]


def test_a_longer_plan_gets_a_larger_cache(make_engine, computed):
    engine = make_engine()
    session = engine.session(LayerPlan.parse("0,1", 3))
    session.set_ids(PROMPT)
    session.prefill()
    session.set_plan(LayerPlan.parse("0,1,1,2", 3))
    computed.clear()
    logits = session.prefill()[0]
    assert computed == [[8]]
    assert session._cache.slots == 4
    assert_same_logits(logits, fresh_logits(engine, PROMPT, "0,1,1,2"))


SCALES = st.sampled_from([1.0, 1.0, 0.0, -0.7])
RANDOM_PLANS = st.lists(st.builds(Slot, st.integers(0, 2), SCALES, SCALES), min_size=1, max_size=SLOTS)
CHANGES = st.lists(  # slots to keep, slots to add, whether to generate, a length to roll back to
    st.tuples(st.integers(0, SLOTS), RANDOM_PLANS, st.booleans(), st.integers(0, 22)), min_size=1, max_size=5
)


def test_any_changes_of_plan_and_rollbacks_of_a_ragged_batch_equal_a_fresh_run(engine):
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(RANDOM_PLANS, CHANGES)
    def check(slots, changes):
        session = new_session(engine, *RAGGED)
        session.set_plan(LayerPlan(tuple(slots), 3))
        session.prefill()
        for keep, tail, computes, length in changes:
            slots = (slots[:keep] + tail)[:SLOTS]
            session.set_plan(LayerPlan(tuple(slots), 3))
            if computes:
                list(generate(session, max_new_tokens=2))
            session.rollback(max(1, min(length, len(session.ids[1]))), 1)
            session.set_ids([*session.ids[2][: length + 1], 5, length], 2)
        fresh = new_session(engine, *session.ids)
        fresh.set_plan(LayerPlan(tuple(slots), 3))
        for actual, expected in zip(session.prefill()[:3], fresh.prefill()[:3], strict=True):
            assert_same_logits(actual, expected)
        ids = [[token[:2] for token in generate(one, max_new_tokens=3)] for one in (session, fresh)]
        assert ids[0] == ids[1]

    check()


# --- sessions that are stored


def assert_continues_alike(session, other):
    params = SamplingParams.make(1, temperature=0.8)
    for _ in range(2):
        for one in (session, other):
            one.set_ids([*one.ids[0], 3, 4])
        tokens = [list(generate(one, max_new_tokens=5, params=params, seeds=[7])) for one in (session, other)]
        assert tokens[0] == tokens[1]  # log-probabilities included: not one bit differs


@pytest.mark.parametrize("variant", ["llama", "longrope", "dynamic", "gpt2"])
@pytest.mark.parametrize("change", ["nothing", "plan", "rollback"])
def test_a_restored_session_goes_on_as_if_it_had_never_stopped(make_engine, variant, change):
    engine = make_engine(variant)
    session = new_session(engine, random_ids(20), plan="0,1,1,2")
    generated(session, max_new_tokens=9)
    plan = "0,1,2,2,1" if change == "plan" else "0,1,1,2"  # stored before its slots are recomputed
    session.set_plan(LayerPlan.parse(plan, 3))
    if change == "rollback":
        session.rollback(24)
    other = new_session(engine, plan=plan)
    other.restore(session.ids[0], session.cached_rows())
    assert (other.ids, other.cached) == (session.ids, session.cached)
    assert_continues_alike(session, other)


def test_only_the_rows_and_slots_in_use_are_stored(engine):
    session = new_session(engine, [1], PROMPT, plan="0,1,1,2")
    session.prefill()
    session.rollback(5, 1)
    rows = session.cached_rows(1)
    assert rows.k.shape == rows.v.shape == (4, 2, 5, 6)
    assert rows.k.dtype == np.float32
    assert new_session(engine).cached_rows().k.shape == (3, 2, 0, 6)


def test_a_restored_sequence_leaves_its_neighbours_alone(engine):
    source = new_session(engine, PROMPT)
    expected = generated(source, max_new_tokens=8)
    session = new_session(engine, [1, 40, 7], [9, 9])
    session.prefill()
    neighbour = generated(new_session(engine, [1, 40, 7]), max_new_tokens=4)
    source.rollback(len(PROMPT) + 4)
    session.restore(source.ids[0], source.cached_rows(), 1)
    tokens = list(generate(session, max_new_tokens=4))
    assert [token.id for token in tokens if token.row == 1] == expected[4:]
    assert [token.id for token in tokens if token.row == 0] == neighbour


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows._replace(k=rows.k[:2]),
            r"stored keys have the shape \[2, 2, 8, 6\], expected \[3, 2",
        ),
        (lambda rows: rows._replace(v=rows.v[..., :5]), r"stored values have the shape \[3, 2, 8, 5\]"),
        (
            lambda rows: rows._replace(v=rows.v.astype(np.float16)),
            "stored values are float16, the cache here is",
        ),
    ],
)
def test_stored_rows_that_do_not_fit_are_refused(engine, change, message):
    session = new_session(engine, PROMPT)
    session.prefill()
    rows, other = session.cached_rows(), new_session(engine, [5])
    with pytest.raises(UsageError, match=message):
        other.restore(PROMPT, change(rows))
    with pytest.raises(UsageError, match="stored keys are of 8 tokens, the conversation has 7"):
        other.restore(PROMPT[:7], rows)
    with pytest.raises(UsageError, match="token id 67 is not in the vocabulary"):
        other.restore([*PROMPT, 67], rows)
    assert other.ids == [[5]]


# --- seeds and executables


def test_a_seed_reproduces_a_run_and_another_seed_does_not(engine):
    params = SamplingParams.make(1, temperature=2.0)
    first, again, other = (
        generated(new_session(engine, PROMPT), max_new_tokens=12, params=params, seeds=[seed])
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_rolled_back_sampled_generation_repeats_itself(engine):
    options = {"params": SamplingParams.make(1, temperature=2.0, top_k=30), "seeds": [9]}
    session = new_session(engine, PROMPT)
    tokens = generated(session, max_new_tokens=10, **options)
    session.rollback(len(PROMPT) + 4)
    assert generated(session, max_new_tokens=6, **options) == tokens[4:]


def test_sampling_parameters_plans_lengths_and_seeds_compile_nothing(engine):
    generated(new_session(engine, PROMPT), max_new_tokens=2)
    before = executables(), executables_module.sample._cache_size()
    for i, plan in enumerate(PLANS):
        params = SamplingParams.make(
            1, temperature=i / 2, top_k=i, top_p=1 - i / 10, repetition_penalty=1 + i
        )
        session = new_session(engine, PROMPT[: i + 1], plan=plan)
        generated(session, max_new_tokens=3 + i, params=params, seeds=[i], stop_ids=[i])
    assert (executables(), executables_module.sample._cache_size()) == before


def test_a_chat_of_many_turns_compiles_one_step_and_one_prefill_per_bucket(make_engine, monkeypatch):
    monkeypatch.setattr(engine_module, "MIN_CAPACITY", 400)
    monkeypatch.setattr(engine_module, "PREFILL_BUCKETS", (16, 64, 256, 1024))
    session = new_session(make_engine(max_length=400))
    prefills, decodes = executables()
    for turn in range(40):
        session.set_ids(session.ids[0] + random_ids(1 + turn * 13 % 20, seed=turn))
        generated(session, max_new_tokens=1 + turn % 5)
        if turn % 8 == 7:
            session.rollback(len(session.ids[0]) // 2)
            session.set_plan(LayerPlan.parse(PLANS[turn % len(PLANS)], 3))
    assert len(session.ids[0]) > 100
    now = executables()
    assert now[0] - prefills <= 3  # chunks of 16, 64 and 256
    assert now[1] - decodes == 1


# --- how a generation ends


def test_a_stop_id_ends_a_sequence_and_is_kept_in_it(engine):
    tokens = generated(new_session(engine, PROMPT), max_new_tokens=8)
    stop = tokens[3]
    session = new_session(engine, PROMPT)
    generation = generate(session, max_new_tokens=8, stop_ids=[stop])
    expected = tokens[: tokens.index(stop) + 1]
    assert [token.id for token in generation] == expected
    assert session.ids[0] == PROMPT + expected
    assert generation.finish_reasons == ["stop"]


def test_max_new_tokens_ends_with_the_reason_length(engine):
    session = new_session(engine, PROMPT)
    generation = generate(session, max_new_tokens=1)
    assert len(list(generation)) == 1
    assert generation.finish_reasons == ["length"]


@pytest.mark.parametrize("max_new_tokens", [0, -3])
def test_fewer_than_one_new_token_is_refused(engine, max_new_tokens):
    with pytest.raises(
        UsageError, match=f"max_new_tokens is {max_new_tokens}; expected a whole number, 1 or"
    ):
        generate(new_session(engine, PROMPT), max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_generation_that_fills_the_context_ends_with_the_reason_context(make_engine, variant):
    session = new_session(make_engine(variant, max_length=32), random_ids(25))
    generation = generate(session)
    assert len(list(generation)) == 7
    assert generation.finish_reasons == ["context"]
    assert len(session.ids[0]) == 32


def test_a_prompt_longer_than_the_context_is_an_error_that_says_what_to_do(make_engine):
    session = new_session(make_engine(max_length=32), random_ids(33))
    with pytest.raises(ContextOverflowError, match=r"33 tokens but the context holds 32; .*truncate_oldest"):
        list(generate(session))
    assert len(session.score_rows([0])[0].logprobs) == 32  # the last token is not read
    session.set_ids(random_ids(34))
    with pytest.raises(ContextOverflowError, match="34 tokens but the context holds 32"):
        session.score_rows([0])


@pytest.mark.parametrize("first", [1, 8])  # 1 is this model's BOS
def test_truncate_oldest_keeps_the_first_token_only_if_it_is_the_bos(make_engine, first):
    engine = make_engine(max_length=32)
    ids = [first, *random_ids(39)]
    kept = [1, *ids[-15:]] if first == 1 else ids[-16:]
    session = new_session(engine, ids)
    tokens = generated(session, max_new_tokens=5, overflow="truncate_oldest")
    assert session.ids[0] == kept + tokens
    assert tokens == generated(new_session(engine, kept), max_new_tokens=5)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "longrope"])
def test_a_generation_beyond_the_context_equals_fresh_runs_on_the_truncated_ids(make_engine, variant):
    engine = make_engine(variant, max_length=32)
    ids = [1, *random_ids(27)]
    session = new_session(engine, ids)
    generation = generate(session, max_new_tokens=24, overflow="truncate_oldest")  # truncates twice
    tokens = [token.id for token in generation]
    for token in tokens:
        if len(ids) >= 32:
            ids = [1, *ids[-15:]]
        assert token == fresh_logits(engine, ids).argmax()
        ids.append(token)
    assert session.ids[0] == ids
    assert generation.finish_reasons == ["length"]


def test_a_context_longer_than_the_learned_positions_is_refused(tiny_model):
    config, params = tiny_model("gpt2")
    with pytest.raises(UsageError, match=r"^max_length is 97, but this model has 96 learned positions"):
        Engine(config, params, max_length=97)
    assert Engine(config, params).max_length == 96


def test_a_context_shorter_than_one_token_is_refused(tiny_model):
    with pytest.raises(UsageError, match=r"^max_length is 0; expected a whole number, 1 or more"):
        Engine(*tiny_model("llama"), max_length=0)


# --- penalties, scores and bad input


def test_penalties_count_prompt_and_output_through_a_whole_generation(engine):
    repetition, presence, frequency = 1.4, 0.3, 0.2
    params = SamplingParams.make(
        1,
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    session, ids, counts = new_session(engine, PROMPT), list(PROMPT), np.zeros(67)
    for token in generate(session, max_new_tokens=20, params=params):
        logits = fresh_logits(engine, ids).astype(np.float64)
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        assert token.id == (logits - presence * (counts > 0) - frequency * counts).argmax()
        ids.append(token.id)
        counts[token.id] += 1
    assert len(ids) == len(PROMPT) + 20


@pytest.mark.parametrize("plan", ["all", "2,0"])
def test_scores_are_the_log_softmax_of_the_logits_of_every_prefix(engine, plan):
    ids = random_ids(21)
    session = new_session(engine, ids, plan=plan)
    ((scores, _),) = session.score_rows([0])
    assert scores.dtype == np.float32
    assert scores.shape == (20,)
    for i, score in enumerate(scores):
        logits = fresh_logits(engine, ids[: i + 1], plan).astype(np.float64)
        expected = logits[ids[i + 1]] - np.log(np.exp(logits).sum())
        assert score == pytest.approx(expected, abs=1e-4)
    assert_same_logits(session.prefill()[0], fresh_logits(engine, ids, plan))


def test_a_text_of_one_token_has_no_scores(engine):
    assert new_session(engine, [5]).score_rows([0])[0].logprobs.shape == (0,)


def test_a_generated_token_carries_the_models_own_log_probability(engine):
    session = new_session(engine, PROMPT)
    params = SamplingParams.make(1, temperature=3.0, top_k=20, repetition_penalty=1.5)
    logprobs = [token.logprob for token in generate(session, max_new_tokens=6, params=params)]
    assert logprobs == pytest.approx(session.score_rows([0])[0].logprobs[-6:].tolist(), abs=1e-4)


def test_logits_that_are_not_finite_are_reported_and_leave_nothing_behind(engine):
    broken = {**engine.params, "embed.weight": engine.params["embed.weight"].at[66].set(np.nan)}
    session = new_session(Engine(engine.config, broken, max_length=MAX_LENGTH), [*PROMPT, 66, 3])
    with pytest.raises(JaxchatError, match="logits are not finite"):
        list(generate(session, max_new_tokens=3))
    session.rollback(len(PROMPT))
    expected = generated(new_session(engine, PROMPT), max_new_tokens=4)
    assert generated(session, max_new_tokens=4) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_all_equal_are_reported(engine, temperature):
    broken = {**engine.params, "norm.weight": jnp.full_like(engine.params["norm.weight"], 0.0)}
    session = new_session(Engine(engine.config, broken, max_length=MAX_LENGTH), PROMPT)
    params = SamplingParams.make(1, temperature=temperature)
    with pytest.raises(JaxchatError, match="logits are all equal"):
        list(generate(session, max_new_tokens=3, params=params))


@pytest.mark.parametrize("token", [-1, 67])
def test_token_ids_outside_the_vocabulary_are_refused(engine, token):
    with pytest.raises(UsageError, match=f"token id {token} is not in the vocabulary: expected 0 to 66"):
        new_session(engine, [1, token])


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(UsageError, match="an empty prompt: give at least one token"):
        generate(new_session(engine, []))
    with pytest.raises(UsageError, match="an empty prompt: give at least one token"):
        generate(new_session(engine, [1], []))
    with pytest.raises(UsageError, match="nothing to prefill"):
        new_session(engine).prefill()
    with pytest.raises(UsageError, match="nothing to prefill"):
        new_session(engine, [1], []).prefill([0, 1])


def test_seeds_and_sampling_parameters_must_match_the_batch(engine):
    session = new_session(engine, [1], [2])
    with pytest.raises(UsageError, match=r"seeds: got values of shape \(1,\), expected one for each of 2"):
        generate(session, seeds=[3])
    with pytest.raises(UsageError, match=r"temperature: got values of shape \(1,\)"):
        generate(session, params=SamplingParams.make(1))
    with pytest.raises(UsageError, match="seed is -1; expected a whole number"):
        generate(session, seeds=[0, -1])


# --- narrow weights


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "uint16"), ("float16", "float16")])
def test_narrow_weights_give_what_the_same_values_give_in_float32(tiny_model, dtype, stored):
    narrow = tiny_model("llama", dtype=dtype)
    wide = tiny_model("llama", dtype=dtype, load_dtype="float32")
    assert narrow[1]["layers.q.weight"].dtype == (stored if jax.default_backend() == "cpu" else dtype)
    sessions = [
        new_session(Engine(*loaded, max_length=MAX_LENGTH, dtype="float32"), PROMPT)
        for loaded in (narrow, wide)
    ]
    assert_same_logits(*(session.prefill()[0] for session in sessions))
    assert len({tuple(generated(session, max_new_tokens=8)) for session in sessions}) == 1


def test_activations_and_cache_take_the_dtype_asked_for(tiny_model):
    session = new_session(Engine(*tiny_model("llama"), max_length=MAX_LENGTH, dtype="bfloat16"), PROMPT)
    logits = np.asarray(session.prefill()[0])
    assert isinstance(session._cache, KVCache)
    assert session.cached_rows().k.dtype == jnp.dtype("bfloat16")
    assert {c.dtype.itemsize for c in session._cache} == {2}
    exact = fresh_logits(Engine(*tiny_model("llama"), max_length=MAX_LENGTH), PROMPT)
    assert np.abs(logits - exact).max() < 0.03 * (exact.max() - exact.min())
