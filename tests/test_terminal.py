"""The chat as a person has it: typed into a real pseudo-terminal, and read from an emulated screen."""

import json
import re
import sys

import pytest
from emulator import CTRL_C, CTRL_D, CTRL_J, ENTER, ESCAPE, TAB, UP, Emulator
from tiny_chat import write_tiny_chat

COMMAND = [sys.executable, "-m", "jaxchat.generate"]
ENDLESS = {"max_position_embeddings": 1 << 20}  # with --ignore_eos it generates until it is stopped
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPT = r"^You  >$"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny-chat", **ENDLESS)


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "thinker", template=THINKING, **ENDLESS)


@pytest.fixture
def open_chat(tmp_path):
    """`open_chat(model, *flags, **environment)`: a chat in a terminal, with a history of its own."""

    def start(model, *flags, columns=80, rows=30, **environment):
        command = [*COMMAND, "-m", model, "-i", *flags]
        where = {"XDG_STATE_HOME": str(tmp_path)}
        return Emulator(*command, columns=columns, rows=rows, **{**where, **environment})

    return start


# --- in a terminal


def test_messages_are_typed_pasted_edited_and_answered(model, open_chat, tmp_path):
    chat = open_chat(model, "-p", "first", "--max_new_tokens", "3", "--layer_spec", "0,1")
    chat.wait(r"^You are served by tiny-chat \(llama\),\nwith \d+ \([\d.]+K\) parameters\.$")
    chat.wait(r"^You  > first\nA\.I\. > ")
    chat.wait(PROMPT)
    chat.wait(r"^3 tokens, [\d.]+ tokens/s · context 12 of 1048576 · plan 0,1$")

    def send_and_undo(keys, message):
        shown = message.replace("\n", "\n       ")  # under each other, beside the label
        chat.send(keys)
        chat.wait(rf"^You  > {shown}\nA\.I\. > ")
        chat.wait(PROMPT)
        chat.send("/undo" + ENTER)
        chat.wait(rf"^forgot the last exchange, which began with: {message}$")
        chat.wait(rf"^You  > {shown}$")  # to be edited
        chat.send(CTRL_C)
        chat.wait(PROMPT)

    # Lines that are typed, with each key for a new one; wide characters; a paragraph that is pasted.
    send_and_undo("grüß dich 你好 🦙" + ENTER, "grüß dich 你好 🦙")
    send_and_undo(f"one{CTRL_J}two{ESCAPE}{ENTER}three\\{ENTER}four{ENTER}", "one\ntwo\nthree\nfour")
    chat.paste("A paragraph.\n\n/quit is no command in it.\n")
    chat.wait(r"^You  > A paragraph\.\n\n       /quit is no command in it\.$")
    chat.send(ENTER)
    chat.wait(PROMPT)

    # The arrow keys bring back what was typed, the tab key completes.
    chat.send(UP + " again")
    chat.wait(r"^        again$")
    chat.send(CTRL_C)
    chat.wait(PROMPT)
    chat.send("/st" + TAB)
    chat.wait(r"^You  > /stats$")
    chat.send(CTRL_C + "/set max_new" + TAB)
    chat.wait(r"^You  > /set max_new_tokens=$")
    chat.send("5" + ENTER)
    chat.wait(r"^max_new_tokens=5$")

    # Another size: the line that is being typed is laid out anew.
    chat.send("x" * 60)
    chat.wait(r"^You  > x{60}$")
    chat.resize(40, 30)
    chat.wait(r"^You  > x{33}\n +x{27}$")
    chat.resize(100, 20)
    chat.wait(r"^You  > x{60}$")
    chat.send(CTRL_C)
    chat.wait(PROMPT)

    chat.send(CTRL_D)
    assert chat.finish() == 0
    kept = [json.loads(line) for line in (tmp_path / "jaxchat/history").read_text().splitlines()]
    assert kept[:4] == ["grüß dich 你好 🦙", "/undo", "one\ntwo\nthree\nfour", "/undo"]


def test_ctrl_c_stops_a_reply_which_can_be_continued_and_twice_leaves(model, open_chat):
    chat = open_chat(model, "--ignore_eos", "--hide_banner", "--history_file", "")
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    chat.wait(r"^Ctrl-C again leaves")
    chat.wait(PROMPT)
    chat.send("hello" + ENTER)
    chat.wait(r"^A\.I\. > .")
    chat.send(CTRL_C)
    chat.wait(r"^Stopped\. /continue goes on")
    chat.wait(PROMPT)
    before = int(chat.wait(r"context (\d+) of \d+$")[1])
    chat.send("/set max_new_tokens=4" + ENTER + "/continue  and" + ENTER)
    chat.wait(r"^A\.I\. >  and")
    assert int(chat.wait(r"^4 tokens.*context (\d+) of \d+$")[1]) == before + 8
    chat.send("/set max_new_tokens=none" + ENTER + "more" + ENTER)
    chat.wait(r"^You  > more\nA\.I\. > .")
    chat.send(CTRL_C)
    chat.wait(r"^Stopped\.", count=2)
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    assert chat.finish() == 130
    assert "Traceback" not in chat.text


def test_nothing_the_model_writes_controls_the_terminal(model, open_chat):
    evil = r"\e[31mred\e]0;title\a\x08\u009b2Jok"  # colour, the window's title, a bell, backspace, clearing
    chat = open_chat(model, "-p", "hello", "--ai_prefix", evil, "--max_new_tokens", "1")
    chat.wait(r"^A\.I\. > ␛\[31mred␛\]0;title␇␈\\x9b2Jok")
    chat.send("/show" + ENTER + "/prefix " + evil + ENTER)
    chat.wait(r"^the next reply begins with '\\x1b\[31m")
    chat.send(CTRL_D)
    assert chat.finish() == 0
    reply = chat.output.decode().split("A.I. > \x1b[0m")[1].split("\r\n")[0]
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", reply)


def test_reasoning_is_dim_and_apart(thinking_model, open_chat):
    flags = ("--ai_prefix", "Hm.</think>Well", "--ai_prefix_in", "reasoning", "--max_new_tokens", "1")
    chat = open_chat(thinking_model, "-p", "hello", *flags)
    chat.wait(r"^A\.I\. > Hm\.\n\nWell")
    assert b"\x1b[2mHm.\x1b[0m" in chat.output
    chat.send(CTRL_D)
    assert chat.finish() == 0


def test_a_dumb_terminal_gets_plain_lines_and_no_sequences(model, open_chat):
    chat = open_chat(model, "--max_new_tokens", "3", "--hide_banner", TERM="dumb")
    chat.wait(PROMPT)
    chat.send("one\\\n")
    chat.wait(r"^You  > one\\$")
    chat.send("two\n")
    chat.wait(r"^You  > one\\\n       two\nA\.I\. > ")
    chat.wait(r"^\[3 tokens, .* · context \d+ of \d+\]\nYou  >$")
    chat.send("/undo\n")
    chat.wait(r"^forgot the last exchange, which began with: one\ntwo$")
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    chat.wait(r"^Ctrl-C again leaves")
    chat.send("half a line" + CTRL_D + CTRL_D)  # the end in the middle of a line: answered, then left
    chat.wait(r"^You  > half a line\nA\.I\. > ")
    assert chat.finish() == 0
    assert b"\x1b" not in chat.output
    assert chat.text.count("You  >") == 4
