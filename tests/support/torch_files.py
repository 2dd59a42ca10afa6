"""Files as PyTorch writes them, written without it: see `checkpoints/torch_file.py` for the layouts."""

import contextlib
import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage", "int64": "LongStorage", "int32": "IntStorage",
    "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip


@contextlib.contextmanager
def fake_torch() -> Iterator[types.SimpleNamespace]:
    """Modules whose names pickle can write down."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}

    def named(module: str, name: str) -> Any:
        def function(*arguments: Any) -> None: ...

        function.__module__, function.__qualname__, function.__name__ = module, name, name
        setattr(modules[module], name, function)
        return function

    rebuild = {name: named("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")}
    storages = {dtype: named("torch", name) for dtype, name in _STORAGES.items()}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield types.SimpleNamespace(**rebuild, storages=storages)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Parameter:
    """Written as a parameter is: a tensor inside of one more call."""

    def __init__(self, array: np.ndarray):
        self.array = array


class Strided(NamedTuple):
    """A tensor that says itself where in a storage it is; numbers of elements."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, torch: Any, protocol: int):
        super().__init__(file, protocol)
        self._torch = torch
        self.storages: dict[int, tuple[str, np.ndarray]] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        key, _ = self.storages.setdefault(id(value.base), (str(len(self.storages)), value.base))
        kind = self._torch.storages[value.base.dtype.name]
        return ("storage", kind, key, "cpu", value.base.size)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Parameter):
            return self._torch._rebuild_parameter, (value.array, True, OrderedDict())
        if isinstance(value, Strided):
            tensor = (_Storage(value.base), *value[1:], False, OrderedDict())
            return self._torch._rebuild_tensor_v2, tensor
        if not isinstance(value, np.ndarray):
            return NotImplemented
        base = value if value.base is None else value.base
        offset = (value.ctypes.data - base.ctypes.data) // value.itemsize
        strides = tuple(stride // value.itemsize for stride in value.strides)
        tensor = (_Storage(base), offset, value.shape, strides, False, OrderedDict())
        return self._torch._rebuild_tensor_v2, tensor


class _Storage:
    def __init__(self, base: np.ndarray):
        self.base = base


def torch_zip(value: Any, *, protocol: int = 2, folder: str = "archive") -> bytes:
    """A file of today's layout."""
    text, out = io.BytesIO(), io.BytesIO()
    with fake_torch() as torch:
        pickler = _Pickler(text, torch, protocol)
        pickler.dump(value)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", text.getvalue())
        archive.writestr(f"{folder}/byteorder", "little")
        for key, base in pickler.storages.values():
            archive.writestr(f"{folder}/data/{key}", base.tobytes())
        archive.writestr(f"{folder}/version", "3\n")
    return out.getvalue()


def torch_legacy(value: Any, *, protocol: int = 2) -> bytes:
    """A file of the layout before PyTorch 1.6."""
    out = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(header, out, protocol)
    with fake_torch() as torch:
        pickler = _Pickler(out, torch, protocol)
        pickler.dump(value)
    pickle.dump([key for key, _ in pickler.storages.values()], out, protocol)
    for _, base in pickler.storages.values():
        out.write(base.size.to_bytes(8, "little") + base.tobytes())
    return out.getvalue()


LAYOUTS: Mapping[str, Callable[..., bytes]] = {"zip": torch_zip, "legacy": torch_legacy}


def write_torch(path: Path, tensors: Mapping[str, Any], layout: str = "zip") -> None:
    """Writes a state dictionary."""
    path.write_bytes(LAYOUTS[layout](OrderedDict(tensors)))


def some_arrays() -> dict[str, np.ndarray]:
    """Tensors of every dtype, and views: of one storage, turned, with steps, of one number and of none."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        name: (rng.standard_normal((3, 5)) * 9).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        for name in _STORAGES
    }
    base = rng.standard_normal((6, 4)).astype(np.float32)
    views = {
        "whole": base[:],
        "part": base[2:5],
        "turned": base.T,
        "steps": base[::2, 1::2],
        "one": base[3, 2:3][0:1],
    }
    return arrays | views | {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 4), np.float32)}
