"""Every type of GGUF tensor stands for the numbers that ggml's own code reads out of it, bit by bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.scripts.gguf_convert_endian import byteswap_tensors

from jaxchat.checkpoints.gguf_types import TYPES, GgufType, dequantize, to_little_endian
from jaxchat.errors import JaxchatError

libgguf = pytest.importorskip("libgguf")

BY_NAME = {kind.name: kind for kind in TYPES.values()}
IN_LIBRARY = [n for n, kind in BY_NAME.items() if kind.id in libgguf._SUPPORTED_QUANTIZED_QTYPES]
PLAIN = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
}


def random_rows(kind: GgufType, rows: int = 40, blocks: int = 3) -> np.ndarray:
    """Random bytes, among them every value of every field: NaN and infinite scales, too."""
    return np.random.default_rng(kind.id).integers(0, 256, (rows, blocks * kind.size), np.uint8)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit, but that one NaN is as good as another."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    nan = np.isnan(found) & np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", IN_LIBRARY)
def test_quantized_numbers_are_those_of_ggml(name: str):
    raw = random_rows(BY_NAME[name])
    assert_same(dequantize(BY_NAME[name], raw), libgguf.dequantize_rows(raw, BY_NAME[name].id))


@pytest.mark.parametrize("name", IN_LIBRARY)
def test_rows_of_a_tensor_stand_for_the_same_alone(name: str):
    kind = BY_NAME[name]
    raw = random_rows(kind)
    whole = dequantize(kind, raw)
    assert_same(dequantize(kind, raw[5:9]), whole[5:9])
    assert_same(dequantize(kind, raw[7]), whole[7])
    assert_same(dequantize(kind, raw.reshape(8, 5, -1)), whole.reshape(8, 5, -1))


def block_by_block(name: str, block: bytes) -> list[float]:
    """What ggml's C says of the types that no library reads, a number at a time."""
    half = float(np.frombuffer(block, "<f2", 1)[0])
    if name == "Q2_0":
        return [(((block[2 + j // 4] >> (j % 4 * 2)) & 3) - 1) * half for j in range(64)]
    if name == "Q8_1":
        return [int(np.int8(np.uint8(code))) * half for code in block[4:36]]
    return [int(np.int8(np.uint8(code))) * float(np.frombuffer(block, "<f4", 1)[0]) for code in block[4:260]]


@pytest.mark.parametrize("name", ["Q2_0", "Q8_1", "Q8_K"])
def test_types_beyond_the_libraries_follow_their_definition(name: str):
    kind = BY_NAME[name]
    raw = random_rows(kind, rows=3)
    raw.reshape(-1, kind.size)[:, 1::2][:, :2] = 0x3C  # finite scales
    expected = [block_by_block(name, block.tobytes()) for block in raw.reshape(-1, kind.size)]
    np.testing.assert_allclose(dequantize(kind, raw).reshape(-1, kind.elements), expected, rtol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_are_widened(name: str):
    values = np.asarray([[1, -2, 3], [100, 0, -7]]).astype(PLAIN[name])
    raw = values.view(np.uint8).reshape(2, -1)
    assert np.array_equal(dequantize(BY_NAME[name], raw), values.astype(np.float32))


def test_every_type_that_the_library_names_is_known_with_its_sizes():
    for kind in gguf.GGMLQuantizationType:
        known = TYPES[kind.value]
        assert known.name == kind.name
        if kind.name != "Q8_1":  # 40 bytes there, and 36 in ggml-common.h
            assert (known.elements, known.size) == gguf.GGML_QUANT_SIZES[kind]
        assert libgguf.type_size(kind.value) == known.size


def test_a_type_newer_than_the_installed_library_says_so():
    strange = GgufType(99, "Q9_9", 32, 18)
    with pytest.raises(JaxchatError, match="does not know the tensor type Q9_9; install a newer one"):
        dequantize(strange, np.zeros((1, 18), np.uint8))


class _Tensor:
    """As the library's converter of byte orders takes one."""

    def __init__(self, data: np.ndarray):
        self.data = data


@pytest.mark.parametrize("kind", list(byteswap_tensors), ids=lambda kind: kind.name)
def test_big_endian_blocks_are_turned_as_ggufs_own_converter_turns_them(kind: gguf.GGMLQuantizationType):
    known = TYPES[kind.value]
    raw = random_rows(known)
    turned = raw.copy()
    for block in range(turned.size // known.size):
        byteswap_tensors[kind](_Tensor(turned.reshape(-1)), block * known.size)
    assert np.array_equal(to_little_endian(known, turned), raw)


@pytest.mark.parametrize("name", [n for n, kind in BY_NAME.items() if kind.words])
def test_the_words_of_a_block_lie_within_it(name: str):
    kind = BY_NAME[name]
    assert all(first >= 0 and first + size * count <= kind.size for first, size, count in kind.words)
    raw = random_rows(kind)
    once = to_little_endian(kind, raw.copy())
    assert not np.array_equal(once, raw) or kind.size == 1
    assert np.array_equal(to_little_endian(kind, once), raw)
