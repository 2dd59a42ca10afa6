"""A chat that was saved and loaded goes on as if it had never stopped; what cannot be loaded says why."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxchat
from jaxchat.chat import session_file
from jaxchat.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.runtime import Model
from tests.support.tiny_chat import TEMPLATE, write_tiny_chat

ROOT = Path(__file__).parents[2]
THINKING = TEMPLATE.replace("|>{% endif", "|><think>{% endif") + "{# #}{% set _ = '</think>' %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return jaxchat.load(directory)


def run(stream):
    """What a turn gave: drawn ids, log-probabilities to the last bit, and the text."""
    for _ in stream:
        pass
    return stream.result.token_ids, stream.result.logprobs, stream.result.text


def reloaded(model, chat, path):
    chat.save(path)
    return model.with_plan(chat.plan).load_session(path)


def assert_same(chat, other):
    """Both hold the same history, and their caches give the same logits to the last bit."""
    assert other.messages == chat.messages
    assert other.token_ids == chat.token_ids
    assert other.session.ids == chat.session.ids
    assert other.session.cached == chat.session.cached
    assert other.reversed_role == chat.reversed_role
    if chat.session.ids[0]:
        np.testing.assert_array_equal(other.session.prefill()[:1], chat.session.prefill()[:1])


SHORT = {"max_new_tokens": 6}
STEPS = {
    "send": lambda chat: run(chat.send("hello é", **SHORT)),
    "send with a prefix": lambda chat: run(chat.send("and?", prefix="Well, ", **SHORT)),
    "sample": lambda chat: run(chat.send("x", temperature=1.0, seed=5, **SHORT)),
    "continue": lambda chat: run(chat.continue_(" and so", **SHORT)),
    "retry": lambda chat: run(chat.retry(temperature=0.7, seed=3, **SHORT)),
    "undo": lambda chat: chat.undo(),
    "other system prompt": lambda chat: chat.set_system("Be brief."),
    "other role": lambda chat: chat.set_role(not chat.reversed_role),
    "restart": lambda chat: chat.restart(),
}


def attempt(step, chat):
    """The step's result, or that it is not possible here."""
    try:
        return STEPS[step](chat)
    except UsageError as error:
        return str(error)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.sampled_from(sorted(STEPS)))
def test_going_on_after_loading_equals_never_having_stopped(model, tmp_path, before, after):
    chat = model.chat_session("Be kind.")
    for step in before:
        attempt(step, chat)
    other = reloaded(model, chat, tmp_path / "a.session")
    assert_same(chat, other)
    assert attempt(after, other) == attempt(after, chat)
    assert_same(chat, other)


def test_nothing_is_computed_anew(model, tmp_path):
    chat = model.chat_session()
    run(chat.send("a rather long first message", **SHORT))
    other = reloaded(model, chat, tmp_path / "a.session")
    stream = other.send("b", **SHORT)
    run(stream)
    assert stream.result.timings.prefill_tokens < 10 < stream.result.prompt_tokens


def test_a_chat_that_has_not_begun_can_be_saved(model, tmp_path):
    chat = model.chat_session("Be kind.", opening="Hello!")
    assert_same(chat, reloaded(model, chat, tmp_path / "a.session"))


def test_a_reversed_chat_stays_reversed(model, tmp_path):
    chat = model.chat_session("Be kind.", reversed_role=True, opening="Hello!")
    run(chat.send("Hi, how can I help?", **SHORT))
    other = reloaded(model, chat, tmp_path / "a.session")
    assert other.reversed_role
    assert run(other.send("I see.", **SHORT)) == run(chat.send("I see.", **SHORT))


def test_reasoning_that_was_begun_goes_on(tmp_path):
    model = jaxchat.load(write_tiny_chat(tmp_path / "model", template=THINKING))
    chat = model.chat_session()
    run(chat.send("why?", prefix="Because", prefix_in="reasoning", **SHORT))
    other = reloaded(model, chat, tmp_path / "a.session")
    stream, others = chat.continue_("</think>So", **SHORT), other.continue_("</think>So", **SHORT)
    assert run(others) == run(stream)
    assert others.result.reasoning == stream.result.reasoning
    assert others.result.content.startswith("So")


# --- plans


def test_a_chat_keeps_its_plan(model, tmp_path):
    chat = model.with_plan("0:2,1:").chat_session()
    run(chat.send("hello", **SHORT))
    other = reloaded(model, chat, tmp_path / "a.session")
    assert other.plan == chat.plan
    assert run(other.send("more", **SHORT)) == run(chat.send("more", **SHORT))


