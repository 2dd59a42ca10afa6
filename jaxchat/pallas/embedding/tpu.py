"""The 8-bit token embedding on TPU: rows are looked up; a tied output head reads the same codes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxchat import quant
from jaxchat.pallas.tpu_layout import laid_out, pad_end, padded_columns, turned_scales, turned_spec
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
        head=tuple(turned_scales(q, part, (parts, 1)) for part in (q.scales, q.mins) if part is not None)
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
