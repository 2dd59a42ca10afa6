"""Attention over the slot-stacked KV cache on TPU, and the write of new rows, in place: Mosaic kernels.

Slot, lengths and window are prefetched scalars: the block index maps read one slot of the whole cache, and
only the blocks that a sequence's queries can see. Definitions: `reference.py`. Checked against them in
interpret mode, and compiled ahead of time for v5e, v6e and tpu7x; it has not been run on hardware.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from jaxchat.pallas.cache_attention.reference import QuantizedRows, Rows, quantize_rows
from jaxchat.pallas.cache_attention.tree import MOST, Tree
from jaxchat.pallas.mesh import mesh_of, split

Array = jax.Array

_MASKED = -1e30
"""Finite, so that a block without a single visible key gives weights of 0 and not NaN."""

_LANES = 128
_MIB = 1 << 20

_VMEM_LIMIT = 48 * _MIB
"""Of 128 MiB on v5e and v6e and 64 on tpu7x."""

_KEY_BLOCK_BYTES = _MIB // 2
"""Keys (and as many values) a step reads: a step costs about 0.35 us, as much as reading 290 kB on v5e."""

_QUERY_ROWS = 512
"""Query rows (tokens times query heads of a key/value head) a step handles in prefill."""

_WRITE_ROWS = 16
"""Cache rows rewritten at a time: a tile of bfloat16 is 16 rows, of float32 8. Turned, a tile is 128 wide."""

_WRITE_CODES = 32
"""The same for a cache in 8 bits, of which a tile is 32 rows."""


def attend(
    q: Array,
    k_cache: Rows,
    v_cache: Rows,
    slot: Array,
    lengths: Array,
    *,
    scale: Array,
    window: Array,
    softcap: float,
    tree: Tree | None = None,
    interpret: Any = False,
) -> Array:
    """Causal grouped-query attention of T new tokens over one slot of the cache; see `reference.attend`.

    Blockwise with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). Cache rows from
    `lengths + T` on are never used, whatever they hold.

    Args:
      q: [B, T, N, H], float32 or bfloat16.
      k_cache, v_cache: [P, B, K, S, H].
      slot: int scalar.
      lengths: int [B].
      scale: float scalar.
      window: int scalar, 0 is all.
      softcap: static, 0 is none.
      tree: of the new tokens, if they are one; it is a single block of queries.
      interpret: for tests without a TPU: True or `pltpu.InterpretParams`.

    Returns:
      float32 [B, T, N, H].
    """
    run = functools.partial(_attend, softcap=softcap, interpret=interpret)
    window = jnp.asarray(window, jnp.int32)
    meta = jnp.stack([jnp.asarray(slot, jnp.int32), window])
    scale = jnp.asarray(scale, jnp.float32).reshape(1, 1)
    tree = None if tree is None else tree.within(window)
    operands = (q, k_cache, v_cache, meta, lengths.astype(jnp.int32), scale, tree)
    mesh = mesh_of(*jax.tree.leaves(k_cache), q)
    if mesh is None:
        return run(*operands)
    batch, heads = split(mesh, "data", q.shape[0]), split(mesh, "model", k_cache.shape[2])
    query, cache = PartitionSpec(batch, None, heads), PartitionSpec(None, batch, heads)
    per_row = PartitionSpec(batch)
    specs = (query, cache, cache, PartitionSpec(), per_row, PartitionSpec(), per_row)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=query, check_vma=False)(*operands)


def _attend(
    q: Array,
    k_cache: Rows,
    v_cache: Rows,
    meta: Array,
    lengths: Array,
    scale: Array,
    tree: Tree | None,
    *,
    softcap: float,
    interpret: Any,
) -> Array:
    b, t, n, h = q.shape
    _, _, kv, s, _ = k_cache.shape
    scales: list[Array] = []
    if isinstance(k_cache, QuantizedRows) and isinstance(v_cache, QuantizedRows):
        scales = [k_cache.scale, v_cache.scale]
        k_cache, v_cache = k_cache.codes, v_cache.codes
    assert not isinstance(k_cache, QuantizedRows)
    assert not isinstance(v_cache, QuantizedRows)
    q = q.astype(jnp.float32 if q.dtype == jnp.float32 else jnp.bfloat16)
    per_kv = n // kv
    # Rows of one key/value head: token-major, so that a block of rows is a run of tokens.
    grouped = q.reshape(b, t, kv, per_kv, h).transpose(0, 2, 1, 3, 4).reshape(b, kv, t * per_kv, h)
    whole = t * per_kv <= _QUERY_ROWS or tree is not None
    tokens = t if whole else max(_QUERY_ROWS // per_kv // 16, 1) * 16
    rows = tokens * per_kv
    heads = kv if t == 1 else 1
    keys = _key_block(s, heads * h * k_cache.dtype.itemsize)
    turned = _is_turned(s, h)
    sizes = _Sizes(tokens=tokens, total=t, per_kv=per_kv, keys=keys, capacity=s, turned=turned)

    def key_block(i: Array, g: Array, j: Array, c: Array, meta: Any, lengths: Any) -> tuple[Any, ...]:
        # Steps out of range repeat the nearest block in range, which is not read again.
        first, last = sizes.visible(lengths[i], j, meta[1])
        at = jnp.clip(c, first, jnp.maximum(last, first))
        return (meta[0], i, g, 0, at) if turned else (meta[0], i, g, at, 0)

    def scale_block(i: Array, g: Array, j: Array, c: Array, meta: Any, lengths: Any) -> tuple[Any, ...]:
        first, last = sizes.visible(lengths[i], j, meta[1])
        return meta[0], i, 0, jnp.clip(c, first, jnp.maximum(last, first))

    def query_block(i: Array, g: Array, j: Array, c: Array, meta: Any, lengths: Any) -> tuple[Any, ...]:
        return i, g, j, 0

    cache_spec = pl.BlockSpec((None, None, heads, *((h, keys) if turned else (keys, h))), key_block)
    scale_spec = pl.BlockSpec((None, None, kv, keys), scale_block)  # of all heads: tiles are 8 high
    query_spec = pl.BlockSpec((None, heads, rows, h), query_block)
    # Of a tree: the word and the depth of each query row.
    by_row = [] if tree is None else [jnp.repeat(part, per_kv, axis=1)[..., None] for part in tree]
    by_row_spec = pl.BlockSpec((None, rows, 1), lambda i, g, j, c, meta, lengths: (i, 0, 0))
    out = pl.pallas_call(
        functools.partial(_attend_kernel, sizes=sizes, softcap=softcap, is_tree=tree is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv // heads, pl.cdiv(t, tokens), pl.cdiv(s, keys)),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                query_spec,
                cache_spec,
                cache_spec,
                *[scale_spec] * len(scales),
                *[by_row_spec] * len(by_row),
            ],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((heads, rows, _LANES), jnp.float32),  # largest score so far, in every lane
                pltpu.VMEM((heads, rows, _LANES), jnp.float32),  # sum of weights
                pltpu.VMEM((heads, rows, h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * n * s * h,
            bytes_accessed=2 * b * kv * s * (h * k_cache.dtype.itemsize + 4 * bool(scales))
            + q.size * (q.dtype.itemsize + 4),
            transcendentals=b * t * n * s,
        ),
        interpret=interpret,
        name="cache_attention",
    )(meta, lengths, scale, grouped, *(_turn(c, turned) for c in (k_cache, v_cache)), *scales, *by_row)
    return out.reshape(b, kv, t, per_kv, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _is_turned(capacity: int, head_dim: int) -> bool:
    """Whether the TPU keeps a cache [.., S, H] with S as the minor axis, because that needs less padding.

    Tiles are 8 x 128: rows of H = 64 would take twice their size. The kernels then read [.., H, S], which is
    the same buffer; the other order would copy the whole cache before and after every step.
    """

    def padded(major: int, minor: int) -> int:
        return -(-major // 8) * -(-minor // _LANES)

    return padded(head_dim, capacity) < padded(capacity, head_dim)


def _turn(cache: Array, turned: bool) -> Array:
    return jnp.swapaxes(cache, 3, 4) if turned else cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The static sizes of a call, and which blocks of keys its queries see.

    Attributes:
      tokens: query tokens in a block.
      total: T.
      per_kv: N / K.
      keys: cache rows in a block.
      capacity: S.
      turned: blocks of the cache are [H, keys], not [keys, H].
    """

    tokens: int
    total: int
    per_kv: int
    keys: int
    capacity: int
    turned: bool

    def end(self, length: Array, j: Array) -> Array:
        """One past the last cache row that query block j sees."""
        return jnp.minimum(length + jnp.minimum((j + 1) * self.tokens, self.total), self.capacity)

    def visible(self, length: Array, j: Array, window: Array) -> tuple[Array, Array]:
        """First and last block of keys that query block j sees; none if last < first."""
        # Of a tree there is one block, j = 0, and its first token is as near the start as any.
        start = jnp.where(window > 0, jnp.maximum(length + j * self.tokens - window + 1, 0), 0)
        first = lax.div(jnp.minimum(start, self.capacity - 1), self.keys)
        return first, lax.div(self.end(length, j) - 1, self.keys)


