"""Matrix products over stacked weights on TPU: Mosaic kernels that read one layer straight out of the stack.

The layer index is a prefetched scalar and appears only in the block index maps: no slice, no copy. Weights
are widened in the kernel (weight-only quantization): codes become bfloat16 exactly, sums are float32, and
scales stay float32 where few rows of x make that affordable. `prepare` puts quantized weights into the
layout the kernels read. Checked against the reference in interpret mode, and compiled ahead of time for v5e,
v6e and tpu7x; it has not been run on hardware, so the block sizes are reasoned, not tuned.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from jaxchat import quant
from jaxchat.config import Role
from jaxchat.pallas.embedding import tpu as embedding
from jaxchat.pallas.embedding.tpu import EmbeddingTensor
from jaxchat.pallas.mesh import mesh_of, split
from jaxchat.pallas.stacked_matmul import reference
from jaxchat.pallas.tpu_layout import LANES, pad_end
from jaxchat.pallas.tpu_weights import (
    BLOCK,
    Form,
    PreparedTensor,
    Span,
    dequantized,
    for_chunks,
    prepare_tensor,
    relayout,
    specs_of,
    widen_scales,
)
from jaxchat.quant import QuantizedTensor

Array = jax.Array

_MIB = 1 << 20

_VMEM_LIMIT = 48 * _MIB
"""Of 128 MiB on v5e and v6e and 64 on tpu7x; the compiler's default of 16 would halve the blocks."""

_X_BLOCK_BYTES = 8 * _MIB
"""Rows of x held at once; more rows mean fewer passes over the weights in prefill."""

_WEIGHT_BLOCK_BYTES = (_MIB // 4, 2 * _MIB)
"""Least and most weight bytes a grid step reads; between them an eighth of the matrix.

A step costs about 0.35 us beside its reads (JAX's Pallas TPU guide), which asks for large blocks; the first
block's read overlaps with nothing, which asks for small ones. On v5e (0.82 TB/s) 2 MiB are 2.6 us.
"""

_SPREAD_ROWS = 256
"""Rows of x, times groups a step of the inner loop covers, up to which x is spread; see `_spread_product`."""


def prepare(value: Any, role: Role, tied: bool) -> Any:
    """A parameter in the kernels' layout: quantized weights are laid out anew, once.

    An 8-bit token embedding keeps its order, for its rows are looked up; where the output head is tied to it,
    the product reads that order. So do those with weights that are not quantized.

    Args:
      value: array or QuantizedTensor, of jax arrays or, to compile ahead of time, ShapeDtypeStructs.
      role: what it is, as `Param` says.
      tied: the token embedding is the output head, too.
    """
    if not isinstance(value, QuantizedTensor):
        return value
    if role == "embedding" and value.bits == 8:
        return embedding.prepare(value, tied)
    return prepare_tensor(value)


def stacked_matmul(
    x: Array,
    w: Array | QuantizedTensor | PreparedTensor | EmbeddingTensor,
    layer: Array | int,
    *,
    interpret: Any = False,
) -> Array:
    """`x @ w[layer].T`; the definition is `reference.stacked_matmul`.

    Args:
      x: [..., I], float32 or bfloat16. With bfloat16 every product is of bfloat16 values.
      w: [L, O, I]: prepared, or bfloat16 or float32. Others are right but slow: quantized weights that are
        not prepared are laid out anew on each call, float16 takes XLA's path.
      layer: int scalar, traced.
      interpret: for tests without a TPU: True or `pltpu.InterpretParams`.

    Returns:
      float32 [..., O].
    """
    if isinstance(w, QuantizedTensor):
        stack = jax.tree.map(lambda part: part[None], relayout(quant.layer_slice(w, layer)))
        return stacked_matmul(x, stack, 0, interpret=interpret)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    x = x.astype(jnp.float32 if x.dtype == jnp.float32 else jnp.bfloat16)
    if isinstance(w, PreparedTensor | EmbeddingTensor):
        x = pad_end(x, -1, w.padded_columns)
        matmul = _packed_matmul if isinstance(w, PreparedTensor) else _rows_matmul
        return _on_shards(functools.partial(matmul, interpret=interpret), x, w, layer)
    if w.dtype not in (jnp.bfloat16, jnp.float32) or mesh_of(x, w):
        # XLA partitions its own dot, and fuses the read of one layer into it.
        return reference.stacked_matmul(x, w, layer[0])
    return _float_matmul(x, w, layer, interpret=interpret)


# --- shards


def _on_shards(
    matmul: Callable[..., Array], x: Array, w: PreparedTensor | EmbeddingTensor, layer: Array
) -> Array:
    """Runs a product on each device's part of the weights; parts of a split contraction are summed."""
    mesh = mesh_of(x, w.codes)
    columns = w.shape[-2]  # outputs, without the padding
    if mesh is None:
        return matmul(x, w, layer)[..., :columns]
    outputs, inner = w.axes
    columns //= mesh.shape[outputs] if outputs else 1
    lead = (split(mesh, "data", x.shape[0]), *(None,) * (x.ndim - 2)) if x.ndim > 1 else ()
    specs = specs_of(w) if isinstance(w, PreparedTensor) else embedding.specs_of(w)

    def local(x: Array, w: Any, layer: Array) -> Array:
        y = matmul(x, w, layer)[..., :columns]
        return lax.psum(y, inner) if inner else y

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(*lead, inner), specs, PartitionSpec()),
        out_specs=PartitionSpec(*lead, outputs),
        check_vma=False,
    )(x, w, layer)


