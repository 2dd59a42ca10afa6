"""The programs in examples/: one as a process, the rest in this one."""

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_chat import write_tiny_chat

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_chat(tmp_path_factory.mktemp("chat"), max_position_embeddings=600))


def run_process(name, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(name, arguments)`: what a program writes, run in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(name, *arguments, code=0, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert importlib.import_module(name).main(["", *map(str, arguments)]) == code
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["crosstask", "threecobblers", "ya_o1"])
def test_help_explains_every_flag_with_an_example(run, name):
    text = run(name, "--help").out
    assert f"python examples/{name}.py" in text
    flags = re.split(r"\n  (?=-)", text)[1:]
    assert len(flags) > 8
    for flag in flags:
        assert "e.g." in flag, flag


def test_crosstask_writes_what_it_shows(model, tmp_path):
    transcript = tmp_path / "talk.json"
    done = run_process(
        "crosstask", model, model, "hello!", "--reversed_role", "--turns", 3, "--max_new_tokens", 5,
        "--b_layer_spec", "0,1,1", "--b", "temperature=0", "--b_system", "Be brief.", "--json", transcript,
    )  # fmt: skip
    said = json.loads(transcript.read_text())
    assert done.stdout == "".join(f"{turn['speaker']} > {turn['text']}\n" for turn in said["turns"])
    assert [turn["number"] for turn in said["turns"]][:2] == [0, 1]
    assert said["models"]["A"]["reversed_role"]
    assert said["models"]["B"]["layer_spec"] == "0,1,1"
    assert said["models"]["B"]["options"]["temperature"] == 0
    assert (done.returncode, done.stderr.count("loading")) == (0, 1)


def test_threecobblers_chooses_for_each_question_and_reports_the_probabilities(run, model, tmp_path):
    panel = tmp_path / "panel.yaml"
    panel.write_text(f"experts: [{{name: one, model: {model}}}, {{name: two, model: {model}}}]")
    done = run(
        "threecobblers",
        panel,
        "--max_new_tokens",
        5,
        "--json",
        "-",
        stdin="why?\n/help\n/restart\nhow?\n/frob\n/bye\nno\n",
    )
    assert "\n/quit or Ctrl-D leaves, /restart forgets" in done.err
    assert "\nno command /frob; /quit or Ctrl-D leaves" in done.err
    turns = json.loads(done.out)["turns"]
    assert [turn["question"] for turn in turns] == ["why?", "how?"]
    for turn in turns:
        assert sum(turn["probabilities"].values()) == pytest.approx(1)
        assert turn["expert"] == max(turn["probabilities"], key=turn["probabilities"].get)
        assert f"{turn['expert']} > " in done.err


def test_ya_o1_thinks_with_prefix_and_nudges_then_answers(run, model, tmp_path):
    transcript = tmp_path / "thought.json"
    done = run(
        "ya_o1", model, model, "-q", "why?", "--prefix", "Well,\\n", "--nudge", " But ", "--nudge", " So ",
        "--max_new_tokens", 4, "--prompt", "{question}", "--json", transcript,
    )  # fmt: skip
    turn = json.loads(transcript.read_text())["turns"][0]
    assert turn["thought"].startswith("Well,\n")
    assert turn["thought"].index(" But ") < turn["thought"].index(" So ")
    assert done.out == f"Thought > {turn['thought']}\nAnswer > {turn['answer']}\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("crosstask", ["nowhere", "box", "hi"], "nowhere"),
        ("crosstask", ["MODEL", "MODEL", "hi", "--b", "heat=1"], "unknown option 'heat'"),
        ("crosstask", ["MODEL", "MODEL", "hi", "--a_layer_spec", "9"], "layer 9 is out of range"),
        ("threecobblers", ["nowhere.yaml"], "nowhere.yaml: No such file"),
        (
            "ya_o1",
            ["MODEL", "MODEL", "-q", "x", "--json", "no/such/t.json"],
            "--json no/such/t.json: there is no",
        ),
        (
            "crosstask",
            ["MODEL", "MODEL", "hi", "--json", "/dev/null"],
            "--json /dev/null: this is a device, ",
        ),
        ("ya_o1", ["MODEL"], "SUMMARIZER must be given; --help shows examples"),
    ],
)
def test_bad_requests_are_one_clear_line(run, model, name, arguments, message):
    done = run(name, *[model if text == "MODEL" else text for text in arguments], code=2)
    assert message in done.err
    assert "jaxchat: error: " in done.err