def _attend_kernel(
    meta_ref: Any,
    lengths_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    sizes: _Sizes,
    softcap: float,
    is_tree: bool,
) -> None:
    """q and out [K', rows, H], k and v [K', keys, H] (or turned): some heads, the queries of some tokens.

    The scales of 8-bit keys and values, if any, are [K, keys]: those of all heads; the words and depths of a
    tree, if it is one, are [rows, 1].
    """
    *given_refs, out_ref, top_ref, total_ref, mixed_ref = refs
    scale_refs, tree_refs = (given_refs[:-2], given_refs[-2:]) if is_tree else (given_refs, [])
    i, g, j, c = (pl.program_id(axis) for axis in range(4))
    length, window = lengths_ref[i], meta_ref[1]
    first, last = sizes.visible(length, j, window)

    @pl.when(c == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, _MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    @pl.when((c >= first) & (c <= last))
    def _() -> None:
        rows = q_ref.shape[1]
        start = c * sizes.keys
        token = lax.div(lax.broadcasted_iota(jnp.int32, (rows, sizes.keys), 0), jnp.int32(sizes.per_kv))
        position = length + (tree_refs[1][...] if is_tree else j * sizes.tokens + token)
        key = start + lax.broadcasted_iota(jnp.int32, (rows, sizes.keys), 1)
        oldest = jnp.where(window > 0, position - window, -1)
        # Rows of blocks that reach beyond the cache belong to nobody, and do not exist.
        seen = (key <= position) & (key > oldest) & (key < sizes.capacity)
        if is_tree:
            number = key - length
            leads = lax.shift_right_logical(
                jnp.broadcast_to(tree_refs[0][...], key.shape), jnp.clip(number, 0, MOST - 1)
            )
            of_tree = (number < sizes.total) & (leads & 1 == 1)
            seen = jnp.where(number < 0, seen, of_tree & (key < sizes.capacity))
        row = start + lax.broadcasted_iota(jnp.int32, v_ref.shape[1:], 1 if sizes.turned else 0)
        written = row < sizes.end(length, j)
        for head in range(q_ref.shape[0]):
            of_head = pl.ds(g * q_ref.shape[0] + head, 1)
            _add_keys(
                q_ref[head], k_ref[head], v_ref[head], seen, written, scale_ref[0, 0],
                top_ref.at[head], total_ref.at[head], mixed_ref.at[head],
                softcap=softcap, turned=sizes.turned, scales=[ref[of_head, :] for ref in scale_refs],
            )  # fmt: skip

    @pl.when(c == pl.num_programs(3) - 1)
    def _() -> None:
        out_ref[...] = mixed_ref[...] / jnp.maximum(total_ref[..., :1], 1e-30)


def _add_keys(
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    written: Array,
    scale: Array,
    top_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *,
    softcap: float,
    turned: bool,
    scales: list[Array],
) -> None:
    """One step of the online softmax: q [rows, H] meets k and v [keys, H]; `seen` is bool [rows, keys].

    Of 8-bit keys and values, `scales` [1, keys] multiply the scores and the weights.
    """
    features, keys = (0, 1) if turned else (1, 0)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    if scales:
        k = k.astype(jnp.float32)
    scores = dot(q, k.astype(q.dtype), (((1,), (features,)), ((), ()))) * scale
    if scales:
        scores = scores * scales[0]
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, _MASKED)
    top = top_ref[:, :1]
    new_top = jnp.maximum(top, scores.max(1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
    decay = jnp.exp(top - new_top)
    # A weight of 0 times a stale NaN would be NaN.
    v = jnp.where(written, v.astype(jnp.float32), 0.0).astype(q.dtype)
    scaled = jnp.where(seen, weights * scales[1], 0.0) if scales else weights
    mixed = dot(scaled.astype(q.dtype), v, (((1,), (keys,)), ((), ())))
    top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
    total_ref[...] = total_ref[...] * decay + weights.sum(1, keepdims=True)
    mixed_ref[...] = mixed_ref[...] * decay + mixed


def _key_block(capacity: int, row_bytes: int) -> int:
    """Cache rows read at a time: all, or a multiple of 128."""
    fitting = max(min(_KEY_BLOCK_BYTES // row_bytes, 1024) // _LANES, 1) * _LANES
    return min(capacity, fitting)


def write_rows(
    cache: Rows, rows: Array, slot: Array, lengths: Array, new: Array, *, interpret: Any = False
) -> Rows:
    """Writes each sequence's new keys (or values) behind those it has; see `reference.write_rows`.

    It rewrites the tiles that hold the new rows, in the donated buffer. XLA's scatter would be in place too
    where H is a multiple of 128, but goes row by row; with other H it copies the whole cache, there and back.

    Args:
      cache: [P, B, K, S, H].
      rows: [B, T, K, H].
      slot: int scalar.
      lengths: int [B], rows each sequence already has.
      new: int [B], how many of the T rows are real.
      interpret: for tests without a TPU.
    """
    run = functools.partial(_write_parts, interpret=interpret)
    operands = (
        cache,
        quantize_rows(rows) if isinstance(cache, QuantizedRows) else rows,
        jnp.asarray(slot, jnp.int32).reshape(1),
        lengths.astype(jnp.int32),
        new.astype(jnp.int32),
    )
    mesh = mesh_of(*jax.tree.leaves(cache), rows)
    if mesh is None:
        return run(*operands)
    batch, heads = split(mesh, "data", cache.shape[1]), split(mesh, "model", cache.shape[2])
    spec = PartitionSpec(None, batch, heads)
    per_row = PartitionSpec(batch)
    specs = (spec, PartitionSpec(batch, None, heads), PartitionSpec(), per_row, per_row)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*operands)


def _write_parts(cache: Rows, rows: Rows, slot: Array, lengths: Array, new: Array, *, interpret: Any) -> Rows:
    write = functools.partial(_write_rows, slot=slot, lengths=lengths, new=new, interpret=interpret)
    if isinstance(cache, QuantizedRows) and isinstance(rows, QuantizedRows):
        # Scales [P, B, K, S] are rows of K features of one head, turned.
        scale = write(jnp.swapaxes(cache.scale, 2, 3)[:, :, None], rows.scale[:, :, None])
        return QuantizedRows(write(cache.codes, rows.codes), jnp.swapaxes(scale[:, :, 0], 2, 3))
    assert not isinstance(cache, QuantizedRows)
    assert not isinstance(rows, QuantizedRows)
    return write(cache, rows)


def _write_rows(
    cache: Array, rows: Array, slot: Array, lengths: Array, new: Array, *, interpret: Any
) -> Array:
    _, b, kv, s, h = cache.shape
    t = rows.shape[1]
    turned = _is_turned(s, h)
    block = min(_LANES if turned else _WRITE_CODES if cache.dtype == jnp.int8 else _WRITE_ROWS, s)
    steps = 1 if t == 1 else pl.cdiv(t + block - 1, block)  # new rows may begin anywhere in a block
    first = jnp.minimum(lax.div(lengths, block), (s - 1) // block)
    # Shifted to where they lie in the blocks.
    source = jnp.arange(steps * block) + (first * block - lengths)[:, None]
    source = jnp.clip(source, 0, t - 1)[:, :, None, None]
    shifted = jnp.take_along_axis(rows.astype(cache.dtype), source, axis=1)  # [B, steps * block, K, H]
    shifted = shifted.transpose((0, 2, 3, 1) if turned else (0, 2, 1, 3))

    def cache_block(i: Array, j: Array, slot: Any, first: Any, lengths: Any, new: Any) -> tuple[Any, ...]:
        # Steps without a new row repeat the last block that has one.
        end = jnp.minimum(lengths[i] + new[i], s)
        last = jnp.maximum(lax.div(jnp.maximum(end - 1, 0), block), first[i])
        at = jnp.minimum(first[i] + j, last)
        return (slot[0], i, 0, 0, at) if turned else (slot[0], i, 0, at, 0)

    def rows_block(i: Array, j: Array, slot: Any, first: Any, lengths: Any, new: Any) -> tuple[Any, ...]:
        return (i, 0, 0, j) if turned else (i, 0, j, 0)

    shape = (kv, h, block) if turned else (kv, block, h)
    cache_spec = pl.BlockSpec((None, None, *shape), cache_block)
    row_bytes = kv * block * h * cache.dtype.itemsize
    operand = _turn(cache, turned)
    out = pl.pallas_call(
        functools.partial(_write_kernel, block=block, capacity=s, axis=2 if turned else 1),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, steps),
            in_specs=[pl.BlockSpec((None, *shape), rows_block), cache_spec],
            out_specs=cache_spec,
        ),
        out_shape=jax.ShapeDtypeStruct(operand.shape, cache.dtype),
        input_output_aliases={5: 0},  # counted with the prefetched scalars
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=3 * b * steps * row_bytes, transcendentals=0),
        interpret=interpret,
        name="write_rows",
    )(slot, first, lengths, new, shifted, operand)
    return _turn(out, turned)


def _write_kernel(
    slot_ref: Any,
    first_ref: Any,
    lengths_ref: Any,
    new_ref: Any,
    rows_ref: Any,
    old_ref: Any,
    out_ref: Any,
    *,
    block: int,
    capacity: int,
    axis: int,
) -> None:
    """Merges new rows into old ones, [K, block, H], or [K, H, block] with axis 2."""
    i, j = pl.program_id(0), pl.program_id(1)
    start = (first_ref[i] + j) * block
    end = jnp.minimum(lengths_ref[i] + new_ref[i], capacity)

    # Later steps find the block of an earlier one, finished, still in place: they must not touch it.
    @pl.when((j == 0) | (start < end))
    def _() -> None:
        position = start + lax.broadcasted_iota(jnp.int32, out_ref.shape, axis)
        real = (position >= lengths_ref[i]) & (position < end)
        wide = jnp.int32 if out_ref.dtype == jnp.int8 else jnp.float32
        merged = jnp.where(real, rows_ref[...].astype(wide), old_ref[...].astype(wide))
        out_ref[...] = merged.astype(out_ref.dtype)
