"""Chat templates run in one process beside this one, under limits of time and memory: they are programs.

What runs there is `template_worker.py`. It can be started while a model loads, and ends with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_SECONDS = 10.0
"""What a template may take: that of a long conversation takes milliseconds."""
MAX_START_SECONDS = 60.0

Answer = Mapping[str, str]
"""See `template_worker.Templates`."""

logger = logging.getLogger(__name__)


class _Died(Exception):
    """The process is no more."""

    def __init__(self, reason: str, *, took_too_long: bool):
        super().__init__(reason)
        self.took_too_long = took_too_long


class _Process:
    """The process; it may still be starting."""

    def __init__(self) -> None:
        # Where the modules are is known: looking for them again (site, editable installs) would take longer.
        paths = [os.path.abspath(path) for path in sys.path]
        start = f"import runpy, sys; sys.path[:] = {paths!r}; runpy.run_path({_WORKER!r}, None, '__main__')"
        self.owner = os.getpid()
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Waits until it can be asked.

        Raises:
          _Died: it cannot be started.
        """
        if not self._is_ready:
            self._line(MAX_START_SECONDS)
            self._is_ready = True

    def ask(self, name: str, *arguments: Any) -> Answer:
        """Has something done.

        Raises:
          _Died: of that, or because it took too long.
        """
        command = pickle.dumps((name, *arguments))
        with contextlib.suppress(OSError):  # it is no more: there will be no answer
            self._process.stdin.write(command)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        answer: Answer = json.loads(self._line(MAX_SECONDS))
        return answer

    def _line(self, seconds: float) -> bytes:
        took_too_long = threading.Event()

        def kill() -> None:
            took_too_long.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            line: bytes = self._process.stdout.readline()  # type: ignore[union-attr]
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self.end()
            reason = f"it takes more than {seconds:g} seconds"
            if not took_too_long.is_set():
                reason = f"it ends the process that it runs in, with {self._process.returncode}"
            raise _Died(reason, took_too_long=took_too_long.is_set())
        return line

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # of what was not sent any more
                stream.close()  # type: ignore[union-attr]


_WORKER = str(Path(__file__).with_name("template_worker.py"))
_lock = threading.RLock()
_process: _Process | None = None


def start() -> None:
    """Starts the process, if there is none; does not wait for it."""
    global _process
    with _lock:
        if _process is None or _process.owner != os.getpid():  # a fork has its parent's
            _process = None
            with contextlib.suppress(OSError, ValueError):  # no such program, or no room for one more
                _process = _Process()


def ask(name: str, *arguments: Any) -> Answer:
    """Has `template_worker.Templates` do something, in the process; where there can be none, here."""
    with _lock:
        for attempt in range(2):
            start()
            if _process is None:
                break
            try:
                _process.wait()
            except _Died as error:
                logger.debug("chat templates run in this process: no other starts (%s)", error)
                _end()
                break
            try:
                return _process.ask(name, *arguments)
            except _Died as error:
                _end()
                if attempt or error.took_too_long:  # otherwise somebody else may have ended it: once more
                    return {"failed": str(error)}
    return _ask_here(name, *arguments)


def _ask_here(name: str, *arguments: Any) -> Answer:
    from jaxchat.text.template_worker import Templates  # jinja2 takes 30 ms

    answer: Answer = getattr(Templates(), name)(*arguments)
    return answer


@atexit.register
def _end() -> None:
    global _process
    with _lock:
        if _process is not None and _process.owner == os.getpid():
            _process.end()
        _process = None
