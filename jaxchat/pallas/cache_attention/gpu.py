"""Cache attention on NVIDIA GPUs: a Pallas kernel (Triton) over the whole slotted cache.

Blockwise with an online softmax. Decoding attends with few queries to many keys: there the keys are split
among programs (Flash-Decoding, Dao et al. 2023), and XLA joins the parts. Rows are written by XLA's scatter,
which is in place. Checked against the definition in interpret mode and compiled ahead of time for sm_90; NOT
RUN ON HARDWARE YET: the block sizes are reasoned, not tuned. Why Triton: see `stacked_matmul/gpu.py`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxchat.lengths import next_power_of_two
from jaxchat.pallas.cache_attention.tree import MOST, Tree

Array = jax.Array

_MASKED = -1e30
"""Finite: two parts without a visible key must not give inf - inf."""

_KEY_BLOCK_BYTES = 1 << 14
"""Keys (and as many values) that a step reads: 64 rows of 128 features in bfloat16."""

_QUERY_ROWS = (16, 64)
"""Least and most query rows (tokens times query heads of a key/value head) of a program.

Tensor cores multiply at least 16; 64 rows of 128 float32 sums fill half of the registers of four warps.
"""

_PROGRAMS = 2 * 132
"""Programs to aim at: two on each of an H200's multiprocessors."""

_WARPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The static sizes of a call; Triton's blocks are powers of two, what is beyond the arrays is masked.

    Attributes:
      tokens: T.
      per_kv: N / K; a key/value head has tokens * per_kv query rows, `rows` of them in a block.
      width: H; `features` of them in a block.
      capacity: S.
      keys: cache rows in a block.
      splits: programs that share the keys of a block of query rows.
    """

    tokens: int
    per_kv: int
    rows: int
    width: int
    features: int
    capacity: int
    keys: int
    splits: int

    @classmethod
    def choose(cls, q: Array, k_cache: Any) -> "_Sizes":
        b, t, n, h = q.shape
        _, _, kv, s, _ = k_cache.shape
        least, most = _QUERY_ROWS
        rows = min(max(next_power_of_two(t * (n // kv)), least), most)
        features = max(next_power_of_two(h), 16)
        fitting = max(_KEY_BLOCK_BYTES // (features * q.dtype.itemsize), 16)
        keys = min(fitting, max(next_power_of_two(s), 16))
        programs = b * kv * -(-t * (n // kv) // rows)
        return cls(
            tokens=t,
            per_kv=n // kv,
            rows=rows,
            width=h,
            features=features,
            capacity=s,
            keys=keys,
            splits=min(max(-(-_PROGRAMS // programs), 1), -(-s // keys)) if t == 1 else 1,
        )

    @property
    def blocks(self) -> int:
        """Blocks of query rows of a key/value head."""
        return -(-self.tokens * self.per_kv // self.rows)


def attend(
    q: Array,
    k_cache: Any,
    v_cache: Any,
    slot: Array,
    lengths: Array,
    *,
    scale: Array,
    window: Array,
    softcap: float,
    tree: Tree | None = None,
    interpret: bool = False,
) -> Array:
    """Causal grouped-query attention of T new tokens over one slot of the cache; see `reference.attend`.

    Args:
      q: [B, T, N, H], float32 or bfloat16.
      k_cache, v_cache: [P, B, K, S, H]; of 8-bit ones (`QuantizedRows`) the codes are widened in the kernel.
      slot: int scalar.
      lengths: int [B].
      scale: float scalar.
      window: int scalar, 0 is all.
      softcap: static, 0 is none.
      tree: of the new tokens, if they are one.
      interpret: for tests without a GPU.

    Returns:
      float32 [B, T, N, H].
    """
    b, t, n, h = q.shape
    _, _, kv, s, _ = k_cache.shape
    sizes = _Sizes.choose(q, k_cache)
    cache = jax.tree.leaves((k_cache, v_cache))  # each an array, or codes and a scale a row
    window = jnp.asarray(window, jnp.int32)
    numbers = jnp.stack([jnp.asarray(slot, jnp.int32), window])
    by_token = [] if tree is None else list(tree.within(window))
    # Rows of one key/value head: token-major, so that a block of rows is a run of tokens.
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 1, 3, 4).reshape(b, kv, t * (n // kv), h)
    parts = (b, kv, sizes.splits, sizes.blocks * sizes.rows)
    rows_block = pl.BlockSpec(
        (None, None, None, sizes.rows), lambda i, j, k: (i, j // sizes.blocks, k, j % sizes.blocks)
    )
    top, total, mixed = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, softcap=softcap, is_tree=tree is not None),
        grid=(b, kv * sizes.blocks, sizes.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (4 + len(cache) + len(by_token)),
        out_specs=[
            rows_block,
            rows_block,
            pl.BlockSpec(
                (None, None, None, sizes.rows, sizes.features),
                lambda i, j, k: (i, j // sizes.blocks, k, j % sizes.blocks, 0),
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct((*parts, sizes.features), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * n * s * h,
            bytes_accessed=2 * b * kv * s * h * cache[0].dtype.itemsize * sizes.blocks,
            transcendentals=b * t * n * s,
        ),
        interpret=interpret,
        name="cache_attention",
    )(
        numbers,
        lengths.astype(jnp.int32),
        jnp.asarray(scale, jnp.float32).reshape(1),
        grouped,
        *cache,
        *by_token,
    )
    weight = jnp.exp(top - top.max(2, keepdims=True))
    out = (mixed * weight[..., None]).sum(2) / jnp.maximum((total * weight).sum(2), 1e-30)[..., None]
    out = out[:, :, : t * (n // kv), :h].reshape(b, kv, t, n // kv, h)
    return out.transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _kernel(
    numbers_ref: Any,
    lengths_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    *refs: Any,
    sizes: _Sizes,
    softcap: float,
    is_tree: bool,
) -> None:
    """Program (b, head and block, split) -> largest score, sum of weights and mixed values of its keys."""
    *given, top_ref, total_ref, mixed_ref = refs
    cache, tree_refs = (given[:-2], given[-2:]) if is_tree else (given, [])
    k_refs, v_refs = cache[: len(cache) // 2], cache[len(cache) // 2 :]
    b, split = pl.program_id(0), pl.program_id(2)
    head = lax.div(pl.program_id(1), jnp.int32(sizes.blocks))
    block = lax.rem(pl.program_id(1), jnp.int32(sizes.blocks))
    slot, window, scale = numbers_ref[0], numbers_ref[1], scale_ref[0]
    length = lengths_ref[b]

    row = jnp.minimum(block * sizes.rows + jnp.arange(sizes.rows), sizes.tokens * sizes.per_kv - 1)
    feature = jnp.arange(sizes.features)
    real = feature[None, :] < sizes.width
    at = jnp.minimum(feature, sizes.width - 1)[None, :]
    q = jnp.where(real, q_ref[b, head, row[:, None], at], 0)
    dot = functools.partial(_dot, precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None)

    # A token sees itself and what is before it, as far as the window reaches. Padding can lie beyond.
    token = lax.div(row, jnp.int32(sizes.per_kv))
    position = length + (tree_refs[1][b, token] if is_tree else token)
    words = tree_refs[0][b, token] if is_tree else token
    oldest = jnp.where(window > 0, position - window, -1)
    first_token = lax.div(block * sizes.rows, jnp.int32(sizes.per_kv))
    last_token = jnp.minimum(lax.div((block + 1) * sizes.rows - 1, jnp.int32(sizes.per_kv)), sizes.tokens - 1)
    end = jnp.minimum(length + last_token + 1, sizes.capacity)
    nearest = 0 if is_tree else first_token  # of a tree any token may be near its root
    start = jnp.where(window > 0, jnp.maximum(length + nearest + 1 - window, 0), 0)
    first = lax.div(start, jnp.int32(sizes.keys))
    blocks = jnp.maximum(lax.div(end - 1, jnp.int32(sizes.keys)) + 1 - first, 0)
    share = lax.div(blocks + (sizes.splits - 1), jnp.int32(sizes.splits))
    begin = first + split * share

    def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, mixed = state
        key = i * sizes.keys + jnp.arange(sizes.keys)
        # Features beyond H are 0 in q; a key or value that nobody sees can be NaN.
        there = (key < end)[:, None] & real
        where = jnp.minimum(key, sizes.capacity - 1)[:, None]
        k, v = (jnp.where(there, r[0][slot, b, head, where, at], 0).astype(q.dtype) for r in (k_refs, v_refs))
        # Row scales of 8-bit keys and values.
        k_scale, v_scale = (
            [jnp.where(key < end, r[slot, b, head, where[:, 0]], 0.0)[None, :] for r in refs[1:]]
            for refs in (k_refs, v_refs)
        )
        scores = math.prod(k_scale, start=dot(q, k.T) * scale)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > oldest[:, None])
        if is_tree:
            number = key - length
            leads = lax.shift_right_logical(
                jnp.broadcast_to(words[:, None], seen.shape),
                jnp.broadcast_to(jnp.clip(number, 0, MOST - 1)[None, :], seen.shape),
            )
            seen = jnp.where((number < 0)[None, :], seen, leads & 1 == 1)
        seen &= (key < end)[None, :]
        scores = jnp.where(seen, scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        decay = jnp.exp(top - new_top)
        added = dot(math.prod(v_scale, start=weights).astype(q.dtype), v)
        return new_top, total * decay + weights.sum(1), mixed * decay[:, None] + added

    state = (
        jnp.full((sizes.rows,), _MASKED, jnp.float32),
        jnp.zeros((sizes.rows,), jnp.float32),
        jnp.zeros((sizes.rows, sizes.features), jnp.float32),
    )
    state = lax.fori_loop(begin, jnp.minimum(begin + share, first + blocks), step, state)
    top_ref[...], total_ref[...], mixed_ref[...] = state


def _dot(a: Array, b: Array, *, precision: Any) -> Array:
    return lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
