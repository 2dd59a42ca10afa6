"""Where conversations are saved: under a name in the user's list, or in any file; and what is there.

Reads no more than the heads of the files, and needs no JAX. What is in them: `session_file.py`.
"""

import dataclasses
import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import parse_json, try_to_replace

FORMAT = "jaxchat-session"
"""What the metadata of a session file says it is."""

_SUFFIX = ".session"
_NAME = re.compile(r"[^./\\\x00-\x1f\x7f-\x9f]{1,80}")
_FIRST_WORDS, _PLAN = 40, 20
"""Characters of each that a list has room for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedSession:
    """A conversation in the list.

    Attributes:
      name: what it was saved as.
      path: its file.
      saved: when, in seconds since 1970.
      bytes: of the file.
      model: in a few words; None, as all below, where the file cannot be read.
      layer_spec: the plan that it runs under.
      messages: how many there are, the system prompt not counted.
      tokens: of its context.
      first_words: of its first message.
    """

    name: str
    path: Path
    saved: float
    bytes: int
    model: str | None = None
    layer_spec: str | None = None
    messages: int | None = None
    tokens: int | None = None
    first_words: str | None = None

    @property
    def when(self) -> str:
        """Its time for people, as the clock here has it."""
        return datetime.datetime.fromtimestamp(self.saved).strftime("%Y-%m-%d %H:%M")


def is_name(text: str) -> bool:
    """Whether a session called so is in the list: a name has neither dots nor slashes, all else is a file."""
    return _NAME.fullmatch(text) is not None


def place(text: str) -> Path:
    """The file of a session, from what a person calls it: a name in the list, or a file.

    Raises:
      UsageError: it is empty, or this user has no folder for the list.
    """
    if not text.strip():
        raise UsageError("a session needs a name or a file, e.g. talk or ./talk.session")
    if is_name(text):
        return list_folder() / f"{text}{_SUFFIX}"
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of a user without a home directory
        return Path(text)


def existing_place(text: str) -> Path:
    """The same, of a session that is there.

    Raises:
      UsageError: it is not; says so of a name where there is such a file.
    """
    path = place(text)
    if path.is_file():
        return path
    if not is_name(text):
        raise UsageError(f"{path}: no such file; give one that a session was saved to")
    there = Path(text).exists()
    hint = f"the file of this name is ./{text}" if there else "`jaxchat sessions` lists those there are"
    raise UsageError(f"no session is saved as {text}; {hint}")


def list_folder() -> Path:
    """Where the list is: `$XDG_DATA_HOME/jaxchat/sessions`, on Linux `~/.local/share/jaxchat/sessions`.

    Raises:
      UsageError: this user has no home directory.
    """
    try:
        return platformdirs.user_data_path("jaxchat", appauthor=False) / "sessions"
    except RuntimeError:
        raise UsageError(
            "there is no home directory to keep sessions in; give a file, e.g. ./talk.session"
        ) from None


def listed() -> list[SavedSession]:
    """The sessions in the list, the newest first; none where there is no list.

    Raises:
      UsageError: see `list_folder`.
    """
    found = [_described(path) for path in list_folder().glob(f"*{_SUFFIX}") if path.is_file()]
    return sorted(found, key=lambda session: (-session.saved, session.name))


def table(sessions: Sequence[SavedSession]) -> str:
    """The list for people, a line each."""
    if not sessions:
        return "no sessions are saved; /save NAME in a chat does, or --save_session NAME"
    rows: list[tuple[str, ...]] = [("name", "saved", "model", "plan", "messages", "tokens", "begins with")]
    for session in sessions:
        facts = (session.model, session.layer_spec, session.messages, session.tokens, session.first_words)
        known = ["" if fact is None else str(fact) for fact in facts]
        known[1] = known[1] if len(known[1]) <= _PLAN else f"{known[1][: _PLAN - 1]}…"
        rows.append((session.name, session.when, known[0] or "cannot be read", *known[1:]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def names() -> list[str]:
    """What sessions in the list are called, in order; none where there is no list."""
    try:
        return sorted(path.name.removesuffix(_SUFFIX) for path in list_folder().glob(f"*{_SUFFIX}"))
    except (UsageError, OSError):
        return []


def try_to_save(path: Path) -> None:
    """Makes sure that a conversation can be saved as `path`, before it is held.

    Only a session is ever replaced, and an empty file, of which there is nothing to lose.

    Raises:
      UsageError: the file cannot be written, or holds something else.
    """
    try:
        if path.parent == _list_folder_or_none():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try_to_replace(path)
        kept = path.exists() and os.path.getsize(path) > 0
    except OSError as error:
        raise UsageError(f"{path}: the session cannot be saved there ({error.strerror or error})") from None
    if kept and not _is_session(path):
        raise UsageError(f"{path}: this file is no session, so it is not replaced by one; name another")


def _list_folder_or_none() -> Path | None:
    try:
        return list_folder()
    except UsageError:
        return None


def _is_session(path: Path) -> bool:
    try:
        return SafetensorsFile(path).metadata.get("format") == FORMAT
    except (JaxchatError, ValueError):
        return False


def _described(path: Path) -> SavedSession:
    about = path.stat()
    plain = SavedSession(
        name=path.name.removesuffix(_SUFFIX), path=path, saved=about.st_mtime, bytes=about.st_size
    )
    try:
        return dataclasses.replace(plain, **_facts(SafetensorsFile(path)))
    except (JaxchatError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return plain  # damaged: loading says how


def _facts(file: SafetensorsFile) -> Mapping[str, Any]:
    stored = parse_json(file.metadata["session"])
    config = stored["model"]["config"]
    messages = [entry["message"] for entry in stored["conversation"]["entries"]]
    said = [str(message["content"]) for message in messages if message["role"] != "system"]
    return {
        "model": f"{config['model_type']}, {config['num_layers']} layers",
        "layer_spec": str(stored["plan"]),
        "messages": len(said),
        "tokens": file.entries["ids"].shape[0],
        "first_words": " ".join(said[0].split())[:_FIRST_WORDS] if said else "",
    }
