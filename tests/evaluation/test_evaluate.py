"""`jaxchat evaluate`: what it writes, what it compares, what it refuses, and kills that change nothing."""

import csv
import itertools
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.evaluation import report
from jaxchat.evaluation.baseline import read_baseline
from jaxchat.evaluation.items import Choice, Completion, Figure, Outcome, Request
from jaxchat.evaluation.run import Measured
from jaxchat.evaluation.statistics import mcnemar
from jaxchat.evaluation.tasks import Prepared
from tests.support.adapters import lora_tensors, projections, write_adapter
from tests.support.commands import environment
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey", "gold"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and questions of every kind."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_chat(folder / "model", max_position_embeddings=96)
    choices = [
        {"question": f"Number {n} is", "choices": WORDS[n % 5 : n % 5 + 3], "answer": n % 3}
        for n in range(40)
    ]
    matches = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
    completions = [
        {"context": f"{word} and", "continuation": f" {other}"} for word, other in itertools.pairwise(WORDS)
    ]
    for name, rows in (("choices", choices), ("matches", matches), ("completions", completions)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "text.txt").write_text(" ".join(WORDS * 90))
    return folder


ALL = "choice:choices.jsonl,completion:completions.jsonl,text:text.txt,match:matches.jsonl"
SMALL = ("--batch", "1", "--noplots")
SHORT = ("--max_new_tokens", "4", "--window", "48")


def evaluate(commands, place, monkeypatch, *arguments, out, tasks="choice:choices.jsonl"):
    monkeypatch.chdir(place)
    return commands("evaluate", "-m", "model", "--tasks", tasks, "--out", out, *SMALL, *arguments)


def read(place, out, file="evaluation.json"):
    return json.loads((place / out / file).read_text())


