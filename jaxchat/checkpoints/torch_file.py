"""Reading PyTorch's `.bin`, `.pt` and `.pth` files without PyTorch, by mapping: tensors and nothing else.

Such a file is a pickle, which is a program. This reader knows the few names that a program of tensors needs;
any other one is refused by name, and nothing of the file is ever run. Two layouts: a zip archive (since
PyTorch 1.6) with `NAME/data.pkl` and a record for each storage, and before that pickles in a row with the
storages behind them. Source: torch/serialization.py and torch/_utils.py.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxchat.checkpoints.open_file import OpenFile
from jaxchat.checkpoints.safetensors_file import DTYPES, Entry
from jaxchat.errors import JaxchatError
from jaxchat.misplaced import refuse_misplaced
from jaxchat.visible import shown

MAX_PICKLE_BYTES = 1 << 28
"""Of the names, shapes and places of the tensors; those of the largest checkpoints take some megabytes."""
_MOST_REPEATED = 1 << 22  # numbers that strides of 0 make of a storage with fewer
_MAX_DIRECTORY_BYTES = 1 << 26  # of a zip archive

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
"""Classes of storages -> dtypes, by their names in safetensors."""
_TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Refused(Exception):
    """The pickle is not one of tensors."""


@dataclasses.dataclass(frozen=True)
class _Dtype:
    """A dtype, by its name in safetensors."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers in a row: where they are is known by the key."""

    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """An open file, with `read` as `SafetensorsFile` has it. Opening reads everything but the numbers.

    Attributes:
      path: the file.
      entries: name -> `Entry`, whose bytes hold the tensor's numbers, and others where it is strided.

    Raises:
      JaxchatError: the file is missing, truncated, malformed, or a pickle of something else than tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        refuse_misplaced(self.path)
        try:
            self._file = OpenFile(self.path, "download the file again")
            with self.path.open("rb") as file:  # a pickle is read in small pieces
                reader = _zipped if file.read(4) == b"PK\x03\x04" else _legacy
                file.seek(0)
                found, places = reader(file, self._file.size)
            flat, self._found = _flat(found), found
            self._tensors = {name: tensor for name, tensor in flat.items() if isinstance(tensor, _Tensor)}
            self.entries = {name: _entry(name, t, places) for name, t in self._tensors.items()}
        except JaxchatError:
            raise
        except OSError as error:
            raise JaxchatError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except _Refused as error:
            raise JaxchatError(f"{self.path}: {error}") from None
        except Exception as error:  # a pickle or an archive may be wrong in any way
            kind = type(error).__name__
            raise JaxchatError(
                f"{self.path}: not a file of PyTorch's tensors ({kind}: {error}); download the file again"
            ) from None

    def numbers(self, key: str) -> dict[str, int | float | bool]:
        """What is saved beside the tensors under a name: numbers by theirs; none where there is nothing."""
        found = _mapping(_mapping(self._found).get(key))
        return {str(name): value for name, value in found.items() if type(value) in (int, float, bool)}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A copy of the tensor in C order, or of some of its rows: `tensor[rows]`. No other rows are read.

        Raises:
          JaxchatError: the file has changed since it was opened.
        """
        tensor, entry = self._tensors[name], self.entries[name]
        dtype, shape, first = DTYPES[entry.dtype], tensor.shape, entry.start
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        if shape:
            start, stop, _ = rows.indices(shape[0])
            shape, first = (max(stop - start, 0), *shape[1:]), first + start * strides[0]
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        numbers = np.empty(0 if 0 in shape else last + dtype.itemsize, np.uint8)
        self._file.read(numbers, first)
        return np.ndarray(shape, dtype, numbers.data, 0, strides).copy(order="C")


