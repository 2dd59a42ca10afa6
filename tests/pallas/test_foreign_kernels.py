"""Kernels that this processor may lack, emulated, against float64.

ARM's are cross-compiled and run under qemu; under those of AVX-512, `avx512.h` stands in for it.
"""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jaxchat.pallas import native
from jaxchat.pallas.cache_attention import cases as attention
from jaxchat.pallas.cache_attention.cases import CACHES, SCALE, SLOT, SOFTCAPS, QuantizedRows
from jaxchat.pallas.stacked_matmul import cases, cpu
from jaxchat.pallas.stacked_matmul.cases import FLOATS, KINDS, Case, normal
from tests.pallas.test_cache_attention import TOLERANCE
from tests.pallas.test_stacked_matmul import COARSE, FINE, NARROW, ROUNDING, rounded

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
    Variant("dotprod", ARM, FINE, COARSE),
    Variant("i8mm", ARM, FINE, COARSE),
    Variant("avx512", AVX512, FINE, COARSE, NARROW),
]
ATTENTION = [Variant("portable", ARM), Variant("avx512", AVX512)]


def parameters(variants):
    """Where the processor has AVX-512, its kernels are tested as they are, and emulated with `-m full`."""
    native_too = [pytest.mark.full] if "avx512" in native.instruction_sets() else []
    return [
        pytest.param(
            variant,
            id=variant.isa,
            marks=[
                pytest.mark.skipif(bool(variant.missing()), reason=variant.missing() or "it runs"),
                *([] if variant.arm else native_too),
            ],
        )
        for variant in variants
    ]


def record(case: Case, stack: cases.Stack, x: np.ndarray) -> bytes:
    """What `kernel_driver.cc` reads: the product of x [m, I] with the first layer."""
    w, columns, m = stack.w, case.shape[1], case.lead[-1]
    if case.weights in FLOATS:
        name = "uint16" if case.weights == "bfloat16" else case.weights
        form = (cpu._FLOAT_KINDS[name], len(w[0]), columns, 1)
        parts, scales = [w[0], *[None] * 5], 0
    else:
        form = (cpu._QUANTIZED_KINDS[w.bits, w.affine], w.shape[1], w.padded_columns, w.group)
        parts = [w.codes, w.high, w.scales, w.mins, w.super_scales, w.super_mins]
        parts = [None if part is None else part[0] for part in parts]
        scales = ("float16", "float32", "int8").index(w.scales.dtype.name)
    data = [b"" if part is None else part.tobytes() for part in parts]
    head = (*form, columns, m, not case.many, scales, *map(len, data))
    return np.array(head, np.int64).tobytes() + b"".join((*data, x.tobytes()))


def products(variant: Variant) -> list[Case]:
    """Each kind with every remainder of rows, forms and shapes in turn."""
    out = []
    shapes = itertools.cycle(cases.SHAPES)
    for kind in KINDS:
        tiled = kind not in FLOATS or (kind == "bfloat16" and variant.bfloat16)
        for form in cases.forms(kind):
            for lead in ((1,), (2,), (3,), (5,), (9,), *(((1, 33), (1, 40)) if tiled else ())):
                shape = next(shapes)
                while kind == "bfloat16" and len(lead) > 1 and shape[1] % 2:
                    shape = next(shapes)
                out.append(Case(form, shape, lead))
    return out


@pytest.mark.parametrize("variant", parameters(PRODUCTS))
def test_products(variant, rng, tmp_path):
    chosen = products(variant)
    stacks = [cases.stack(rng, case.weights, case.shape, layers=1) for case in chosen]
    inputs = [normal(rng, (case.lead[-1], case.shape[1])) for case in chosen]
    records = b"".join(map(record, chosen, stacks, inputs))
    results = variant.run("stacked_matmul", "kProducts", "kernel_driver.cc", records, tmp_path)
    for case, stack, x in zip(chosen, stacks, inputs, strict=True):
        y, results = np.split(results, [len(x) * case.shape[0]])
        if case.weights in FLOATS:
            tolerance = variant.bfloat16 if case.many else ROUNDING
        else:
            tolerance = variant.fine if case.weights.startswith("int8") and not case.many else variant.coarse
        assert cases.error(y.reshape(len(x), -1), x, stack, 0) <= tolerance, case
    assert not len(results)


STORED = {"float32": 0, "bfloat16": 1, "uint16": 1, "int8": 2}


def attention_record(given: attention.Inputs, case: attention.Case, cache: str) -> bytes:
    """What `attention_driver.cc` reads: attention over the slot that holds something."""
    b, t, n, h = given.q.shape
    _, _, kv, s, _ = given.k.shape
    caches = [given.k, given.v]
    arrays = [cache.codes if isinstance(cache, QuantizedRows) else cache for cache in caches]
    arrays += [cache.scale for cache in caches if isinstance(cache, QuantizedRows)]
    tree = [] if case.tree is None else list(case.tree.within(case.window))
    head = np.array([b, t, n, kv, s, h, STORED[cache], case.window, bool(tree)], np.int64).tobytes()
    scalars = np.array([SCALE, case.softcap], np.float32)
    parts = [scalars, given.q, *(array[SLOT] for array in arrays), given.lengths, *tree]
    return head + b"".join(np.asarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("variant", parameters(ATTENTION))
def test_attention(variant, rng, tmp_path):
    chosen = [
        (case, cache)
        for cache in CACHES
        for case in (
            *attention.NAMED.values(),
            *(
                attention.drawn(rng, shape, t, window, softcap)
                for shape in attention.SHAPES
                for t in attention.TOKENS
                for window in (0, 7, 600)
                for softcap in SOFTCAPS
            ),
        )
    ]
    inputs = [attention.inputs(rng, case, cache, np.nan) for case, cache in chosen]
    records = b"".join(attention_record(given, *pair) for given, pair in zip(inputs, chosen, strict=True))
    results = variant.run("cache_attention", "kAttention", "attention_driver.cc", records, tmp_path)
    for given, (case, cache) in zip(inputs, chosen, strict=True):
        out, results = np.split(results, [given.q.size])
        error = np.abs(out.reshape(given.q.shape) - attention.expected(given, case)).max()
        assert error <= TOLERANCE, f"{case}, {cache}: {error}"
    assert not len(results)
