"""The README's examples run as they stand, with a real model in place of its path."""

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from jaxchat import __main__ as program
from jaxchat.checkpoints.chimera import write_chimera
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.layers.chimera import ChimeraConfig, initial_params
from tests.support.adapters import lora_tensors, projections, write_adapter

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "jaxchat "))]


@pytest.fixture
def model_path(shared_data: Path) -> str:
    return str(shared_data / "models" / "CraftGPT-hf")


def test_the_python_example_runs(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(compile(block.replace("path/to/model", model_path), "README.md", "exec"), {})
    assert "i enjoy listening to music" in capsys.readouterr().out


def main_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """What a command of the README runs, to be called in this process."""
    if words[0] == "jaxchat":
        return program.main
    if words[1] == "-m":
        return importlib.import_module(words[2]).main
    path = ROOT / words[1]
    monkeypatch.syspath_prepend(path.parent)
    return importlib.import_module(f"tools.{path.stem}" if path.parent.name == "tools" else path.stem).main


def arguments_of(words: list[str]) -> list[str]:
    """The arguments as `main` takes them, the program's name first."""
    return words[2:] if words[1] == "-m" else words if words[0] == "jaxchat" else words[1:]


def test_the_commands_run(
    model_path: str,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("path/to/model", model_path))
    story = (shared_data / "corpora" / "tinystories_2MiB.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "story.txt").write_text(re.sub(r"[^a-z ]", "", story.lower()))  # what the model can read
    modules = projections(ModelDirectory.at(model_path).config)
    write_adapter(tmp_path / "path/to/adapter", lora_tensors(modules), target_modules="all-linear")
    asked = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello, poet"}
    for name in ("chats.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(f"{json.dumps({'messages': asked})}\n" * 3)
    quiz = [{"question": "do you like", "choices": ["music", "stone"], "answer": n % 2} for n in range(3)]
    (tmp_path / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in quiz))
    (questions,) = blocks("jsonl")
    (tmp_path / "questions.jsonl").write_text(questions)
    base, heads = load_params(model_path), ChimeraConfig(heads=3)
    write_chimera(tmp_path / "path/to/heads", heads, initial_params(heads, *base, jax.random.key(0)), *base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    chatted = False
    for command in commands():
        words = shlex.split(command.replace("path/to/model", model_path))
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        code = main_of(words, monkeypatch)(arguments_of(words))
        out, err = capsys.readouterr()
        assert code == 0, f"{command}\n{err}"
        if command == 'jaxchat generate -m path/to/model -p "do you like music?"':
            assert out == "yes, i enjoy listening to music while i feel happy and relaxed.\n"
            chatted = True
    assert chatted
    for made in (
        "poet/adapter/adapter_config.json",
        "back-to-hf/model.safetensors",
        "expanded/config.json",
        "report/layers.csv",
        "longer/evaluation.json",
    ):
        assert (tmp_path / "out" / made).exists()


def test_the_transcript_is_what_its_command_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (transcript,) = re.findall(r"^```\n\$ (jaxchat chat .*?)^```", TEXT, flags=re.M | re.S)
    command, *lines = transcript.splitlines()
    typed = [line.removeprefix("You  > ") for line in lines if line.startswith("You  > ")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    assert program.main(shlex.split(command)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [line.removeprefix("A.I. > ") for line in lines if line.startswith("A.I. > ")]
    assert err.splitlines() == [line for line in lines if not line.startswith(("You  > ", "A.I. > "))]


def test_the_examples_say_what_is_printed_below_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (block,) = re.findall(r"^```\n(\$ python examples/.*?)^```", TEXT, flags=re.M | re.S)
    for part in block.replace("\\\n", "").split("\n\n"):
        command, *lines = part.strip().removeprefix("$ ").splitlines()
        words = shlex.split(command)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        assert main_of(words, monkeypatch)(arguments_of(words)) == 0
        out, err = capsys.readouterr()
        beside = [line for line in lines if line.startswith("(")]
        assert out.splitlines() == [line for line in lines if line not in beside]
        assert [line for line in err.splitlines() if line.startswith("(")] == beside


def test_a_module_and_a_script_run_as_processes(model_path: str, tmp_path: Path):
    found = [command for command in commands() if "tools/convert.py" in command or "jaxchat.plan" in command]
    for command in (found[0], found[-1]):
        words = shlex.split(command.replace("path/to/model", model_path))
        words = [str(ROOT / word) if word.startswith("tools/") else word for word in words]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, input="", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_first_commands_are_chat_and_test():
    first = [line.split()[:2] for line in blocks("sh")[0].splitlines()]
    assert first == [["make", "chat"], ["make", "test"]]
