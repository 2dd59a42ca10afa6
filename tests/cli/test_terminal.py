"""The chat as a person has it: typed into a real pseudo-terminal, and read from an emulated screen."""

import dataclasses
import io
import json
import os
import re
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import jaxchat
from jaxchat import __main__ as program
from jaxchat.cli.terminal import chat as chat_module
from jaxchat.cli.terminal import commands
from jaxchat.cli.terminal.history import MessageFile, default_file
from jaxchat.cli.terminal.markdown import MarkdownSink
from jaxchat.cli.terminal.wrapping import Screen, Wrapping
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions, setting_text, with_setting
from tests.support.commands import QUICK, Commands
from tests.support.emulator import CTRL_C, CTRL_D, CTRL_J, ENTER, ESCAPE, TAB, UP, Emulator
from tests.support.tiny_chat import write_tiny_chat

GENERATE = [sys.executable, "-m", "jaxchat.generate"]
CHAT = [sys.executable, "-m", "jaxchat", "chat"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

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

    def start(model, *flags, columns=80, rows=30, program=CHAT, **environment):
        command = [*program, "-m", model, *flags]
        where = {"XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        return Emulator(*command, columns=columns, rows=rows, **{**QUICK, **where, **environment})

    return start


@pytest.fixture(name="commands")
def _commands(capfd, monkeypatch):
    return Commands(capfd, monkeypatch)


# --- in a terminal


def test_messages_are_typed_pasted_edited_and_answered(model, open_chat, tmp_path):
    chat = open_chat(model, "-p", "first", "--max_new_tokens", "3", "--layer_spec", "0,1")
    chat.wait(r"^You are served by tiny-chat \(llama\),\nwith [\d,]+ \([\d.]+K\) parameters\.$")
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
    chat.wait(r"^Ctrl-C again leaves", count=2)
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    assert chat.finish() == 130
    assert "Traceback" not in chat.text


def test_nothing_the_model_writes_controls_the_terminal_and_reasoning_is_dim_and_apart(
    thinking_model, open_chat
):
    evil = r"\e[31mred\e]0;title\a\x08\u009b2Jok"  # colour, the window's title, a bell, backspace, clearing
    flags = ("--ai_prefix", evil, "--max_new_tokens", "1", "--hide_banner")
    chat = open_chat(thinking_model, "-p", "hello", *flags)
    chat.wait(r"^A\.I\. > ␛\[31mred␛\]0;title␇␈\\x9b2Jok")
    chat.send("/show" + ENTER + "/prefix " + evil + ENTER)
    chat.wait(r"^the next reply begins with '\\x1b\[31m")
    reply = chat.output.decode().split("A.I. > \x1b[0m")[1].split("\r\n")[0]
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", reply)
    chat.send("/set ai_prefix_in=reasoning" + ENTER + "/prefix Hm.</think>Well" + ENTER + "again" + ENTER)
    chat.wait(r"^A\.I\. > Hm\.\n\nWell")
    assert b"\x1b[2mHm.\x1b[0m" in chat.output
    chat.send(CTRL_D)
    assert chat.finish() == 0


def test_a_dumb_terminal_gets_plain_lines_and_no_sequences(model, open_chat):
    chat = open_chat(model, "--max_new_tokens", "3", "--hide_banner", TERM="dumb")
    chat.wait(PROMPT)
    chat.send("one\\\n")
    chat.wait(r"^You  > one\\\n     >$")
    chat.send("two\n")
    chat.wait(r"^You  > one\\\n     > two\nA\.I\. > ")
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


def test_markdown_is_rendered_while_it_grows_and_stays_as_text(model, open_chat):
    text = r"# Title\n\nSome **bold** words.\n\n- one\n- two\n\n"
    chat = open_chat(model, "-p", "hello", "--markdown", "--ai_prefix", text, "--max_new_tokens", "1")
    chat.wait(r"^A\.I\. >\n(.*\n)*.*Title.*\n\nSome bold words\.\n\n+ • one\n • two")
    chat.send(CTRL_D)
    assert chat.finish() == 0


def test_ctrl_c_ends_one_answer(model):
    answer = Emulator(*GENERATE, "-m", model, "-p", "hello", "--ignore_eos", "--hide_banner", **QUICK)
    answer.wait(r".{8}")
    answer.send(CTRL_C)
    assert answer.finish() == 130
    assert "Traceback" not in answer.text


SLOW = """
import sys, time
from jaxchat import __main__, runtime
load = runtime.load
runtime.load = lambda **arguments: (time.sleep(1.5), load(**arguments))[1]
sys.exit(__main__.main())
"""


def test_what_is_typed_while_the_model_loads_is_sent_as_it_was_typed(model, open_chat):
    program = [sys.executable, "-c", SLOW, "chat"]
    chat = open_chat(model, "--max_new_tokens", "3", "--hide_banner", program=program)
    chat.send("before anything\r/set top_k=7\r")
    chat.wait(r"^. loading tiny-chat$")
    chat.send("one two\r/set seed=5\r")
    chat.paste("pasted\nlines")
    chat.send("\rlast words")
    chat.wait(r"^You  > before anything\nA\.I\. > ")
    chat.wait(r"^You  > /set top_k=7\ntop_k=7$")
    chat.wait(r"^You  > one two\nA\.I\. > ")
    chat.wait(r"^seed=5$")
    chat.wait(r"^You  > pasted\n       lines\nA\.I\. > ")
    chat.wait(r"^You  > last words$")
    chat.send(CTRL_C)
    chat.wait(PROMPT)
    chat.send(CTRL_D)
    assert chat.finish() == 0


def test_it_says_that_it_compiles_and_that_ctrl_c_has_to_wait_for_that(model, open_chat):
    cold = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    chat = open_chat(model, "--hide_banner", "--compilation_cache_dir", "", **cold)
    chat.wait(PROMPT)
    chat.send("hello" + ENTER)
    chat.wait(r"^. compiling, once for this model$")
    chat.send(CTRL_C)
    chat.wait(r"^. stopping after the compile$")
    chat.wait(r"^A\.I\. >\nStopped\.")
    chat.wait(PROMPT)
    assert "compiling" not in chat.text
    chat.send(CTRL_D)
    assert chat.finish() == 0


def test_words_of_other_programs_are_explained_once_and_commands_leave_an_empty_line(
    model, open_chat, tmp_path
):
    chat = open_chat(model, "--max_new_tokens", "3", "--hide_banner", "--save_session", "left")
    chat.wait(PROMPT)
    chat.send("Exit" + ENTER)
    chat.wait(r"^You  > Exit\nto leave: /quit; .* if you type it again$")
    chat.wait(PROMPT)
    chat.send("help" + ENTER)
    chat.wait(r"^for help: /help; ")
    chat.wait(PROMPT)
    chat.send("help" + ENTER)
    chat.wait(r"^You  > help\nA\.I\. > ")
    chat.wait(PROMPT)
    chat.send("/frob" + ENTER)
    chat.wait(r"^jaxchat: error: no command /frob; ")
    chat.wait(PROMPT)
    chat.send(UP)
    chat.wait(r"^You  > /frob$")
    chat.send(CTRL_C)
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    chat.wait(r"^Ctrl-C again leaves")
    chat.wait(PROMPT)
    chat.send(CTRL_C)
    assert chat.finish() == 130
    (kept,) = (tmp_path / "jaxchat" / "sessions").iterdir()  # it was saved on the way out
    loaded = jaxchat.load(model).load_session(kept)
    assert [message["content"] for message in loaded.messages][::2] == ["help"]


def test_replies_wrap_at_words_and_not_where_a_program_reads(model, open_chat, commands):
    text = "Once upon a time there was a very considerate hippopotamus, 你好你好你好你好 and 🦙🦙 in it."
    flags = ("--ai_prefix", text, "--max_new_tokens", "1", "-p", "hello")
    chat = open_chat(model, *flags, "--hide_banner", columns=30)
    chat.wait(
        r"^A\.I\. > Once upon a time there\n"
        r"was a very considerate\nhippopotamus, (\S *){8}\nand 🦙 *🦙 * in it\."
    )
    chat.send(CTRL_D)
    assert chat.finish() == 0
    assert commands.output("generate", "-m", model, *flags).startswith(text)


# --- the commands, on lines from a pipe


@pytest.fixture
def talk(model, monkeypatch, capfd, tmp_path):
    """`talk(*lines, flags=())`: what a chat with these lines prints on standard output and standard error."""

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def run(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert program.main(["", "chat", "-m", str(model), "--max_new_tokens", "4", *map(str, flags)]) == 0
        out, err = capfd.readouterr()
        return out.split("\n")[:-1], err

    return run


def test_steering_commands(talk):
    (plain,), _ = talk("hello")
    replies, said = talk(
        "/prefix Sure,\\x20",
        "hello",
        "/retry",
        "/continue  and",
        "/undo",
        "hello",
        "/prefix x",
        "/prefix",
        "hello",
    )
    assert replies[0] == replies[1]  # greedy
    assert replies[0].startswith("Sure, ")
    assert replies[2].startswith(" and")
    assert replies[3] == plain  # the prefix was for one turn, and the exchange is forgotten
    assert "the next reply begins with 'Sure, '" in said
    assert "forgot the last exchange, which began with: hello" in said
    assert "the next reply no longer begins with 'x'" in said
    every, _ = talk("hello", "again", flags=["--ai_prefix", "Oh! ", "--ai_prefix_every_turn"])
    assert [reply[:4] for reply in every] == ["Oh! ", "Oh! "]


def test_commands_that_have_nothing_to_work_on_say_so(talk):
    replies, said = talk(
        "/continue", "/retry", "/undo", "/save", "/load nowhere", "/role pirate", "/set heat=1", "/set top_p",
        "/set top_p=2", "/stts", "/help frob", "/set 'x", "/prefix \\xff",
    )  # fmt: skip
    errors = [line.removeprefix("jaxchat: error: ") for line in said.splitlines() if "error: " in line]
    assert replies == []
    expected = [
        "there is no reply to continue",
        "there is no reply to retry",
        "there is nothing to undo",
        "/save needs a name, e.g. /save talk, or a file, e.g. /save ./talk.session",
        "no session is saved as nowhere; `jaxchat sessions` lists those there are",
        "/role pirate: expected user or assistant",
        "unknown option 'heat'. The options are max_new_tokens, ",
        "/set top_p: expected name=value, e.g. /set temperature=0.2",
        "top_p is '2'; expected a number above 0, at mo",
        "no command /stts; did you mean /stats",
        "no command /frob; /help lists them",
        "/set 'x: a quote is not closed",
        "/prefix: ",
    ]
    assert len(errors) == len(expected)
    assert [error[: len(start)] for error, start in zip(errors, expected, strict=True)] == expected


def test_roles_system_prompt_and_sessions(talk, tmp_path):
    file = tmp_path / "a b.session"
    replies, said = talk(
        "/system Be kind.", "/system", "hello", f"/save {file}", "/role user", "I am fine.", "/restart",
        f"/load {file}", "/retry", '/system ""', "/role",
    )  # fmt: skip
    assert replies[0] == replies[2]
    assert said.count("system prompt: Be kind.") == 2
    assert "no system prompt" in said
    assert "the model plays the user, you the assistant" in said
    assert f"loaded {file}: " in said
    assert said.count("the model plays the assistant") == 1  # as it did when the chat was saved


class _Typed(io.StringIO):
    def isatty(self):
        return True


def test_sessions_have_a_name_or_are_a_file(talk, tmp_path, monkeypatch, commands, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "thesis.txt").write_text("mine")
    replies, said = talk(
        "hello", "/save talk", '/save "my talk"', "/save ./talk", "/save talk.session", "/save 'a b.session'",
        "/save thesis", "/restart", "/load", "/retry", "/sessions", "/save thesis.txt", "/save sub/x",
        "/save 'open", "/load thesis.txt", "/load nothing", '/save ""',
    )  # fmt: skip
    assert replies[0] == replies[1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "a b.session", "talk", "talk.session", "thesis", "thesis.txt",
    ]  # fmt: skip
    assert (tmp_path / "thesis").read_text() == (tmp_path / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "data/jaxchat/sessions").iterdir()) == [
        "my talk.session", "talk.session", "thesis.session",
    ]  # fmt: skip
    errors = [line.removeprefix("jaxchat: error: ") for line in said.splitlines() if "error: " in line]
    assert errors[0].startswith("thesis.txt: this file is no session, so it is not replaced by one; name")
    assert re.match("sub/x: the session cannot be saved there .there is no folder .*/sub; make it", errors[1])
    assert errors[2:3] + errors[4:] == [
        "/save 'open: a quote is not closed",
        "no session is saved as nothing; `jaxchat sessions` lists those there are",
        "/save needs a name, e.g. /save talk, or a file, e.g. /save ./talk.session",
    ]
    table = commands.output("sessions")
    assert all(line in said for line in table.splitlines())
    listed = json.loads(commands.output("sessions", "--json"))
    assert {entry["name"] for entry in listed} == {"talk", "my talk", "thesis"}
    assert {(e["messages"], e["first_words"], e["layer_spec"]) for e in listed} == {(2, "hello", "all")}
    assert all(
        os.path.samefile(e["path"], tmp_path / f"data/jaxchat/sessions/{e['name']}.session") for e in listed
    )

    assert "give --yes" in commands.error("sessions", "--remove", "talk", code=2)
    assert "no session is saved as tlak" in commands.error("sessions", "--remove", "tlak", "--yes", code=2)
    assert commands.output("sessions", "--remove", "talk", "--remove", "thesis", "--yes")
    flags = ("-m", model, "--max_new_tokens", "4", "-p", "x", "--save_session", "x", "--load_session")
    assert commands.output("generate", *flags, "my talk") == commands.output("generate", *flags, "./talk")
    assert "the file of this name is ./talk" in commands.error("generate", *flags, "talk", code=2)
    for answer, left in (("n\n", True), ("", True), ("y\n", False)):
        monkeypatch.setattr(sys, "stdin", _Typed(answer))
        assert program.main(["", "sessions", "--remove", "my talk"]) == 0
        assert (tmp_path / "data/jaxchat/sessions/my talk.session").exists() == left
    (tmp_path / "data/jaxchat/sessions/broken.session").write_bytes(b"\x1b[2J")
    assert "broken  " in (table := commands.output("sessions"))
    assert "cannot be read" in table
    assert "\nx   " in table


def test_without_a_home_directory_sessions_are_files(talk, tmp_path, monkeypatch, commands):
    def no_home(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_data_path", no_home)
    monkeypatch.setattr("platformdirs.user_state_path", no_home)
    _, said = talk("hello", "/save talk", f"/save {tmp_path}/a.session")
    assert "error: there is no home directory to keep sessions in; give a file, e.g. ./talk.session" in said
    assert f"saved {tmp_path}/a.session" in said
    assert "there is no home directory" in commands.error("sessions", code=2)
    assert default_file() is None


def test_every_retry_is_another_draw_and_all_repeat_with_the_seed(talk):
    lines = ("hello", "/retry", "/retry", "/set seed=8", "/retry", "/restart", "hello", "/stats")
    flags = ("-t", "2", "--max_new_tokens", "12", "--seed")
    (first, second, third, eighth, last), said = talk(*lines, flags=(*flags, "7"))
    assert len({first, second, third}) == 3
    assert eighth == second == last  # the first draw with seed 8, which is the second with seed 7
    assert "seed: 8" in said
    assert talk(*lines, flags=(*flags, "7"))[0] == [first, second, third, eighth, last]
    others = {talk("hello", flags=flags[:-1])[0][0] for _ in range(2)}
    assert len(others) == 2
    assert "at temperature 0 a prompt has one reply" in talk("hello", "/retry")[1]


def test_nothing_is_called_forgotten_while_there_is_room(talk):
    lines = ("hello there", "/plan 0,1,1", "more", "/retry", "/undo", "/retry", "/continue x")
    assert "is full" not in talk(*lines, flags=["--max_length", "200"])[1]


def test_a_full_context_forgets_the_oldest_and_says_so_once(talk):
    said = talk(*["hello there"] * 9, flags=["--max_length", "60"])[1]
    assert said.count("The context of 60 tokens is full: forgot the oldest") == 1
    assert "error: " not in said
    for flags, lines in (
        (["--overflow", "error"], ["hello there"] * 9),
        ([], ["/set overflow=error"] + ["hi"] * 9),
    ):
        said = talk(*lines, flags=["--max_length", "60", *flags])[1]
        assert "too many for the context of 60; /restart forgets the conversation, /set overflow=" in said
        assert "--" not in said
    said = talk("x" * 99, flags=["--max_length", "60"])[1]
    assert "the context of 60; shorten the message, or /restart forgets the conversation" in said
    assert talk(*["hello there"] * 9, flags=["--max_length", "60", "--quiet"])[1] == ""


def test_plans_of_up_to_twice_the_layers_compile_nothing(talk):
    lines = ["hello", "hello", "/stats", "/plan 0:3,0:3", "/restart", "hello", "hello", "/stats"]
    compiling = re.findall(r"compile: ([\d.]+) s", talk(*lines, flags=["--max_length", "200"])[1])
    assert compiling[0] == compiling[1]
    less = talk(*lines, flags=["--max_length", "200", "--max_slots", "3"])[1]
    compiling = re.findall(r"compile: ([\d.]+) s", less)
    assert compiling[0] != compiling[1]


def test_what_the_chat_shows_of_the_model_is_what_show_does_and_what_is_in_memory(talk, commands, model):
    said = talk("hello", "/show")[1].splitlines()
    shown = commands.output("show", "-m", model, "--kv_dtype", "float32").splitlines()
    differing = [(a, b) for a, b in zip(said, shown, strict=True) if a != b]
    assert len(differing) == 1
    assert re.fullmatch(r"in memory   \S+ KiB of weights, \S+ KiB of KV cache, for plans of up to \d slots",
                        differing[0][0])  # fmt: skip
    assert re.fullmatch(r"in memory   [\d.]+ KiB of weights, once loaded", differing[0][1])


def test_other_names_of_commands(talk):
    replies, said = talk("hello", "/clear", "/? plan", "/bye", "never")
    assert len(replies) == 1
    assert "forgot the conversation" in said
    assert "  /plan [LAYERS]" in said
    assert talk("hello", "/exit", "never")[0] == replies


def test_reversed_role_from_the_command_line(talk, model):
    session = jaxchat.load(model).chat_session(reversed_role=True, opening="Tell me.")
    expected = "".join(session.send("Once.", max_new_tokens=4))
    assert talk("Once.", flags=["--reversed_role", "-p", "Tell me."])[0] == [expected]
    opening = "".join(jaxchat.load(model).chat_session(reversed_role=True).send("", max_new_tokens=4))
    assert talk(flags=["--reversed_role"])[0] == [opening]  # the model goes first


def test_help_names_every_command(talk):
    _, said = talk("/help", "/help plan")
    assert all(f"  /{name} " in said for name in commands.COMMANDS)
    assert said.count("  /plan ") == 2
    expected = "help system plan adapter show prefix continue retry undo role save load sessions set "
    expected += "stats restart quit"
    assert list(commands.COMMANDS) == expected.split()


def test_every_option_can_be_set_and_is_shown_as_it_is_read():
    values = {"max_new_tokens": "5", "top_k": "40", "seed": "7", "stop": "END,\\n,a\\x2cb"}
    values |= {"stop_token_ids": "1,2", "ignore_eos": "on", "overflow": "truncate_oldest"}
    options = GenerateOptions()
    for field in dataclasses.fields(options):
        options = with_setting(options, field.name, values.get(field.name, "0.25"))
        shown = setting_text(getattr(options, field.name))
        assert with_setting(options, field.name, shown) == options
    assert options.stop == ("END", "\n", "a,b")
    assert options.min_p == 0.25
    with pytest.raises(UsageError, match="seed is '-1'; expected a whole number, 0 to 4294967295"):
        with_setting(options, "seed", "-1")


def test_what_the_tab_key_offers(tmp_path, monkeypatch):
    (tmp_path / "talk.session").touch()

    def texts(text):
        return [candidate.text for candidate in commands.completions(text)]

    assert texts("/re") == ["/retry", "/restart"]
    assert texts("/cl") == ["/clear"]
    folder = tmp_path / "jaxchat" / "sessions"
    folder.mkdir(parents=True)
    (folder / "tulips.session").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tub").touch()
    assert texts("/load tu") == ["tulips", "./tub"]
    assert texts("/role a") == ["assistant"]
    assert texts("/set temperature=1 rep") == ["repetition_penalty="]
    assert texts(f"/load {tmp_path}/ta") == [f"{tmp_path}/talk.session"]
    assert texts("hello") == texts("/nonsense ") == []


# --- parts


def test_the_second_ctrl_c_in_a_reply_interrupts():
    class Stream:
        stopped = False

        def stop(self):
            self.stopped = True

    stream = Stream()
    with chat_module._stoppable() as stop:
        os.kill(os.getpid(), signal.SIGINT)  # before there is a stream: it is stopped when it comes
        stop.set_stream(stream)
        assert stream.stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class _Screen(Screen):
    columns = 20


TEXTS = st.text(st.sampled_from("ab你好🦙 \n\t,"), max_size=80)


@given(TEXTS, st.lists(st.integers(1, 9), max_size=40), st.sampled_from(["", "| "]))
def test_text_is_wrapped_the_same_however_it_is_cut_and_only_spaces_become_line_breaks(text, cuts, margin):
    def wrapped(pieces):
        wrapping = Wrapping(_Screen(None, 7), margin)
        return "".join(wrapping.add(piece) for piece in pieces) + wrapping.end()

    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    whole = wrapped([text])
    assert wrapped([*pieces, text[at:]]) == whole
    assert "".join(whole.replace(f"\n{margin}", "").split()) == "".join(text.split())
    for number, line in enumerate(whole.split("\n")):
        words = re.findall("[ab,]+|[^ab,]", line.removeprefix(margin))
        width = cell_len(line.expandtabs()) + 7 * (number == 0)
        assert width <= 20 or max(map(cell_len, words), default=0) > 13 or "\t" in line


def test_markdown_in_a_pipe_is_plain_text_and_whole_for_every_way_it_is_cut():
    text = "# Head\n\nA **bold** [link](http://x.org).\n\n1. one\n2. two\n\n```\ncode\n```\nend \x1b[2J"

    def render(pieces):
        out = io.StringIO()
        sink = MarkdownSink(out)
        for piece in pieces:
            sink.write(piece)
        sink.end()
        return out.getvalue()

    whole = render([text])
    assert "\x1b" not in whole
    words = ("Head", "A bold link (http://x.org).", " 1 one", " 2 two", "code", "end ␛[2J")
    assert [word for word in words if word in whole] == list(words)
    assert render(text) == render([text[:9], text[9:40], text[40:]]) == whole
    assert render([]) == "\n"


def test_typed_messages_are_kept_in_a_private_file_that_does_not_grow_for_ever(tmp_path):
    path = tmp_path / "state" / "history"
    file = MessageFile(path)
    assert file.load() == []
    for number in range(2001):
        file.add(f"{number}\nzwei")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text() + "broken\n[1]\n")
    assert file.load()[-1] == "2000\nzwei"
    assert len(file.load()) == 1000
    for nowhere in (None, tmp_path / "state" / "history" / "below a file"):
        MessageFile(nowhere).add("x")
        assert MessageFile(nowhere).load() == []
