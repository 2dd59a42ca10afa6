"""The native CPU kernels of `cpu.cc`: one layer's weight is read straight out of the stack, once."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.pallas.stacked_matmul import reference
from jaxchat.quant import Array, QuantizedTensor

TARGET = "jaxchat_stacked_matmul"

MAX_FLOAT_ROWS = 8
"""Float weights times more rows of x than this are compute-bound; XLA's own matrix product is used there."""

FEW_TOKENS = 32
"""From so many tokens of a sequence on, quantized weights are unpacked once for all of them."""

_FLOAT_KINDS = {"float32": 0, "uint16": 1, "float16": 2}  # uint16 holds the bits of bfloat16
_QUANTIZED_KINDS = {8: 3, 4: 4}


def stacked_matmul(x: jax.Array, w: jax.Array | QuantizedTensor, layer: jax.Array) -> jax.Array:
    """`x @ w[layer].T`; see `reference.stacked_matmul`.

    Quantized weights meet activations that are integers too, with a scale per 32 of them. 4-bit weights: 8
    bits, as in llama.cpp; far finer than the weights. 8-bit weights: 15 bits, but 8 bits in prefill from
    `FEW_TOKENS` on, which is bound by arithmetic. The choice depends on T (x is [B, T, I]) and not on B: a
    sequence's tokens do not depend on its neighbours.
    """
    rows = math.prod(x.shape[:-1])
    few = x.ndim <= 2 or x.shape[-2] < FEW_TOKENS
    if not isinstance(w, QuantizedTensor):
        if rows > MAX_FLOAT_ROWS or w.dtype.name not in _FLOAT_KINDS:
            return reference.stacked_matmul(x, w, layer)
        none = jnp.zeros((w.shape[0], 0), jnp.float16)
        kind = _FLOAT_KINDS[w.dtype.name]
        return _call(x, w, none, none, layer, kind=kind, cols=w.shape[-1], group=1, few=True)
    mins = jnp.zeros((w.codes.shape[0], 0), w.scales.dtype) if w.mins is None else w.mins
    kind = _QUANTIZED_KINDS[w.bits]
    cols = w.padded_columns
    return _call(x, w.codes, w.scales, mins, layer, kind=kind, cols=cols, group=w.group, few=few)


def _call(
    x: jax.Array,
    codes: Array,
    scales: Array,
    mins: Array,
    layer: jax.Array,
    *,
    kind: int,
    cols: int,
    group: int,
    few: bool,
) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    out = jax.ShapeDtypeStruct((flat.shape[0], codes.shape[1]), jnp.float32)
    y = jax.ffi.ffi_call(TARGET, out)(
        flat,
        codes,
        scales,
        mins,
        jnp.asarray(layer, jnp.int32).reshape(1),
        kind=np.int64(kind),
        cols=np.int64(cols),
        group=np.int64(group),
        affine=mins.size > 0,
        few=few,
    )
    return y.reshape(*x.shape[:-1], -1)
