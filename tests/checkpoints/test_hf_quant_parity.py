"""Layers that the libraries themselves quantize are the numbers that these make of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from tests.checkpoints.test_hf_quant import loaded  # noqa: E402
from tests.support.hf_quantized import BF16, E4M3, Made, Rng, write_quantized  # noqa: E402

NUMPY = {torch.bfloat16: (torch.int16, BF16), torch.float8_e4m3fn: (torch.uint8, E4M3)}
"""torch's types that numpy lacks -> of the same size, and ours."""


def array(tensor: Any) -> np.ndarray:
    bits, own = NUMPY.get(tensor.dtype, (tensor.dtype, None))
    found = tensor.detach().contiguous().view(bits).numpy()
    return found if own is None else found.view(own)


def assert_read(tmp_path: Path, section: dict[str, Any], make: Any, rtol: float = 1e-6) -> None:
    weights = write_quantized(tmp_path, section, make)
    _, found, _ = loaded(tmp_path, keep="exact")
    assert weights
    for name, expected in weights.items():
        np.testing.assert_allclose(found[name], expected, rtol=rtol, atol=1e-7, err_msg=name)


# --- compressed-tensors

GROUP, CHANNEL = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}


@pytest.mark.parametrize(
    ("format", "arguments"),
    [
        ("pack-quantized", {"num_bits": 4, "symmetric": True, **GROUP}),
        ("pack-quantized", {"num_bits": 4, "symmetric": False, **GROUP}),
        ("pack-quantized", {"num_bits": 8, "symmetric": True, **CHANNEL}),
        ("pack-quantized", {"num_bits": 8, "symmetric": False, **GROUP}),
        ("pack-quantized", {"num_bits": 3, "symmetric": True, **GROUP}),
        ("pack-quantized", {"num_bits": 3, "symmetric": False, **GROUP}),
        ("pack-quantized", {"num_bits": 2, "symmetric": True, **GROUP}),
        ("int-quantized", {"num_bits": 8, "symmetric": True, **CHANNEL}),
        ("int-quantized", {"num_bits": 8, "symmetric": False, **CHANNEL}),
        ("naive-quantized", {"num_bits": 8, "symmetric": True, **CHANNEL}),
        ("float-quantized", {"num_bits": 8, "type": "float", **CHANNEL}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
        ),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", **GROUP}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **GROUP}),
        (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
    ],
)  # fmt: skip
def test_compressed_tensors(format: str, arguments: dict[str, Any], tmp_path: Path):
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    args = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=format)

    def make(rng: Rng, rows: int, columns: int) -> Made:
        weight = torch.from_numpy(rng.normal(0, 0.05, (rows, columns)).astype(np.float32))
        state = {"weight": weight, **_scales(rng, args, rows, columns)}
        stored = compressor.compress(state, scheme)
        number = compressor.decompress(dict(stored), scheme)["weight"]
        return {name: array(tensor) for name, tensor in stored.items()}, number.double().numpy()

    section = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
    }
    # Of NVFP4 the library hands out bfloat16 numbers.
    assert_read(tmp_path, section, make, rtol=2**-8 if format == "nvfp4-pack-quantized" else 1e-6)


def _scales(rng: Rng, args: Any, rows: int, columns: int) -> dict[str, Any]:
    """Scales and zero points as a calibration might have left them, float32."""
    high, wide = args.block_structure or (1, 1)
    shape = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // max(args.group_size or 1, 1)),
        "tensor_group": (rows, columns // max(args.group_size or 1, 1)),
        "block": (-(-rows // high), -(-columns // wide)),
    }[args.strategy]
    most = (1 << (args.num_bits - 1)) if args.type == "int" else (448.0 if args.num_bits == 8 else 6.0)
    scale = torch.from_numpy(rng.uniform(0.1, 0.2, shape).astype(np.float32)) / most
    found = {"weight_scale": scale}
    if args.strategy == "tensor_group":
        found["weight_scale"] = (scale * 10000).to(torch.float8_e4m3fn).float()
        found["weight_global_scale"] = torch.tensor([10000.0])
    if args.type == "float" and args.group_size == 32:
        found["weight_scale"] = 2.0 ** torch.floor(torch.log2(scale))
    if not args.symmetric:
        half = 1 << (args.num_bits - 1)
        found["weight_zero_point"] = torch.from_numpy(rng.integers(-half, half, shape).astype(np.int8))
    return found


# --- bitsandbytes


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(kind: str, double: bool, tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes.functional")

    def make(rng: Rng, rows: int, columns: int) -> Made:
        weight = torch.from_numpy(rng.normal(0, 0.05, (rows, columns)).astype(np.float32))
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        parts = {f"weight.{name}": array(part) for name, part in state.as_dict(packed=True).items()}
        return {"weight": array(packed), **parts}, functional.dequantize_4bit(packed, state).double().numpy()

    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    assert_read(tmp_path, section, make)


def test_bitsandbytes_8_bits(tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes.functional")

    def make(rng: Rng, rows: int, columns: int) -> Made:
        weight = torch.from_numpy(rng.normal(0, 0.05, (rows, columns)).astype(np.float16))
        codes, largest, _ = functional.int8_vectorwise_quant(weight)
        number = functional.int8_vectorwise_dequant(codes, largest)
        return {"weight": array(codes), "SCB": array(largest)}, number.double().numpy()

    assert_read(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, make)
