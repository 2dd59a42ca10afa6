"""The native CPU kernel of `cpu.cc`: reads the columns that are in use, where they lie, each once."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxchat.pallas.low_rank import reference

TARGET = "jaxchat_low_rank"

MAX_ROWS = 8
"""More rows of x than this are compute-bound; XLA's own matrix product is used there."""


def add_deltas(
    x: jax.Array,
    ys: Sequence[jax.Array],
    downs: Sequence[jax.Array],
    ups: Sequence[jax.Array],
    layer: jax.Array,
    scales: jax.Array,
    *,
    isa: str = "",
) -> list[jax.Array]:
    """See `reference.add_deltas`; `isa` is one of `native.instruction_sets()`, empty: the default."""
    rows = math.prod(x.shape[:-1])
    stored = {stack.dtype.name for stack in (*downs, *ups)}
    if not ys:
        return []
    if rows > MAX_ROWS or len(stored) > 1 or not stored <= {"float32", "float16"}:
        return reference.add_deltas(x, ys, downs, ups, layer, scales)
    each = rows // scales.shape[0]
    flat = [y.reshape(rows, -1).astype(jnp.float32) for y in ys]
    operands = [part for delta in zip(flat, downs, ups, strict=True) for part in delta]
    outs = jax.ffi.ffi_call(TARGET, [jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in flat])(
        x.reshape(rows, -1).astype(jnp.float32),
        jnp.repeat(scales.astype(jnp.float32), each, axis=0),
        jnp.asarray(layer, jnp.int32).reshape(1),
        *operands,
        isa=isa,
    )
    return [out.reshape(y.shape) for out, y in zip(outs, ys, strict=True)]