def _entry(name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]]) -> Entry:
    """Where a tensor's numbers are, checked against its storage and the file."""
    if tensor.storage.key not in places:
        raise _Refused(f"the storage of tensor {name} is missing; download the file again")
    start, stop = places[tensor.storage.key]
    itemsize = DTYPES[tensor.dtype].itemsize
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    count = 0 if 0 in tensor.shape else last + 1
    first = start + tensor.offset * itemsize
    if first + count * itemsize > stop:
        raise _Refused(
            f"tensor {name} ends at byte {first + count * itemsize - start} of a storage of {stop - start}; "
            "download the file again"
        )
    if (numbers := math.prod(tensor.shape)) > max((stop - start) // itemsize, _MOST_REPEATED):
        raise _Refused(f"tensor {name} repeats few numbers to {numbers}; save it as it is (contiguous)")
    return Entry(tensor.dtype, tensor.shape, first, first + count * itemsize)


# --- the two layouts: what the pickle holds, and key of a storage -> its first and last-plus-one byte


def _zipped(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        name = next((name for name in records if name.endswith("/data.pkl")), None)
        if name is None:
            raise _Refused("a zip archive without data.pkl, not PyTorch's; give the model's own file")
        folder = name.removesuffix("data.pkl")
        if not _is_stored(records[name], min(MAX_PICKLE_BYTES, size)):
            raise _Refused(
                f"its pickle has {records[name].file_size} bytes or is compressed; no such file is"
            )
        order = records.get(f"{folder}byteorder")
        if order is not None and not (_is_stored(order, 16) and archive.read(order) == b"little"):
            raise _Refused("its numbers are big-endian, which is not read; save it on another machine")
        found = _unpickled(io.BytesIO(archive.read(name)))
        places = {
            key.removeprefix(f"{folder}data/"): _bytes_of(file, info, size)
            for key, info in records.items()
            if key.startswith(f"{folder}data/")
        }
    return found, places


def _is_stored(info: zipfile.ZipInfo, most: int) -> bool:
    """Whether a record is as PyTorch writes it and small: zipfile makes room for whatever one claims."""
    return info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size <= most


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuses an archive whose directory, which zipfile reads whole, cannot be one."""
    file.seek(max(0, size - (1 << 16) - 22))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if length == 0xFFFFFFFF and tail[end - 20 : end - 16] == b"PK\x06\x07":  # zip64
        file.seek(int.from_bytes(tail[end - 12 : end - 4], "little"))
        length = int.from_bytes(file.read(56)[40:48], "little")
    if length > _MAX_DIRECTORY_BYTES:
        raise _Refused(f"its directory would have {length} bytes; download the file again")
    file.seek(0)


def _bytes_of(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Refused(f"{info.filename} is compressed or encrypted, which PyTorch does not do")
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[:4] != b"PK\x03\x04" or start + info.file_size > size:
        raise _Refused(f"truncated: {info.filename} is not all there; download the file again")
    return start, start + info.file_size


def _legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    if _unpickled(file) != _LEGACY_MAGIC or _unpickled(file) != _LEGACY_PROTOCOL:
        raise _Refused("not a file that PyTorch has saved; give the model's own file")
    _unpickled(file)  # about the machine
    storages: dict[str, _Storage] = {}
    found = _unpickled(file, storages)
    keys = _unpickled(file)
    if not isinstance(keys, list):
        raise _Refused("its list of storages is none; download the file again")
    places, at = {}, file.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            continue  # of what is no tensor's
        file.seek(at)
        count = int.from_bytes(file.read(8), "little", signed=True)
        stop = at + 8 + count * DTYPES[storages[key].dtype].itemsize
        if count < 0 or stop > size:
            raise _Refused(
                f"truncated: expected at least {stop} bytes, found {size}; download the file again"
            )
        places[key] = (at + 8, stop)
        at = stop
    return found, places


# --- the pickle

_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    """.split()  # noqa: SIM905 (a list of forty strings is harder to read)
)
"""What tensors are written with, of protocol 2 and later."""


class _Bounded:
    """A file for a pickle: whatever length it states, no more is asked for than there is."""

    def __init__(self, file: BinaryIO):
        self._file, start = file, file.tell()
        self._end = min(file.seek(0, io.SEEK_END), start + MAX_PICKLE_BYTES)
        file.seek(start)

    def read(self, count: int) -> bytes:
        """So many bytes."""
        if count > self._end - self._file.tell():  # before they are made room for
            raise EOFError("it ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        """A line, of a name."""
        return self._file.readline(1 << 16)

    def readinto(self, buffer: bytearray) -> int:
        """See `read`."""
        buffer[:] = self.read(len(buffer))
        return len(buffer)


def _unpickled(file: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    return _Unpickler(file, {} if storages is None else storages).load()


_PurePython: Any = pickle._Unpickler


class _Unpickler(_PurePython):
    """Knows `_NAMES` and `_OPCODES`, and takes storages for what they are called.

    Made of the unpickler written in Python: opcodes can be taken from it, and its memo is a dictionary,
    where the other one's is an array as long as a file says.
    """

    dispatch = {  # noqa: RUF012 (as it is in the class above)
        getattr(pickle, name)[0]: _PurePython.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]):
        super().__init__(_Bounded(file), encoding="utf-8")
        self._storages = storages

    def load_build(self) -> None:
        """Attributes, which nothing here has; those of a dictionary (`_metadata`) are left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused(f"attributes for {shown(self.stack[-1])}; download the file again")

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for, if a file of tensors needs it."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and name in _TORCH_DTYPES:
            return _Dtype(_TORCH_DTYPES[name])
        if (module, name) not in _NAMES:
            raise _Refused(
                f"a pickle that asks for {shown(f'{module}.{name}')}, which no tensor needs; nothing of it "
                "was run. Take safetensors, or save the weights alone (state_dict)"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, from ("storage", class, key, device, elements)."""
        match pid:
            case ("storage", _Dtype(name=dtype), str(key), _, int(count), *view) if view in ([], [None]):
                storage = self._storages.setdefault(key, _Storage(dtype, key, count))
                if storage.dtype != dtype:
                    raise _Refused(f"storage {shown(key)} is of two dtypes; download the file again")
                return storage
        raise _Refused(f"a storage that is {shown(pid)}; download the file again")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """`_rebuild_tensor` and `_v2`, whose dtype is the storage's, and `_v3`, which names one."""
    dtype = next((value.name for value in rest if isinstance(value, _Dtype)), None)
    sizes = (*shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (-1,)
    if (
        not isinstance(storage, _Storage)
        or any(type(n) is not int or not 0 <= n < 1 << 60 for n in (offset, *sizes))
        or len(shape) != len(strides)
        or len(shape) > 32
    ):
        raise _Refused(f"a tensor of {shown((offset, shape, strides))}; download the file again")
    return _Tensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How bytes are written where a pickle has none; `_codecs.encode` would know many more."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused(f"bytes in the encoding {shown(encoding)}; download the file again")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("_codecs", "encode"): _encode,
}
"""All that a pickle may ask for beside storages and dtypes."""


def _flat(found: Any) -> Mapping[str, Any]:
    """Names -> tensors: what was saved, or the one part of it that has the most of them (`state_dict`)."""
    whole = _mapping(found)

    def tensors(holder: Mapping[str, Any]) -> int:
        return sum(isinstance(value, _Tensor) for value in holder.values())

    best = max((whole, *map(_mapping, whole.values())), key=tensors)
    if not tensors(best):
        raise _Refused("holds no tensors by name; save the weights alone (state_dict)")
    return best


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        return {}
    return {name: inner for name, inner in value.items() if isinstance(name, str)}
