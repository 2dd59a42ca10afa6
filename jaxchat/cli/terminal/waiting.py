"""One line that says what is waited for, on standard error of a terminal, until there is more to show."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from jaxchat.cli.stats import CompileClock
from jaxchat.cli.terminal.wrapping import Screen
from jaxchat.cli.terminal.writing import is_dumb, is_terminal

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PATIENCE, _TICK = 0.4, 0.1
"""Seconds before the line appears, and between its movements."""
_ERASE = "\r\x1b[K"


def reply_awaited(clock: CompileClock, *, hidden: bool) -> "Waiting":
    """Waits for the first words of a reply: until the prompt is read, and for the compiler where it runs."""
    return Waiting(
        lambda: "compiling, once for this model" if clock.compiling else "reading the prompt",
        after_interrupt=lambda: "stopping after the compile" if clock.compiling else "stopping",
        hidden=hidden,
    )


class Waiting:
    """A context in whose time the line is shown, unless it is short or nobody would see it.

    Ctrl-C is told at once: while XLA compiles, no handler of Python's runs, but the signal writes to a pipe.

    Args:
      text: gives the line, again and again.
      after_interrupt: the same once Ctrl-C was pressed.
      hidden: shows nothing.
    """

    def __init__(
        self,
        text: Callable[[], str],
        *,
        after_interrupt: Callable[[], str] = lambda: "stopping",
        hidden: bool = False,
    ):
        self._text, self._after_interrupt = text, after_interrupt
        self._shown = not hidden and is_terminal(sys.stderr) and not is_dumb()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._shown and threading.current_thread() is threading.main_thread():
            self._reads, self._writes = os.pipe()
            os.set_blocking(self._reads, False)
            os.set_blocking(self._writes, False)
            self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the line away, for good."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        signal.set_wakeup_fd(self._before)
        os.close(self._reads)
        os.close(self._writes)

    def _show(self) -> None:
        text, frame, shown = self._text, 0, False
        patience = _PATIENCE
        while not self._over.wait(_TICK):
            patience -= _TICK
            if self._interrupted():
                text, patience = self._after_interrupt, 0
            if patience <= 0:
                line = f"{_FRAMES[frame % len(_FRAMES)]} {text()} "
                self._put(_ERASE + line[: (Screen(sys.stderr).columns or 80) - 1])
                frame, shown = frame + 1, True
        if shown:
            self._put(_ERASE)

    def _interrupted(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return signal.SIGINT in os.read(self._reads, 4096)
        return False

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody is there any more
            sys.stderr.write(text)
            sys.stderr.flush()
