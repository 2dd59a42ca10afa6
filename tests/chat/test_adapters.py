"""Chats with adapters: keys and values of one adapter never serve another, in memory or in a file."""

import json

import pytest

import jaxchat
from jaxchat.chat import session_file
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.errors import JaxchatError, UsageError
from tests.support.adapters import logits_of, lora_tensors, projections, write_adapter
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    config = ModelDirectory.at(write_tiny_chat(folder / "model")).config
    for seed, name in enumerate(("poet", "critic")):
        tensors = lora_tensors(projections(config), seed=seed)
        write_adapter(folder / name, tensors, target_modules="all-linear")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return jaxchat.load(folder / "model", adapter=[str(folder / "poet"), f"{folder / 'critic'}=0"])


def say(chat, text="hello"):
    stream = chat.send(text, max_new_tokens=5)
    for _ in stream:
        pass
    return stream.result.token_ids


def test_a_chat_goes_on_with_another_adapter_as_if_it_had_always_been_there(model):
    chat = model.with_adapters("poet").chat_session()
    say(chat)
    chat.set_adapters("critic")
    assert chat.session.cached == [0]
    drawn = say(chat, "and then?")
    ids = chat.session.ids[0]
    logits = logits_of(model.with_adapters("critic"), [ids])[0]
    start = len(ids) - len(drawn)
    assert drawn == logits[start - 1 : len(ids) - 1].argmax(-1).tolist()
    with pytest.raises(UsageError, match="'nobody' is not loaded"):
        chat.set_adapters("nobody")


def test_a_saved_chat_is_of_its_adapters(model, folder, tmp_path):
    chat = model.with_adapters("poet=0.5").chat_session()
    say(chat)
    chat.save(tmp_path / "talk.session")
    again = model.with_adapters("poet=0.5").load_session(tmp_path / "talk.session")
    assert say(again, "more") == say(chat, "more")
    for other in ("poet", "critic=0.5", ["poet=0.5", "critic"], None):
        with pytest.raises(UsageError, match=r"it was made with adapter '.*=0.5', and .*give the adapter"):
            model.with_adapters(other).load_session(tmp_path / "talk.session")
    # The same adapters from another place, in another order and in two halves, are the same.
    (tmp_path / "elsewhere").symlink_to(folder / "poet")
    moved = jaxchat.load(folder / "model", adapter=[f"{tmp_path / 'elsewhere'}=0.25", str(folder / "critic")])
    halves = [f"{tmp_path / 'elsewhere'}=0.25"] * 2
    assert moved.with_adapters(halves).load_session(tmp_path / "talk.session").messages == chat.messages[:2]


def test_a_chat_without_adapters_is_saved_as_ever(model, folder, tmp_path):
    chat = model.with_adapters(None).chat_session()
    say(chat)
    chat.save(tmp_path / "talk.session")
    plain = jaxchat.load(folder / "model")
    assert plain.load_session(tmp_path / "talk.session").messages == chat.messages
    with pytest.raises(UsageError, match="it was made with no adapter"):
        model.load_session(tmp_path / "talk.session")


def test_older_programs_do_not_read_a_chat_with_adapters(model, tmp_path, monkeypatch):
    chat = model.with_adapters("poet").chat_session()
    say(chat)
    chat.save(tmp_path / "talk.session")
    monkeypatch.setattr(session_file, "_WITH_ADAPTERS", "2")  # as before
    with pytest.raises(JaxchatError, match="a session file of version 3"):
        model.with_adapters("poet").load_session(tmp_path / "talk.session")


def test_the_command_line_takes_adapters(folder, commands):
    given = ("generate", "-m", folder / "model", "-p", "hello", "--json", "--max_new_tokens", 4, "--quiet")
    one = json.loads(commands.output(*given, "--adapter", f"{folder / 'poet'}=0.5"))
    assert one["adapters"] == [f"{folder / 'poet'}=0.5"]
    none = json.loads(commands.output(*given))
    assert none["adapters"] == []
    assert one["logprobs"] != none["logprobs"]
    assert "no such adapter" in commands.error(*given, "--adapter", folder / "nowhere", code=2)
    assert "strength" in commands.error(*given, "--adapter", f"{folder / 'poet'}=much", code=2)
    assert "expected a slot from 0 to 2" in commands.error(
        *given, "--adapter", f"{folder / 'poet'}@3", code=2
    )
    shown = ("generate", "-m", folder / "model", "--show", "--adapter", folder / "poet")
    assert "--show" in commands.error(*shown, code=2)


def test_adapters_change_between_two_messages(folder, commands):
    lines = "/adapter\nhello\n/adapter critic=0.5 poet@1\n/adapter other\n/adapter none\n/stats\n/quit\n"
    done = commands(
        "chat", "-m", folder / "model", "--max_new_tokens", 2, "--adapter", folder / "poet",
        "--adapter", f"{folder / 'critic'}=0", stdin=lines,
    )  # fmt: skip
    assert done.code == 0
    assert "adapter: critic=0.5 poet@1 (there are poet, critic)" in done.err
    assert "adapter 'other' is not loaded" in done.err
    assert "adapter: none" in done.err
    without = commands("chat", "-m", folder / "model", stdin="/adapter poet\n/quit\n")
    assert "start with --adapter DIR" in without.err
