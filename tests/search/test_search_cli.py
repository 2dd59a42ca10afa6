"""`jaxchat search` as a command: its files, what it refuses, and that a kill changes nothing."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxchat
from jaxchat.layer_plan import LayerPlan
from tests.support.commands import environment
from tests.support.tiny_chat import write_tiny_chat
from tests.support.workers import workers_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once there was a little fox who liked to sing. " * 40)
    return path


SMALL = ("--window", "16", "--max_tokens", "400", "--plans", "30", "--candidates", "2")


def test_a_search_writes_its_report_its_scores_and_a_plan_to_run(commands, chat_model, story, tmp_path):
    out = tmp_path / "found"
    said = commands.output("search", "-m", chat_model, "--text", story, "--out", out, *SMALL)
    found = json.loads((out / "search.json").read_text())
    assert said.splitlines()[0] == found["headline"]
    assert found["tried"] > 8
    assert len(found["candidates"]) == 2
    for candidate in found["candidates"]:
        gain = candidate["validation_gain"]
        assert candidate["beats_base"] == (gain["low"] > 0)
        assert gain["value"] == pytest.approx(
            found["base_on_validation"]["value"] - candidate["validation_score"], abs=1e-9
        )
    spec = f"@{out / 'best.json'}"
    plan = LayerPlan.parse(spec, 3)
    assert str(plan) == (found["best"] or "all")
    said = commands.output(
        "generate", "-m", chat_model, "--layer_spec", spec, "-p", "hello", "--max_new_tokens", "3"
    )
    assert said
    assert jaxchat.load(recipe=out / "best.yml", model_paths={str(chat_model): chat_model}).plan == plan
    lines = (out / "plans.csv").read_text().splitlines()
    assert lines[0] == "sample,stage,layer_spec,slots,cost,score"
    assert sum(line.startswith("validation,") for line in lines) == 3
    for name in ("repeats", "drops", "pareto", "candidates"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert found["headline"] in report
    assert "White's reality check" in report


def test_more_budget_goes_on_from_what_is_there(commands, chat_model, story, tmp_path):
    arguments = (
        "search",
        "-m",
        chat_model,
        "--text",
        story,
        "--out",
        tmp_path / "found",
        *SMALL,
        "--noplots",
    )
    commands.output(*arguments)
    known = (tmp_path / "found" / "journal.jsonl").read_text()
    commands.output(*arguments, "--plans", "40")
    assert (tmp_path / "found" / "journal.jsonl").read_text().startswith(known)
    assert not list((tmp_path / "found").glob("*.png"))


@pytest.mark.parametrize("objective", ["kl", "agreement"])
def test_cheaper_plans_are_searched_for_that_say_the_same(commands, chat_model, story, tmp_path, objective):
    out = tmp_path / "found"
    arguments = ("-m", chat_model, "--text", story, "--out", out, "--objective", objective)
    commands.output("search", *arguments, *SMALL, "--noplots")
    found = json.loads((out / "search.json").read_text())
    best = max(found["candidates"], key=lambda one: one["validation_gain"]["value"])
    assert found["best"] == best["layer_spec"]
    assert found["headline"].startswith(f"{best['layer_spec']} is the nearest to the base, of")
    assert str(LayerPlan.parse(f"@{out / 'best.json'}", 3)) == best["layer_spec"]
    assert ("as a draft, at best" in (out / "report.md").read_text()) == (objective == "agreement")
    assert found["base_on_validation"]["value"] == pytest.approx(float(objective == "agreement"), abs=1e-5)
    assert all(candidate["cost"] < 1 for candidate in found["candidates"])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_a_search_that_is_killed_again_and_again_ends_with_the_same_bytes(chat_model, story, tmp_path, kills):
    command = [sys.executable, "-m", "jaxchat", "search", "-m", str(chat_model), "--text", str(story)]
    command += ["--out", "found", *SMALL, "--plans", "60", "--noplots"]
    ended = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        journal = folder / "found" / "journal.jsonl"
        for number in range(kills if name == "killed" else 0):
            process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, env=environment())
            wanted = 1 + (number + 1) * 50 // (kills + 1)
            while process.poll() is None and (
                not journal.exists() or journal.read_bytes().count(b"\n") < wanted
            ):
                time.sleep(0.005)
            time.sleep(random.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, cwd=folder, capture_output=True, env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr
        files = sorted((folder / "found").glob("*"))
        ended[name] = {file.name: file.read_bytes() for file in files if file != journal}
    assert ended["whole"] == ended["killed"]
    assert {"report.md", "search.json", "plans.csv", "best.json"} <= set(ended["whole"])
    assert b"--plans 60" in ended["whole"]["report.md"]


def test_an_interrupted_search_says_how_to_go_on(chat_model, story, tmp_path):
    command = [sys.executable, "-m", "jaxchat", "search", "-m", str(chat_model), "--text", str(story)]
    command += ["--out", "found", "--window", "16", "--minutes", "5"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=environment())
    journal = tmp_path / "found" / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; the scores so far are in found/journal.jsonl: run again to go on" in err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "no text: give a file with --text"),
        (("--text", "STORY"), "no --out: give the directory"),
        (("--text", "STORY", "--out", "OUT", "--objective", "x"), "--objective: no task 'x'"),
        (("--text", "STORY", "--out", "OUT", "--minutes", "0"), "--minutes is '0'"),
        (
            ("--text", "STORY", "--out", "OUT", "--minutes", "1", "--plans", "2"),
            "cannot be combined with --plans",
        ),
        (("--text", "STORY", "--out", "OUT", "--plans", "0"), "--plans is '0'"),
        (("--text", "STORY", "--out", "OUT", "--search_share", "1"), "--search_share is '1'"),
        (
            ("--text", "STORY", "--out", "OUT", "--window", "96", "--max_tokens", "90"),
            "too short to search on",
        ),
        (("--text", "STORY", "--out", "STORY"), "give a directory to write to"),
        (("--text", "nowhere", "--out", "OUT"), "--text nowhere: No such file"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(commands, arguments, error, chat_model, story, tmp_path):
    known = {"STORY": story, "OUT": tmp_path / "out"}
    given = [known.get(argument, argument) for argument in arguments]
    assert error in commands.error("search", "-m", chat_model, *given, code=2)


def test_scores_of_another_search_are_not_mixed_in(commands, chat_model, story, tmp_path):
    arguments = ("search", "-m", chat_model, "--text", story, "--out", tmp_path / "out", *SMALL, "--noplots")
    commands.output(*arguments)
    assert "--objective is kl now and was loss" in commands.error(*arguments, "--objective", "kl", code=2)


@pytest.mark.parametrize(("flag", "package"), [((), "matplotlib"), (("--surrogate", "--noplots"), "optuna")])
def test_what_is_not_installed_is_told_before_anything_is_loaded(
    commands, chat_model, story, tmp_path, monkeypatch, flag, package
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ("search", "-m", chat_model, "--text", story, "--out", tmp_path / "out", *flag)
    assert f"this needs {package}, which is not installed" in commands.error(*arguments, code=1)
    assert not (tmp_path / "out").exists()


# --- tasks


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {
            "question": f"What is {number}?",
            "choices": ["a number", "a letter " + "x" * (number % 5)],
            "answer": number % 2,
        }
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_is_searched_for_with_probes_beside_it(commands, chat_model, story, questions, tmp_path):
    out = tmp_path / "found"
    task = f"choice:{questions}"
    arguments = ("-m", chat_model, "--objective", task, "--out", out, "--plans", "20", "--noplots")
    probes = ("--probe", f"completion:{completions(tmp_path)}", "--text", story, "--max_tokens", "99")
    commands.output("search", *arguments, *probes, "--metric", "bits_per_byte", "--candidates", "2")
    found = json.loads((out / "search.json").read_text())
    assert found["higher_is_better"] is False
    assert found["base_on_search"]["items"] == found["base_on_validation"]["items"] == 12
    assert {probe["name"].split(":")[0] for probe in found["candidates"][0]["probes"]} == {
        "loss",
        "completion",
    }


def completions(folder):
    path = folder / "completions.jsonl"
    rows = [{"context": f"The number {n} is", "continuation": " odd" if n % 2 else " even"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--objective", "arc_esay", "--data", "DATA"), "did you mean arc_easy"),
        (("--objective", "arc_easy"), "arc_easy: no data"),
        (("--objective", "choice:QUESTIONS", "--metric", "nonsense"), "has no metric 'nonsense'"),
        (("--objective", "loss", "--text", "STORY", "--metric", "acc"), "--metric is for tasks"),
        (("--objective", "match:MATCH"), "is not scored by the likelihood of continuations"),
        (("--objective", "choice:QUESTIONS,choice:QUESTIONS"), "give one task, and others with --probe"),
    ],
)
def test_tasks_that_cannot_be_searched_for_are_refused(
    commands, chat_model, story, questions, tmp_path, arguments, error
):
    match = tmp_path / "match.jsonl"
    match.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": str(n)}) + "\n" for n in range(3)))
    known = {"STORY": story, "DATA": tmp_path}
    given = [
        known.get(one) or str(one).replace("QUESTIONS", str(questions)).replace("MATCH", str(match))
        for one in arguments
    ]
    out = tmp_path / "out"
    assert error in commands.error("search", "-m", chat_model, *given, "--out", out, code=2)


# --- workers


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_two_workers_find_the_same_though_one_is_killed(chat_model, story, tmp_path):
    pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    command = [sys.executable, "-m", "jaxchat", "search", "-m", str(chat_model), "--text", str(story), *SMALL]
    command += ["--plans", "60", "--noplots", "--out"]
    for name in ("alone", "together"):
        process = subprocess.Popen(
            [*command, str(tmp_path / name), *(("--workers", "2") if name == "together" else ())],
            stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        journal = tmp_path / name / "journal.jsonl"
        if name == "together":
            while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
                time.sleep(0.01)
            os.kill(workers_of(process)[0], signal.SIGKILL)
        said = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, said
    assert "a worker has ended" in said
    alone, together = ((tmp_path / name / "plans.csv").read_text() for name in ("alone", "together"))
    assert alone == together


def test_a_cluster_that_does_not_answer_is_one_line(commands, chat_model, story, tmp_path):
    pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    arguments = ("search", "-m", chat_model, "--text", story, "--out", tmp_path / "out", *SMALL, "--noplots")
    done = commands(*arguments, "--ray", "127.0.0.1:1")
    assert done.code == 1
    assert "--ray 127.0.0.1:1: no cluster answers there (Connection refused)" in done.err.splitlines()[-1]
