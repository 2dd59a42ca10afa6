"""`jaxchat train`, as its users run it."""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

import jaxchat
from tests.support.commands import environment, run_process
from tests.support.tiny import write_tiny_hf

WORDS = ("sun", "sea", "dog", "red", "old", "big", "sky", "run")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations that are all alike, and some that are held out."""
    folder = tmp_path_factory.mktemp("data")
    for name, start in (("train", 0), ("eval", 3)):
        rows = [
            {"messages": [{"role": "user", "content": f"Say {word}."},
                          {"role": "assistant", "content": f"O {word}, my {word}! O {word}!"}]}
            for word in WORDS[start:]
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(data, out, *more):
    return [
        "train", "--task", "lora", "-m", "box", "--data_path", data / "train.jsonl", "--output_dir", out,
        "--model_max_length", "64", "--per_device_train_batch_size", "4", "--logging_steps", "1",
        "--learning_rate", "0.01", "--lora_rank", "4", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that goes on after it was interrupted, as one process after the other."""
    out = tmp_path_factory.mktemp("trained")
    more = ("--eval_data_path", data / "eval.jsonl", "--max_steps", "12", "--save_steps", "1")
    command = [sys.executable, "-m", "jaxchat", *map(str, arguments(data, out, *more))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and sum("learning_rate" in line for line in metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert b"--resume goes on" in told
    done = run_process("jaxchat", *arguments(data, out, *more, "--resume"))
    assert done.code == 0, done.err
    return out, done


def test_a_run_goes_on_where_it_was_interrupted_and_says_what_to_do_with_it(trained):
    out, done = trained
    assert "goes on after step" in done.err
    lines = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    before, after = (line["eval_loss"] for line in (lines[0], lines[-1]))
    assert lines[0]["step"] == 0
    assert after < before - 1
    assert done.out.splitlines() == [
        f"{out}/adapter: held-out loss {after:.4f} (before: {before:.4f}) after 12 steps; use it with",
        f"  jaxchat chat -m box --adapter {out}/adapter",
    ]
    assert (out / "loss.png").exists()


def test_the_adapter_says_what_it_has_learnt(trained):
    out, _ = trained
    model = jaxchat.load("box", adapter=out / "adapter")
    assert model.chat("Say sun.", max_new_tokens=12).text.startswith("O sun")
    assert not model.with_adapters(None).chat("Say sun.", max_new_tokens=12).text.startswith("O ")


def test_flags_of_other_trainers_mean_the_same(commands, data, tmp_path):
    """Booleans with a value, and the model by its other name; here they lead to a plan without new layers."""
    told = commands.error(
        "train", "--task", "blocks", "--model_name_or_path", "box", "--data_path", data / "train.jsonl",
        "--output_dir", tmp_path / "out", "--lazy_preprocess", "True", "--load_in_8bit", "True",
        "--evaluation_strategy", "no", "--save_strategy", "steps", "--save_total_limit", "2", code=2,
    )  # fmt: skip
    assert "there is no new layer in this plan" in told


CHIMERA = """
    --model_name_or_path box --data_path train.jsonl --eval_data_path eval.jsonl --output_dir out
    --num_train_epochs 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 2 --evaluation_strategy "steps" --eval_steps 50 --save_strategy "steps"
    --save_steps 200 --save_total_limit 2 --learning_rate 2e-4 --weight_decay 0.0 --warmup_ratio 0.01
    --lr_scheduler_type "cosine" --logging_steps 1 --model_max_length 64 --lazy_preprocess True
    --chimera_num_heads 4 --chimera_num_layers 1
"""


@pytest.mark.parametrize("more", ["", *[pytest.param("--load_in_8bit True", marks=pytest.mark.full)]])
def test_chimera_is_trained_by_the_flags_of_its_authors(commands, data, tmp_path, more):
    """All of `chimera/train.py`'s, in its README's two command lines; the paths are these."""
    words = [f"{data}/{word}" if word.endswith(".jsonl") else word for word in shlex.split(CHIMERA + more)]
    words[words.index("out")] = out = str(tmp_path / "out")
    done = run_process("jaxchat", "train", "--task", "chimera", *words)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{out}/chimera: held-out loss ")
    assert done.out.endswith(f"jaxchat chat -m box --draft chimera:{out}/chimera\n")
    assert lines_of(tmp_path / "out/metrics.jsonl")[-1]["head4_top5"] >= 0
    if not more:
        return
    again = ("--eval_only", "--eval_data_path", data / "train.jsonl")
    told = commands.output("train", "--task", "chimera", *words, *again).splitlines()
    assert told[0].startswith("after ")
    assert [line.split()[0] for line in told[1:4]] == ["eval_loss", "head1_top1", "head1_top5"]
    asked = ("generate", "-p", "Hello!", "--max_new_tokens", "8")
    assert commands.output(*asked, "--draft", f"chimera:{out}/chimera") == commands.output(*asked)


@pytest.mark.parametrize(
    ("more", "code", "complaint"),
    [
        (["--task", "lora"], 2, "--data_path must be given"),
        (["--task", "full", "--quant", "int8", "--data_path", "DATA"], 2, "leave --quant out"),
        (["--task", "blocks", "--lora_rank", "4", "--data_path", "DATA"], 2, "--lora_rank is for"),
        (["--task", "lora", "--data_path", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--task", "lora", "--data_path", "BROKEN", "--nolazy_preprocess"], 1, "broken.jsonl:2"),
        (["--task", "lora", "--data_path", "BROKEN"], 1, "broken.jsonl:2"),
        (["--task", "lora", "--data_path", "DATA", "--lora_targets", "query"], 2, "'query' is none of all"),
        (["--task", "lora", "--data_path", "DATA", "--report_to", "paper"], 2, "expected tensorboard"),
        (["--task", "chimera", "--data_path", "DATA", "--chimera_num_layers", "2"], 2, "has one layer"),
        (["--task", "chimera", "--data_path", "DATA", "--chimera_losses", "mse"], 2, "'mse' is none"),
        (["--task", "lora", "--data_path", "DATA", "--eval_only"], 2, "needs --eval_data_path"),
        (["--task", "lora", "--data_path", "DATA", "--eval_only", "--eval_data_path", "DATA"], 2, "no run"),
        (["--task", "lora", "--data_path", "DATA", "--max_steps", "1", "--max_minutes", "1"], 2, "give one"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line(commands, data, tmp_path, more, code, complaint):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 3}\n')
    places = {"DATA": data / "train.jsonl", "BROKEN": broken}
    given = [places.get(word, word) for word in more]
    told = commands.error("train", "-m", "box", "--output_dir", tmp_path / "out", *given, code=code)
    assert complaint in told


def test_what_is_not_installed_is_named(commands, data, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optax" else found(name))
    told = commands.error(*arguments(data, tmp_path / "out"), code=1)
    assert "training needs optax; pip install 'jaxchat[train]'" in told


def test_a_model_without_a_tokenizer_is_refused(commands, data, tmp_path):
    write_tiny_hf(tmp_path / "bare", "llama")
    given = arguments(data, tmp_path / "out")
    given[given.index("box")] = tmp_path / "bare"
    assert "has no tokenizer" in commands.error(*given, code=2)
