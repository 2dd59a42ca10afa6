"""Rows of the token embedding on TPU; a tied output head reads the same codes.

At 8 bits the embedding keeps its order and XLA gathers its rows. Below, it lies as every weight does, a
token's row being a column of it: there a kernel reads, for each token, the 128 columns that have its own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from jaxchat import quant
from jaxchat.pallas import tpu_weights
from jaxchat.pallas.embedding import reference
from jaxchat.pallas.mesh import mesh_of, split
from jaxchat.pallas.tpu_layout import LANES, laid_out, pad_end, padded_columns, turned_scales, turned_spec
from jaxchat.pallas.tpu_weights import BLOCK, Form, PreparedTensor, Span, dequantized, for_chunks
from jaxchat.quant import InParts, QuantizedTensor

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingTensor(InParts):
    """An 8-bit embedding [V, D]: indexing gives rows, dequantized; if it is the output head too, a product.

    Attributes:
      codes: int8 [V, Dp], Dp being D rounded up to a multiple of G and of 128.
      scales: float16 or float32 [V * D/G]: in one dimension, which no tiling pads.
      mins: None, or like `scales`.
      head: () or what the product reads: scales (and minimums) as `PreparedTensor` has them, [Gp, Vp].
      group, columns: G and D, static.
      axes: static, the mesh axis that V is split over, and None.
    """

    codes: Array
    scales: Array
    mins: Array | None
    head: tuple[Array, ...]
    group: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    axes: tuple[str | None, str | None] = dataclasses.field(default=(None, None), metadata={"static": True})

    def __getitem__(self, ids: Array) -> Array:
        """Rows `ids` [...], float32 [..., D]."""
        # A lookup of one row becomes a dynamic slice, for which XLA copies all the codes into another tiling;
        # a gather of two rows it does in place.
        flat = jnp.repeat(ids.reshape(1), 2) if ids.size == 1 else ids.reshape(-1)
        groups = self.scales.shape[0] // self.codes.shape[0]
        where = flat[:, None] * groups + jnp.arange(groups)
        rows = QuantizedTensor(
            codes=self.codes[flat][:, : groups * self.group],
            scales=self.scales[where],
            mins=None if self.mins is None else self.mins[where],
            bits=8,
            group=self.group,
            columns=self.columns,
        )
        return quant.dequantize(rows)[: ids.size].reshape(*ids.shape, self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """[V, D]."""
        return (*self.codes.shape[:-1], self.columns)

    @property
    def padded_columns(self) -> int:
        """Dp."""
        return self.codes.shape[-1]


def embedding_rows(w: Any, ids: Array, *, interpret: Any = False) -> Array:
    """Rows `ids` [...] of an embedding [V, D], float32 [..., D], as `reference.embedding_rows` defines them.

    Args:
      w: as `prepare` of the stacked product lays it out, or of a float type.
      ids: int32, 0 to V - 1.
      interpret: for tests without a TPU.
    """
    if not isinstance(w, PreparedTensor):
        return reference.embedding_rows(w, ids)
    look_up = functools.partial(_look_up, w.columns, interpret=interpret)
    mesh = mesh_of(ids, w.codes)
    if mesh is None:
        return look_up(w, ids)
    outer, inner = w.axes
    lead = (split(mesh, "data", ids.shape[0]), *(None,) * (ids.ndim - 1)) if ids.ndim else ()
    rows = w.rows // (mesh.shape[outer] if outer else 1)

    def local(w: PreparedTensor, ids: Array) -> Array:
        """Each device has some of the rows; of others it adds zeros."""
        if outer is None:
            return _look_up(w.padded_columns, w, ids, interpret=interpret)
        own = ids - rows * lax.axis_index(outer)
        there = (own >= 0) & (own < rows)
        found = _look_up(w.padded_columns, w, jnp.clip(own, 0, rows - 1), interpret=interpret)
        return lax.psum(jnp.where(there[..., None], found, 0.0), outer)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tpu_weights.specs_of(w), PartitionSpec(*lead)),
        out_specs=PartitionSpec(*lead, inner),
        check_vma=False,
    )(w, ids)[..., : w.columns]


def _look_up(columns: int, w: PreparedTensor, ids: Array, *, interpret: Any) -> Array:
    """Rows `ids` [...] of the weight [O, I], the first `columns` of each, float32."""
    flat, inner, parts = ids.reshape(-1), w.padded_columns, w.parts.values()

    def block_of(t: Array, ids: Any) -> tuple[Any, Array]:
        return 0, lax.div(ids[t], LANES)

    rows = pl.pallas_call(
        functools.partial(_row_kernel, form=w.form),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(flat),),
            in_specs=[pl.BlockSpec((part.shape[0], LANES), block_of) for part in parts],
            out_specs=pl.BlockSpec((None, 1, inner), lambda t, ids: (t, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(flat), 1, inner), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="embedding_rows",
    )(flat, *parts)
    return rows[:, 0, :columns].reshape(*ids.shape, columns)


def _row_kernel(ids_ref: Any, *refs: Any, form: Form) -> None:
    """Parts of a `PreparedTensor` [..., 128] -> the one column that is asked for, as a row [1, Ip]."""
    *part_refs, out_ref = refs
    parts = dict(zip(form.parts, part_refs, strict=True))
    lane = lax.rem(ids_ref[pl.program_id(0)], LANES)
    inner = out_ref.shape[1]
    per_channel = form.group == inner
    ones = jnp.ones((1, LANES), jnp.float32)

    def put(span: Span, size: int) -> None:
        scales, mins = form.scales(parts, (lambda per: slice(None)) if per_channel else span)
        w = dequantized(form.codes(parts, span), scales, mins, size if per_channel else form.group)
        own = lax.broadcasted_iota(jnp.int32, w.shape, 1) == lane
        # A sum over lanes of which one is not zero: exact, and it lays the column down.
        out_ref[:, span(1)] = lax.dot_general(
            ones, jnp.where(own, w, 0.0), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )

    for_chunks(inner, _chunk(form, per_channel), put)


def _chunk(form: Form, per_channel: bool) -> int:
    """Weights of a column that are widened at once: whole blocks, and of 8 groups."""
    if form.two_level:
        return BLOCK
    return 2 * BLOCK if per_channel else max(2 * BLOCK, 8 * form.group)


def prepare(q: QuantizedTensor, tied: bool) -> EmbeddingTensor:
    """An 8-bit embedding [V, D] as it is looked up; `tied`: it is the output head too."""
    sharding: Any = getattr(q.codes, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    axis = sharding.spec[0] if named and len(sharding.spec) else None
    relayout = functools.partial(
        _relayout, axis=axis, parts=sharding.mesh.shape[axis] if axis else 1, tied=tied
    )
    specs = specs_of(jax.eval_shape(relayout, q))
    shardings = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec) if named else sharding, specs)
    return laid_out(q, relayout, shardings)


def _relayout(q: QuantizedTensor, *, axis: str | None, parts: int, tied: bool) -> EmbeddingTensor:
    return EmbeddingTensor(
        codes=pad_end(jnp.asarray(q.codes), -1, padded_columns(q)),
        scales=jnp.ravel(q.scales),
        mins=None if q.mins is None else jnp.ravel(q.mins),
        head=tuple(
            turned_scales(part, q.group, padded_columns(q), (parts, 1))
            for part in (q.scales, q.mins)
            if part is not None
        )
        if tied
        else (),
        group=q.group,
        columns=q.columns,
        axes=(axis, None),
    )


def specs_of(w: Any) -> Any:
    """How each part of an `EmbeddingTensor`, or of a stack of them, is split."""
    lead, outputs = (None,) * (w.codes.ndim - 2), w.axes[0]
    flat = PartitionSpec(*lead, outputs)
    return dataclasses.replace(
        w,
        codes=PartitionSpec(*lead, outputs, None),
        scales=flat,
        mins=None if w.mins is None else flat,
        head=tuple(turned_spec(part, w.axes) for part in w.head),
    )