# --- quantized weights, prepared: codes [L, Ip, O]


def _packed_matmul(x: Array, w: PreparedTensor, layer: Array, *, interpret: Any) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    rows, inner = flat.shape
    out = w.codes.shape[-1]
    column_bytes = w.nbytes // (w.codes.shape[0] * out)
    bm, bo = _row_block(flat), _column_block(column_bytes, out)
    form, operands = w.form, w.parts.values()
    # Of two levels a block at a time: its outer scale is one row, which Mosaic reads from anywhere.
    chunk = BLOCK if form.two_level else _chunk(bm, inner, form.group)
    y = _call(
        functools.partial(_packed_kernel, form=form, chunk=chunk),
        grid=(pl.cdiv(rows, bm), pl.cdiv(out, bo)),
        in_specs=[
            pl.BlockSpec((bm, inner), lambda i, j, layer: (i, 0)),
            *(
                pl.BlockSpec((None, part.shape[1], bo), lambda i, j, layer: (layer[0], 0, j))
                for part in operands
            ),
        ],
        out_specs=pl.BlockSpec((bm, bo), lambda i, j, layer: (i, j)),
        out_shape=(rows, out),
        cost=_cost(flat, out, column_bytes * out),
        interpret=interpret,
    )(layer, flat, *operands)
    return y.reshape(*x.shape[:-1], out)


