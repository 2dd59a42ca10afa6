"""Results kept on disk while they are found, so that an interrupted analysis goes on where it stopped.

Knows neither models nor plans: names and JSON values, under a description of what they are results of.
"""

import collections
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import locked


class Journal(collections.UserDict[str, Any]):
    """A mapping whose every new entry is appended to a file.

    The first line describes what was measured, every other is `[name, value]`. A line that a kill cut short
    is dropped, so that name is measured again.
    """

    def __init__(self, path: Path, of: Mapping[str, str]):
        """Opens or begins the file.

        Args:
          path: the file.
          of: what the results depend on, as text for people, e.g. {"--window": "256"}.

        Raises:
          UsageError: the file holds results of something else, or another process is writing it.
          JaxchatError: it is no such file.
        """
        super().__init__()
        self.path = path
        with contextlib.ExitStack() as opened:
            self._lock(opened)
            self._file = opened.enter_context(open(path, "a+b"))
            self._read(dict(of))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Ends the writing, and lets others write."""
        self._opened.close()

    def __setitem__(self, name: str, value: Any) -> None:
        self._append([name, value])
        self.data[name] = value

    def _append(self, entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def _lock(self, opened: contextlib.ExitStack) -> None:
        try:
            opened.enter_context(locked(self.path.with_name(f".{self.path.name}.lock")))
        except BlockingIOError:
            raise UsageError(
                f"another analysis is writing to {self.path.parent}; give another --out"
            ) from None

    def _read(self, of: dict[str, str]) -> None:
        self._file.seek(0)
        data = self._file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(complete))
        lines = complete.splitlines()
        if not lines:
            self._append(of)
            return
        try:
            there = json.loads(lines[0])
            if not isinstance(there, dict):
                raise ValueError
            self.data = dict(json.loads(line) for line in lines[1:])
        except (ValueError, TypeError):
            raise JaxchatError(
                f"{self.path} is not the journal of an analysis; delete it, or give another --out"
            ) from None
        self._refuse_others(there, of)

    def _refuse_others(self, there: dict[str, str], of: dict[str, str]) -> None:
        for key in (*of, *there):
            if there.get(key) != of.get(key):
                raise UsageError(
                    f"{self.path.parent} holds the results of another analysis: {key} is "
                    f"{of.get(key, 'not given')} now and was {there.get(key, 'not given')}; give another "
                    f"--out, or delete {self.path} to start anew"
                )