def test_every_kind_of_task_is_scored_and_written(commands, place, monkeypatch):
    done = evaluate(commands, place, monkeypatch, *SHORT, "--plots", "--seed", "3", out="all", tasks=ALL)
    assert done.code == 0, done.err
    assert "items: 40 of choice:choices.jsonl, 8 of completion:completions.jsonl" in done.err
    found = read(place, "all")
    assert (found["model"], found["layer_spec"], found["seed"]) == ("model", "all", 3)
    flags = "--max_new_tokens 4 --window 48 --batch 1 --seed 3 --out all"
    assert found["command"] == f"jaxchat evaluate --model model --tasks {ALL} {flags}"
    assert found["versions"].keys() == {"jaxchat", "jax"}
    tasks = {task["name"].partition(":")[0]: task for task in found["tasks"]}
    assert {name: (task["metric"], task["items"], task["chat_template"]) for name, task in tasks.items()} == {
        "choice": ("acc", 40, False), "completion": ("acc", 8, False), "text": ("bits_per_byte", 3, False),
        "match": ("normalized", 9, True),
    }  # fmt: skip
    accuracy = tasks["choice"]["scores"]["acc"]
    values = tasks["choice"]["rows"]["metrics"]["acc"]["values"]
    assert accuracy["value"] == np.mean(values)
    assert accuracy["error"] == pytest.approx(np.std(values, ddof=1) / 40**0.5)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    nats = tasks["text"]["scores"]["nats_per_token"]
    assert nats["perplexity"]["value"] == pytest.approx(np.exp(nats["value"]))
    lines = list(csv.DictReader((place / "all" / "evaluation.csv").open()))
    assert [
        float(line["value"])
        for line in lines
        if (line["task"], line["metric"]) == ("choice:choices.jsonl", "acc")
    ] == values
    items = [json.loads(line) for line in (place / "all" / "items.jsonl").read_text().splitlines()]
    assert len(items) == 40 + 8 + 3 + 9
    assert {"reply", "finish_reason"} <= items[-1].keys()
    markdown = (place / "all" / "evaluation.md").read_text()
    assert "| choice:choices.jsonl | acc |" in markdown
    assert "- text:text.txt: 3 of 3 items, 0 examples, as text, no context too long" in markdown
    assert (place / "all" / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plan_is_compared_with_a_baseline_item_by_item(commands, place, monkeypatch):
    assert evaluate(commands, place, monkeypatch, out="plain").code == 0
    flags = ("--layer_spec", "0,2", "--plots", "--baseline", "plain/evaluation.json")
    done = evaluate(commands, place, monkeypatch, *flags, out="other")
    assert done.code == 0, done.err
    (mine,), (theirs,) = (read(place, out)["tasks"] for out in ("other", "plain"))
    for name in ("acc", "bits_per_byte"):
        pair = mine["compared"][name]
        own, other = (np.array(task["rows"]["metrics"][name]["values"]) for task in (mine, theirs))
        weights = np.array(mine["rows"]["metrics"][name]["weights"])
        assert pair["baseline"] == pytest.approx(np.average(other, weights=weights))
        assert pair["difference"]["value"] == pytest.approx(np.average(own - other, weights=weights))
        better, worse = int((own > other).sum()), int((own < other).sum())
        assert (pair["better"], pair["worse"]) == ((better, worse) if name == "acc" else (worse, better))
        assert pair["mcnemar_p"] == (mcnemar(better, worse) if name == "acc" else None)
    assert "McNemar p" in (place / "other" / "evaluation.md").read_text()
    assert f"choice:choices.jsonl: acc {mine['compared']['acc']['difference']['value']:+.4f} from" in done.out
    assert read(place, "other")["baseline"] == {
        "file": "plain/evaluation.json",
        "model": "model",
        "layer_spec": "all",
    }


def test_items_that_the_baseline_has_not_are_told(commands, place, monkeypatch):
    assert evaluate(commands, place, monkeypatch, "--limit", "20", out="twenty").code == 0
    tasks = "choice:choices.jsonl,completion:completions.jsonl"
    flags = ("--few_shot", "1", "--baseline", "twenty/evaluation.json")
    done = evaluate(commands, place, monkeypatch, *flags, out="more", tasks=tasks)
    assert done.code == 0, done.err
    assert "twenty/evaluation.json has no completion:completions.jsonl: it is not compared" in done.err
    assert (
        "choice:choices.jsonl: 20 of 40 items are in twenty/evaluation.json, too; those are compared"
        in done.err
    )
    assert "20 of 20 items were asked otherwise in twenty/evaluation.json" in done.err
    first, second = read(place, "more")["tasks"]
    assert first["compared"]["acc"]["difference"]["items"] == 20
    assert second["compared"] == {}


def test_the_same_command_measures_nothing_again(commands, place, monkeypatch):
    assert evaluate(commands, place, monkeypatch, "--limit", "5", out="again").code == 0
    before = (place / "again" / "evaluation.json").read_bytes()
    done = evaluate(commands, place, monkeypatch, "--limit", "5", out="again")
    assert (done.code, (place / "again" / "evaluation.json").read_bytes()) == (0, before)
    assert "5 results are there already" in done.err
    assert "a second" not in done.err
    more = evaluate(commands, place, monkeypatch, out="again")
    assert "40 of choice:choices.jsonl; 5 results are there already" in more.err
    refused = evaluate(commands, place, monkeypatch, "--layer_spec", "0,2", out="again")
    assert refused.code == 2
    assert "--layer_spec is 0,2 now and was all" in refused.err


REFUSED = {
    "no tasks: name some with --tasks": ["--out", "o"],
    "no --out: give the directory": ["--tasks", "piqa"],
    "--tasks: no task 'pika'; did you mean piqa": ["--tasks", "pika", "--out", "o"],
    "say where its files are with --data DIR": ["--tasks", "piqa", "--out", "o"],
    "none.jsonl: no such file": ["--tasks", "choice:none.jsonl", "--out", "o"],
    "none.json: no such file; give the evaluation.json": [
        "--tasks", "choice:choices.jsonl", "--out", "o", "--baseline", "none.json",
    ],
    "choices.json: not readable as JSON": [
        "--tasks", "choice:choices.jsonl", "--out", "o", "--baseline", "choices.json",
    ],
    "--few_shot is 1, but text:text.txt has no examples": [
        "--tasks", "text:text.txt", "--out", "o", "--few_shot", "1",
    ],
    "leave --apply_chat_template out": ["--tasks", "text:text.txt", "--out", "o", "--apply_chat_template"],
    "--window is for tasks of long texts": ["--tasks", "choice:choices.jsonl", "--out", "o", "--window", "9"],
    "--max_new_tokens is for tasks": ["--tasks", "text:text.txt", "--out", "o", "--max_new_tokens", "9"],
    "--window is 97; expected 2 to 96": ["--tasks", "text:text.txt", "--out", "o", "--window", "97"],
    "--stride is 9, and --window 8": [
        "--tasks", "text:text.txt", "--out", "o", "--window", "8", "--stride", "9",
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_be_refused_is_before_the_weights_are_read(commands, place, monkeypatch, message):
    monkeypatch.chdir(place)
    (place / "choices.json").write_text("{")
    monkeypatch.setattr(
        "jaxchat.cli.model_flags.LoadFlags.load", lambda *_, **__: pytest.fail("read weights")
    )
    done = commands("evaluate", "-m", "model", *REFUSED[message])
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_template_is_asked_of_models_that_have_one(commands, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    bare = write_tiny_chat(tmp_path / "bare", template=None)
    refused = commands.error(
        "evaluate",
        "-m",
        bare,
        "--tasks",
        "choice:choices.jsonl",
        "--out",
        "o",
        "--apply_chat_template",
        code=2,
    )
    assert "the model has no chat template" in refused
    done = evaluate(
        commands,
        place,
        monkeypatch,
        "--noapply_chat_template",
        "--limit",
        "1",
        out="text",
        tasks="match:matches.jsonl",
    )
    assert done.code == 0, done.err
    assert read(place, "text")["tasks"][0]["chat_template"] is False
    assert "--noapply_chat_template" in read(place, "text")["command"]


def test_a_model_without_a_tokenizer_is_refused(commands, place, monkeypatch, tiny_directory):
    monkeypatch.chdir(place)
    directory = tiny_directory("llama")
    found = commands.error(
        "evaluate", "-m", directory, "--tasks", "choice:choices.jsonl", "--out", "o", code=2
    )
    assert "has no tokenizer, and tasks are texts" in found


def test_an_adapter_is_evaluated_and_told_from_another_strength(commands, place, monkeypatch):
    modules = projections(ModelDirectory.at(place / "model").config)
    write_adapter(place / "poet", lora_tensors(modules), target_modules="all-linear")
    found = []
    for number, flags in enumerate(([], ["--adapter", "poet"], ["--adapter", "poet=0.5"])):
        done = evaluate(commands, place, monkeypatch, "--limit", "2", *flags, out=f"adapter{number}")
        assert done.code == 0, done.err
        found.append(read(place, f"adapter{number}"))
    assert [one["adapters"] for one in found] == [[], ["poet"], ["poet=0.5"]]
    assert len({one["tasks"][0]["scores"]["bits_per_byte"]["value"] for one in found}) == 3
    refused = evaluate(commands, place, monkeypatch, "--adapter", "poet=0.2", out="adapter2")
    assert (refused.code, "--adapter is" in refused.err) == (2, True)


def test_tasks_and_reports_need_no_jax():
    code = (
        "import sys; from jaxchat.evaluation import baseline, likelihood, report, run, tasks; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_damaged_baseline_is_refused(tmp_path):
    rows = {"ids": ["a"], "digests": ["x"], "metrics": {"acc": {"values": [1.0], "weights": [1.0]}}}
    good = {"format": 1, "model": "m", "layer_spec": "all", "tasks": [{"name": "t", "rows": rows}]}
    path = tmp_path / "evaluation.json"

    def write(value):
        path.write_text(json.dumps(value))
        return path

    assert read_baseline(write(good)).tasks["t"].ids == ["a"]
    for change, message in (
        ({"format": 2}, "format is 2; this version reads 1"),
        ({"tasks": 3}, "tasks is 3; expected a list"),
        ({"tasks": [{"name": "t", "rows": {**rows, "ids": ["a", "a"]}}]}, "an id is there twice"),
        ({"tasks": [{"name": "t", "rows": {**rows, "digests": []}}]}, "differ in length"),
    ):
        with pytest.raises(Exception, match=message):
            read_baseline(write({**good, **change}))


# --- reports without a model


def measured(values, *, groups=("",), weights=None, name="t", metric="acc"):
    items = [Completion(str(n), Request("a", "b"), groups[n % len(groups)]) for n in range(len(values))]
    weights = [1.0] * len(values) if weights is None else weights
    outcomes = [
        Outcome({metric: Figure(v, w)}, cut=n % 2)
        for n, (v, w) in enumerate(zip(values, weights, strict=True))
    ]
    return Measured(Prepared(name, "", metric, tuple(items), total=len(items)), tuple(outcomes))


def test_right_and_wrong_of_few_items_is_not_called_sure():
    (summary,) = report.summaries([measured([1.0, 1.0, 1.0])])
    score = summary.scores["acc"]
    assert (score.value, score.items, score.high) == (1, 3, pytest.approx(1))
    assert score.low < 0.5
    assert summary.cut == (1, 1)


def test_parts_of_a_task_have_scores_of_their_own():
    (summary,) = report.summaries([measured([1.0, 0.0] * 6, groups=("a", "b"))])
    assert {group: score.value for group, score in summary.groups.items()} == {"a": 1, "b": 0}
    assert "| a | 1.0000 |" in report.as_markdown([summary], {"model": "m"}).decode()


def test_a_ratio_is_over_all_items_together():
    (summary,) = report.summaries([measured([1.0, 4.0], weights=[3.0, 1.0], metric="nats_per_token")])
    assert summary.scores["nats_per_token"].value == pytest.approx(7 / 4)
    value = json.loads(report.as_json([summary], {}))["tasks"][0]["scores"]["nats_per_token"]
    assert value["perplexity"]["value"] == pytest.approx(np.exp(7 / 4))


def test_one_item_has_no_interval():
    (summary,) = report.summaries([measured([2.5], metric="nats")])
    value = json.loads(report.as_json([summary], {}))["tasks"][0]["scores"]["nats"]
    assert (value["value"], value["error"], value["low"]) == (2.5, None, None)
    assert "| unknown | 1 |" in report.as_markdown([summary], {"model": "m"}).decode()


def test_ratios_over_other_tokens_are_not_compared(tmp_path):
    def written(weight):
        one = measured([1.0, 2.0], weights=[weight, 2.0], metric="nats_per_token")
        path = tmp_path / "b.json"
        path.write_bytes(report.as_json(report.summaries([one]), {"model": "m", "layer_spec": "all"}))
        return one, read_baseline(path)

    one, same = written(2.0)
    assert (
        report.summaries([one], baseline=same)[0].compared["nats_per_token"].comparison.difference.value == 0
    )
    _, other = written(3.0)
    assert report.summaries([one], baseline=other)[0].compared == {}


def test_names_with_bars_stay_in_their_cells():
    (summary,) = report.summaries([measured([1.0, 0.0], name="choice:a|b.jsonl")])
    assert "choice:a\\|b.jsonl" in report.as_markdown([summary], {"model": "m|n"}).decode()


# --- kills


def command(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxchat", "evaluate", "-m", "model", "--tasks", ALL, "--out", "out",
         *SMALL, *SHORT],
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(folder, more):
    """A run that is killed once its journal has so many lines more; False if it ended before."""
    journal = folder / "out" / "journal.jsonl"
    before, run = lines_of(journal), command(folder)
    while run.poll() is None:
        if lines_of(journal) >= before + more:
            run.kill()
            break
        time.sleep(0.002)
    run.communicate()
    return run.returncode != 0


def finished(folder):
    run = command(folder)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err.decode()
    return {
        name: (folder / "out" / name).read_bytes()
        for name in ("evaluation.json", "evaluation.csv", "items.jsonl")
    }


def kill_again_and_again(place, tmp_path, times):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        for path in place.iterdir():
            if path.name not in ("out",) and (path.is_file() or path.name == "model"):
                os.symlink(path, folder / path.name)
    expected = finished(folders[0])
    count = expected["items.jsonl"].count(b"\n")
    draw = random.Random()
    seed = draw.randrange(10**6)
    print("seed", seed)
    draw.seed(seed)
    kills = sum(killed(folders[1], draw.randint(1, max(count // times, 1))) for _ in range(times))
    assert kills > times // 2
    assert finished(folders[1]) == expected


def test_kills_do_not_change_a_byte(place, tmp_path):
    kill_again_and_again(place, tmp_path, 2)


@pytest.mark.full
def test_twenty_kills_do_not_change_a_byte(place, tmp_path):
    kill_again_and_again(place, tmp_path, 20)


def test_choices_are_items_of_the_report():
    item = Choice("a", (Request("q", " x"), Request("q", " y")), 0)
    outcome = Outcome({"acc": Figure(1.0)}, detail={"chosen": 0})
    task = Measured(Prepared("t", "", "acc", (item,), total=1), (outcome,))
    (line,) = report.items_json(report.summaries([task])).decode().splitlines()
    assert json.loads(line) == {
        "task": "t",
        "item": "a",
        "scores": {"acc": 1.0},
        "tokens_cut": 0,
        "chosen": 0,
    }
