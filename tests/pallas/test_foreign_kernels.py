"""Kernels that this processor may lack, emulated, against float64.

ARM's are cross-compiled and run under qemu; under those of AVX-512, `avx512.h` stands in for it.
"""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from jaxchat.pallas import native
from tests.pallas.test_cache_attention import (
    CACHES,
    SCALE,
    SLOT,
    SOFTCAPS,
    TOLERANCE,
    QuantizedRows,
    expected,
    make_case,
)
from tests.pallas.test_stacked_matmul import ROUNDING, Case, float_case, quantized_case, rounded

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "jaxchat" / "pallas"


class Variant(NamedTuple):
    """The kernels of an instruction set; the errors of products, relative to the norms of both sides."""

    isa: str
    flags: str
    fine: float = 0  # where 8-bit weights meet a few tokens
    coarse: float = 0  # where other quantized weights or more tokens meet
    bfloat16: float = 0  # where bfloat16 weights meet many tokens, if they do

    @property
    def arm(self) -> bool:
        """Whether it needs the cross-compiler and an emulator."""
        return "armv8" in self.flags

    def missing(self) -> str:
        """Why this machine cannot run it, or nothing."""
        if self.arm:
            return "" if ARM_COMPILER and EMULATOR else "no aarch64-linux-gnu-g++ or no qemu-aarch64"
        return "" if COMPILER and "avx2" in native.instruction_sets() else "no C++ compiler or no AVX2"

    def run(self, operation: str, table: str, driver: str, records: bytes, folder: Path) -> np.ndarray:
        """What a driver, compiled in a folder with the kernels, makes of the records: float32."""
        if self.missing():
            pytest.skip(self.missing())
        source, program = SOURCES / operation / f"cpu_{self.isa}.cc", folder / "driver"
        flags = f"-std=c++17 -Wall -Wextra -Werror -Wno-psabi -fno-math-errno {self.flags}"
        flags += f" -I{source.parent} -I{TESTS} -DTABLE={self.isa}::{table}"
        compiler = ARM_COMPILER if self.arm else COMPILER
        command = [compiler, *flags.split(), TESTS / driver, source, "-o", program]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        command = [EMULATOR, "-cpu", "max", str(program)] if self.arm else [str(program)]
        done = subprocess.run(command, input=records, capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.float32)


COMPILER = shutil.which("g++")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

ARM = "-O2 -static -march=armv8-a"
AVX512 = "-O1 -mavx2 -mfma -mf16c -Wno-ignored-attributes -include avx512.h"
PRODUCTS = [
    Variant("portable", ARM, rounded(32767), rounded(32767)),
    Variant("dotprod", ARM, rounded(16256), rounded(127)),
    Variant("i8mm", ARM, rounded(16256), rounded(127)),
    Variant("avx512", AVX512, rounded(16256), rounded(127), 2**-9 + ROUNDING),
]
ATTENTION = [Variant("portable", ARM), Variant("avx512", AVX512)]
SHAPES = ((33, 172), (100, 96), (7, 31), (1, 1), (65, 2400))
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, (8, False): 3, (8, True): 4, (4, False): 5, (4, True): 6}


def record(case: Case, kind, x: np.ndarray, few: bool) -> bytes:
    """What `kernel_driver.cc` reads: the product of x [m, I] with the first layer."""
    if kind in ("float32", "bfloat16", "float16"):
        kind, cols, group, wide, arrays = KINDS[kind], x.shape[1], 1, False, [case.w[0], x]
    else:
        w = case.w
        kind, cols, group, wide = (
            KINDS[kind, w.affine],
            w.padded_columns,
            w.group,
            w.scales.dtype == np.float32,
        )
        arrays = [part[0] for part in (w.codes, w.scales, w.mins) if part is not None] + [x]
    codes = arrays[0]
    head = (kind, len(codes), codes[0].nbytes, cols, group, x.shape[1], len(x), few, wide)
    return np.array(head, np.int64).tobytes() + b"".join(a.tobytes() for a in arrays)


