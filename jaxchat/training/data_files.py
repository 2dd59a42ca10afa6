"""Files of training data: which there are, where their records lie, and one record or block at a time.

Bytes and text; what a record means is in `records`, what becomes of it in `data`. No file is read whole: of
JSON Lines the offsets of the lines are kept, of a JSON list those of its elements.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import os
import re
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from jaxchat.errors import JaxchatError, UsageError, option

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt",)
_ALL = ", ".join((*JSON_SUFFIXES, *TEXT_SUFFIXES))

MAX_RECORD_BYTES = 1 << 24
"""More than any context holds; a longer text belongs into a .txt, which is read in blocks."""
MAX_RECORDS = 1 << 27
"""Of a file. Each costs 8 to 16 bytes of memory."""
MAX_TEXT_BYTES = 1 << 30
"""Of a .txt: its token ids, about as large, are kept in memory."""
_BLOCK = 1 << 22
_TEXT_BLOCK = 1 << 18
_BLANKS = b" \t\r\n"
_BOM = codecs.BOM_UTF8


class RecordError(JaxchatError):
    """What is wrong with one record, or one line: the others may be right."""


class Records(Protocol):
    """The records of a file."""

    def __len__(self) -> int:
        """How many there are."""

    def place(self, index: int) -> str:
        """Where one is, as messages say it."""

    def read(self, index: int) -> bytes:
        """The JSON text of one.

        Raises:
          RecordError: it is too large.
          JaxchatError: the file can no longer be read.
        """


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of training data that paths name; of a directory those in it, by name, without hidden ones.

    Raises:
      UsageError: a path leads to nothing, to no file, to an empty one, or to one of another kind.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise UsageError(f"{option('data_path')}: no files; name one, or a directory ({_ALL})")
    return [file for path in paths for file in _files_at(Path(path))]


def _files_at(path: Path) -> list[Path]:
    where = f"{option('data_path')}: {path}"
    mode = _status(path, where).st_mode
    found = [path]
    if stat.S_ISDIR(mode):
        found = _files_in(path, where)
        if not found:
            raise UsageError(f"{where}: no data files in this directory; expected some of {_ALL}")
    for file in found:
        _check(file, f"{option('data_path')}: {file}")
    return found


def _files_in(directory: Path, where: str) -> list[Path]:
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}; name another directory") from None
    kinds = (*JSON_SUFFIXES, *TEXT_SUFFIXES)
    return [e for e in entries if e.suffix.lower() in kinds and e.name[0] != "." and not e.is_dir()]


def _check(path: Path, where: str) -> None:
    status = _status(path, where)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{where}: not a file; give a regular file ({_ALL}), or a directory of such")
    if path.suffix.lower() not in (*JSON_SUFFIXES, *TEXT_SUFFIXES):
        raise UsageError(f"{where}: not a kind of file that is known; expected one of {_ALL}")
    if not status.st_size:
        raise UsageError(f"{where}: an empty file; expected records or text")
    if is_text(path) and status.st_size > MAX_TEXT_BYTES:
        raise UsageError(
            f"{where}: {status.st_size >> 20:,} MiB of text, where {MAX_TEXT_BYTES >> 20:,} fit into memory; "
            'split the file, or make JSON Lines of it: {"text": ...}'
        )


def _status(path: Path, where: str) -> os.stat_result:
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where}: {reason}; name a file or a directory that is there") from None


def is_text(path: Path) -> bool:
    """Whether a file is plain text, and not records."""
    return path.suffix.lower() in TEXT_SUFFIXES


def digest(files: Sequence[Path]) -> str:
    """Tells data from other data: a hash of the files' names, sizes, first and last blocks."""
    found = hashlib.sha256()
    for path in files:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            found.update(f"{path.name!a} {size}\n".encode())
            found.update(file.read(_BLOCK))
            file.seek(max(size - _BLOCK, 0))
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise JaxchatError(f"{path}: {error.strerror or error}; see that the file can be read") from None


# --- records


def records_of(path: Path) -> Records:
    """The records of a JSON file: a list if it begins with `[`, else one a line.

    Raises:
      JaxchatError: it cannot be read, has no records or too many, or its list does not end.
    """
    with _opened(path) as file:
        start = file.read(_BLOCK).removeprefix(_BOM).lstrip(_BLANKS)
    records: Records = _json_list(path) if start.startswith(b"[") else _json_lines(path)
    if not len(records):
        raise JaxchatError(f"{path}: no records; expected JSON objects, one a line or in a list")
    return records


def _part(path: Path, start: int, end: int, place: str) -> bytes:
    if end - start > MAX_RECORD_BYTES:
        raise RecordError(
            f"{place}: a record of {(end - start) / (1 << 20):,.0f} MiB, where at most "
            f"{MAX_RECORD_BYTES >> 20} are read; split it"
        )
    with _opened(path) as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise JaxchatError(f"{path}: the file has become shorter while it was in use; begin again")
    return data


