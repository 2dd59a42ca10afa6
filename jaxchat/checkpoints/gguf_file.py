"""Reading GGUF files, single ones and split ones: the format only, no models and no JAX.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header, keys with values, the tensors'
names and places, then their data. What a file claims is checked before anything is done about it. What the
bytes of a tensor stand for is in `gguf_types.py`.
"""

import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.checkpoints.gguf_types import REMOVED, TYPES, GgufType, dequantize, to_little_endian
from jaxchat.checkpoints.open_file import OpenFile
from jaxchat.errors import JaxchatError
from jaxchat.misplaced import refuse_misplaced
from jaxchat.visible import shown

MAGIC = b"GGUF"
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""Of GGML, GGMF, GGJT and of its adapters, GGLA: what GGUF replaced in 2023."""
VERSIONS = (2, 3)

MAX_HEADER_BYTES = 1 << 27
"""Of all that comes before the data; the largest vocabularies take some 20 megabytes."""
_MAX_KEYS, _MAX_TENSORS, _MAX_DEPTH, _MAX_DIMENSIONS = 1 << 16, 1 << 17, 3, 4
_MAX_VALUES = 1 << 24  # in lists, all together; a vocabulary's have some millions
_MAX_ALIGNMENT = 1 << 20
_MAX_KEY = 65535  # bytes, says the format

_ADVICE = "download the file again"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Types of values that are numbers -> their letter in `struct` and in numpy."""