@pytest.mark.parametrize("variant", PRODUCTS, ids=lambda variant: variant.isa)
def test_products(variant, rng, tmp_path):
    products = []  # case, kind, x, few
    for shape in SHAPES:
        forms = [(kind, float_case(rng, kind, shape)) for kind in ("float32", "bfloat16", "float16")]
        for bits in (8, 4):
            for group in (32, 64, 128, 0):
                for affine in (False, True):
                    scales = rng.choice(["float16", "float32"])
                    forms.append((bits, quantized_case(rng, bits, shape, group, affine, scales)))
        for kind, case in forms:
            for m, few in ((1, True), (2, True), (3, True), (5, True), (9, True), (40, False), (33, False)):
                tiled = kind in (8, 4) or (kind == "bfloat16" and variant.bfloat16 and shape[1] % 2 == 0)
                if few or tiled:
                    products.append((case, kind, rng.standard_normal((m, shape[1]), np.float32), few))
    records = b"".join(record(*product) for product in products)
    results = variant.run("stacked_matmul", "kProducts", "kernel_driver.cc", records, tmp_path)
    for case, kind, x, few in products:
        y, results = np.split(results, [len(x) * case.values.shape[1]])
        x64 = x.astype(np.float64)
        error = np.abs(y.reshape(len(x), -1) - x64 @ case.values[0].T)
        if kind in (8, 4):
            tolerance = variant.fine if few and kind == 8 else variant.coarse
        else:
            tolerance = ROUNDING if few else variant.bfloat16
        bound = tolerance * np.linalg.norm(x64, axis=-1, keepdims=True) * case.norms[0]
        worst = (error / np.maximum(bound, 1e-35)).max()
        assert worst <= 1, f"{kind} {case.w}, x {x.shape}, few {few}: {worst} x the bound"
    assert not len(results)


STORED = {np.float32: 0, ml_dtypes.bfloat16: 1, np.uint16: 1, np.int8: 2}
ATTENTION_SHAPES = (
    (1, 8, 2, 16, 128),
    (3, 6, 2, 12, 96),
    (2, 4, 1, 64, 700),
    (1, 7, 1, 40, 90),
    (2, 5, 5, 8, 64),
)
"""B, N, K, H, S: one to four query heads at a time, in blocks of 64 keys and tasks of 512."""


def attention_record(case, dtype, window: int, softcap: float) -> bytes:
    """What `attention_driver.cc` reads: attention over the slot that holds something."""
    b, t, n, h = case.q.shape
    _, _, kv, s, _ = case.k.shape
    caches = [case.k, case.v]
    arrays = [cache.codes if isinstance(cache, QuantizedRows) else cache for cache in caches]
    arrays += [cache.scale for cache in caches if isinstance(cache, QuantizedRows)]
    head = np.array([b, t, n, kv, s, h, STORED[dtype], window], np.int64).tobytes()
    parts = [np.array([SCALE, softcap], np.float32), case.q, *(array[SLOT] for array in arrays), case.lengths]
    return head + b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("variant", ATTENTION, ids=lambda variant: variant.isa)
def test_attention(variant, rng, tmp_path):
    runs = [
        (make_case(rng, shape, t, dtype, np.nan), dtype, window, softcap)
        for dtype in CACHES
        for shape in ATTENTION_SHAPES
        for t in (1, 3, 17)
        for window in (0, 7, 600)
        for softcap in SOFTCAPS
    ]
    records = b"".join(attention_record(*run) for run in runs)
    results = variant.run("cache_attention", "kAttention", "attention_driver.cc", records, tmp_path)
    for case, dtype, window, softcap in runs:
        out, results = np.split(results, [case.q.size])
        error = np.abs(out.reshape(case.q.shape) - expected(case, window, softcap)).max()
        assert error <= TOLERANCE, (
            f"{np.dtype(dtype)} {case.q.shape}, window {window}, softcap {softcap}: {error}"
        )
    assert not len(results)
