"""The programs in examples/, run as processes."""

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


def run(name, *arguments, code=0, **options):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL if "input" not in options else None,
        **options,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("name", ["crosstask", "threecobblers", "ya_o1"])
def test_help_explains_every_flag_with_an_example(name):
    text = run(name, "--help").stdout
    assert f"python examples/{name}.py" in text
    flags = re.split(r"\n  (?=-)", text)[1:]
    assert len(flags) > 8
    for flag in flags[1:]:  # the first is --help itself
        assert "e.g." in flag, flag


def test_crosstask_writes_what_it_shows(model, tmp_path):
    transcript = tmp_path / "talk.json"
    done = run(
        "crosstask", model, model, "hello!", "--reversed_role", "--turns", 3, "--max_new_tokens", 5,
        "--b_layer_spec", "0,1,1", "--b", "temperature=0", "--b_system", "Be brief.", "--json", transcript,
    )  # fmt: skip
    said = json.loads(transcript.read_text())
    assert done.stdout == "".join(f"{turn['speaker']} > {turn['text']}\n" for turn in said["turns"])
    assert [turn["number"] for turn in said["turns"]][:2] == [0, 1]
    assert said["models"]["A"]["reversed_role"]
    assert said["models"]["B"]["layer_spec"] == "0,1,1"
    assert said["models"]["B"]["options"]["temperature"] == 0
    assert done.stderr.count("loading") == 1


def test_threecobblers_chooses_for_each_question_and_reports_the_probabilities(model, tmp_path):
    panel = tmp_path / "panel.yaml"
    panel.write_text(f"experts: [{{name: one, model: {model}}}, {{name: two, model: {model}}}]")
    done = run(
        "threecobblers",
        panel,
        "--max_new_tokens",
        5,
        "--json",
        "-",
        input="why?\n/restart\nhow?\n/quit\nno\n",
    )
    turns = json.loads(done.stdout)["turns"]
    assert [turn["question"] for turn in turns] == ["why?", "how?"]
    for turn in turns:
        assert sum(turn["probabilities"].values()) == pytest.approx(1)
        assert turn["expert"] == max(turn["probabilities"], key=turn["probabilities"].get)
        assert f"{turn['expert']} > " in done.stderr


def test_ya_o1_thinks_with_prefix_and_nudges_then_answers(model, tmp_path):
    transcript = tmp_path / "thought.json"
    done = run(
        "ya_o1", model, model, "-q", "why?", "--prefix", "Well,\\n", "--nudge", " But ", "--nudge", " So ",
        "--max_new_tokens", 4, "--prompt", "{question}", "--json", transcript,
    )  # fmt: skip
    turn = json.loads(transcript.read_text())["turns"][0]
    assert turn["thought"].startswith("Well,\n")
    assert turn["thought"].index(" But ") < turn["thought"].index(" So ")
    assert done.stdout == f"Thought > {turn['thought']}\nAnswer > {turn['answer']}\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("crosstask", ["nowhere", "box", "hi"], "nowhere"),
        ("crosstask", ["MODEL", "MODEL", "hi", "--b", "heat=1"], "no option 'heat'"),
        ("crosstask", ["MODEL", "MODEL", "hi", "--a_layer_spec", "9"], "layer 9 is out of range"),
        ("threecobblers", ["nowhere.yaml"], "nowhere.yaml: No such file"),
        ("ya_o1", ["MODEL"], "the following arguments are required: summarizer"),
    ],
)
def test_bad_requests_are_one_clear_line(model, name, arguments, message):
    done = run(name, *[model if text == "MODEL" else text for text in arguments], code=2)
    assert message in done.stderr
