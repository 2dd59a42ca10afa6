"""The messages typed in earlier chats, in a file of the user's: one JSON string a line, the newest last."""

import contextlib
import json
import os
from pathlib import Path

import platformdirs

from jaxchat.files import replaced

_PRIVATE = 0o600
_KEPT = 1000
"""How many messages a file is cut down to once it has twice as many."""


def default_file() -> Path | None:
    """`history` in the state directory: `$XDG_STATE_HOME/jaxchat`, on Linux `~/.local/state/jaxchat`.

    None where the user has no home directory.
    """
    try:
        return platformdirs.user_state_path("jaxchat", appauthor=False) / "history"
    except RuntimeError:
        return None


class MessageFile:
    """A file of messages. Without a place to write it nothing is kept, and nothing else is lost.

    Args:
      path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def load(self) -> list[str]:
        """The messages, the newest last; lines that are none are left out."""
        lines: list[str] = []
        if self._path is not None and self._path.is_file():
            with contextlib.suppress(OSError):
                lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        messages = [message for line in lines if (message := _message(line)) is not None]
        if len(messages) >= 2 * _KEPT:
            messages = messages[-_KEPT:]
            self._replace(messages)
        return messages

    def add(self, message: str) -> None:
        """Keeps one more message."""
        if self._path is None or (self._path.exists() and not self._path.is_file()):
            return  # a device or a pipe keeps nothing, and may wait for ever
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", opener=_private) as file:
                file.write(json.dumps(message) + "\n")

    def _replace(self, messages: list[str]) -> None:
        assert self._path is not None
        with contextlib.suppress(OSError), replaced(self._path, _PRIVATE) as temporary:
            temporary.write_text("".join(json.dumps(message) + "\n" for message in messages))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE)


def _message(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
