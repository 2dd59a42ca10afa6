"""PyTorch's files are read as PyTorch reads them, without it, and nothing in them is run."""

import contextlib
import io
import json
import os
import pickle
import pickletools
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.errors import JaxchatError
from tests.support.tiny import write_tiny_hf
from tests.support.torch_files import LAYOUTS, Parameter, Strided, some_arrays, torch_zip, write_torch


def error_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(JaxchatError) as caught:
        TorchFile(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", range(2, 6))
def test_tensors_of_every_dtype_and_all_kinds_of_views(tmp_path, layout, protocol):
    arrays = some_arrays()
    path = tmp_path / "a.bin"
    path.write_bytes(LAYOUTS[layout](OrderedDict(arrays), protocol=protocol))
    file = TorchFile(path)
    assert list(file.entries) == list(arrays)
    for name, array in arrays.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert file.entries[name].shape == array.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_some_rows_no_others_are_read(tmp_path, layout, monkeypatch):
    arrays = {name: array for name, array in some_arrays().items() if array.ndim}
    write_torch(tmp_path / "a.bin", arrays, layout)
    file = TorchFile(tmp_path / "a.bin")
    for name, array in arrays.items():
        for rows in (slice(1, 3), slice(0, 0), slice(2, None), slice(None)):
            found = file.read(name, rows)
            assert found.tobytes() == array[rows].tobytes()
            assert found.flags.c_contiguous
    read: list[int] = []
    monkeypatch.setattr(file._file, "read", lambda out, offset: read.append(out.nbytes))
    file.read("float32", slice(1, 2))
    assert read == [arrays["float32"][0].nbytes]


def test_a_tied_head_may_be_stored_turned(tmp_path):
    """A matrix that is turned is a view in PyTorch's files, as a tied head of it is."""
    write_tiny_hf(tmp_path, "llama", tie_word_embeddings=True)
    expected = load_params(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    turned = np.ascontiguousarray(tensors["model.embed_tokens.weight"].T).T
    tensors |= {"model.embed_tokens.weight": turned, "lm_head.weight": turned}
    write_torch(tmp_path / "pytorch_model.bin", tensors)
    assert_same(load_params(tmp_path), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_other_values_and_the_part_that_holds_the_tensors(tmp_path, layout):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    inner = OrderedDict(weight=Parameter(array), alike=array, extra=None)
    for value in (
        inner,
        {"epoch": 3, "args": {"lr": 1e-3}, "state_dict": inner},
        {"optimizer": {"x": array}, "net": inner},
    ):
        (tmp_path / "a.pt").write_bytes(LAYOUTS[layout](value))
        file = TorchFile(tmp_path / "a.pt")
        assert list(file.entries) == ["weight", "alike"]
        assert np.array_equal(file.read("weight"), array)


# --- models


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_a_model_of_pytorch_files_equals_the_one_of_safetensors(tmp_path, layout, model_type):
    write_tiny_hf(tmp_path, model_type)
    config, expected = load_params(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    write_torch(tmp_path / "pytorch_model.bin", tensors, layout)
    assert_same(load_params(tmp_path), (config, expected))


def test_shards_that_an_index_names(tmp_path):
    write_tiny_hf(tmp_path, "llama")
    expected = load_params(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: names[number % 2] for number, name in enumerate(tensors)}
    for shard in names:
        write_torch(tmp_path / shard, {n: t for n, t in tensors.items() if weight_map[n] == shard})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_params(tmp_path), expected)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert np.array_equal(np.asarray(found[1][name]), np.asarray(value)), name


# --- what is no file of tensors


class Evil:
    """Makes a directory, if it is unpickled as pickle does."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, io.open, pickle.loads, np.load])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.skipif(os.name != "posix", reason="names of this system")
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name_and_not_run(
    tmp_path, function, layout, protocol
):
    value = {"weight": np.zeros(2, np.float32), "evil": Evil(function, str(tmp_path / "made"))}
    said = error_of(tmp_path / "a.bin", LAYOUTS[layout](value, protocol=protocol))
    assert re.search(
        rf"asks for '\w+\.{function.__name__}', which no tensor needs; nothing of it was run", said
    )
    assert not (tmp_path / "made").exists()


def without(content: bytes, record: str) -> bytes:
    """A zip archive without one record."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith(record):
                target.writestr(info.filename, source.read(info))
    return out.getvalue()


def test_a_file_that_is_not_whole_says_what_is_missing(tmp_path):
    content = torch_zip({"weight": np.ones(50, np.float32)})
    path = tmp_path / "a.bin"
    assert "the storage of tensor weight is missing" in error_of(path, without(content, "data/0"))
    assert "without data.pkl" in error_of(path, without(content, "data.pkl"))
    for keep in (0, 3, 100, len(content) - 1):
        assert "a.bin: " in error_of(path, content[:keep])
    legacy = LAYOUTS["legacy"]({"weight": np.ones(50, np.float32)})
    assert "truncated: expected at least" in error_of(path, legacy[:-1])
    assert "no tensors by name" in error_of(path, torch_zip({"a": 1}))
    assert "no tensors by name" in error_of(path, torch_zip([1, 2]))


def test_a_big_endian_file_is_refused(tmp_path):
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_zip({"w": np.ones(2)}))) as source,
        zipfile.ZipFile(out, "w") as target,
    ):
        for info in source.infolist():
            data = b"big" if info.filename.endswith("byteorder") else source.read(info)
            target.writestr(info.filename, data)
    assert "big-endian" in error_of(tmp_path / "a.bin", out.getvalue())


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(40, (20,), (1,)), (0, (8, 8), (8, 1)), (0, (2,), (1 << 50,)), (49, (2,), (1,)), (50, (1,), (1,))],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_beyond_its_storage_is_refused(tmp_path, layout, offset, shape, strides):
    content = LAYOUTS[layout]({"weight": Strided(np.ones(50, np.float32), offset, shape, strides)})
    assert "of a storage of 200" in error_of(tmp_path / "a.bin", content)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1 << 62,), (0,)),
        (0, "ab", (1, 1)),
        (0.5, (), ()),
    ],
)
def test_a_view_that_is_none_is_refused(tmp_path, offset, shape, strides):
    content = torch_zip({"weight": Strided(np.ones(50, np.float32), offset, shape, strides)})
    assert "a tensor of " in error_of(tmp_path / "a.bin", content)