def test_a_plan_changed_a_moment_ago_can_be_saved(model, tmp_path):
    chat = model.chat_session()
    run(chat.send("hello", **SHORT))
    chat.set_plan("0:2,0:2")  # nothing is recomputed yet: the first slots have more rows than the others
    other = reloaded(model, chat, tmp_path / "a.session")
    assert run(other.send("more", **SHORT)) == run(chat.send("more", **SHORT))


def test_another_plan_is_refused_by_name(model, tmp_path):
    model.with_plan("0:2,1:").chat_session().save(tmp_path / "a.session")
    with pytest.raises(
        UsageError, match=r"made under the layer plan 0,1,1,2, this is all: give plan='0,1,1,2'"
    ):
        model.load_session(tmp_path / "a.session")


# --- models


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"embed\.weight and \d+ more has other values"),
        ({"hidden_size": 32}, r"llama, 3 layers of width 32, float32\).*: hidden_size was 32 and is 24"),
        ({"num_hidden_layers": 2}, "num_layers was 2 and is 3"),
        ({"rope_theta": 5e5}, "ropes was"),
        ({"dtype": "bfloat16"}, r"embed\.weight and \d+ more was bfloat16 and is float32"),
        ({"template": TEMPLATE + " "}, "the chat template is another one"),
    ],
)
def test_another_model_is_refused_by_what_differs(model, tmp_path, options, message):
    jaxchat.load(write_tiny_chat(tmp_path / "other", **options)).chat_session().save(tmp_path / "a.session")
    with pytest.raises(UsageError, match=rf"made with another model \(.*{message}"):
        model.load_session(tmp_path / "a.session")


def test_the_same_model_quantized_is_another(model, directory, tmp_path):
    jaxchat.load(directory, quant="int8").chat_session().save(tmp_path / "a.session")
    with pytest.raises(UsageError, match=r"width 24, int8\).* was int8 and is float32"):
        model.load_session(tmp_path / "a.session")


def test_one_changed_matrix_of_one_layer_makes_another_model(model, directory, tmp_path):
    model.chat_session().save(tmp_path / "a.session")
    params = dict(model.engine.params)
    params["layers.down.weight"] = params["layers.down.weight"].at[1].multiply(1.01)
    other = Model(
        Engine(model.config, params), model.plan, tokenizer=model.tokenizer, template=model.template
    )
    with pytest.raises(UsageError, match=r": layers\.down\.weight has other values"):
        other.load_session(tmp_path / "a.session")


def test_another_tokenizer_is_refused(model, directory, tmp_path):
    model.chat_session().save(tmp_path / "a.session")
    other = write_tiny_chat(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="the tokenizer is another one"):
        jaxchat.load(other).load_session(tmp_path / "a.session")


def test_the_same_model_from_another_directory_is_the_same(model, tmp_path):
    chat = model.chat_session()
    run(chat.send("hello", **SHORT))
    chat.save(tmp_path / "a.session")
    again = jaxchat.load(write_tiny_chat(tmp_path / "copy")).load_session(tmp_path / "a.session")
    assert run(again.send("more", **SHORT)) == run(chat.send("more", **SHORT))


def test_a_bfloat16_cache_is_kept_as_it_is(model, tmp_path):
    narrow = Model(
        Engine(model.config, model.engine.params, dtype=jnp.bfloat16),
        model.plan,
        tokenizer=model.tokenizer,
        template=model.template,
    )
    chat = narrow.chat_session()
    run(chat.send("hello", **SHORT))
    assert_same(chat, reloaded(narrow, chat, tmp_path / "a.session"))
    assert SafetensorsFile(tmp_path / "a.session").view("k").dtype == jnp.bfloat16
    with pytest.raises(UsageError, match="the stored keys are bfloat16, the cache here is float32"):
        model.load_session(tmp_path / "a.session")


def test_a_context_that_is_too_long_here_is_refused(model, directory, tmp_path):
    chat = model.chat_session()
    run(chat.send("hello" * 8, **SHORT))
    chat.save(tmp_path / "a.session")
    with pytest.raises(UsageError, match=r"the context holds 40; raise max_length"):
        jaxchat.load(directory, max_length=40).load_session(tmp_path / "a.session")


# --- the file


def test_the_file_holds_the_rows_in_use_only(model, tmp_path):
    chat = model.chat_session()
    sizes = {}
    for text in ("a", "b" * 20):
        run(chat.send(text, max_new_tokens=2))
        chat.save(tmp_path / "a.session")
        sizes[chat.session.cached[0]] = os.path.getsize(tmp_path / "a.session")
    (few, small), (many, large) = sorted(sizes.items())
    config = model.config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert (many - few) * row <= large - small < (many - few) * (row + 64) + 1000
    assert small < few * row + 12_000  # fingerprint and text