def _packed_kernel(layer_ref: Any, x_ref: Any, *refs: Any, form: Form, chunk: int) -> None:
    """x [bm, Ip], parts of a `PreparedTensor` [..., bo] -> out [bm, bo]."""
    *part_refs, out_ref = refs
    parts = dict(zip(form.parts, part_refs, strict=True))
    inner = x_ref.shape[1]
    per_channel = form.group == inner

    def add(span: Span, size: int) -> None:
        x, codes = x_ref[:, span(1)], form.codes(parts, span)
        if per_channel:
            out_ref[...] += _dot(x, codes)
            return
        product = _spread_product if _is_spread(x.shape[0], size // form.group) else _scaled_product
        out_ref[...] += product(x, codes, *form.scales(parts, span), form.group)

    out_ref[...] = jnp.zeros_like(out_ref)
    for_chunks(inner, chunk, add)
    if per_channel:
        _apply_channel(out_ref, x_ref, *form.scales(parts, lambda per: slice(None)))


def _apply_channel(out_ref: Any, x_ref: Any, scales: Array, mins: Array | None = None) -> None:
    """Scales sums of codes [bm, bo] by one scale (and minimum) an output, [1, bo]."""
    y = out_ref[...] * scales
    if mins is not None:
        y += x_ref[...].astype(jnp.float32).sum(1, keepdims=True) * mins
    out_ref[...] = y


def _spread_product(
    x: Array, codes: Array, scales: Array, mins: Array | None, group: int, *, transposed: bool = False
) -> Array:
    """Few rows of x: each is spread to one row a group, zero elsewhere; scales meet sums and not weights.

    sum_i x[m, i] s[g(i), o] c[i, o] = sum_g s[g, o] (sum_i X[m, g, i] c[i, o]) with X[m, g, i] = x[m, i]
    where i is in group g, else 0. The matrix unit takes up to 128 rows in the time of 8, while a
    multiplication per weight on the vector unit would take longer than the weight's read; and nothing is
    rounded but x.

    Args:
      x: [M, C].
      codes: [C, bo], integers; [bo, C] if transposed.
      scales, mins: float32 [C/G, bo].
      group: G.
    """
    rows, cols = x.shape
    groups = cols // group
    # Position within the group of each row. (Mosaic divides integers, but slowly.)
    offset = lax.broadcasted_iota(jnp.int32, (groups, cols), 1)
    offset -= group * lax.broadcasted_iota(jnp.int32, (groups, cols), 0)
    own = (offset >= 0) & (offset < group)
    spread = jnp.where(own[None], x.astype(jnp.float32)[:, None, :], 0.0)  # [M, C/G, C]
    sums = _dot(spread.reshape(rows * groups, cols).astype(x.dtype), codes, transposed=transposed)
    y = sums.reshape(rows, groups, -1) * scales
    if mins is not None:
        y += spread.sum(2, keepdims=True) * mins
    return y.sum(1)


def _scaled_product(x: Array, codes: Array, scales: Array, mins: Array | None, group: int) -> Array:
    """Many rows of x: the weights are dequantized, to the dtype of x, and multiplied. Shapes as above."""
    return _dot(x, dequantized(codes, scales, mins, group))


def _is_spread(rows: int, groups: int) -> bool:
    return groups % 8 == 0 and rows * groups <= _SPREAD_ROWS


def _chunk(rows: int, inner: int, group: int) -> int:
    """Weights of a column the inner loop handles at once: a multiple of 256, and of 8 groups if grouped."""
    if group >= inner:
        return min(1024, inner)
    groups = 8
    while groups * 2 * group <= 1024 and rows * groups * 2 <= _SPREAD_ROWS // 2:
        groups *= 2
    return groups * group


# --- weights as they lie: [L, O, I]


def _rows_matmul(x: Array, w: EmbeddingTensor, layer: Array, *, interpret: Any) -> Array:
    """8-bit codes [L, O, Ip], scales [L, Gp, Op]: an embedding that is the output head too."""
    flat = x.reshape(-1, x.shape[-1])
    rows, inner = flat.shape
    out = w.codes.shape[1]
    column_bytes = inner + sum(part.shape[1] * part.dtype.itemsize for part in w.head)
    # Few rows at a time: scaled are sums, see `_spread_product`. Scaling weights would mean turning them.
    bm, bo = min(_row_block(flat), 32), _column_block(column_bytes, out)
    group = inner if w.head[0].shape[1] == 1 else w.group
    y = _call(
        functools.partial(_rows_kernel, group=group, chunk=_chunk(bm, inner, group)),
        grid=(pl.cdiv(rows, bm), pl.cdiv(out, bo)),
        in_specs=[
            pl.BlockSpec((bm, inner), lambda i, j, layer: (i, 0)),
            pl.BlockSpec((None, bo, inner), lambda i, j, layer: (layer[0], j, 0)),
            *(
                pl.BlockSpec((None, part.shape[1], bo), lambda i, j, layer: (layer[0], 0, j))
                for part in w.head
            ),
        ],
        out_specs=pl.BlockSpec((bm, bo), lambda i, j, layer: (i, j)),
        out_shape=(rows, out),
        cost=_cost(flat, out, column_bytes * out),
        interpret=interpret,
    )(layer, flat, w.codes, *w.head)
    return y.reshape(*x.shape[:-1], out)


def _rows_kernel(
    layer_ref: Any, x_ref: Any, codes_ref: Any, scales_ref: Any, *refs: Any, group: int, chunk: int
) -> None:
    """x [bm, Ip], codes [bo, Ip], scales [Gp, bo] (and mins) -> out [bm, bo]."""
    *mins_ref, out_ref = refs
    per_channel = group == x_ref.shape[1]
    out_ref[...] = jnp.zeros_like(out_ref)

    def add(span: Span, size: int) -> None:
        x, codes = x_ref[:, span(1)], codes_ref[:, span(1)]
        if per_channel:
            out_ref[...] += _dot(x, codes, transposed=True)
            return
        scales = widen_scales(scales_ref[span(group), :])
        mins = widen_scales(mins_ref[0][span(group), :]) if mins_ref else None
        out_ref[...] += _spread_product(x, codes, scales, mins, group, transposed=True)

    for_chunks(x_ref.shape[1], chunk, add)
    if per_channel:
        _apply_channel(out_ref, x_ref, *(widen_scales(ref[...]) for ref in (scales_ref, *mins_ref)))


def _float_matmul(x: Array, w: Array, layer: Array, *, interpret: Any) -> Array:
    """Float weights [L, O, I]."""
    flat = x.reshape(-1, x.shape[-1])
    rows, inner = flat.shape
    out = w.shape[1]
    column_bytes = inner * w.dtype.itemsize
    bm, bo = _row_block(flat), _column_block(column_bytes, out)
    y = _call(
        _float_kernel,
        grid=(pl.cdiv(rows, bm), pl.cdiv(out, bo)),
        in_specs=[
            pl.BlockSpec((bm, inner), lambda i, j, layer: (i, 0)),
            pl.BlockSpec((None, bo, inner), lambda i, j, layer: (layer[0], j, 0)),
        ],
        out_specs=pl.BlockSpec((bm, bo), lambda i, j, layer: (i, j)),
        out_shape=(rows, out),
        cost=_cost(flat, out, column_bytes * out),
        interpret=interpret,
    )(layer, flat, w)
    return y.reshape(*x.shape[:-1], out)


def _float_kernel(layer_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any) -> None:
    out_ref[...] = jnp.zeros_like(out_ref)

    def add(span: Span, size: int) -> None:
        out_ref[...] += _dot(x_ref[:, span(1)], w_ref[:, span(1)], transposed=True)

    for_chunks(x_ref.shape[1], 1024, add)


# --- shared


def _call(
    kernel: Callable[..., None],
    *,
    grid: tuple[int, int],
    in_specs: list[Any],
    out_specs: Any,
    out_shape: tuple[int, int],
    cost: pl.CostEstimate,
    interpret: Any,
) -> Callable[..., Array]:
    """A kernel over (blocks of rows of x, blocks of outputs) whose index maps see the layer."""
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="stacked_matmul",
    )


