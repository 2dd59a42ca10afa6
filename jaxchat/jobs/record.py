"""The answers that a job has so far, in a file beside its output: added to as they come, whatever happens.

A process that is killed leaves whole lines, and at most one that is cut short, which does not count.
"""

import contextlib
import json
import os
import re
import time
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, Self, TypedDict

import msgspec

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import UnreadableError, locked, parse_json, replaced, text_of
from jaxchat.jobs.answers import Finished
from jaxchat.typed import checked

_SYNC_SECONDS = 5.0
_MAX_HEADER = 1 << 20
_MAX_ENTRY = 1 << 30
_ENTRY = re.compile(rb"([0-9]{1,15}) ([01]) ([0-9]{1,15}) ([0-9]{1,15}) ([0-9a-f]{8}) (.*)\n", re.DOTALL)
"""Number, failed, prompt and completion tokens, checksum of all that and of the answer; the answer."""


class _Header(TypedDict):
    of: dict[str, str]
    created: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class Record:
    """Answers by the number of their line; of each its place in the file is held.

    Args:
      output: the file that they are for; this one is beside it, with `.partial` behind its name.
      of: what they depend on, as text for people by the flag that says it: `{"--seed": "0"}`.
      created: when the input was written: of a job that goes on, that of its beginning counts.
      last: the greatest number there is.
      resume: goes on with the answers that are there.

    Attributes:
      path: the file.
      created: seconds since 1970.
      errors, prompt_tokens, completion_tokens: of all answers.

    Raises:
      UsageError: it holds answers of another job, there are some and `resume` does not say to go on, or
        another process adds to it.
      JaxchatError: it is no such file.
    """

    def __init__(self, output: Path, of: Mapping[str, str], *, created: int, last: int, resume: bool):
        self.path = path_for(output)
        self.created = created
        self.errors = self.prompt_tokens = self.completion_tokens = 0
        self._places = array("q", [-1]) * (last + 1)
        self._count = 0
        with contextlib.ExitStack() as opened:
            _lock(opened, self.path)
            if not resume:
                self.path.unlink(missing_ok=True)
            self._file = opened.enter_context(open(self.path, "a+b"))
            self._begin(dict(of))
            self._opened = opened.pop_all()
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, number: int) -> bool:
        return self._places[number] >= 0

    def add(self, finished: Finished) -> None:
        """Keeps an answer; it outlives this process from here on, and soon the machine."""
        if finished.number in self:
            return
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(_entry(finished))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()
        self._count_in(finished, place)

    def close(self) -> None:
        """Ends the writing, and lets others write."""
        with contextlib.suppress(OSError):
            self._sync()
        self._opened.close()

    def assemble(self, output: Path) -> None:
        """Writes all answers in order, and puts the file into its place at once. The record is gone then.

        Raises:
          OSError: it cannot be written; the record stays.
        """
        self._sync()
        with replaced(output) as temporary, open(temporary, "wb") as file:
            for place in self._places:
                if place >= 0:
                    self._file.seek(place)
                    match = _ENTRY.fullmatch(self._file.readline(_MAX_ENTRY))
                    if match is None:
                        raise JaxchatError(f"{self.path}: was changed by others; delete it and begin anew")
                    file.write(match[6] + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.path.unlink(missing_ok=True)

    def _sync(self) -> None:
        self._synced = time.monotonic()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _count_in(self, finished: Finished, place: int) -> None:
        self._places[finished.number] = place
        self._count += 1
        self.errors += finished.failed
        self.prompt_tokens += finished.prompt_tokens
        self.completion_tokens += finished.completion_tokens

    def _begin(self, of: dict[str, str]) -> None:
        """Reads what is there, up to the first entry that is not whole."""
        self._file.seek(0)
        first = self._file.readline(_MAX_HEADER)
        if not first.endswith(b"\n") and len(first) < _MAX_HEADER:
            self._file.truncate(0)
            self._file.write(json.dumps({"of": of, "created": self.created}).encode() + b"\n")
            self._sync()
            return
        header = _header(self.path, first)
        refuse_others(self.path, header.of, of)
        self.created = header.created
        place = len(first)
        while (finished := _read_entry(self._file.readline(_MAX_ENTRY))) is not None:
            if finished.number < len(self._places) and finished.number not in self:
                self._count_in(finished, place)
            place = self._file.tell()
        self._file.truncate(place)


def path_for(output: Path) -> Path:
    """Where the answers for an output are while they are not all there."""
    return output.with_name(f"{output.name}.partial")


class Begun(NamedTuple):
    """What the first line of a record says.

    Attributes:
      of: what its answers depend on.
      created: seconds since 1970.
    """

    of: dict[str, str]
    created: int


def described(path: Path) -> Begun | None:
    """What a record is of; None of one that has just begun.

    Raises:
      JaxchatError: it is no record.
    """
    with open(path, "rb") as file:
        first = file.readline(_MAX_HEADER)
    return _header(path, first) if first.endswith(b"\n") or len(first) == _MAX_HEADER else None


def refuse_others(path: Path, there: Mapping[str, str], of: Mapping[str, str]) -> None:
    """Raises UsageError where something is not as it was, naming it; what is only in one does not count."""
    for key in of:
        if key in there and there[key] != of[key]:
            raise UsageError(
                f"{path} holds the answers of another job: {key} was {there[key]} and is {of[key]} now; give "
                "what it was, or --overwrite to begin anew"
            )


def _header(path: Path, line: bytes) -> Begun:
    advice = "delete it, or give another --output"
    try:
        value = parse_json(text_of(line))
    except UnreadableError as error:
        raise JaxchatError(f"{path}: holds no answers of a job ({error}); {advice}") from None
    return Begun(**checked(value, _Header, where=str(path), advice=advice))


def _entry(finished: Finished) -> bytes:
    head = f"{finished.number} {int(finished.failed)} {finished.prompt_tokens} {finished.completion_tokens}"
    check = zlib.crc32(finished.data, zlib.crc32(head.encode()))
    return b"%s %08x %s\n" % (head.encode(), check, finished.data)


def _read_entry(line: bytes) -> Finished | None:
    match = _ENTRY.fullmatch(line)
    if match is None:
        return None
    number, failed, prompt, completion, check, data = match.groups()
    if zlib.crc32(data, zlib.crc32(b" ".join((number, failed, prompt, completion)))) != int(check, 16):
        return None
    return Finished(int(number), data, failed == b"1", int(prompt), int(completion))


def _lock(opened: contextlib.ExitStack, path: Path) -> None:
    try:
        opened.enter_context(locked(path.with_name(f".{path.name}.lock")))
    except BlockingIOError:
        raise UsageError(f"another job is writing to {path}; wait for it, or give another --output") from None
