"""Results kept on disk while they are found, so that an interrupted run goes on where it stopped.

Knows neither models nor plans: names and JSON values, under a description of what they are results of.
"""

import collections
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError, UsageError, told
from jaxchat.files import UnreadableError, locked, parse_json, text_of
from jaxchat.typed import checked

_Entry = tuple[str, float | list[Any]]
"""A line after the first: the name of a result, and a number or lists of numbers."""


def _another_place() -> str:
    return told("another directory", "another --out")


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
                f"another run is writing to {self.path.parent}; give {_another_place()}"
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
        there = self._line(1, lines[0], dict[str, str])
        self._refuse_others(there, of)
        self.data = dict(self._line(number, line, _Entry) for number, line in enumerate(lines[1:], 2))

    def _line(self, number: int, line: bytes, kind: Any) -> Any:
        where, advice = (
            f"{self.path}:{number}",
            f"delete the file, or give {_another_place()}",
        )
        try:
            return checked(parse_json(text_of(line)), kind, where=where, advice=advice)
        except UnreadableError as error:
            raise JaxchatError(f"{where}: no line of a journal ({error}); {advice}") from None

    def _refuse_others(self, there: Mapping[str, str], of: Mapping[str, str]) -> None:
        for key in (*of, *there):
            if there.get(key) != of.get(key):
                raise UsageError(
                    f"{self.path.parent} holds the results of another run: {key} is "
                    f"{of.get(key, 'not given')} now and was {there.get(key, 'not given')}; give "
                    f"{_another_place()}, or delete {self.path} to start anew"
                )
