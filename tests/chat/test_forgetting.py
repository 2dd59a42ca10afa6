"""What a conversation forgets is gone at once: from its ids, its cache and the files it is saved in."""

import json

import numpy as np
import pytest

import jaxchat
from jaxchat.chat.batch import Retry, Send
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.options import GenerateOptions
from tests.support.tiny_chat import TEMPLATE, write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECRET = "tulips at midnight"
SHORT = GenerateOptions(max_new_tokens=5)
NEEDS_A_USER = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module", params=[TEMPLATE, NEEDS_A_USER], ids=["renders all", "needs a user"])
def model(request, tmp_path_factory):
    return jaxchat.load(write_tiny_chat(tmp_path_factory.mktemp("model"), template=request.param))


def say(chat, text, **options):
    return "".join(chat.send(text, options=SHORT, **options))


def assert_no_trace(path, texts, chat):
    """Neither the texts nor their ids are in the file, and no row of keys and values beyond the ids."""
    data, file = path.read_bytes(), SafetensorsFile(path)
    stored = json.loads(file.metadata["session"])
    chunks = [i for chunk in stored["conversation"]["chunks"] for i in chunk["ids"]]
    for text in texts:
        needle = chat.conversation.tokenizer.encode(text)
        for ids in (file.view("ids").tolist(), chunks):
            assert not any(ids[at : at + len(needle)] == needle for at in range(len(ids)))
        assert json.dumps(text, ensure_ascii=False)[1:-1].encode() not in data
    assert file.view("k").shape[2] <= len(file.view("ids"))


def undo(chat):
    chat.undo()


def restart(chat):
    chat.restart()


def undo_twice_of_the_history_itself(chat):
    chat.conversation.undo()
    chat.conversation.undo()


def replace_the_system_prompt(chat):
    chat.set_system("Be brief.")


@pytest.mark.parametrize(
    ("forget", "gone", "kept"),
    [
        (undo, [SECRET], ["hello there", "Be kind."]),
        (restart, [SECRET, "hello there"], ["Be kind."]),
        (undo_twice_of_the_history_itself, [SECRET, "hello there"], ["Be kind."]),
        (replace_the_system_prompt, ["Be kind."], [SECRET, "hello there", "Be brief."]),
    ],
)
def test_what_is_forgotten_is_in_no_file(model, tmp_path, forget, gone, kept):
    chat = model.chat_session("Be kind.")
    say(chat, "hello there")
    say(chat, SECRET)
    before = len(chat.session.ids[0])
    forget(chat)
    chat.save(tmp_path / "a.session")
    assert_no_trace(tmp_path / "a.session", gone, chat)
    stored = SafetensorsFile(tmp_path / "a.session").metadata["session"]
    assert all(text in stored for text in kept)
    assert len(chat.session.ids[0]) == len(chat.token_ids) < before or forget is replace_the_system_prompt
    # And it goes on as a chat that never heard of it.
    other = model.chat_session("Be brief." if forget is replace_the_system_prompt else "Be kind.")
    other.conversation.extend(m for m in chat.messages if m["role"] != "system")
    assert say(chat, "and now?") == say(other, "and now?")


def test_the_context_counts_what_is_left_at_once(model):
    chat = model.chat_session()
    say(chat, "hello there")
    once = chat.session.ids[0]
    say(chat, "x" * 20)
    chat.undo()
    assert len(chat.session.ids[0]) <= len(once) + 1  # where the next message of the model would begin
    chat.restart()
    assert chat.session.ids[0] == chat.token_ids == []
    assert chat.session.cached == [0]


def test_a_reply_that_was_drawn_anew_is_gone(model, tmp_path):
    chat = model.chat_session()
    said = say(chat, "hello", prefix="Quite " + SECRET)
    "".join(chat.continue_(" or else", options=SHORT))
    chat.undo()
    say(chat, "hello")
    "".join(chat.retry(options=GenerateOptions(max_new_tokens=5, temperature=1.0, seed=3)))
    chat.save(tmp_path / "a.session")
    assert SECRET in said
    assert_no_trace(tmp_path / "a.session", [SECRET, " or else"], chat)


def test_one_conversation_of_a_batch_forgets_and_the_other_does_not(model, tmp_path):
    batch = model.chat_batch([model.conversation(), model.conversation()])
    batch.send([SECRET, SECRET], SHORT)
    batch.conversations[0].restart()
    batch.save(tmp_path / "a.session", 0)
    batch.save(tmp_path / "b.session", 1)
    assert SECRET not in SafetensorsFile(tmp_path / "a.session").metadata["session"]
    assert SECRET in SafetensorsFile(tmp_path / "b.session").metadata["session"]
    batch.conversations[1].undo()
    for _ in batch.begin([Send("hi"), None], [SHORT, SHORT]).pieces():  # a turn of another lets go of it too
        pass
    assert batch.session.ids[1] == []
    for _ in batch.begin([Retry(), None], [SHORT, SHORT]).pieces():
        pass
    assert batch.session.ids[0] == batch.conversations[0].token_ids


def test_a_reply_that_outgrew_the_context_is_saved_and_loaded(tmp_path):
    model = jaxchat.load(write_tiny_chat(tmp_path / "m"), max_length=40)
    chat = model.chat_session()
    text = "".join(chat.send("hello", max_new_tokens=60, ignore_eos=True, overflow="truncate_oldest"))
    assert len(chat.session.ids[0]) <= 40 < len(chat.token_ids)
    chat.save(tmp_path / "a.session")
    other = model.load_session(tmp_path / "a.session")
    assert other.messages[-1]["content"] == text
    np.testing.assert_array_equal(other.session.prefill()[:1], chat.session.prefill()[:1])
    chat.undo()
    assert chat.session.ids == [[]]
