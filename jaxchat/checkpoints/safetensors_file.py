"""Reading and writing safetensors files, whole tensors or mapped ones: the format only, no models and no JAX.

Format: https://huggingface.co/docs/safetensors/index#format. Eight bytes of little-endian header length N, N
bytes of JSON (`name -> dtype, shape, data_offsets`, offsets counted from the end of the header), then the
data without holes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.checkpoints.open_file import OpenFile
from jaxchat.errors import JaxchatError
from jaxchat.misplaced import refuse_misplaced

ALIGNMENT = 64
"""Bytes. XLA on CPU takes over a host buffer without a copy only if it starts at a multiple of this."""

PAD_PREFIX = "__pad__."
"""Names of the tensors that only move the next one to an aligned offset; readers drop them."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Format name -> numpy dtype, of the types with whole bytes."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the official reader


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its format dtype name, shape, and first and last-plus-one byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file. Opening reads the header only and checks it against the size of the file.

    `read` copies and notices if the file changes; `view` maps, for what is to stay on the disk. Of a view
    whose file is cut short the operating system ends the process (SIGBUS).

    Attributes:
      path: the file.
      entries: name -> `Entry`, without the padding tensors.
      metadata: the free-form strings of the header.

    Args:
      path: the file.
      advice: what to do about a file that is not whole.

    Raises:
      JaxchatError: the file is missing, truncated or malformed; the message has found and expected bytes.
    """

    def __init__(self, path: str | Path, *, advice: str = "download the file again"):
        self.path = Path(path)
        try:
            self._file = OpenFile(self.path, advice)
            size = self._file.size
            header, data_start = _read_header(self._file.file, size, self.path, advice)
        except OSError as error:
            raise JaxchatError(f"{self.path}: cannot be read ({error.strerror or error}); {advice}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = {name: _entry(name, value, data_start, self.path) for name, value in header.items()}
        _check_offsets(entries, data_start, size, self.path, advice)
        self.entries = {name: entry for name, entry in entries.items() if not name.startswith(PAD_PREFIX)}

    def read(self, name: str, rows: slice | int = slice(None)) -> np.ndarray:
        """A copy of the tensor, or of some of its rows: `tensor[rows]`.

        Raises:
          JaxchatError: the file has changed since it was opened.
        """
        dtype, shape = self._dtype(name), self.entries[name].shape
        start, stop = 0, 1
        if shape:
            start, stop, _ = (slice(rows, rows + 1) if isinstance(rows, int) else rows).indices(shape[0])
            shape = (stop - start, *shape[1:])
        out = np.empty(shape, dtype)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file.read(out, self.entries[name].start + start * row_bytes)
        return out[0] if isinstance(rows, int) else out

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapping; nothing is read before it is used.

        The view keeps the mapping alive.
        """
        entry, dtype = self.entries[name], self._dtype(name)
        count = math.prod(entry.shape)
        return np.frombuffer(self._file.map, dtype, count, entry.start).reshape(entry.shape)

    def _dtype(self, name: str) -> np.dtype:
        stored = self.entries[name].dtype
        if stored not in DTYPES:
            raise JaxchatError(
                f"{self.path}: tensor {name} has dtype {stored}; readable: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]


def _read_header(file: Any, size: int, path: Path, advice: str) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise JaxchatError(f"{path}: truncated: expected at least 8 bytes, found {size}; {advice}")
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        refuse_misplaced(path)
        raise JaxchatError(
            f"{path}: not a safetensors file: its header would have {length} bytes, the file has {size}; "
            f"{advice}"
        )
    if 8 + length > size:
        raise JaxchatError(
            f"{path}: truncated inside the header: expected at least {8 + length} bytes, found {size}; "
            f"{advice}"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers of thousands of digits
        raise JaxchatError(
            f"{path}: corrupt header: the {length} bytes at byte 8 are no JSON ({error}); {advice}"
        ) from None
    if not isinstance(header, dict):
        raise JaxchatError(
            f"{path}: corrupt header: expected a JSON object, found {type(header).__name__}; {advice}"
        )
    return header, 8 + length


def _entry(name: str, value: Any, data_start: int, path: Path) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
        valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise JaxchatError(
            f"{path}: corrupt header: tensor {name} has {json.dumps(value)}; "
            "expected dtype, shape and data_offsets"
        )
    if stop < start or (dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize):
        expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else "at least 0"
        raise JaxchatError(
            f"{path}: corrupt header: tensor {name} ({dtype} {shape}) has {stop - start} bytes; "
            f"expected {expected}"
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_offsets(entries: Mapping[str, Entry], data_start: int, size: int, path: Path, advice: str) -> None:
    end, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a hole after"
            raise JaxchatError(
                f"{path}: corrupt header: tensor {name} {what} {previous}: expected to start at byte {end}, "
                f"found {entry.start}"
            )
        end, previous = entry.stop, name
    if end != size:
        what = "truncated" if size < end else "has bytes after the last tensor"
        raise JaxchatError(f"{path}: {what}: expected {end} bytes, found {size}; {advice}")


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand by name, dtype and shape, in pieces and in any order.

    The whole size is reserved first, so that a full disk is an `OSError` before the work and not after it.
    Use as a context manager; leaving it without an exception brings the data safely to the disk.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        alignment: int = 1,
    ):
        """Lays the file out, in the order of `specs`.

        Args:
          path: created, or truncated.
          specs: name -> (dtype, shape).
          metadata: free-form strings for the header.
          alignment: every tensor starts at a multiple of this many bytes. The format forbids holes, so a
            tensor whose size is not a multiple is followed by a small `U8` tensor named `PAD_PREFIX` + a
            number. With 1 there is no padding: order the tensors by falling item size.
        """
        self.path = Path(path)
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        header = self._layout({"__metadata__": dict(metadata)} if metadata else {}, alignment)
        self._file = self.path.open("wb")
        try:
            self._reserve(header)
        except BaseException:
            self._file.close()
            raise

    def _layout(self, header: dict[str, Any], alignment: int) -> bytes:
        end = 0
        for name, (dtype, shape) in self._specs.items():
            if gap := -end % alignment:
                pad = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
                header[f"{PAD_PREFIX}{len(header)}"] = pad
                end += gap
            stop = end + math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [end, stop],
            }
            self._offsets[name], end = end, stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-(8 + len(text)) % max(alignment, 8))
        self._data_start, self._size = 8 + len(text), 8 + len(text) + end
        return text

    def _reserve(self, header: bytes) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, self._size)
        else:
            self._file.truncate(self._size)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, values: np.ndarray, index: int | None = None) -> None:
        """Writes a whole tensor, or `tensor[index]` of a stacked one.

        Raises:
          ValueError: dtype or shape is not the announced one.
        """
        dtype, shape = self._specs[name]
        expected = shape if index is None else shape[1:]
        if values.dtype != dtype or values.shape != expected:
            raise ValueError(f"{name}: {values.dtype}{values.shape}, announced {dtype}{expected}")
        offset = self._data_start + self._offsets[name] + (index or 0) * values.nbytes
        self._file.seek(offset)
        # Through uint8: numpy has no buffer protocol for bfloat16.
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
