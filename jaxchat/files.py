"""Files: small ones that somebody else wrote, read whole; ours, written whole; and locks."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxchat.errors import JaxchatError
from jaxchat.misplaced import refuse_misplaced

MAX_SMALL_BYTES = 1 << 20
"""A plan or a recipe is a few lines; more is another file, chosen by mistake."""
MAX_JSON_BYTES = 1 << 26
"""The index of the largest checkpoints, of 100,000 tensors, has a quarter of it."""
MAX_JSON_DEPTH = 64


class UnreadableError(ValueError):
    """Why a file cannot be read, in words that follow its name."""


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Anything else is refused unread, a device unopened.

    So is a pipe, which might be waited for, except one that is open already: a shell's `<(...)`.

    Raises:
      UnreadableError: there is no such file, it is no file, or it is too large.
    """
    try:
        path = _as_named(path)
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and str(path).startswith(_OPEN))):
            raise UnreadableError(f"{_kind_of(mode)}, not a file")
        with path.open("rb") as file:
            return limited(file, limit)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; ValueError: a NUL in the name
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from None


_OPEN = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
"""Names of what the process has open."""


def _as_named(path: Path) -> Path:
    """The same file where the locale's encoding is not UTF-8, but the name is."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return Path(os.fsdecode(str(path).encode(errors="surrogateescape")))
    return path


def limited(file: BinaryIO, limit: int) -> bytes:
    """All that is left in a stream, if it is at most `limit` bytes.

    Raises:
      UnreadableError: it is more.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise UnreadableError(f"more than {limit >> 20} MiB")
    return data


def _kind_of(mode: int) -> str:
    tests = {
        "a directory": stat.S_ISDIR,
        "a named pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((kind for kind, test in tests.items() if test(mode)), "something special")


def read_small_text(path: Path) -> str:
    """The UTF-8 text of a file of at most `MAX_SMALL_BYTES`, without a byte order mark.

    Raises:
      UnreadableError: there is no such file, it is too large, or no text.
    """
    return text_of(read_bytes(path, MAX_SMALL_BYTES))


def text_of(data: bytes) -> str:
    """A file's bytes as text, without the byte order mark that some editors put first.

    Raises:
      UnreadableError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def parse_json(text: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value whose lists and objects are nested at most `MAX_JSON_DEPTH` deep.

    Args:
      text: all of it.
      pairs: makes an object of its keys and values; may raise ValueError. Default: of a key that is there
        twice the last counts.

    Raises:
      UnreadableError: it is malformed, or nested deeper.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise UnreadableError(f"nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:  # also of a number of thousands of digits
        raise UnreadableError(str(error)) from None
    level, depth = [value], 0
    while level := [item for holder in level if isinstance(holder, list | dict) for item in _items(holder)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise UnreadableError(f"nested more than {MAX_JSON_DEPTH} deep")
    return value


def _items(holder: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return holder if isinstance(holder, list) else holder.values()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing, unreadable or malformed file is one clear line."""
    if not os.path.lexists(path):
        raise JaxchatError(f"{path}: no such file; a model directory needs its {path.name}")
    try:
        value = parse_json(text_of(read_bytes(path, MAX_JSON_BYTES)))
    except UnreadableError as error:
        refuse_misplaced(path)
        raise JaxchatError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise JaxchatError(
            f"{path}: expected a JSON object, found {type(value).__name__}; download the file again"
        )
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same, `{}` if there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


@contextlib.contextmanager
def replaced(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Gives a new file to write, which replaces `path` if the block ends well, and is removed otherwise.

    Whoever reads `path` sees the old file or the new one, whole. Of a link what it leads to is replaced.

    Args:
      path: the file that is to be.
      mode: who may read and write it, as `os.open` takes it.

    Raises:
      OSError: it cannot be written, or is no file but a directory or a device: see `try_to_replace`.
    """
    target = _target(path)
    temporary = _made_beside(target, mode)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def try_to_replace(path: Path) -> None:
    """Raises the OSError in which `replaced` would end, before there is anything to lose. Leaves no trace."""
    _made_beside(_target(path), 0o600).unlink()


def _target(path: Path) -> Path:
    """What writing to `path` replaces: behind its links, and a file, if there is anything yet.

    A device is refused rather than written to: a block device would lose a whole disk.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path))  # a link to a file that is to be
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    what = ""
    if not stat.S_ISREG(found.st_mode):
        what = f"{_kind_of(found.st_mode)}, not a file"
    elif any(_leads_to(stream, found) for stream in (1, 2)):
        what = "where the output goes already"
    if what:
        raise OSError(errno.EINVAL, f"this is {what}; name another file", str(path))
    return Path(os.path.realpath(path))


def _leads_to(stream: int, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(stream), found)
    except OSError:  # closed
        return False


def _made_beside(target: Path, mode: int) -> Path:
    """A new, empty file in the folder of another, in place of those that killed processes have left there."""
    name = f".{target.name[:100]}."
    _remove_leftovers(target.parent, name)
    temporary = target.with_name(f"{name}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except FileNotFoundError:
        if target.parent.is_dir():  # one that takes no files: /proc
            raise
        raise FileNotFoundError(
            errno.ENOENT, f"there is no folder {target.parent}; make it first, or name another", str(target)
        ) from None
    return temporary


def _remove_leftovers(folder: Path, start: str) -> None:
    pattern = re.compile(re.escape(start) + r"(\d+)-[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if (match := pattern.fullmatch(entry.name)) and not _is_running(match[1]):
                os.unlink(entry)


def _is_running(number: str) -> bool:
    """Whether a process of this number runs here; True where that cannot be told."""
    if os.name == "nt" or not number.isascii() or not number.isdigit():  # there `kill` asks nothing, it kills
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file: a reader sees the old one or the new one."""
    with replaced(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock, a file that is there only as long; a process that dies lets go of it.

    Raises:
      BlockingIOError: another process holds it.
    """
    import filelock  # 20 ms, which --help need not wait for

    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{path} is locked") from None
    try:
        yield
    finally:
        # Before the release: who opened it in the meantime finds that it is gone, and makes another.
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink(missing_ok=True)
        lock.release()
