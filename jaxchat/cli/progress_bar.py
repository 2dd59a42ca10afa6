"""Progress bars on standard error, for people: none where it is not a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

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


class _Rate(ProgressColumn):
    """Things a second."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The cell."""
        return Text("" if task.speed is None else f"{task.speed:.3g} {self._unit}/s")