def test_a_failed_save_leaves_the_old_file_and_nothing_else(model, tmp_path, monkeypatch):
    path = tmp_path / "a.session"
    model.chat_session().save(path)
    before = path.read_bytes()

    def full(self, name, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(UsageError, match=r"a\.session: .* cannot be saved there \(No space left on device\)"):
        model.chat_session("another").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.session"]


def test_a_place_that_cannot_be_written_is_said(model, tmp_path):
    with pytest.raises(UsageError, match=r"there \(there is no folder .*missing; make it first"):
        model.chat_session().save(tmp_path / "missing" / "a.session")
    with pytest.raises(UsageError, match="no such file"):
        model.load_session(tmp_path / "a.session")


@pytest.mark.parametrize("content", [b"My thesis.\n", b"\x08" + b"\0" * 7 + b"{}      ", b"0" * 100])
def test_a_file_that_is_no_session_is_not_replaced_by_one(model, tmp_path, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"thesis.txt: this file is no session, .*; name another"):
        model.chat_session().save(path)
    assert path.read_bytes() == content


def test_a_session_or_an_empty_file_is_replaced(model, tmp_path):
    path, chat = tmp_path / "a.session", model.chat_session()
    path.touch()
    chat.save(path)
    run(chat.send("hello", **SHORT))
    chat.save(path)
    assert model.load_session(path).messages == chat.messages


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.session"
    chat = model.chat_session()
    run(chat.send("hello", **SHORT))
    chat.save(path)
    return path.read_bytes()


def message_of_loading(model, path, content):
    path.write_bytes(content)
    with pytest.raises(JaxchatError) as caught:
        model.load_session(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_found_out(model, saved, tmp_path, data):
    at = data.draw(st.integers(0, len(saved) - 1))
    flipped = saved[at] ^ data.draw(st.integers(1, 255))
    content = saved[:at] + bytes([flipped]) + saved[at + 1 :]
    message_of_loading(model, tmp_path / "a.session", content)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_said_to_be(model, saved, tmp_path, kept):
    assert "truncated" in message_of_loading(model, tmp_path / "a.session", saved[:kept])


def test_a_file_of_another_kind_is_said_to_be(model, directory, tmp_path):
    message = message_of_loading(
        model, tmp_path / "a.session", (directory / "model.safetensors").read_bytes()
    )
    assert "not a session that jaxchat saved" in message
    message = message_of_loading(model, tmp_path / "a.session", b"some text, longer than a header")
    assert "not a safetensors file" in message


def test_another_version_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(session_file, "VERSION", "7")
    model.chat_session().save(tmp_path / "a.session")
    monkeypatch.undo()
    content = (tmp_path / "a.session").read_bytes()
    assert "a session file of version 7" in message_of_loading(model, tmp_path / "a.session", content)


def test_of_the_version_before_the_rows_that_all_slots_have_are_taken(model, tmp_path, monkeypatch):
    """There, a plan changed just before saving left the slots in front with more rows than the last."""
    path, chat = tmp_path / "a.session", model.chat_session()
    run(chat.send("hello", **SHORT))
    slots = len(chat.plan.executed())
    write, rows = session_file._write, np.array([chat.session.cached[0]] * (slots - 1) + [5])

    def write_before(path, arrays, metadata):
        write(path, {**arrays, "slot_rows": rows}, {**metadata, "version": "1"})

    monkeypatch.setattr(session_file, "_write", write_before)
    chat.save(path)
    other = model.load_session(path)
    assert other.session.cached == [5]
    assert other.session.ids == chat.session.ids
    assert run(other.send("more", **SHORT))[0] == run(chat.send("more", **SHORT))[0]


# --- the command line


def test_two_runs_with_a_session_are_one_chat(model, directory, tmp_path, commands):
    path = tmp_path / "a.session"
    common = ("-m", directory, "--max_new_tokens", 6, "--json")
    first = commands("generate", *common, "-p", "hello", "--save_session", path)
    second = commands("generate", *common, "-p", "more", "--load_session", path, "--save_session", path)
    chat = model.chat_session()
    for text, (code, out, err) in (("hello", first), ("more", second)):
        assert code == 0, err
        assert json.loads(out)["token_ids"] == run(chat.send(text, **SHORT))[0]
    assert_same(chat, model.load_session(path))


def test_a_session_that_cannot_be_loaded_is_one_line(directory, model, saved, tmp_path, commands):
    path = tmp_path / "a.session"
    path.write_bytes(saved[:1000])
    code, out, err = commands("generate", "-m", directory, "-p", "x", "--load_session", path)
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert f"{path}: truncated" in err

    path.write_bytes(saved)
    code, out, err = commands(
        "generate", "-m", directory, "-p", "x", "--load_session", path, "--layer_spec", "0:2"
    )
    assert (code, out) == (2, "")
    assert "made under the layer plan all, this is 0,1: give --layer_spec 'all'" in err
