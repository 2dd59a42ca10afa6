"""Products to check and to time, for tests and benchmarks: forms, shapes, random inputs, results in float64.

O, I and L are a weight's rows, its columns and the layers of its stack.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxchat.quant import QuantFormat, QuantizedTensor, dequantize, empty, group_mins

FLOATS = ("float32", "bfloat16", "float16")
KINDS = (*FLOATS, "int8", "int8:affine", "int4", "int4:affine", "int5", "int5:affine", "q4_k", "q5_k", "q6_k")
"""Weights that are multiplied in different ways."""

GROUPS = (32, 64, 128, 0)  # 0: one group a row
SHAPES = ((64, 128), (33, 172), (100, 96), (129, 300), (200, 1100), (257, 1056), (7, 31), (1, 1))  # O, I
FEW = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23)
"""Rows of x: all remainders of what kernels take at a time."""
MANY = (33, 38, 40, 70)
"""Tokens of a sequence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
      weights: a float type, or a format of quantized weights.
      shape: O, I.
      lead: axes of x before I.
      dtype: of x.
    """

    weights: str
    shape: tuple[int, int]
    lead: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        lead, (rows, columns) = "x".join(map(str, self.lead)), self.shape
        return f"{self.dtype} {lead}x{columns} times {self.weights} {rows}x{columns}"

    @property
    def many(self) -> bool:
        """Whether x holds many tokens of a sequence."""
        return len(self.lead) > 1 and self.lead[-1] in MANY


def forms(kind: str) -> tuple[str, ...]:
    """What weights of a kind there are: groups, and types of scales."""
    if kind in FLOATS:
        return (kind,)
    fmt = QuantFormat.parse(kind)
    assert fmt is not None
    if fmt.two_level:
        return (kind,)
    return tuple(
        str(dataclasses.replace(fmt, group=group, scale_dtype=scales))
        for group in GROUPS
        for scales in ("float16", "float32")
    )


def every(kind: str, shape: tuple[int, int]) -> list[Case]:
    """All products with weights of a kind and a shape."""
    leads = [*((m,) for m in FEW), *((1, m) for m in FEW), *((1, m) for m in MANY)]
    return [Case(form, shape, lead) for form in forms(kind) for lead in leads]


def sample(
    rng: np.random.Generator,
    kinds: Sequence[str] = KINDS,
    *,
    each: int = 2,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[Case]:
    """Of each kind some products of few rows and one of many, everything else drawn by chance."""
    out = []
    for kind in kinds:
        leads: list[tuple[int, ...]] = [(int(m),) for m in rng.choice(FEW, each, replace=False)]
        for lead in [*leads, (1, int(rng.choice(MANY)))]:
            shape = shapes[int(rng.integers(len(shapes)))]
            out.append(
                Case(str(rng.choice(forms(kind))), shape, lead, str(rng.choice(["float32", "bfloat16"])))
            )
    return out


class Stack(NamedTuple):
    """Weights [L, O, I] as a checkpoint holds them, in numpy, and what they stand for."""

    w: Any  # an array, or a QuantizedTensor
    values: np.ndarray  # float64 [L, O, I]
    norms: np.ndarray  # float64 [L, O]: what errors are relative to, beside the norm of x


def stack(rng: np.random.Generator, weights: str, shape: tuple[int, int], layers: int = 2) -> Stack:
    """Random weights. Quantized ones are no quantizer's: every pattern of bits occurs, in the padding too."""
    if weights in FLOATS:
        w = normal(rng, (layers, *shape), weights)
        return stack_of(w)
    fmt = QuantFormat.parse(weights)
    assert fmt is not None

    def random(part: np.ndarray, size: float) -> np.ndarray:
        if part.dtype == np.uint8:
            return rng.integers(0, 256, part.shape, np.uint8)
        if part.dtype == np.int8:
            return rng.integers(-128, 128, part.shape, np.int8)
        return (rng.standard_normal(part.shape) * size).astype(part.dtype)

    drawn = empty((layers, *shape), fmt)
    sizes = {"scales": 1e-2, "mins": 1e-1, "super_scales": 1e-4, "super_mins": 1e-3}
    parts: dict[str, Any] = {
        name: random(part, sizes.get(name, 0))
        for name in ("codes", "high", *sizes)
        if (part := getattr(drawn, name)) is not None
    }
    return stack_of(dataclasses.replace(drawn, **parts))


def stack_of(w: Any) -> Stack:
    """What weights stand for."""
    if not isinstance(w, QuantizedTensor):
        values = w.astype(np.float64)
        return Stack(w, values, np.linalg.norm(values, axis=-1))
    values = np.asarray(dequantize(w), np.float64)
    norms = np.linalg.norm(values, axis=-1)
    if w.affine:  # code * scale and the minimum may cancel
        mins = np.repeat(np.asarray(group_mins(w), np.float64), w.group, axis=-1)[..., : w.columns]
        norms = norms + 2 * np.linalg.norm(mins, axis=-1)
    return Stack(w, values, norms)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """Normally distributed numbers."""
    return rng.standard_normal(tuple(shape), np.float32).astype(getattr(ml_dtypes, dtype, dtype))


def error(y: Any, x: np.ndarray, weights: Stack, layer: int) -> float:
    """The largest error of a product, relative to the norms of the rows of x and of the weights."""
    x64 = x.astype(np.float64)
    found = np.abs(np.asarray(y, np.float64) - x64 @ weights.values[layer].T)
    bound = np.linalg.norm(x64, axis=-1, keepdims=True) * weights.norms[layer]
    return float(
        (found / np.maximum(bound, 1e-29)).max()
    )  # below are no outputs that float32 could hold well


FOR_GPU = tuple(
    Case(weights, shape, (m,), "bfloat16")
    for weights, (m, shape) in itertools.product(
        (
            "bfloat16",
            "int4",
            "int8",
            "int4:64:affine",
            "int4:128",
            "int4:channel",
            "int8:128:affine",
            "int8:channel",
            "int5",
            "q4_k",
            "q5_k",
            "q6_k",
        ),
        ((1, (32001, 1100)), (3, (4096, 4096)), (8, (301, 96))),
    )
)
"""What a benchmark on the device checks; those interpreted on a CPU are from `sample`."""
