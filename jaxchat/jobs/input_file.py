"""The lines of a job's input: where each is, and which have the same name. Texts stay in the file."""

import hashlib
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.visible import shown

MAX_LINE_BYTES = 1 << 24
"""More than the longest context; a longer line is refused, and never held in memory."""
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of the input.

    Attributes:
      number: its place in the file, from 1 on.
      data: its bytes; None of one that is too long.
    """

    number: int
    data: bytes | None


class InputFile:
    """A file of lines that are read when they are asked for; of each its place is held, 24 bytes.

    Blank lines are none of them.

    Args:
      path: the file.

    Attributes:
      path: as given.
      digest: of all bytes.
      created: when the file was last modified, seconds since 1970.
      total: lines of the file, blank ones too.

    Raises:
      UsageError: there is no such file, it is no file, or has no lines; or two lines have one name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._numbers, self._offsets, self._lengths = array("q"), array("q"), array("q")
        names, digest = array("Q"), hashlib.blake2b(digest_size=16)
        try:
            self._file = _opened(path)
            self._stamp = self._now()
            for number, offset, data, length in _scanned(self._file, digest):
                self.total = number
                if data is None or data.strip():
                    self._numbers.append(number)
                    self._offsets.append(offset)
                    self._lengths.append(-1 if data is None else length)
                    names.append(0 if data is None else _name_hash(data))
        except OSError as error:
            raise UsageError(
                f"--input {path}: {error.strerror or error}; give a file of JSON lines"
            ) from None
        if not self._numbers:
            raise UsageError(f"--input {path}: there are no lines in it; give a file of JSON lines")
        self.digest = digest.hexdigest()
        self.created = int(os.fstat(self._file.fileno()).st_mtime)
        self._refuse_same_names(np.asarray(names))

    def __len__(self) -> int:
        return len(self._numbers)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def number(self, index: int) -> int:
        """Of the line at a place among those that are not blank."""
        return self._numbers[index]

    def line(self, index: int) -> Line:
        """The line at a place among those that are not blank.

        Raises:
          JaxchatError: the file has changed since it was opened.
        """
        length = self._lengths[index]
        if self._now() != self._stamp:
            raise JaxchatError(f"{self.path}: has changed while it was read; begin anew with --overwrite")
        self._file.seek(self._offsets[index])
        return Line(self._numbers[index], None if length < 0 else self._file.read(length))

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _refuse_same_names(self, names: np.ndarray) -> None:
        order = np.argsort(names, kind="stable")
        same = np.flatnonzero((names[order][1:] == names[order][:-1]) & (names[order][1:] != 0))
        pairs = sorted((int(order[place + 1]), int(order[place])) for place in same)
        for second, first in pairs:
            found = _name(self.line(second).data or b"")
            if found is not None and found == _name(self.line(first).data or b""):
                key, name = found
                raise UsageError(
                    f"--input {self.path}: lines {self._numbers[first]} and {self._numbers[second]} have the "
                    f"same {key} {shown(name)}; give each its own"
                )


def _opened(path: Path) -> BinaryIO:
    """A regular file; anything else is refused, a pipe is not waited for."""
    try:
        mode = path.stat().st_mode
    except (RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise OSError(0, str(error)) from None
    if not stat.S_ISREG(mode):
        raise OSError(
            0, f"{'a directory' if stat.S_ISDIR(mode) else 'no ordinary file'}, which is read twice"
        )
    return path.open("rb")


def _scanned(file: BinaryIO, digest: Any) -> Iterator[tuple[int, int, bytes | None, int]]:
    """Number, offset, bytes (None: too long) and length of every line, without a byte order mark."""
    offset = number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        digest.update(data)
        number += 1
        start, length = offset, len(data)
        offset += length
        if number == 1 and data.startswith(_BOM):
            start, length, data = start + 3, length - 3, data[3:]
        if len(data) <= MAX_LINE_BYTES:
            yield number, start, data, length
            continue
        while not data.endswith(b"\n") and (data := file.readline(1 << 20)):
            digest.update(data)
            offset += len(data)
        yield number, start, None, 0


class _Names(msgspec.Struct):
    custom_id: Any = None
    id: Any = None


_decoder = msgspec.json.Decoder(_Names)


def _name(data: bytes) -> tuple[str, str | int] | None:
    """Which field names a line, and what that says; None where that cannot be told."""
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    for key in ("custom_id", "id"):
        value = getattr(found, key)
        if isinstance(value, str) or type(value) is int:
            return key, value
    return None


def _name_hash(data: bytes) -> int:
    """64 bits of the line's name; 0 where it has none."""
    name = _name(data)
    if name is None:
        return 0
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest()) or 1
