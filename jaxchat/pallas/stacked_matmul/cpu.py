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

_FLOAT_KINDS = {"float32": 0, "uint16": 1, "float16": 2}  # uint16 holds the bits of bfloat16
_QUANTIZED_KINDS = {8: 3, 4: 4}


def stacked_matmul(x: jax.Array, w: jax.Array | QuantizedTensor, layer: jax.Array) -> jax.Array:
    """`x @ w[layer].T`; see `reference.stacked_matmul`.

    Quantized weights meet activations of 15 bits, with a scale per 32 of them. Only in prefill (x is
    [B, T, I], T > 1), which is bound by arithmetic, do 4-bit weights meet 8 bits (on AVX-512). The choice
    does not depend on B: a sequence's tokens do not depend on its neighbours.
    """
    rows = math.prod(x.shape[:-1])
    exact = x.ndim <= 2 or x.shape[-2] == 1
    if not isinstance(w, QuantizedTensor):
        if rows > MAX_FLOAT_ROWS or w.dtype.name not in _FLOAT_KINDS:
            return reference.stacked_matmul(x, w, layer)
        none = jnp.zeros((w.shape[0], 0), jnp.float16)
        kind = _FLOAT_KINDS[w.dtype.name]
        return _call(x, w, none, none, layer, kind=kind, cols=w.shape[-1], group=1, exact=True)
    mins = jnp.zeros((w.codes.shape[0], 0), w.scales.dtype) if w.mins is None else w.mins
    kind = _QUANTIZED_KINDS[w.bits]
    cols = w.padded_columns
    return _call(x, w.codes, w.scales, mins, layer, kind=kind, cols=cols, group=w.group, exact=exact)


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
    exact: bool,
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
        exact=exact,
    )
    return y.reshape(*x.shape[:-1], -1)
