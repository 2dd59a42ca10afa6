"""The GGUF container: everything that a file may hold, and no claim of a broken one that is believed."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.errors import JaxchatError
from tests.support.gguf_models import write_gguf_file

Q = gguf.GGMLQuantizationType
KEYS = {"a.text": "é\0x", "a.number": 7, "a.real": 0.25, "a.flag": True, "a.list": ["x", "", "yz"]}


def tensors(rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    rng = rng or np.random.default_rng(0)
    shapes = {"matrix": (6, 64), "vector": (10,), "cube": (3, 4, 32), "four": (2, 3, 2, 32)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def error_of(path: Path) -> str:
    with pytest.raises(JaxchatError) as caught:
        GgufFile(path)
    assert str(caught.value).startswith(f"{path.parent}/")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files that are whole


def test_keys_of_every_type_are_read_as_gguf_reads_them(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -9, "uint32": 4294967295, "int32": -5}
    numbers |= {"uint64": 1 << 63, "int64": -(1 << 40), "float32": 1.5, "float64": 1e-300, "bool": False}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"one.{kind}", value)
    writer.add_string("one.string", "text")
    for name, values in {
        "ints": [1, -2],
        "reals": [0.5],
        "flags": [True, False],
        "texts": ["a", "ü"],
    }.items():
        writer.add_array(f"list.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = GgufFile(tmp_path / "m.gguf").metadata
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert {**found} == expected
    assert found["one.uint32"] == 4294967295
    assert found["list.flags"] == [True, False]
    assert type(found["one.bool"]) is bool


# The library's writer turns plain numbers around, and leaves blocks to another tool of its own.
@pytest.mark.parametrize(
    ("kind", "big_endian"),
    [
        *((kind, False) for kind in (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1, Q.Q5_1)),
        (Q.F32, True),
        (Q.F16, True),
    ],
)
def test_tensors_are_read_whole_and_by_rows(kind: Q, big_endian: bool, tmp_path: Path):
    path = tmp_path / "m.gguf"
    values = tensors()
    write_gguf_file(path, "llama", KEYS, values, kind=kind, big_endian=big_endian)
    file = GgufFile(path)
    assert {key: file.metadata[key] for key in KEYS} == KEYS
    for name, value in values.items():
        wanted = Q.F32 if value.ndim == 1 else kind
        bits = gguf.quants.quantize(value, wanted) if wanted != Q.F32 else value
        raw = bits.view(np.uint8).reshape(*value.shape[:-1], -1)
        assert file.entries[name].shape == value.shape
        assert file.entries[name].nbytes == raw.size
        assert np.array_equal(file.raw(name), raw)
        if value.ndim > 1:
            assert np.array_equal(file.raw(name, slice(1, 3)), raw[1:3])
            assert np.array_equal(file.raw(name, 1), raw[1])
            assert file.values(name, slice(2, 2)).shape == (0, *value.shape[1:])
        expected = gguf.quants.dequantize(bits, wanted)
        assert np.array_equal(file.values(name).astype(np.float32), expected)


def test_another_alignment_is_followed(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(256)
    for name, values in tensors().items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert all(entry.offset % 256 == 0 for entry in file.entries.values())
    assert all(np.array_equal(file.values(name), values) for name, values in tensors().items())


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path):
    words = [f"word{number}" for number in range(150_000)]
    path = tmp_path / "m.gguf"
    lists = {"scores": [0.5] * len(words), "merges": [f"{a} {a}" for a in words], "types": [1] * len(words)}
    write_gguf_file(path, "llama", {"tokens": words, **lists}, {})
    took = []
    for _ in range(3):
        started = time.perf_counter()
        found = GgufFile(path).metadata
        took.append(time.perf_counter() - started)
    assert found["tokens"] == words
    assert found["scores"][-1] == 0.5
    assert min(took) < 0.5


# --- split files


def write_parts(folder: Path, parts: int = 3) -> list[Path]:
    write_gguf_file(folder / "m.gguf", "llama", KEYS, tensors(), parts=parts)
    return sorted(folder.glob("*.gguf"))


def test_the_first_part_opens_all(tmp_path: Path):
    paths = write_parts(tmp_path, 2)
    file = GgufFile(paths[0])
    assert [path.name for path in paths] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert file.paths == tuple(paths)
    assert file.metadata["a.number"] == 7
    assert {entry.part for entry in file.entries.values()} == {0, 1}
    assert all(np.array_equal(file.values(name), values) for name, values in tensors().items())


def test_another_part_names_the_first(tmp_path: Path):
    paths = write_parts(tmp_path, 2)
    assert "part 2 of 2; give the first part; that is m-00001-of-00002.gguf" in error_of(paths[1])


def test_missing_and_renamed_parts_are_told(tmp_path: Path):
    paths = write_parts(tmp_path, 4)
    paths[1].unlink()
    paths[3].unlink()
    assert "2 of 4 parts are missing: m-00002-of-00004.gguf and 1 more" in error_of(paths[0])
    other = paths[0].rename(tmp_path / "other.gguf")
    assert "rename it to NAME-00001-of-00004.gguf" in error_of(other)


def test_parts_of_another_model_are_told(tmp_path: Path):
    paths = write_parts(tmp_path, 2)
    paths[1].write_bytes(paths[0].read_bytes())
    assert "m-00002-of-00002.gguf: says it is part 0 of 2, counted from 0" in error_of(paths[0])
    write_parts(tmp_path, 2)
    data = paths[0].read_bytes()
    key = struct.pack("<Q", 19) + b"split.tensors.count" + struct.pack("<Ii", 5, 4)
    assert key in data
    paths[0].write_bytes(data.replace(key, key[:-4] + struct.pack("<i", 9)))
    assert "the parts have 4 tensors together, and split.tensors.count is 9" in error_of(paths[0])


# --- files that are not


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(
    *pairs: tuple[bytes, int, bytes],
    infos: bytes = b"",
    num_tensors: int | None = None,
    num_keys: int | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    """A file of these keys (name, type, value) and tensors."""
    keys = b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in pairs)
    counts = (
        bool(infos) if num_tensors is None else num_tensors,
        len(pairs) if num_keys is None else num_keys,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + infos + bytes(data)


def info(
    name: bytes = b"t",
    shape: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    dims: int | None = None,
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


U32, HUGE = 4, (1 << 64) - 1
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file: it begins with b''"),
    "other magic": (b"GGUX" + bytes(60), "not a GGUF file: it begins with b'GGUX'"),
    "GGML": (b"lmgg" + bytes(60), "of the format GGML, which GGUF has replaced; convert it with llama.cpp's"),
    "GGJT": (b"tjgg" + bytes(60), "of the format GGML"),
    "GGLA": (b"algg" + bytes(60), "of the format GGML"),
    "version 1": (header(version=1), "GGUF of the version 1; read are 2 and 3"),
    "version 4": (header(version=4), "GGUF of the version 4"),
    "magic only": (b"GGUF\3", "truncated inside the header: expected at least 8 bytes, found 5"),
    "half of the counts": (header()[:20], "truncated inside the header"),
    "many tensors": (header(num_tensors=HUGE), f"it would have {HUGE} tensors"),
    "many keys": (header(num_keys=1 << 40), f"it would have {1 << 40} keys"),
    "more keys than fit": (header(num_keys=400), "it would have 400 keys"),
    "long key": (header(num_keys=1, data=0) + struct.pack("<Q", 1 << 60) + bytes(99), "a key would have"),
    "long text": (header((b"k", 8, struct.pack("<Q", HUGE))), f"key 'k' would have {HUGE} bytes"),
    "long list": (
        header((b"k", 9, struct.pack("<IQ", U32, 1 << 62))),
        f"key 'k' would have {1 << 62} values",
    ),
    "long list of texts": (header((b"k", 9, struct.pack("<IQ", 8, 600))), "key 'k' would have 600 values"),
    "long text of a list": (
        header((b"k", 9, struct.pack("<IQQ", 8, 2, 1 << 63))),
        f"a text of a list would have {1 << 63} bytes",
    ),
    "lists in lists": (
        header((b"k", 9, struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQ", 0, 0))),
        "key 'k' has lists in lists in lists",
    ),
    "type of a value": (header((b"k", 13, bytes(8))), "key 'k' is of the type 13; there are 0 to 12"),
    "type of a list": (header((b"k", 9, struct.pack("<IQ", 99, 1))), "key 'k' is of the type 99"),
    "flag": (header((b"k", 7, b"\2")), "key 'k' is [2]; expected 0 or 1"),
    "key twice": (header((b"k", 0, b"\1"), (b"k", 0, b"\1")), "key 'k' is there twice"),
    "tensor twice": (header(infos=info() + info(offset=128), num_tensors=2), "tensor 't' is there twice"),
    "no dimensions": (header(infos=info(shape=())), "tensor 't' has 0 dimensions; expected 1 to 4"),
    "many dimensions": (header(infos=info(dims=1 << 31)), f"tensor 't' has {1 << 31} dimensions"),
    "five dimensions": (header(infos=info(shape=(1,) * 5)), "tensor 't' has 5 dimensions"),
    "zero": (header(infos=info(shape=(32, 0))), "tensor 't' has the shape [0, 32]"),
    "overflow": (header(infos=info(shape=(1 << 32, 1 << 32, 2))), "tensor 't' has the shape"),
    "outside": (header(infos=info(shape=(32, 1 << 40))), "truncated: tensor 't' ends at byte"),
    "offset outside": (header(infos=info(offset=1 << 40)), "truncated: tensor 't' ends at byte"),
    "offset that wraps": (header(infos=info(offset=HUGE - 31)), "truncated: tensor 't' ends at byte"),
    "unaligned": (
        header(infos=info(offset=4)),
        "at byte 4 of the data, no multiple of the alignment, 32",
    ),
    "overlap": (
        header(infos=info(b"a", (64,)) + info(b"b", (64,), offset=128), num_tensors=2),
        "tensors 'a' and 'b' overlap",
    ),
    "type": (header(infos=info(kind=77)), "tensor 't' is of the type 77, which is not known; known: F32,"),
    "removed type": (header(infos=info(kind=31)), "is of the type Q4_0_4_4, which ggml has given up"),
    "part of a block": (
        header(infos=info(shape=(33,), kind=2)),
        "rows of 33 numbers; those of the type Q4_0",
    ),
    "alignment 0": (
        header((b"general.alignment", U32, bytes(4))),
        "alignment is 0; expected a power",
    ),
    "alignment 33": (header((b"general.alignment", U32, struct.pack("<I", 33))), "general.alignment is 33"),
    "alignment of text": (header((b"general.alignment", 8, text(b"32"))), "general.alignment is '32'"),
    "alignment huge": (
        header((b"general.alignment", U32, struct.pack("<I", 1 << 31))),
        "general.alignment is",
    ),
    "parts": (header((b"split.count", U32, struct.pack("<I", 1 << 31))), "split.count 2147483648; expected"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_in_one_line(case: str, tmp_path: Path):
    content, says = BROKEN[case]
    (tmp_path / "m.gguf").write_bytes(content)
    assert says in error_of(tmp_path / "m.gguf")


def test_lists_are_no_longer_than_a_vocabularys(tmp_path: Path):
    count = 1 << 23
    lists = [(b"k%d" % number, 9, struct.pack("<IQ", 0, count) + bytes(count)) for number in range(3)]
    (tmp_path / "m.gguf").write_bytes(header(*lists))
    assert f"key 'k2' would have {count} values, which no vocabulary has" in error_of(tmp_path / "m.gguf")


def test_text_of_a_file_is_made_fit_to_print(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(header(infos=info(b"\x1b[2J" + b"x" * 5000, kind=77)))
    message = error_of(tmp_path / "m.gguf")
    assert "\x1b" not in message
    assert len(message) < 1000


def test_a_big_endian_file_of_a_type_without_a_byte_order_is_refused(tmp_path: Path):
    content = b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + struct.pack(">Q", 1) + b"t"
    content += struct.pack(">IQIQ", 1, 256, 16, 0) + bytes(4096)
    (tmp_path / "m.gguf").write_bytes(content)
    assert "of the type IQ2_XXS, which is not read of big-endian files" in error_of(tmp_path / "m.gguf")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_gguf_file(path, "llama", KEYS, tensors())
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(JaxchatError, match="was changed while it was read"):
        file.values("four")
