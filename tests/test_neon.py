"""The ARM kernels of the stacked product, cross-compiled and run under an emulator, against float64."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_stacked_matmul import Case, float_case, quantized_case, rounded

SOURCES = Path(__file__).parents[1] / "jaxchat" / "pallas" / "stacked_matmul"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

needs_a_cross_compiler = pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="no aarch64-linux-gnu-g++ or no qemu-aarch64"
)

VARIANTS = {  # table -> source, flags, error where 8-bit weights meet a few tokens, error elsewhere
    "PortableKernels": ("cpu_portable.cc", "-march=armv8-a", rounded(32767), rounded(32767)),
    "DotprodKernels": ("cpu_neon.cc", "-march=armv8.2-a+dotprod", rounded(16256), rounded(127)),
    "I8mmKernels": ("cpu_neon.cc", "-march=armv8.2-a+dotprod+i8mm", rounded(16256), rounded(127)),
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


@needs_a_cross_compiler
@pytest.mark.parametrize("table", VARIANTS)
def test_products(table, tmp_path):
    source, march, fine, coarse = VARIANTS[table]
    program = tmp_path / "driver"
    driver = Path(__file__).with_name("kernel_driver.cc")
    flags = f"-O2 -std=c++17 -Wall -Wextra -Werror -Wno-psabi -fno-math-errno -static {march}"
    command = [
        COMPILER,
        *flags.split(),
        f"-I{SOURCES}",
        f"-DKERNELS={table}",
        driver,
        SOURCES / source,
        "-o",
        program,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)

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
                if few or kind in (8, 4):
                    products.append((case, kind, rng.standard_normal((m, shape[1]), np.float32), few))
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program],
        input=b"".join(record(*product) for product in products),
        capture_output=True,
        check=True,
    )
    results = np.frombuffer(done.stdout, np.float32)
    for case, kind, x, few in products:
        y, results = np.split(results, [len(x) * case.values.shape[1]])
        x64 = x.astype(np.float64)
        error = np.abs(y.reshape(len(x), -1) - x64 @ case.values[0].T)
        tolerance = 1e-6 if kind not in (8, 4) else fine if few and kind == 8 else coarse
        bound = tolerance * np.linalg.norm(x64, axis=-1, keepdims=True) * case.norms[0]
        worst = (error / np.maximum(bound, 1e-35)).max()
        assert worst <= 1, f"{kind} {case.w}, x {x.shape}, few {few}: {worst} x the bound"
    assert not len(results)
