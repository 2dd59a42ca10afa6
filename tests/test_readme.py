"""The README's examples run as they stand, with a real model in place of its path."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


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


def test_the_commands_run(model_path: str, shared_data: Path, tmp_path: Path):
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("path/to/model", model_path))
    story = (shared_data / "corpora" / "tinystories_2MiB.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "story.txt").write_text(re.sub(r"[^a-z ]", "", story.lower()))  # what the model can read
    for command in commands():
        words = shlex.split(command.replace("path/to/model", model_path))
        if words[1].startswith(("tools/", "examples/")):
            words[1] = str(ROOT / words[1])
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, input="", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for made in ("back-to-hf/model.safetensors", "expanded/config.json", "report/layers.csv", "talk.session"):
        assert (tmp_path / made).exists()


def test_the_first_commands_are_chat_and_test():
    first = [line.split()[:2] for line in blocks("sh")[0].splitlines()]
    assert first == [["make", "chat"], ["make", "test"]]
