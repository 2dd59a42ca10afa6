"""Small files: those that somebody else wrote, read whole, and ours, written whole."""

import json
import os
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError

MAX_SMALL_BYTES = 1 << 20
"""A plan or a recipe is a few lines; more is another file, chosen by mistake."""


class UnreadableError(ValueError):
    """Why a file cannot be read, in words that follow its name."""


def read_small_text(path: Path) -> str:
    """The UTF-8 text of a file of at most `MAX_SMALL_BYTES`, without a byte order mark.

    Raises:
      UnreadableError: there is no such file, it is too large, or no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SMALL_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from None
    if len(data) > MAX_SMALL_BYTES:
        raise UnreadableError("more than 1 MiB")
    return text_of(data, "utf-8-sig")


def text_of(data: bytes, encoding: str = "utf-8") -> str:
    """Decodes a file's bytes.

    Raises:
      UnreadableError: they are not UTF-8.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing, unreadable or malformed file is one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxchatError(f"{path}: no such file; a model directory needs its {path.name}") from None
    except (OSError, ValueError) as error:
        raise JaxchatError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise JaxchatError(
            f"{path}: expected a JSON object, found {type(value).__name__}; download the file again"
        )
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same, `{}` if there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