def _dot(x: Array, w: Array, *, transposed: bool = False) -> Array:
    """x [M, C] times w [C, bo], or [bo, C] if transposed, in the dtype of x, summed in float32."""
    w = w.astype(jnp.float32).astype(x.dtype) if w.dtype == jnp.int4 else w.astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _row_block(x: Array) -> int:
    """Rows of x [M, I] a block holds: all, or a multiple of 16 that fits."""
    fitting = _X_BLOCK_BYTES // (x.shape[1] * x.dtype.itemsize)
    return x.shape[0] if x.shape[0] <= fitting else max(fitting // 16 * 16, 16)


def _column_block(column_bytes: int, columns: int) -> int:
    """Outputs a block of weights holds: all, or a multiple of 128, by the bytes of one output's weights."""
    least, most = _WEIGHT_BLOCK_BYTES
    target = min(max(column_bytes * columns // 8, least), most)
    fitting = max(min(target // column_bytes, 1024) // LANES, 1) * LANES
    return columns if columns <= fitting else fitting


def _cost(x: Array, out: int, weight_bytes: int) -> pl.CostEstimate:
    rows, inner = x.shape
    return pl.CostEstimate(
        flops=2 * rows * inner * out,
        bytes_accessed=weight_bytes + x.size * x.dtype.itemsize + rows * out * 4,
        transcendentals=0,
    )
