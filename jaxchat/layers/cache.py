"""The KV cache: the one room that knows its shape, [P, B, K, S, H]. The kernels read and write it as a whole.

Rows beyond a sequence's length are stale. Their weight is 0, so they must be finite: all that a working model
writes is, and the engine drops a cache after non-finite logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.config import ModelConfig
from jaxchat.pallas.backends import Kernels
from jaxchat.pallas.cache_attention import QuantizedRows, Rows, Tree
from jaxchat.sharding import MESH_AXES


class Fresh(NamedTuple):
    """Queries of new tokens, and the keys and values they bring."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, T, K, H]
    v: jax.Array  # [B, T, K, H]


class KVCache(NamedTuple):
    """Keys and values of every slot of a plan."""

    k: Rows  # [P, B, K, S, H]
    v: Rows  # [P, B, K, S, H]

    @property
    def slots(self) -> int:
        """P."""
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        """S."""
        return self.k.shape[3]

    def append(
        self,
        kernels: Kernels,
        fresh: Fresh,
        slot: Int[Array, ""],
        lengths: Int[Array, " B"],
        new: Int[Array, " B"],
    ) -> "KVCache":
        """Writes the first `new` int32 [B] of each sequence's keys and values behind its `lengths` [B]."""
        return KVCache(
            kernels.write_rows(self.k, fresh.k, slot, lengths, new),
            kernels.write_rows(self.v, fresh.v, slot, lengths, new),
        )

    def attend(
        self,
        kernels: Kernels,
        q: Float[Array, "B T N H"],
        slot: Int[Array, ""],
        lengths: Int[Array, " B"] | Int[Array, "B T"],
        *,
        scale: Float[Array, ""],
        window: Int[Array, ""],
        softcap: float,
        tree: Tree | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of queries [B, T, N, H] behind `lengths` [B] over one slot, float32 [B, T, N, H].

        In training, of rows with several texts, `lengths` is `Step.starts`.
        """
        attend = kernels.decode_attention if q.shape[1] == 1 else kernels.prefill_attention
        return attend(
            q, self.k, self.v, slot, lengths, scale=scale, window=window, softcap=softcap, tree=tree
        )

    def gathered(
        self, lengths: Int[Array, " B"], path: Int[Array, "B A"], count: Int[Array, " B"]
    ) -> "KVCache":
        """With some of each sequence's new rows moved to the front of them; other new rows are stale then.

        Args:
          lengths: rows before the new ones.
          path: which of these come first, in order, as a path through a tree has them: each moves forwards.
          count: how many of them.
        """
        number = jnp.arange(path.shape[1])
        source = lengths[:, None] + path
        # Those that stay, and what is beyond the count, are written nowhere.
        moves = (number < count[:, None]) & (path != number)
        target = jnp.where(moves, lengths[:, None] + number, self.capacity)

        def move(part: jax.Array) -> jax.Array:
            slot, sequence, head = (
                jnp.arange(size).reshape(shape)
                for size, shape in zip(part.shape, ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1)), strict=False)
            )
            rows = part[slot, sequence, head, source[:, None]]
            return part.at[slot, sequence, head, target[:, None]].set(rows, mode="drop")

        return jax.tree.map(move, self)

    def grown(self, slots: int, capacity: int) -> "KVCache":
        """With room for more slots, and for `capacity` rows in each."""

        def pad(part: jax.Array) -> jax.Array:
            more = slots - part.shape[0], 0, 0, capacity - part.shape[3]
            return jnp.pad(part, [(0, n) for n in more] + [(0, 0)] * (part.ndim - 4))

        return jax.tree.map(pad, self)

    def with_rows(self, rows: "KVCache", sequence: jax.Array) -> "KVCache":
        """With one sequence's first rows of the first slots, each part [P, K, S, ...], written into it."""

        def put(part: jax.Array, new: jax.Array) -> jax.Array:
            start = (0, sequence) + (0,) * (part.ndim - 2)
            return jax.lax.dynamic_update_slice(part, new[:, None], start)

        return jax.tree.map(put, self, rows)

    def rows(self, slots: int, sequence: int, length: int) -> "KVCache":
        """One sequence's first `length` rows of the first slots as numpy arrays [P, K, S, ...]."""
        return jax.tree.map(lambda part: np.asarray(part[:slots, sequence, :, :length]), self)


def empty_cache(config: ModelConfig, *, slots: int, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for plans of up to `slots` slots and contexts of up to `capacity` tokens.

    Args:
      config: the model.
      slots, batch, capacity: P, B and S.
      dtype: a float type; uint16, which is bfloat16 as its bits; or int8, for `QuantizedRows`.
    """
    shape = (slots, batch, config.num_kv_heads, capacity, config.head_dim)

    def zeros() -> Rows:
        codes = jnp.zeros(shape, dtype)
        return QuantizedRows(codes, jnp.zeros(shape[:-1], jnp.float32)) if dtype == jnp.int8 else codes

    return KVCache(zeros(), zeros())


def cache_bytes(config: ModelConfig, *, slots: int, batch: int, capacity: int, dtype: DTypeLike) -> int:
    """The size of `empty_cache`."""
    rows = 2 * slots * batch * config.num_kv_heads * capacity
    scale = 4 if dtype == jnp.int8 else 0
    return rows * (config.head_dim * jnp.dtype(dtype).itemsize + scale)


def cache_sharding(config: ModelConfig, mesh: Mesh, batch: int) -> NamedSharding:
    """How a cache is split over a mesh: sequences over `data`, key/value heads over `model`.

    As in `param_spec`, a dimension that does not divide evenly is whole on each device.
    """

    def split(logical: str, size: int) -> str | None:
        axis = MESH_AXES[logical]
        parts = mesh.shape.get(axis, 1)
        return axis if parts > 1 and size % parts == 0 else None

    names = [None, split("batch", batch), split("kv_heads", config.num_kv_heads)]
    # Spelled as XLA spells the shardings of results (no axis of size 1, no None at the end): a cache that
    # comes back from a step would otherwise be another kind of argument, and each step would compile twice.
    while names and names[-1] is None:
        names.pop()
    return NamedSharding(mesh, PartitionSpec(*names))
