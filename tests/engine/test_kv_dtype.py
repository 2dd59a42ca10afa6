"""The KV cache in bfloat16 and int8: what it costs in memory, in exactness, and in nothing else."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxchat
from jaxchat import generate as generate_command
from jaxchat.analysis import cost, show
from jaxchat.engine import session as session_module
from jaxchat.engine import steps
from jaxchat.engine.generation import generate
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import Engine
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.pallas import native
from tests.support.tiny_chat import write_tiny_chat

KV_DTYPES = ("float32", "bfloat16", "int8")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}  # of the range of the logits
PROMPT = [1, 40, 7, 22, 63, 9, 30, 5]

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "native kernels run")
KERNELS = ["reference", pytest.param("native", marks=needs_native)]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(session_module, "MIN_CAPACITY", 32)
    monkeypatch.setattr(session_module, "PREFILL_BUCKETS", (16,))


@pytest.fixture
def make_session(tiny_model):
    def make(kv_dtype, kernels="auto", model_type="llama", plan="all", **options):
        engine = Engine(*tiny_model(model_type), max_length=64, kv_dtype=kv_dtype, kernels=kernels)
        return engine.session(LayerPlan.parse(plan, 3), max_slots=6, **options)

    return make


def logits_of(session, ids):
    session.set_ids(ids)
    return np.asarray(session.prefill()[0])


def generated(session, count, **options):
    return [token.id for token in generate(session, max_new_tokens=count, **options)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_logits_stay_close_to_those_of_a_float32_cache(make_session, model_type, kv_dtype, kernels):
    exact = make_session("float32", "reference", model_type)
    session = make_session(kv_dtype, kernels, model_type)
    for ids in (PROMPT, [*PROMPT, 3], [*PROMPT, 3, 8, 2, 50]):  # the last two find rows in the cache
        expected, found = logits_of(exact, ids), logits_of(session, ids)
        assert np.abs(found - expected).max() < TOLERANCE[kv_dtype] * np.ptp(expected)
    if kv_dtype != "float32":
        assert (found != expected).any()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_steps_turns_rollbacks_and_growth_give_what_one_prefill_gives(make_session, kv_dtype):
    session = make_session(kv_dtype)
    session.set_ids(PROMPT)
    ids = PROMPT + generated(session, 30)  # beyond the first 32 rows
    session.rollback(20)
    session.set_ids([*ids[:20], 4, 4, *ids[20:]])
    steps = np.asarray(session.prefill()[0])
    fresh = logits_of(make_session(kv_dtype), session.ids[0])
    # A sum in another order may round a key to another code.
    assert np.abs(steps - fresh).max() <= TOLERANCE[kv_dtype] * np.ptp(fresh)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_a_changed_plan_and_a_restored_session_keep_the_rows_bit_for_bit(make_session, kv_dtype):
    session = make_session(kv_dtype, plan="0,1,1,2")
    session.set_ids(PROMPT)
    generated(session, 6)
    before = session.cached_rows()
    assert before.k.dtype == before.v.dtype == kv_dtype
    assert (before.k_scale is not None) == (kv_dtype == "int8")
    session.set_plan(LayerPlan.parse("0,1,1", 3))
    other = make_session(kv_dtype, plan="0,1,1")
    other.restore(session.ids[0], session.cached_rows())
    params = SamplingParams.make(1, temperature=0.8)
    tokens = [list(generate(one, max_new_tokens=6, params=params, seeds=[2])) for one in (session, other)]
    assert tokens[0] == tokens[1]
    after = session.cached_rows()
    for name in ("k", "v", "k_scale", "v_scale"):
        old, new = getattr(before, name), getattr(after, name)
        if old is not None:
            np.testing.assert_array_equal(new[:, :, :13], old[:3])


def test_stored_rows_of_another_dtype_are_refused(make_session):
    stored = {}
    for kv_dtype in KV_DTYPES:
        session = make_session(kv_dtype)
        logits_of(session, PROMPT)
        stored[kv_dtype] = session.cached_rows()
    with pytest.raises(
        UsageError, match=r"stored keys are int8, the cache here is bfloat16: .* kv_dtype='int8'"
    ):
        make_session("bfloat16").restore(PROMPT, stored["int8"])
    with pytest.raises(UsageError, match=r"scales of the keys .* int8 keys: expected float32 \[3, 2, 8\]"):
        make_session("int8").restore(PROMPT, stored["int8"]._replace(k_scale=None))
    scaled = stored["float32"]._replace(v_scale=stored["int8"].v_scale)
    with pytest.raises(UsageError, match=r"scales of the values .* float32 values: expected none"):
        make_session("float32").restore(PROMPT, scaled)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_a_step_copies_no_cache(make_session, monkeypatch, kv_dtype, kernels, step):
    monkeypatch.setattr(session_module, "MIN_CAPACITY", 8192)
    session = make_session(kv_dtype, kernels, batch=2)
    session.engine.max_length = 8192
    session._slots = 64
    session._plan_arrays = session.plan.arrays(64)
    session._reserve(1)
    rows = np.zeros(2, np.int32)
    tokens = np.zeros((2, 16), np.int32) if step == "prefill" else rows
    lowered = getattr(steps, step).lower(session.step(tokens, rows, rows, rows), session._cache)
    memory = lowered.compile().memory_analysis()
    parts = jax.tree.leaves(session._cache)
    assert memory.alias_size_in_bytes == session.cache_bytes == sum(part.nbytes for part in parts)
    assert memory.temp_size_in_bytes < min(part.nbytes for part in parts) / 4


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_cache_takes_the_bytes_that_show_tells(make_session, kv_dtype):
    session = make_session(kv_dtype)
    logits_of(session, PROMPT)
    row = cost.kv_row_bytes(session.engine.config, kv_dtype)
    assert session.cache_bytes == 6 * 32 * row  # slots, rows
    report = show.describe(session.engine.config, LayerPlan.identity(3), name="x", max_length=32)
    assert report.kv_bytes[kv_dtype] == 3 * 32 * row
    assert f"{kv_dtype}; grows" in show.render(dataclasses.replace(report, kv_dtype=kv_dtype))


def test_an_unknown_dtype_is_refused_before_anything_is_loaded(make_session, tmp_path):
    message = "kv_dtype is 'int4'; expected one of float32, bfloat16, int8"
    with pytest.raises(UsageError, match=message):
        make_session("int4")
    write_tiny_chat(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=message):
        jaxchat.load(tmp_path, kv_dtype="int4")


def test_the_command_line_takes_it(tmp_path, capsys):
    write_tiny_chat(tmp_path)
    asked = ["generate", "-m", str(tmp_path), "--kv_dtype", "int8"]
    assert generate_command.main([*asked, "-p", "hello", "--max_new_tokens", "4", "--json"]) == 0
    expected = jaxchat.load(tmp_path, kv_dtype="int8").chat("hello", max_new_tokens=4)
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected.token_ids
    assert generate_command.main([*asked, "--show"]) == 0
    assert "int8; grows as it fills" in capsys.readouterr().out
    command = [sys.executable, "-m", "jaxchat.generate", *asked[1:4], "int4", "-p", "hello"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "expected float32, bfloat16 or int8" in refused.stderr


def test_perplexity_of_stories260k_hardly_moves(shared_data):
    directory = shared_data / "models" / "stories260K-hf"
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
        "day, she saw a big, red ball. She wanted to play with it, but it was too high. Lily was sad and did "
        "not know what to do."
    )
    scores = {kv: jaxchat.load(directory, kv_dtype=kv).score(text)[0] for kv in KV_DTYPES}
    loss = {kv: -score.total / len(score.logprobs) for kv, score in scores.items()}
    for kv_dtype in ("bfloat16", "int8"):
        assert loss[kv_dtype] == pytest.approx(loss["float32"], rel=0.005)
        assert loss[kv_dtype] != loss["float32"]
