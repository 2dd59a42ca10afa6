"""Random models as other programs quantize them, and the numbers that they stand for.

Written from the formats' definitions, element by element, apart from what reads them in `jaxchat`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.checkpoints.safetensors_file import SafetensorsWriter
from jaxchat.families import parameter_table, read_config
from tests.support.tiny import TINY_CONFIGS, random_hf_tensors

Rng = np.random.Generator
Tensors = dict[str, np.ndarray]
Made = tuple[Tensors, np.ndarray]
"""The tensors of a layer by suffix, and its weight, float64 [O, I]."""

E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def bit_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as little-endian bits of 32-bit words, int32 [o, words]."""
    ordered = codes.astype(np.int64)[..., None] >> np.arange(bits) & 1
    stream = ordered.reshape(len(codes), -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 32)])
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def by_columns(values: np.ndarray, group: int, columns: int) -> np.ndarray:
    """[o, groups] -> [o, I], float64."""
    return np.stack([values[:, i // group].astype(np.float64) for i in range(columns)], axis=1)


def random_scales(rng: Rng, shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
    return rng.uniform(0.004, 0.02, shape).astype(dtype)


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    sym: bool = True,
    offset: int = 1,
    order: str = "",
    dtype: Any = np.float16,
) -> Callable[[Rng, int, int], Made]:
    """`order`: columns in groups as `desc_act` leaves them, `regular`, or with groups of unequal sizes."""

    def make(rng: Rng, rows: int, columns: int) -> Made:
        size = columns if group == -1 else group
        groups = -(-columns // size)
        codes = rng.integers(0, 1 << bits, (rows, columns))
        middle = 1 << (bits - 1)
        zeros = np.full((rows, groups), middle) if sym else rng.integers(0, 1 << bits, (rows, groups))
        scales = random_scales(rng, (rows, groups), dtype)
        where = np.arange(columns) // size
        if order == "regular":
            where = rng.permutation(where)
        elif order:
            where = rng.integers(0, groups, columns)
        weight = (codes - zeros[:, where]) * scales[:, where].astype(np.float64)
        stored = bit_words(zeros.T, bits)
        if offset:
            ones = bit_words(np.ones_like(zeros.T), bits)
            ones[...] = sum(1 << shift for shift in range(0, 32, bits)) if bits != 3 else ones
            stored = (
                (stored.view(np.uint32) - ones.view(np.uint32)).view(np.int32)
                if bits != 3
                else (bit_words(zeros.T - 1, bits))
            )
        return {
            "qweight": np.ascontiguousarray(bit_words(codes, bits).T),
            "qzeros": stored,
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": where.astype(np.int32),
        }, weight

    return make


def awq(version: str, group: int = 32) -> Callable[[Rng, int, int], Made]:
    def make(rng: Rng, rows: int, columns: int) -> Made:
        size = columns if group == -1 else group
        groups = columns // size
        codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, groups))
        scales = random_scales(rng, (rows, groups))
        weight = (codes - by_columns(zeros, size, columns)) * by_columns(scales, size, columns)
        if version == "gemm":
            return {
                "qweight": _gemm_words(codes.T),
                "qzeros": _gemm_words(zeros.T),
                "scales": np.ascontiguousarray(scales.T),
            }, weight
        unit = {32: 4, 64: 2}.get(size, 1)
        words = (groups + 7) // 8
        width = (words + unit - 1) // unit * unit
        padded = np.zeros((rows, width * 8), np.float16)
        padded[:, :groups] = scales
        if version == "gemv":
            words = np.zeros((rows, width), np.int32)
            found = bit_words(zeros, 4)
            words[:, : found.shape[1]] = found
            return {"qweight": bit_words(codes, 4), "qzeros": words, "scales": padded}, weight
        mins = np.zeros_like(padded)
        mins[:, :groups] = -(scales.astype(np.float32) * zeros)
        own = by_columns(mins, size, columns)
        return {
            "qweight": _fast_words(codes),
            "scales": np.ascontiguousarray(padded.T),
            "scaled_zeros": np.ascontiguousarray(mins.T),
        }, codes * by_columns(scales, size, columns) + own

    return make


def _gemm_words(codes: np.ndarray) -> np.ndarray:
    """[n, m] -> int32 [n, m/8]: nibble i of a word is its element (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, element in enumerate(order):
        words |= codes[:, element::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def _fast_words(codes: np.ndarray) -> np.ndarray:
    """int16 [O/4, I], element by element as AutoAWQ's `pack_intweight` puts them."""
    rows, columns = codes.shape
    out = np.zeros((rows // 4, columns), np.uint16)
    for block in range(columns // 64):
        for half in range(2):
            for place in range(32):
                # First 8 runs of 2 are dealt to 4, then each 8 is split into even and odd.
                eight, within = divmod(place, 8)
                dealt = eight * 8 + (within % 4) * 2 + within // 4
                four, pair = divmod(dealt, 8)
                run, parity = divmod(pair, 2)
                column = run * 8 + four * 2 + parity
                target = 32 * half + place
                for row in range(rows):
                    value = np.uint16(codes[row, 64 * block + 32 * half + column])
                    # Four rows of 64 are one row of 256, of which four neighbours share a word.
                    flat = 64 * (row % 4) + target
                    out[row // 4, 64 * block + flat // 4] |= value << np.uint16(4 * (flat % 4))
    return out.view(np.int16)


def packed(
    bits: int = 4, group: int = 32, *, sym: bool = True, order: str = "", dtype: Any = np.float16
) -> Callable[[Rng, int, int], Made]:
    """compressed-tensors' pack-quantized."""

    def make(rng: Rng, rows: int, columns: int) -> Made:
        size = columns if group == -1 else group
        groups, half = -(-columns // size), 1 << (bits - 1)
        codes = rng.integers(-half, half, (rows, columns))
        zeros = np.zeros((rows, groups), int) if sym else rng.integers(-half, half, (rows, groups))
        scales = random_scales(rng, (rows, groups), dtype)
        where = np.arange(columns) // size
        if order:
            where = rng.permutation(where) if order == "regular" else rng.integers(0, groups, columns)
        tensors = {
            "weight_packed": bit_words(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": np.array([rows, columns]),
        }
        if not sym:
            tensors["weight_zero_point"] = np.ascontiguousarray(bit_words(zeros.T + half, bits).T)
        if order:
            tensors["weight_g_idx"] = where.astype(np.int32)
        return tensors, (codes - zeros[:, where]) * scales[:, where].astype(np.float64)

    return make


def integers(group: int = -1, *, sym: bool = True, whole: bool = False) -> Callable[[Rng, int, int], Made]:
    """compressed-tensors' int-quantized: int8, a scale a row, group, or for all of it."""

    def make(rng: Rng, rows: int, columns: int) -> Made:
        size = columns if group == -1 else group
        groups = columns // size
        codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        shape = (1, 1) if whole else (rows, groups)
        zeros = np.zeros(shape, np.int8) if sym else rng.integers(-128, 128, shape).astype(np.int8)
        scales = random_scales(rng, shape, BF16)
        tall = np.broadcast_to(scales, (rows, groups)), np.broadcast_to(zeros, (rows, groups))
        each, own = (by_columns(part, size, columns) for part in tall)
        tensors = {"weight": codes, "weight_scale": scales.reshape(1) if whole else scales}
        if not sym:
            tensors["weight_zero_point"] = zeros
        return tensors, (codes - own) * each

    return make


def float8(
    scale: str, kind: str, block: tuple[int, int] = (0, 0), dtype: Any = np.float32
) -> Callable[[Rng, int, int], Made]:
    def make(rng: Rng, rows: int, columns: int) -> Made:
        weight = rng.normal(0, 40, (rows, columns)).astype(E4M3)
        shape = {
            "tensor": (),
            "one": (1,),
            "row": (rows, 1),
            "rows": (rows,),
            "block": (-(-rows // max(block[0], 1)), -(-columns // max(block[1], 1))),
            "group": (rows, -(-columns // max(block[1], 1))),
        }[kind]
        scales = rng.uniform(1e-4, 5e-4, shape).astype(dtype)
        wide = scales.astype(np.float64)
        if kind in ("block", "group"):
            tall = block[0] if kind == "block" else 1
            wide = wide[np.arange(rows) // tall][:, np.arange(columns) // block[1]]
        elif kind == "rows":
            wide = wide[:, None]
        return {"weight": weight, scale: scales}, weight.astype(np.float64) * wide

    return make


def mx8(rng: Rng, rows: int, columns: int) -> Made:
    weight = rng.normal(0, 40, (rows, columns)).astype(E4M3)
    exponents = rng.integers(110, 118, (rows, columns // 32)).astype(np.uint8)
    scales = 2.0 ** (exponents.astype(int) - 127)
    return {"weight": weight, "weight_scale": exponents}, weight.astype(np.float64) * by_columns(
        scales, 32, columns
    )


def mx4(codes_name: str, scales_name: str, *, blocks: bool = False, lowest: int = 115):
    def make(rng: Rng, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 16, (rows, columns))
        exponents = rng.integers(lowest, lowest + 9, (rows, columns // 32)).astype(np.uint8)
        scales = 2.0 ** (exponents.astype(int) - 127)
        low = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        tensors = {codes_name: low.reshape(rows, -1, 16) if blocks else low, scales_name: exponents}
        return tensors, E2M1[codes] * by_columns(scales, 32, columns)

    return make


def nv4(rng: Rng, rows: int, columns: int) -> Made:
    codes = rng.integers(0, 16, (rows, columns))
    scales = rng.uniform(50, 400, (rows, columns // 16)).astype(E4M3)
    whole = np.array([20000.0], np.float32)
    return {
        "weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": scales,
        "weight_global_scale": whole,
    }, E2M1[codes] * by_columns(scales.astype(np.float64) / float(whole[0]), 16, columns)


def table4(kind: str, *, nested: bool = False, storage: Any = np.uint8) -> Callable[[Rng, int, int], Made]:
    """bitsandbytes' 4 bits; the table is of random numbers, as the file has it anyway."""

    def make(rng: Rng, rows: int, columns: int) -> Made:
        count, block = rows * columns, 64
        codes, blocks = rng.integers(0, 16, count), -(-count // block)
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": [rows, columns],
        }
        largest = rng.uniform(0.02, 0.06, blocks).astype(np.float32)
        parts: Tensors = {"weight.absmax": largest, "weight.quant_map": table}
        if nested:
            own = np.linspace(-1, 1, 256).astype(np.float32)
            outer = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
            stored = rng.integers(0, 256, blocks).astype(np.uint8)
            parts |= {
                "weight.absmax": stored,
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": own,
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04}
            largest = own[stored].astype(np.float64) * outer[np.arange(blocks) // 256] + 0.04
        values = [table[code].astype(np.float64) * largest[i // block] for i, code in enumerate(codes)]
        raw = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
        parts["weight"] = raw.view(storage).reshape(-1, 1)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return parts, np.reshape(values, (rows, columns))

    return make


def rows8(rng: Rng, rows: int, columns: int) -> Made:
    """bitsandbytes' int8."""
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    largest = rng.uniform(0.1, 0.5, rows).astype(np.float32)
    tensors = {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return tensors, codes * (largest.astype(np.float64) / 127)[:, None]


def hqq(bits: int = 4, group: int = 32, axis: int = 1) -> Callable[[Rng, int, int], Made]:
    def make(rng: Rng, rows: int, columns: int) -> Made:
        groups = rows * columns // group
        shape = (groups, group) if axis == 1 else (group, groups)
        codes = rng.integers(0, 1 << bits, shape)
        each = (groups, 1) if axis == 1 else (1, groups)
        scale, zero = random_scales(rng, each), rng.uniform(0, (1 << bits) - 1, each).astype(np.float16)
        weight = (codes - zero.astype(np.float64)) * scale.astype(np.float64)
        parts = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
        height = -(-shape[0] // parts)
        padded = np.zeros((height * parts, shape[1]), np.int64)
        padded[: shape[0]] = codes
        words = sum(
            padded[part * height : (part + 1) * height] << bits * (parts - 1 - part) for part in range(parts)
        )
        facts = {"nbits": bits, "group_size": group, "axis": axis}
        return {
            "W_q": np.asarray(words).astype(np.int32 if bits == 3 else np.uint8),
            "scale": scale,
            "zero": zero,
            "shape": np.array([rows, columns]),
            "packing": np.frombuffer(b"some_u8", np.uint8),
            "quant_zero": np.array(0, np.uint8),
            **{name: np.array(value, np.int32) for name, value in facts.items()},
        }, weight.reshape(rows, columns)

    return make


@dataclasses.dataclass(frozen=True)
class Case:
    """A sub-format.

    Attributes:
      section: of `config.json`.
      make: a layer of it.
      small, exact: the format in memory of a layer of 64 columns, under either `keep`.
      error: of `small`, root mean square relative to the weights; 0 is none.
    """

    section: dict[str, Any]
    make: Callable[[Rng, int, int], Made]
    small: str
    exact: str
    error: float = 0.0


def _gptq(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **more}


def _awq(version: str, group: int = 32) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": version,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }


def _compressed(format: str, *, bits: int = 8, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "symmetric": True, "strategy": "channel", "type": "int", **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _grouped(size: int, **more: Any) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size, **more}


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}}

CASES: Mapping[str, Case] = {
    "gptq-sym": Case(_gptq(4, 32, sym=True), gptq(), "int4", "int4"),
    "gptq-sym-row": Case(_gptq(4, -1, sym=True), gptq(group=-1), "int4:channel", "int4:channel"),
    "gptq-sym-bfloat16": Case(_gptq(4, 32, sym=True), gptq(dtype=BF16), "int4:f32", "int4:f32"),
    "gptq-asym": Case(_gptq(4, 32, sym=False), gptq(sym=False), "int5", "int5"),
    "gptq-asym-128": Case(
        _gptq(4, 128, sym=False),
        gptq(group=128, sym=False),
        "int4:channel:affine:f32",
        "int4:channel:affine:f32",
    ),
    "gptq-v2-asym": Case(
        _gptq(4, 32, sym=False, checkpoint_format="gptq_v2"), gptq(sym=False, offset=0), "int5", "int5"
    ),
    "gptq-8": Case(_gptq(8, 32, sym=True), gptq(bits=8), "int8", "int8"),
    "gptq-8-asym": Case(
        _gptq(8, 32, sym=False), gptq(bits=8, sym=False), "int8:affine:f32", "int8:affine:f32"
    ),
    "gptq-2": Case(_gptq(2, 32, sym=False), gptq(bits=2, sym=False), "int4", "int4"),
    "gptq-3": Case(_gptq(3, 32, sym=True), gptq(bits=3), "int4", "int4"),
    "gptq-act-order": Case(
        _gptq(4, 32, sym=True, desc_act=True), gptq(order="regular"), "int4:reordered", "int4:reordered"
    ),
    "gptq-act-order-asym": Case(
        _gptq(4, 32, sym=False, desc_act=True),
        gptq(order="regular", sym=False),
        "int5:reordered",
        "int5:reordered",
    ),
    "gptq-unequal-groups": Case(
        _gptq(4, 32, sym=True, desc_act=True), gptq(order="unequal"), "int5:affine", "float32", 0.09
    ),
    "gptq-group-16": Case(_gptq(4, 16, sym=True), gptq(group=16), "int5:affine", "float32", 0.09),
    "awq-gemm": Case(_awq("gemm"), awq("gemm"), "int5", "int5"),
    "awq-gemv": Case(_awq("gemv"), awq("gemv"), "int5", "int5"),
    "awq-gemv-fast": Case(_awq("gemv_fast"), awq("gemv_fast"), "int4:affine", "int4:affine"),
    "awq-row": Case(_awq("gemm", -1), awq("gemm", -1), "int4:channel:affine:f32", "int4:channel:affine:f32"),
    "ct-pack": Case(_compressed("pack-quantized", bits=4, **_grouped(32)), packed(), "int4", "int4"),
    "ct-pack-asym": Case(
        _compressed("pack-quantized", bits=4, **_grouped(32, symmetric=False)),
        packed(sym=False),
        "int5",
        "int5",
    ),
    "ct-pack-8": Case(_compressed("pack-quantized", bits=8), packed(8, -1), "int8:channel", "int8:channel"),
    "ct-pack-3": Case(_compressed("pack-quantized", bits=3, **_grouped(32)), packed(3), "int4", "int4"),
    "ct-pack-act-order": Case(
        _compressed("pack-quantized", bits=4, **_grouped(32, actorder="group")),
        packed(order="regular"),
        "int4:reordered",
        "int4:reordered",
    ),
    "ct-pack-unequal-groups": Case(
        _compressed("pack-quantized", bits=4, **_grouped(32, actorder="group")),
        packed(order="unequal"),
        "int5:affine",
        "float32",
        0.09,
    ),
    "ct-int": Case(_compressed("int-quantized"), integers(), "int8:channel:f32", "int8:channel:f32"),
    "ct-int-asym": Case(
        _compressed("int-quantized", symmetric=False),
        integers(sym=False),
        "int8:channel:affine:f32",
        "int8:channel:affine:f32",
    ),
    "ct-int-group": Case(_compressed("int-quantized", **_grouped(32)), integers(32), "int8:f32", "int8:f32"),
    "ct-int-tensor": Case(
        _compressed("int-quantized", strategy="tensor"),
        integers(whole=True),
        "int8:channel:f32",
        "int8:channel:f32",
    ),
    "ct-naive": Case(_compressed("naive-quantized"), integers(), "int8:channel:f32", "int8:channel:f32"),
    "ct-float": Case(
        _compressed("float-quantized", type="float"),
        float8("weight_scale", "row", dtype=BF16),
        "q8_0",
        "float32",
        0.01,
    ),
    "ct-float-tensor": Case(
        _compressed("float-quantized", type="float", strategy="tensor"),
        float8("weight_scale", "one"),
        "q8_0",
        "float32",
        0.01,
    ),
    "ct-float-group": Case(
        _compressed("float-quantized", type="float", **_grouped(32)),
        float8("weight_scale", "group", (1, 32)),
        "q8_0",
        "float32",
        0.01,
    ),
    "ct-float-block": Case(
        _compressed("float-quantized", type="float", strategy="block", block_structure="24x48"),
        float8("weight_scale", "block", (24, 48)),
        "q8_0",
        "float32",
        0.01,
    ),
    "ct-mxfp8": Case(
        _compressed("mxfp8-quantized", type="float", **_grouped(32)), mx8, "q8_0", "float32", 0.01
    ),
    "ct-mxfp4": Case(
        _compressed("mxfp4-pack-quantized", bits=4, type="float", **_grouped(32)),
        mx4("weight_packed", "weight_scale"),
        "int5",
        "int5:f32",
    ),
    "ct-mxfp4-tiny-scales": Case(
        _compressed("mxfp4-pack-quantized", bits=4, type="float", **_grouped(32)),
        mx4("weight_packed", "weight_scale", lowest=102),
        "int5",
        "int5:f32",
        0.02,
    ),
    "ct-nvfp4": Case(
        _compressed("nvfp4-pack-quantized", bits=4, type="float", strategy="tensor_group", group_size=16),
        nv4,
        "int5:affine",
        "float32",
        0.06,
    ),
    "fp8-block": Case(
        {"quant_method": "fp8", "weight_block_size": [24, 48], "activation_scheme": "dynamic"},
        float8("weight_scale_inv", "block", (24, 48)),
        "q8_0",
        "float32",
        0.01,
    ),
    "fp8-block-powers": Case(
        {"quant_method": "fp8", "weight_block_size": [24, 48], "scale_fmt": "ue8m0"},
        float8("weight_scale_inv", "block", (24, 48), E8M0),
        "q8_0",
        "float32",
        0.01,
    ),
    "fp8-tensor": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        float8("weight_scale", "tensor"),
        "q8_0",
        "float32",
        0.01,
    ),
    "fp8-rows": Case(
        {"quant_method": "fp8"}, float8("weight_scale_inv", "rows", dtype=BF16), "q8_0", "float32", 0.01
    ),
    "fbgemm-fp8": Case(
        {"quant_method": "fbgemm_fp8"}, float8("weight_scale", "row"), "q8_0", "float32", 0.01
    ),
    "mxfp4": Case(
        {"quant_method": "mxfp4"},
        mx4("weight_blocks", "weight_scales", blocks=True),
        "int5",
        "int5:f32",
    ),
    "bnb-nf4": Case(_BNB, table4("nf4"), "int5:affine", "float32", 0.06),
    "bnb-fp4-double": Case(
        {**_BNB, "bnb_4bit_quant_type": "fp4"}, table4("fp4", nested=True), "int5:affine", "float32", 0.06
    ),
    "bnb-nf4-in-bfloat16": Case(_BNB, table4("nf4", storage=BF16), "int5:affine", "float32", 0.06),
    "bnb-int8": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, rows8, "int8:channel:f32", "int8:channel:f32"
    ),
    "hqq": Case(_HQQ, hqq(), "int4:affine:f32", "int4:affine:f32"),
    "hqq-8": Case(_HQQ, hqq(8), "int8:affine:f32", "int8:affine:f32"),
    "hqq-3": Case(_HQQ, hqq(3), "int4:affine:f32", "int4:affine:f32"),
    "hqq-2": Case(_HQQ, hqq(2), "int4:affine:f32", "int4:affine:f32"),
    "hqq-1": Case(_HQQ, hqq(1), "int4:affine:f32", "int4:affine:f32"),
    "hqq-other-axis": Case(_HQQ, hqq(axis=0), "int5:affine", "float32", 0.06),
}


def write_quantized(
    directory: Path,
    section: Mapping[str, Any],
    make: Callable[[Rng, int, int], Made] | Mapping[str, Callable[[Rng, int, int], Made]],
    *,
    model_type: str = "llama",
    plain: Callable[[str], bool] = lambda name: False,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """Writes a model whose projections are quantized, and returns them, float64 [out, in].

    Args:
      directory: to write into.
      section: `quantization_config`.
      make: of every layer, or by the end of its name.
      model_type: of `TINY_CONFIGS`.
      plain: which layers are not quantized.
      **changes: of the configuration.
    """
    values = {"model_type": model_type, **TINY_CONFIGS[model_type], **SIZES, **changes}
    values = {key: value for key, value in values.items() if value is not None}
    config = read_config(values)
    tensors, weights, rng = random_hf_tensors(config, seed=5), {}, np.random.default_rng(6)
    shapes = {
        param.hf.format(layer): (param.hf_shape(config), param.transposed)
        for param in parameter_table(config)
        if param.role in ("weight", "head")
        for layer in range(param.rows(config))
    }
    for name, (shape, turned) in shapes.items():
        module = name.removesuffix(".weight")
        if plain(module) or (name == "lm_head.weight" and not isinstance(make, Mapping)):
            continue
        own = make if callable(make) else next(f for end, f in make.items() if module.endswith(end))
        rows, columns = shape[::-1] if turned else shape
        parts, weights[name] = own(rng, rows, columns)
        del tensors[name]
        tensors |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "config.json").write_text(json.dumps({**values, "quantization_config": dict(section)}))
    write_tensors(directory / "model.safetensors", tensors)
    return weights


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    specs = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