def _too_many(path: Path) -> JaxchatError:
    return JaxchatError(f"{path}: more than {MAX_RECORDS:,} records; split the file")


@dataclass(frozen=True)
class JsonLines:
    """One record a line; blank lines are none.

    Attributes:
      offsets: int64 [lines + 1], of their beginnings, and of the end.
      lines: int64 [N], which lines are records; None if all are.
    """

    path: Path
    offsets: np.ndarray
    lines: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1 if self.lines is None else len(self.lines)

    def _line(self, index: int) -> int:
        return index if self.lines is None else int(self.lines[index])

    def place(self, index: int) -> str:
        """`train.jsonl:17`: the first line is 1."""
        return f"{self.path}:{self._line(index) + 1}"

    def read(self, index: int) -> bytes:
        """See `Records`."""
        line = self._line(index)
        return _part(self.path, int(self.offsets[line]), int(self.offsets[line + 1]), self.place(index))


def _json_lines(path: Path) -> JsonLines:
    offsets = _line_offsets(path)
    blank = _blank_lines(path, offsets)
    return JsonLines(path, offsets, np.flatnonzero(~blank) if blank.any() else None)


def _line_offsets(path: Path) -> np.ndarray:
    found, at, count = [np.zeros(1, np.int64)], 0, 0
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            found.append(ends + (at + 1))
            at, count = at + len(block), count + len(ends)
            if count > MAX_RECORDS:
                raise _too_many(path)
    offsets = np.concatenate(found)
    return offsets if offsets[-1] == at else np.append(offsets, at)


def _blank_lines(path: Path, offsets: np.ndarray) -> np.ndarray:
    """bool [lines]: of `\\n`, of `\\r\\n`, and of a blank at the end of the file."""
    lengths = np.diff(offsets)
    blank = lengths == 1
    short = np.flatnonzero(lengths <= 2)
    if len(short):
        first = np.memmap(path, np.uint8, "r")[offsets[short]]
        blank[short] = np.isin(first, list(_BLANKS)) & ((lengths[short] == 2) | blank[short])
    return blank


@dataclass(frozen=True)
class JsonList:
    """The elements of a JSON list.

    Attributes:
      bounds: int64 [N, 2], where each begins and ends, blanks included.
    """

    path: Path
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds)

    def place(self, index: int) -> str:
        """`train.json[16]`: the first element is 0."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> bytes:
        """See `Records`."""
        start, end = map(int, self.bounds[index])
        return _part(self.path, start, end, self.place(index))


# Strings, which may hold anything, and what is between them. A string that does not end is all the rest:
# nothing is looked at twice, whatever the file holds.
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}


def _json_list(path: Path) -> JsonList:
    with _opened(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    bounds, end = _elements(path, data)
    after = data[end:].strip(_BLANKS) if len(data) - end < _BLOCK else data[end : end + _BLOCK]
    if after:
        raise JaxchatError(f"{path}: there is more after the list, from byte {end} on; expected its end")
    return JsonList(path, np.frombuffer(bounds, np.int64).reshape(-1, 2))


def _elements(path: Path, data: mmap.mmap) -> tuple[array[int], int]:
    bounds: array[int] = array("q")
    depth = start = 0
    for mark in _MARKS.finditer(data):
        step = _STEPS.get(data[mark.start()])
        if step is None:
            continue
        depth += step
        if depth == 1 and step == 1:
            start = mark.end()
        elif depth == 0 or (depth == 1 and step == 0):
            empty = depth == 0 and not bounds and not data[start : mark.start()].strip(_BLANKS)
            bounds.extend(() if empty else (start, mark.start()))
            start = mark.end()
        if depth == 0:
            return bounds, mark.end()
        if len(bounds) > 2 * MAX_RECORDS:
            raise _too_many(path)
    raise JaxchatError(
        f"{path}: the list does not end: element {len(bounds) // 2} is cut off; get the whole file"
    )


# --- text


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file, block by block, cut between words: where a tokenizer cuts, too.

    Raises:
      JaxchatError: it cannot be read, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, at = "", 0
    with _opened(path) as file:
        while True:
            block = file.read(_TEXT_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise JaxchatError(
                    f"{path}: not UTF-8 text: byte 0x{byte:02x} at offset {at - pending + error.start}; "
                    "save it as UTF-8"
                ) from None
            at += len(block)
            if not block:
                break
            cut = _between_words(held)
            yield held[:cut]
            held = held[cut:]
    yield held


def _between_words(text: str) -> int:
    """Where a line begins or, without one, a word; as far back as there may be one, and not at the start."""
    newline = re.compile(r"\n(?=\S)")
    space = re.compile(r"(?<=\S)(?= \S)")
    for pattern in (newline, space):
        for start in (max(len(text) - 4096, 1), 1):
            if found := [match.end() for match in pattern.finditer(text, start)]:
                return found[-1]
    return len(text)