@dataclasses.dataclass(frozen=True)
class GgufEntry:
    """One tensor of a file.

    Attributes:
      type: of its numbers.
      shape: the slowest dimension first, as in numpy; the file has them the other way round.
      offset: its first byte in its file.
      nbytes: how many it has there.
      part: the index of that file in `GgufFile.paths`.
    """

    type: GgufType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, which is what is along the last dimension."""
        return self.shape[-1] // self.type.elements * self.type.size


class GgufFile:
    """An open file, with the parts that it is split into. Opening reads everything but the numbers.

    Attributes:
      path: the file, of several the first.
      paths: all of them.
      metadata: key -> number, text, true or false, or a list of such; of the first part.
      entries: name -> `GgufEntry`.

    Raises:
      JaxchatError: a file is missing, truncated or malformed, of another version, or not the first part.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        first = _Part(self.path, 0)
        self.metadata: Mapping[str, Any] = first.metadata
        self.paths = _paths(self.path, first.metadata)
        parts = [first, *(_Part(other, number) for number, other in enumerate(self.paths) if number)]
        self.entries: Mapping[str, GgufEntry] = _joined(parts)
        self._parts = parts

    def raw(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """A copy of a tensor's bytes, or of some of its rows': uint8 [..., bytes of a row], little endian.

        Args:
          name: of the tensor.
          rows: `tensor[rows]`, along the first dimension of at least two; no others are read.

        Raises:
          JaxchatError: the file has changed since it was opened.
        """
        entry = self.entries[name]
        shape, first = (*entry.shape[:-1], entry.row_bytes), entry.offset
        if rows is not None and len(shape) > 1:
            wanted = slice(rows, rows + 1) if isinstance(rows, int) else rows
            start, stop, _ = wanted.indices(shape[0])
            first += start * math.prod(shape[1:])
            shape = (max(stop - start, 0), *shape[1:])
        part, out = self._parts[entry.part], np.empty(shape, np.uint8)
        part.file.read(out, first)
        out = to_little_endian(entry.type, out) if part.is_big_endian else out
        return out[0] if isinstance(rows, int) and len(shape) > 1 else out

    def values(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """A copy of a tensor, or of some of its rows: plain numbers as they are, others float32.

        Arguments and errors as for `raw`.
        """
        kind, raw = self.entries[name].type, self.raw(name, rows)
        return raw.view(kind.dtype) if kind.dtype is not None else dequantize(kind, raw)


class _Broken(Exception):
    """What is wrong with a file."""


class _Part:
    """One file: its keys, and its tensors by name."""

    def __init__(self, path: Path, number: int):
        self.path, self._number = path, number
        refuse_misplaced(path)
        try:
            self.file = OpenFile(path, _ADVICE)
            self._read()
        except OSError as error:
            raise JaxchatError(f"{path}: cannot be read ({error.strerror or error}); {_ADVICE}") from None
        except _Broken as error:
            raise JaxchatError(f"{path}: {error}") from None

    def _read(self) -> None:
        header = _Header(self.file)
        _check_magic(header.take(4) if self.file.size >= 4 else b"")
        header.is_big_endian = _is_big_endian(header.take(4))
        self.is_big_endian = header.is_big_endian
        num_tensors, num_keys = header.number("Q"), header.number("Q")
        for what, count, most, least in (
            ("tensors", num_tensors, _MAX_TENSORS, 32),
            ("keys", num_keys, _MAX_KEYS, 13),
        ):
            if count > min(most, (self.file.size - header.position) // least):
                raise _Broken(
                    f"it would have {count} {what}, which a file of {self.file.size} bytes cannot; {_ADVICE}"
                )
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = header.text("a key", _MAX_KEY)
            if key in self.metadata:
                raise _Broken(f"key {shown(key)} is there twice; {_ADVICE}")
            self.metadata[key] = header.value(key)
        infos = [_info(header) for _ in range(num_tensors)]
        self.entries = self._placed(infos, header.position)

    def _placed(self, infos: list["_Info"], end: int) -> dict[str, GgufEntry]:
        """The tensors with their places in the file, which are checked."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _Broken(f"general.alignment is {shown(alignment)}; expected a power of two; {_ADVICE}")
        start = -(-end // alignment) * alignment
        entries: dict[str, GgufEntry] = {}
        for info in infos:
            if info.name in entries:
                raise _Broken(f"tensor {shown(info.name)} is there twice; {_ADVICE}")
            if info.offset % alignment:
                raise _Broken(
                    f"tensor {shown(info.name)} begins at byte {info.offset} of the data, no multiple of "
                    f"the alignment, {alignment}; {_ADVICE}"
                )
            if self.is_big_endian and info.type.words is None:
                raise _Broken(
                    f"tensor {shown(info.name)} is of the type {info.type.name}, which is not read of "
                    "big-endian files; take the little-endian file"
                )
            nbytes = math.prod(info.shape) // info.type.elements * info.type.size
            entries[info.name] = GgufEntry(info.type, info.shape, start + info.offset, nbytes, self._number)
        _check_places(entries, self.file.size)
        return entries


def _check_magic(magic: bytes) -> None:
    if magic in OLD_MAGICS:
        raise _Broken(
            "of the format GGML, which GGUF has replaced; convert it with llama.cpp's "
            "convert_llama_ggml_to_gguf.py, or take a GGUF file of the model"
        )
    if magic != MAGIC:
        raise _Broken(f"not a GGUF file: it begins with {shown(magic)}, expected {shown(MAGIC)}; {_ADVICE}")


def _is_big_endian(version: bytes) -> bool:
    found = {int.from_bytes(version, "little"): False, int.from_bytes(version, "big"): True}
    for known in VERSIONS:
        if known in found:
            return found[known]
    raise _Broken(
        f"GGUF of the version {min(found)}; read are {' and '.join(map(str, VERSIONS))}: convert the model "
        "again, or take a newer file of it"
    )


def _check_places(entries: Mapping[str, GgufEntry], size: int) -> None:
    before, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise _Broken(f"tensors {shown(before)} and {shown(name)} overlap; {_ADVICE}")
        before, end = name, entry.offset + entry.nbytes
        if end > size:
            raise _Broken(
                f"truncated: tensor {shown(name)} ends at byte {end}, and the file has {size}; {_ADVICE}"
            )


# --- the header


class _Header:
    """The start of a file, read as it is needed, in order."""

    def __init__(self, file: OpenFile):
        self._file, self._bytes = file, bytearray()
        self.position, self.is_big_endian = 0, False
        self._values_left = _MAX_VALUES

    def _need(self, count: int) -> None:
        """Has `count` more bytes at hand."""
        end = self.position + count
        if end > self._file.size:
            raise _Broken(
                f"truncated inside the header: expected at least {end} bytes, found {self._file.size}; "
                f"{_ADVICE}"
            )
        if end > MAX_HEADER_BYTES:
            raise _Broken(f"its header would have more than {MAX_HEADER_BYTES} bytes; {_ADVICE}")
        had = len(self._bytes)
        if end > had:
            more = np.empty(min(max(end, 2 * had, 1 << 16), self._file.size) - had, np.uint8)
            self._file.read(more, had)
            self._bytes += more.data

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._need(count)
        self.position += count
        return bytes(self._bytes[self.position - count : self.position])

    def number(self, letter: str) -> Any:
        """The next number, of a type of `struct`."""
        return struct.unpack(f"{'>' if self.is_big_endian else '<'}{letter}", self.take(_SIZES[letter]))[0]

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        """The next text; bytes that are no UTF-8 are replaced."""
        length = self.number("Q")
        if length > min(most, self._file.size - self.position):
            raise _Broken(f"{what} would have {length} bytes; {_ADVICE}")
        return self.take(length).decode(errors="replace")

    def texts(self, count: int) -> list[str]:
        """So many texts; a vocabulary has half a million, so this one is quick."""
        found = []
        length_of = struct.Struct(">Q" if self.is_big_endian else "<Q").unpack_from
        data, at = self._bytes, self.position
        for _ in range(count):
            stop = at + 8
            if stop <= len(data):
                stop += length_of(data, at)[0]
            if stop > len(data) or stop < at:  # once a chunk
                self.position = at
                found.append(self.text("a text of a list"))
                at = self.position
                continue
            found.append(data[at + 8 : stop].decode(errors="replace"))
            at = stop
        self.position = at
        return found

    def value(self, key: str) -> Any:
        """The next value, of the type that comes before it."""
        return self._value(key, self.number("I"), 0)

    def _value(self, key: str, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.text(f"key {shown(key)}")
        if kind == _ARRAY:
            return self._list(key, depth + 1)
        return self._numbers(key, kind, 1)[0]

    def _list(self, key: str, depth: int) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        least = _SIZES[_NUMBERS[kind]] if kind in _NUMBERS else 8 if kind == _STRING else 12
        if count > min(self._values_left, (self._file.size - self.position) // least):
            raise _Broken(
                f"key {shown(key)} would have {count} values, which no vocabulary has, or a file of "
                f"{self._file.size} bytes cannot; {_ADVICE}"
            )
        self._values_left -= count
        if kind == _STRING:
            return self.texts(count)
        if kind != _ARRAY:
            return self._numbers(key, kind, count)
        if depth == _MAX_DEPTH:
            raise _Broken(f"key {shown(key)} has lists in lists in lists; {_ADVICE}")
        return [self._list(key, depth + 1) for _ in range(count)]

    def _numbers(self, key: str, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise _Broken(f"key {shown(key)} is of the type {kind}; there are 0 to 12; {_ADVICE}")
        letter = _NUMBERS[kind]
        raw = self.take(_SIZES[letter] * count)
        dtype = np.dtype(letter).newbyteorder(">" if self.is_big_endian else "<")
        found: list[Any] = np.frombuffer(raw, dtype, count).tolist()
        if kind != _BOOL:
            return found
        if not set(found) <= {0, 1}:
            raise _Broken(f"key {shown(key)} is {shown(found[:3])}; expected 0 or 1; {_ADVICE}")
        return list(map(bool, found))


_SIZES = {letter: struct.calcsize(f"<{letter}") for letter in "BbHhIifQqd"}


@dataclasses.dataclass(frozen=True)
class _Info:
    """What the header says of a tensor; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    offset: int


def _info(header: _Header) -> _Info:
    name = header.text("the name of a tensor", _MAX_KEY)
    count = header.number("I")
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise _Broken(
            f"tensor {shown(name)} has {count} dimensions; expected 1 to {_MAX_DIMENSIONS}; {_ADVICE}"
        )
    shape = tuple(header.number("Q") for _ in range(count))[::-1]
    if not all(shape) or math.prod(shape) >= 1 << 63:
        raise _Broken(f"tensor {shown(name)} has the shape {shown(list(shape))}, which none has; {_ADVICE}")
    number = header.number("I")
    if number in REMOVED:
        raise _Broken(
            f"tensor {shown(name)} is of the type {REMOVED[number]}, which ggml has given up; take a newer "
            "file of the model"
        )
    if number not in TYPES:
        raise _Broken(
            f"tensor {shown(name)} is of the type {number}, which is not known; known: "
            f"{', '.join(kind.name for kind in TYPES.values())}"
        )
    found = TYPES[number]
    if shape[-1] % found.elements:
        raise _Broken(
            f"tensor {shown(name)} has rows of {shape[-1]} numbers; those of the type {found.name} are a "
            f"multiple of {found.elements}; {_ADVICE}"
        )
    return _Info(name, shape, found, header.number("Q"))


# --- split files


@functools.cache
def _split_name() -> re.Pattern[str]:
    return re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_of(name: str) -> tuple[str, int, int] | None:
    """What a file name says of a part: how the model is called, which part from 1 on, and of how many.

    >>> part_of("llama-00002-of-00003.gguf")
    ('llama', 2, 3)
    """
    match = _split_name().fullmatch(name)
    return None if match is None else (match["prefix"], int(match["number"]), int(match["count"]))


def _paths(first: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """All parts of a model, of which the first is given."""
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if type(number) is not int or type(count) is not int or number < 0 or not 0 <= count <= 99999:
        raise JaxchatError(
            f"{first}: split.no is {shown(number)} and split.count {shown(count)}; expected a part from 0 on "
            f"and how many there are; {_ADVICE}"
        )
    if count <= 1:
        return (first,)
    said = part_of(first.name)
    if number != 0:
        other = f"; that is {said[0]}-{1:05}-of-{count:05}.gguf" if said else ""
        raise JaxchatError(f"{first}: part {number + 1} of {count}; give the first part{other}")
    if said is None or said[1:] != (1, count):
        raise JaxchatError(
            f"{first}: the first of {count} parts, whose names must be as they were made: rename it to "
            f"NAME-{1:05}-of-{count:05}.gguf, and the others accordingly"
        )
    paths = [first.with_name(f"{said[0]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [path.name for path in paths if not os.path.lexists(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise JaxchatError(
            f"{first}: {len(missing)} of {count} parts are missing: {missing[0]}{more}; download them into "
            "the same folder"
        )
    return tuple(paths)


def _joined(parts: list[_Part]) -> dict[str, GgufEntry]:
    """The tensors of all parts, which are checked to be of one model."""
    entries: dict[str, GgufEntry] = {}
    for number, part in enumerate(parts):
        said = [part.metadata.get(f"split.{key}", 0) for key in ("no", "count")]
        if len(parts) > 1 and said != [number, len(parts)]:
            raise JaxchatError(
                f"{part.path}: says it is part {shown(said[0])} of {shown(said[1])}, counted from 0; its "
                f"name says part {number} of {len(parts)}; {_ADVICE}"
            )
        if twice := entries.keys() & part.entries.keys():
            raise JaxchatError(
                f"{part.path}: tensor {shown(min(twice))} is in another part, too; are all of one model?"
            )
        entries |= part.entries
    total = parts[0].metadata.get("split.tensors.count", len(entries))
    if len(parts) > 1 and total != len(entries):
        raise JaxchatError(
            f"{parts[0].path}: the parts have {len(entries)} tensors together, and split.tensors.count is "
            f"{shown(total)}; are all parts of one model?"
        )
    return entries