def test_a_few_numbers_that_are_repeated_very_often_are_refused(tmp_path):
    content = torch_zip({"weight": Strided(np.ones(1, np.float32), 0, (1 << 20, 1 << 20), (0, 0))})
    assert "repeats few numbers to 1099511627776" in error_of(tmp_path / "a.bin", content)


@pytest.mark.parametrize("record", ["archive/byteorder", "archive/data.pkl"])
def test_no_room_is_made_for_the_size_that_a_record_claims(tmp_path, record):
    content = bytearray(torch_zip({"weight": np.ones(4, np.float32)}))
    entry = content.rindex(record.encode()) - 46  # in the archive's directory
    content[entry + 20 : entry + 28] = struct.pack("<II", 1 << 27, 1 << 27)
    tracemalloc.start()
    try:
        error_of(tmp_path / "a.bin", bytes(content))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


# --- any bytes


WHOLE = {name: LAYOUTS[name](OrderedDict(some_arrays())) for name in LAYOUTS}


@given(st.sampled_from(sorted(LAYOUTS)), st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_wrong_bytes_is_read_or_refused_by_name(tmp_path, layout, data):
    content = bytearray(WHOLE[layout])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with contextlib.suppress(JaxchatError):
        file = TorchFile(path)
        for name in file.entries:
            file.read(name).tobytes()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pickle_of_any_opcodes_is_read_or_refused_by_name(tmp_path, data):
    with zipfile.ZipFile(io.BytesIO(WHOLE["zip"])) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    text = bytearray(records["archive/data.pkl"])
    codes = [code.code.encode("latin1") for code in pickletools.opcodes]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(2, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(codes))
    records["archive/data.pkl"] = bytes(text)
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with contextlib.suppress(JaxchatError):
        file = TorchFile(path)
        for name in file.entries:
            file.read(name).tobytes()


# --- files that others made


def test_files_that_others_made_are_read(shared_data: Path):
    files = sorted((shared_data / "torch-files").rglob("*.p*t*"))
    read = 0
    for path in files:
        if path.suffix in (".pt", ".pth"):
            with contextlib.suppress(JaxchatError):
                file = TorchFile(path)
                read += all(file.read(name).shape == entry.shape for name, entry in file.entries.items())
    assert read > 50
