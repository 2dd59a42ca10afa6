"""What a run says while it goes on: JSON lines in `metrics.jsonl`, a plot, and whoever else is told."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxchat.errors import UsageError
from jaxchat.files import write_atomically

FILE, PLOT = "metrics.jsonl", "loss.png"


class Sink(Protocol):
    """Another place for the numbers."""

    def write(self, step: int, values: dict[str, float], /) -> None:
        """Adds the numbers of a step."""

    def close(self) -> None:
        """Ends it."""


class Journal:
    """The lines of a run, those after the checkpoint it goes on from left out."""

    def __init__(self, directory: Path, step: int, sinks: Sequence[Sink] = ()):
        self._path, self._sinks = directory / FILE, sinks
        self.lines = [line for line in _read(self._path) if line["step"] <= step]
        write_atomically(self._path, "".join(map(_line, self.lines)).encode())

    def write(self, *, step: int, **values: Any) -> None:
        """Adds a line."""
        self.lines.append({"step": step, **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(self.lines[-1]))
        for sink in self._sinks:
            sink.write(step, values)

    def last(self, name: str) -> float:
        """The last value of that name; NaN where there is none."""
        return next((line[name] for line in reversed(self.lines) if name in line), float("nan"))

    def plot(self) -> None:
        """Draws training and held-out loss over steps; nothing where there are no lines."""
        from matplotlib.figure import Figure  # takes a second

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
        for key, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "held out")):
            points = [(line["step"], line[key]) for line in self.lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        if not axes.lines:
            return
        axes.legend()
        figure.savefig(self._path.with_name(PLOT), dpi=90)

    def close(self) -> None:
        """Ends the sinks."""
        for sink in self._sinks:
            sink.close()


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what an interruption cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class _TensorBoard:
    def __init__(self, directory: Path):
        from tensorboard.summary import Writer

        self._writer = Writer(os.fspath(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path):
        import wandb

        self._run = wandb.init(project="jaxchat", dir=os.fspath(directory), name=directory.name)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
"""`--report_to` -> what it makes; the packages are the user's own."""


def sink(name: str, directory: Path) -> Sink:
    """One of `SINKS`.

    Raises:
      UsageError: its package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"--report_to {name}: {name} is not installed; pip install {name}, or leave it out")
    return SINKS[name](directory)
