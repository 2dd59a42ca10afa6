"""Kernels of the stacked product that this processor may lack, emulated, against float64.

ARM's are cross-compiled and run under qemu; under those of AVX-512, `avx512.h` stands in for it.
"""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_stacked_matmul import ROUNDING, Case, float_case, quantized_case, rounded

from jaxchat import native

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "jaxchat" / "pallas" / "stacked_matmul"


class Variant(NamedTuple):
    """A table of kernels; the errors of its products, relative to the norms of both sides."""

    source: str
    flags: str
    fine: float  # where 8-bit weights meet a few tokens
    coarse: float  # where other quantized weights or more tokens meet
    bfloat16: float = 0  # where bfloat16 weights meet many tokens, if they do

    @property
    def arm(self) -> bool:
        """Whether it needs the cross-compiler and an emulator."""
        return "armv8" in self.flags

    def missing(self) -> str:
        """Why this machine cannot run it, or nothing."""
        if self.arm:
            return "" if ARM_COMPILER and EMULATOR else "no aarch64-linux-gnu-g++ or no qemu-aarch64"
        avx2 = platform.machine() in ("x86_64", "AMD64") and native.instruction_set() in ("avx2", "avx512")
        return "" if COMPILER and avx2 else "no C++ compiler or no AVX2"

    def compile(self, table: str, program: Path) -> list[str]:
        """Compiles the driver with the kernels; the command that runs it."""
        flags = f"-std=c++17 -Wall -Wextra -Werror -Wno-psabi -fno-math-errno {self.flags}"
        sources = [TESTS / "kernel_driver.cc", SOURCES / self.source]
        paths = [*sources, f"-I{SOURCES}", f"-I{TESTS}", f"-DKERNELS={table}", "-o", program]
        compiler = ARM_COMPILER if self.arm else COMPILER
        subprocess.run([compiler, *flags.split(), *paths], check=True, capture_output=True, text=True)
        return [EMULATOR, "-cpu", "max", str(program)] if self.arm else [str(program)]


COMPILER = shutil.which("g++")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

ARM = "-O2 -static -march=armv8"
VARIANTS = {
    "PortableKernels": Variant("cpu_portable.cc", f"{ARM}-a", rounded(32767), rounded(32767)),
    "DotprodKernels": Variant("cpu_neon.cc", f"{ARM}.2-a+dotprod", rounded(16256), rounded(127)),
    "I8mmKernels": Variant("cpu_neon.cc", f"{ARM}.2-a+dotprod+i8mm", rounded(16256), rounded(127)),
    "Avx512Kernels": Variant(
        "cpu_avx512.cc",
        "-O1 -mavx2 -mfma -mf16c -Wno-ignored-attributes -include avx512.h",
        rounded(16256),
        rounded(127),
        2**-9 + ROUNDING,
    ),
}
SHAPES = ((33, 172), (100, 96), (7, 31), (1, 1), (65, 2400))
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, 8: 3, 4: 4}


def record(case: Case, kind, x: np.ndarray, few: bool) -> bytes:
    """What `kernel_driver.cc` reads: the product of x [m, I] with the first layer."""
    if kind in ("float32", "bfloat16", "float16"):
        head = (*case.w.shape[1:], 1, x.shape[1], len(x), few, False, False)
        arrays = [case.w[0], x]
    else:
        w = case.w
        head = (w.codes.shape[1], w.padded_columns, w.group, x.shape[1], len(x), few)
        head = (*head, w.scales.dtype == np.float32, w.mins is not None)
        arrays = [w.codes[0], w.scales[0], *([] if w.mins is None else [w.mins[0]]), x]
    return np.array([KINDS[kind], *head], np.int64).tobytes() + b"".join(a.tobytes() for a in arrays)


@pytest.mark.parametrize("table", VARIANTS)
def test_products(table, tmp_path):
    variant = VARIANTS[table]
    if variant.missing():
        pytest.skip(variant.missing())
    command = variant.compile(table, tmp_path / "driver")

    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
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
    done = subprocess.run(command, input=records, capture_output=True, check=True)
    results = np.frombuffer(done.stdout, np.float32)
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
