"""The native CPU kernels of `cpu.cc`: one layer's weight is read straight out of the stack, once."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.mixed import MixedTensor, by_part
from jaxchat.pallas import native
from jaxchat.pallas.stacked_matmul import reference
from jaxchat.quant import Array, QuantizedTensor

Weight = jax.Array | QuantizedTensor | MixedTensor

TARGET = "jaxchat_stacked_matmuls"

MAX_FLOAT_ROWS = 8
"""Float weights times more rows of x than this are compute-bound; XLA's own matrix product is used there."""

FEW_TOKENS = 32
"""From so many tokens of a sequence on, quantized weights are unpacked once for all of them."""

_FLOAT_KINDS = {"float32": 0, "uint16": 1, "float16": 2}  # uint16 holds the bits of bfloat16
_QUANTIZED_KINDS = {
    (8, False): 3, (8, True): 4, (4, False): 5, (4, True): 6, (5, False): 7, (5, True): 8, (6, False): 9,
}  # fmt: skip
"""Bits, affine -> `Kind`."""


def stacked_matmul(x: jax.Array, w: Weight, layer: jax.Array, *, isa: str = "") -> jax.Array:
    """`x @ w[layer].T`; see `reference.stacked_matmul`, and `stacked_matmuls` for `isa`."""
    return stacked_matmuls(x, [w], [layer], isa=isa)[0]


def stacked_matmuls(
    x: jax.Array,
    weights: Sequence[Weight],
    layers: Sequence[jax.Array],
    *,
    isa: str = "",
) -> list[jax.Array]:
    """`stacked_matmul` of one x with several weights, in one call: fewer waits for the slowest thread.

    Quantized weights meet activations that are integers too, with a scale per 32 of them (6-bit weights: per
    16). Weights of 4 to 6 bits: 8 bits or more, as in llama.cpp; finer than the weights. 8-bit weights: 15
    bits; in prefill from `FEW_TOKENS` on, which is bound by arithmetic, 8 bits or more: what the processor
    multiplies best. There bfloat16 weights meet bfloat16 activations, if the processor multiplies those. The
    choice depends on T
    (x is [B, T, I]) and not on B: a sequence's tokens do not depend on its neighbours.

    `isa` is one of `native.instruction_sets()`; empty: the default.
    """
    few = x.ndim <= 2 or x.shape[-2] < FEW_TOKENS
    calls: dict[bool, list[int]] = {}  # few or many -> numbers of the weights
    out: dict[int, jax.Array] = {}
    for number, (w, layer) in enumerate(zip(weights, layers, strict=True)):
        if isinstance(w, QuantizedTensor) or _is_quantized(w):
            calls.setdefault(few, []).append(number)
        elif isinstance(w, MixedTensor):
            out[number] = by_part(w, layer, lambda part, row: stacked_matmul(x, part, row, isa=isa))
        elif math.prod(x.shape[:-1]) <= MAX_FLOAT_ROWS and w.dtype.name in _FLOAT_KINDS:
            calls.setdefault(True, []).append(number)
        elif not few and w.dtype == jnp.uint16 and w.shape[-1] % 2 == 0 and native.multiplies_bfloat16(isa):
            calls.setdefault(False, []).append(number)
        else:
            out[number] = reference.stacked_matmul(x, w, layer)
    for few, numbers in calls.items():
        ys = _call(x, [weights[n] for n in numbers], [layers[n] for n in numbers], few=few, isa=isa)
        out.update(zip(numbers, ys, strict=True))
    return [out[number] for number in range(len(weights))]


def _is_quantized(w: Weight) -> bool:
    """Whether it is a mixed stack whose every part is quantized: the foreign function picks the part."""
    return isinstance(w, MixedTensor) and all(isinstance(part, QuantizedTensor) for part in w.parts)


class _Operand(NamedTuple):
    """A weight as the foreign function takes it."""

    kind: int
    cols: int
    group: int
    arrays: tuple[Array, ...]  # codes, high bits, scales, minimums, outer scales and minimums


def _operand(w: Array | QuantizedTensor) -> _Operand:
    if isinstance(w, QuantizedTensor):
        parts = (w.codes, w.high, w.scales, w.mins, w.super_scales, w.super_mins)
        arrays = tuple(_none(w) if part is None else part for part in parts)
        return _Operand(_QUANTIZED_KINDS[w.bits, w.affine], w.padded_columns, w.group, arrays)
    return _Operand(_FLOAT_KINDS[w.dtype.name], w.shape[-1], 1, (w, *[_none(w)] * 5))


def _none(w: Array | QuantizedTensor) -> jax.Array:
    """A part that a weight does not have."""
    return jnp.zeros((w.shape[0], 0), jnp.float16)


def _call(
    x: jax.Array,
    weights: Sequence[Weight],
    layers: Sequence[jax.Array],
    *,
    few: bool,
    isa: str,
) -> list[jax.Array]:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    parts: list[Any] = [w.parts if isinstance(w, MixedTensor) else (w,) for w in weights]
    places = [
        w.place(layer) if isinstance(w, MixedTensor) else (0, layer)
        for w, layer in zip(weights, layers, strict=True)
    ]
    operands = [_operand(part) for alike in parts for part in alike]
    outs = [jax.ShapeDtypeStruct((flat.shape[0], w.shape[1]), jnp.float32) for w in weights]
    ys = jax.ffi.ffi_call(TARGET, outs)(
        flat,
        jnp.stack([jnp.asarray(number, jnp.int32).reshape(()) for place in places for number in place]),
        *(array for operand in operands for array in operand.arrays),
        parts=np.array([len(alike) for alike in parts], np.int64),
        kinds=np.array([operand.kind for operand in operands], np.int64),
        cols=np.array([operand.cols for operand in operands], np.int64),
        groups=np.array([operand.group for operand in operands], np.int64),
        few=few,
        isa=isa,
    )
    return [y.reshape(*x.shape[:-1], -1) for y in ys]
