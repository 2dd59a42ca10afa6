"""Progress bars on standard error, for people: none where it is not a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

Report = Callable[[int, int], None]
"""Called with how much of how much is done."""


@contextlib.contextmanager
def loading_bar(
    *, hidden: bool = False, before: Callable[[], None] = lambda: None
) -> Iterator[Report | None]:
    """Bytes with rate and remaining time, once loading turns out to take more than a second.

    Args:
      hidden: show nothing.
      before: called before it appears.
    """
    bar = _bytes_bar("loading")
    if bar.disable or hidden:
        yield None
        return
    started = time.perf_counter()
    task = bar.add_task("", total=None)

    def report(done: int, total: int) -> None:
        elapsed = time.perf_counter() - started
        if not bar.live.is_started and elapsed > 0.3 and elapsed * total > done:
            before()
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()  # also shows the cursor again


@contextlib.contextmanager
def copying_bar(label: str) -> Iterator[Report]:
    """Bytes with rate and remaining time, from the first report on, which says how many there are."""
    bar = _bytes_bar(label)

    def report(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task("", total=total)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done)

    try:
        yield report
    finally:
        bar.stop()


def _bytes_bar(label: str) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


@contextlib.contextmanager
def counting_bar(label: str, unit: str) -> Iterator[Report]:
    """Things done of all, with their rate, the time so far and the time that remains.

    What is done at the first report was done before, and does not count for the rate.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn(label), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip

    def report(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task("", total=total, completed=done)
        bar.update(bar.tasks[0].id, completed=done)

    with bar:
        yield report


@contextlib.contextmanager
def share_bar(label: str, unit: str) -> Iterator[Callable[[float, int], None]]:
    """The part of a budget that is spent, what was done for it, its rate, and the time that remains."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn(label), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    started: tuple[int, float] | None = None

    def report(spent: float, done: int) -> None:
        nonlocal started
        if started is None:  # what is done at the first report was done before, or compiled
            started = done, time.monotonic()
            bar.add_task("", total=1.0)
        before, begun = started
        rate = (done - before) / max(time.monotonic() - begun, 1e-9)
        text = f"{done} {unit}" + (f", {rate:.3g} {unit}/s" if done > before else "")
        bar.update(bar.tasks[0].id, completed=spent, description=text)

    with bar:
        yield report


@contextlib.contextmanager
def training_bar(*, every: int) -> Iterator[Callable[["StepReport"], None]]:
    """How much is done, with loss, tokens a second and the time that remains; a line where no terminal is.

    Args:
      every: steps between such lines.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("training"), BarColumn(), TextColumn("{task.percentage:.1f} %"),
        TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    started: tuple[float, float] | None = None

    def report(now: "StepReport") -> None:
        nonlocal started
        if started is None:  # the first step compiles, too
            started = now.done, time.monotonic()
            bar.add_task("", total=1.0)
        text = f"step {now.step}: loss {now.loss:.4f}, {now.tokens_per_second:,.0f} tokens/s"
        bar.update(bar.tasks[0].id, completed=now.done, description=text)
        if bar.disable and (now.step % every == 0 or now.done >= 1):
            first, begun = started
            pace = (time.monotonic() - begun) / max(now.done - first, 1e-9)
            left = f", {pace * max(1 - now.done, 0) / 60:.1f} min left" if now.done > first else ""
            print(f"{text}, {now.done:.1%}{left}", file=sys.stderr, flush=True)

    with bar:
        yield report


@contextlib.contextmanager
def job_bar() -> Iterator[Callable[["JobReport"], None]]:
    """Lines done of all, tokens a second and the time that remains."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("lines"),
        TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    started = time.monotonic()

    def report(now: "JobReport") -> None:
        if not bar.tasks:
            bar.add_task("", total=now.total, completed=now.lines)
        rate = now.tokens / max(time.monotonic() - started, 1e-9)
        bar.update(bar.tasks[0].id, completed=now.lines, description=f"{rate:,.0f} tokens/s")

    with bar:
        yield report


class JobReport(Protocol):
    """How far a job is: see `jobs.job.Progress`."""

    @property
    def lines(self) -> int:
        """That have an answer."""

    @property
    def total(self) -> int:
        """Of all."""

    @property
    def tokens(self) -> int:
        """Of this run."""


class StepReport(Protocol):
    """How far a training is: see `training.trainer.Report`."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def done(self) -> float:
        """Of the whole run, 0 to 1."""

    @property
    def loss(self) -> float:
        """Of the last one."""

    @property
    def tokens_per_second(self) -> float:
        """Learnt."""


class _Rate(ProgressColumn):
    """Things a second."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The cell."""
        return Text("" if task.speed is None else f"{task.speed:.3g} {self._unit}/s")
