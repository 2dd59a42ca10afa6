"""Blocks of GGUF's quantized types are read and written bit for bit."""

import gguf
import jax
import numpy as np
import pytest

from jaxchat.pallas.gguf_blocks import LAYOUTS, blocks_of, cpu, reference, tensor_of
from jaxchat.quant import QuantFormat, dequantize, quantize

NAMES = tuple(LAYOUTS)


def random_blocks(rng: np.random.Generator, name: str, rows: int, columns: int) -> np.ndarray:
    """Every pattern of bits, but for scales, which are finite."""
    layout = LAYOUTS[name]
    blocks = rng.integers(0, 256, (rows, columns // layout.elements, layout.bytes), dtype=np.uint8)
    halves = {"Q6_K": (208,)}.get(name, (0, 2) if layout.format.affine else (0,))
    for at in halves:
        scales = rng.standard_normal(blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_stand_for_what_ggufs_own_reader_says(name):
    raw = random_blocks(np.random.default_rng(), name, 7, 768)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize(tensor_of(name, raw)), expected)


@pytest.mark.skipif(cpu.reader() is None, reason="no native library")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3, 4100])
def test_the_native_reader_is_the_reference(name, rows):
    raw = random_blocks(np.random.default_rng(), name, rows, 512)
    jax.tree.map(np.testing.assert_array_equal, cpu.tensor_of(name, raw), reference.tensor_of(name, raw))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_written_as_they_were_read(name):
    raw = random_blocks(np.random.default_rng(), name, 5, 512)
    np.testing.assert_array_equal(blocks_of(name, tensor_of(name, raw)), raw)


@pytest.mark.parametrize("name", NAMES)
def test_bits_per_weight_stay_within_a_tenth_of_the_files(name):
    raw = random_blocks(np.random.default_rng(), name, 4, 1024)
    assert tensor_of(name, raw).nbytes <= 1.1 * raw.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_weights_quantized_here_are_blocks_that_ggufs_reader_reads(name):
    w = np.random.default_rng().standard_normal((3, 512)).astype(np.float32)
    q = quantize(w, LAYOUTS[name].format, name="w")
    found = gguf.quants.dequantize(blocks_of(name, q), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(found, dequantize(q))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_simple_formats_are_llama_cpps_bit_for_bit(name):
    w = np.random.default_rng().standard_normal((4, 256)).astype(np.float32)
    q = quantize(w, QuantFormat.parse(name.lower()), name="w")
    expected = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(blocks_of(name, q), expected)
