"""The messages typed in earlier chats, in a file of the user's: one JSON string a line, the newest last."""

import contextlib
import json
import os
from pathlib import Path

_KEPT = 1000
"""How many messages a file is cut down to once it has twice as many."""


def default_file() -> Path:
    """`$XDG_STATE_HOME/jaxchat/history`, or `~/.local/state/jaxchat/history`."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "jaxchat" / "history"


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
        if self._path is not None:
            with contextlib.suppress(OSError):
                lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        messages = [message for line in lines if (message := _message(line)) is not None]
        if len(messages) >= 2 * _KEPT:
            messages = messages[-_KEPT:]
            self._replace(messages)
        return messages

    def add(self, message: str) -> None:
        """Keeps one more message."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", opener=_private) as file:
                file.write(json.dumps(message) + "\n")

    def _replace(self, messages: list[str]) -> None:
        assert self._path is not None
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            with open(beside, "w", encoding="utf-8", opener=_private) as file:
                file.writelines(json.dumps(message) + "\n" for message in messages)
            beside.replace(self._path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _message(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
