"""Matrix products over stacked weights on TPU: Mosaic kernels that read one layer straight out of the stack.

The layer index is a prefetched scalar and appears only in the block index maps: no slice, no copy. Weights
are widened in the kernel (weight-only quantization): codes become bfloat16 exactly, sums are float32, and
scales stay float32 where few rows of x make that affordable. `prepare` puts quantized weights into the
layout the kernels read. Checked against the reference in interpret mode, and compiled ahead of time for v5e,
v6e and tpu7x; it has not been run on hardware, so the block sizes are reasoned, not tuned.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from jaxchat import quant
from jaxchat.config import Role
from jaxchat.pallas.embedding import tpu as embedding
from jaxchat.pallas.embedding.tpu import EmbeddingTensor
from jaxchat.pallas.mesh import mesh_of, split
from jaxchat.pallas.stacked_matmul import reference
from jaxchat.pallas.tpu_layout import (
    LANES,
    laid_out,
    pad_end,
    pad_parts,
    padded_columns,
    turned_scales,
    turned_spec,
)
from jaxchat.quant import InParts, QuantizedTensor

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTensor(InParts):
    """A quantized weight [..., O, I] as the TPU kernels read it: the contraction axis first.

    Ip is I rounded up to a multiple of G and of 128, Op is O rounded up to one of 128 (on each device), Gp
    the number of groups rounded up to one of 8: whole tiles. XLA keeps an array that is not made of whole
    tiles in another order of its axes, if that is smaller, and copies it whenever a kernel reads it. The
    padding is 0.

    Attributes:
      codes: 8 bits: int8 [..., Ip, Op]. 4 bits: uint8 [..., Ip/2, Op], rows 2j and 2j+1 in the low and high
        nibble of byte j, two's complement: what `pltpu.bitcast` turns into int4 [Ip, Op] in the kernel.
      scales: float32, or the bits of float16 as uint16 (Mosaic has no float16), [..., Gp, Op]; one row if
        the whole row of weights shares a scale.
      mins: None, or like `scales`. Affine 4-bit codes are stored minus 8, so that they are signed; the
        kernels add 8 scales to the minimum.
      bits: 8 or 4, static.
      group: G, static.
      rows, columns: O and I, static.
      axes: static, the mesh axes that O and I are split over.
    """

    codes: Array
    scales: Array
    mins: Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    axes: tuple[str | None, str | None] = dataclasses.field(default=(None, None), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""
        return (*self.codes.shape[:-2], self.rows, self.columns)

    @property
    def padded_columns(self) -> int:
        """Ip."""
        return self.codes.shape[-2] * 8 // self.bits


def prepare(value: Any, role: Role, tied: bool) -> Any:
    """A parameter in the kernels' layout: quantized weights are laid out anew, once.

    The token embedding keeps its order, for its rows are looked up; where the output head is tied to it, the
    product reads that order. So do those with weights that are not quantized.

    Args:
      value: array or QuantizedTensor, of jax arrays or, to compile ahead of time, ShapeDtypeStructs.
      role: what it is, as `Param` says.
      tied: the token embedding is the output head, too.
    """
    if not isinstance(value, QuantizedTensor):
        return value
    if role != "embedding":
        return _prepare_tensor(value)
    return embedding.prepare(value, tied) if value.bits == 8 else value


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
        stack = jax.tree.map(lambda part: part[None], _relayout(quant.layer_slice(w, layer)))
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


# --- layout


def _specs(w: PreparedTensor | EmbeddingTensor) -> Any:
    """How each part, or each part of a stack of them, is split."""
    if isinstance(w, EmbeddingTensor):
        return embedding.specs_of(w)
    return jax.tree.map(lambda part: turned_spec(part, w.axes), w)


def _prepare_tensor(q: QuantizedTensor) -> PreparedTensor:
    sharding = getattr(q.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return laid_out(q, _relayout, jax.tree.map(lambda part: sharding, jax.eval_shape(_relayout, q)))
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (q.ndim - len(sharding.spec)))
    parts = [mesh.shape[axis] if axis else 1 for axis in spec[-2:]]
    # The contraction axis is split between groups and tiles only, else it is whole on every device.
    if padded_columns(q) % (parts[1] * max(LANES, q.group if q.scales.shape[-1] > 1 else 1)):
        spec, parts = (*spec[:-1], None), [parts[0], 1]
    axes = (spec[-2], spec[-1])
    relayout = functools.partial(_relayout, axes=axes, parts=(parts[0], parts[1]))
    specs = _specs(jax.eval_shape(relayout, q))
    shardings = jax.tree.map(lambda part: NamedSharding(mesh, part), specs)
    return laid_out(q, relayout, shardings)


def _relayout(
    q: QuantizedTensor,
    *,
    axes: tuple[str | None, str | None] = (None, None),
    parts: tuple[int, int] = (1, 1),
) -> PreparedTensor:
    """Turns, flips and pads; `axes` and `parts`: the mesh axes O and I are split over, and into how many."""
    padded = padded_columns(q)
    codes = jnp.swapaxes(q.codes, -1, -2)
    if q.bits == 4 and q.affine:
        codes = codes ^ jnp.uint8(0x88)
    return PreparedTensor(
        codes=pad_parts(pad_end(codes, -2, padded * q.bits // 8), -1, parts[0], LANES),
        scales=turned_scales(q, q.scales, parts),
        mins=None if q.mins is None else turned_scales(q, q.mins, parts),
        bits=q.bits,
        group=q.group if q.scales.shape[-1] > 1 else padded,
        rows=q.shape[-2],
        columns=q.columns,
        axes=axes,
    )


def _widen_scales(bits: Array) -> Array:
    """float32 values of float16 bits (IEEE 754 binary16, finite ones), by arithmetic; float32 as is."""
    if bits.dtype == jnp.float32:
        return bits
    wide = bits.astype(jnp.int32)
    magnitude = wide & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * jnp.float32(2**-24)
    value = jnp.where(magnitude < 0x400, subnormal, normal)
    return jnp.where(wide > 0x7FFF, -value, value)


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

    def local(x: Array, w: Any, layer: Array) -> Array:
        y = matmul(x, w, layer)[..., :columns]
        return lax.psum(y, inner) if inner else y

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(*lead, inner), _specs(w), PartitionSpec()),
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
    operands = [w.codes, w.scales] + ([] if w.mins is None else [w.mins])
    group = inner if w.scales.shape[-2] == 1 else w.group
    kernel = functools.partial(_packed_kernel, bits=w.bits, group=group, chunk=_chunk(bm, inner, group))
    y = _call(
        kernel,
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


def _packed_kernel(
    layer_ref: Any,
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    *refs: Any,
    bits: int,
    group: int,
    chunk: int,
) -> None:
    """x [bm, Ip], codes [Ip*bits/8, bo], scales [Ip/G, bo] (and mins) -> out [bm, bo]."""
    *mins_ref, out_ref = refs
    inner = x_ref.shape[1]
    per_channel = group == inner

    def add(span: Span, size: int) -> None:
        x, codes = x_ref[:, span(1)], codes_ref[span(8 // bits), :]
        if bits == 4:
            codes = pltpu.bitcast(codes, jnp.int4)
        if per_channel:
            out_ref[...] += _dot(x, codes)
            return
        scales = _widen_scales(scales_ref[span(group), :])
        mins = _minimum(mins_ref[0][span(group), :], scales, bits) if mins_ref else None
        product = _spread_product if _is_spread(x.shape[0], size // group) else _scaled_product
        out_ref[...] += product(x, codes, scales, mins, group)

    out_ref[...] = jnp.zeros_like(out_ref)
    _for_chunks(inner, chunk, add)
    if per_channel:
        scales = _widen_scales(scales_ref[...])
        mins = _minimum(mins_ref[0][...], scales, bits) if mins_ref else None
        _apply_channel(out_ref, x_ref, scales, mins)


def _apply_channel(out_ref: Any, x_ref: Any, scales: Array, mins: Array | None = None) -> None:
    """Scales sums of codes [bm, bo] by one scale (and minimum) an output, [1, bo]."""
    y = out_ref[...] * scales
    if mins is not None:
        y += x_ref[...].astype(jnp.float32).sum(1, keepdims=True) * mins
    out_ref[...] = y


def _minimum(bits_of_mins: Array, scales: Array, bits: int) -> Array:
    mins = _widen_scales(bits_of_mins)
    return mins + 8 * scales if bits == 4 else mins  # 4-bit codes are stored minus 8


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
    cols, out = codes.shape
    w = codes.astype(jnp.float32).reshape(cols // group, group, out) * scales[:, None, :]
    if mins is not None:
        w += mins[:, None, :]
    return _dot(x, w.reshape(cols, out))


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
        scales = _widen_scales(scales_ref[span(group), :])
        mins = _widen_scales(mins_ref[0][span(group), :]) if mins_ref else None
        out_ref[...] += _spread_product(x, codes, scales, mins, group, transposed=True)

    _for_chunks(x_ref.shape[1], chunk, add)
    if per_channel:
        _apply_channel(out_ref, x_ref, *(_widen_scales(ref[...]) for ref in (scales_ref, *mins_ref)))


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

    _for_chunks(x_ref.shape[1], 1024, add)


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


Span = Callable[[int], Any]
"""Of a part of the contraction axis: its slice along an axis where so many weights share an entry."""


def _for_chunks(length: int, chunk: int, add: Callable[[Span, int], None]) -> None:
    """Calls `add(span, size)` over [0, length): a loop over whole chunks, then what is left."""
    whole = length // chunk

    def static(start: int, size: int) -> None:
        add(lambda per: pl.ds(start // per, size // per), size)

    def body(i: Array, _: None) -> None:
        add(lambda per: pl.ds(pl.multiple_of(i * (chunk // per), chunk // per), chunk // per), chunk)

    if whole == 1:
        static(0, chunk)
    elif whole:
        lax.fori_loop(0, whole, body, None)
    if length % chunk:
        static(whole * chunk, length % chunk)


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
