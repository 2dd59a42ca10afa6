"""Attention to check and to time, for tests and benchmarks: shapes, random inputs, results in float64.

B sequences, T new tokens, N query heads, K key/value heads of size H, S rows of the cache.
"""

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxchat.pallas.cache_attention.reference import QuantizedRows
from jaxchat.pallas.cache_attention.tree import Tree, tree_of

SLOT, SLOTS = 1, 2
SCALE = 0.3

CACHES = ("float32", "bfloat16", "uint16", "int8")
"""uint16 holds the bits of bfloat16; int8 is codes with a scale for each row."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      lengths: [B], rows of the cache in use before.
      tokens, heads, kv_heads, capacity, head_dim: T, N, K, S, H.
      window: keys that a query sees, 0: all.
      softcap: of the scores, 0: none.
      parents: of each sequence, which new token each follows, if they are trees: see `tree_of`.
    """

    lengths: tuple[int, ...]
    tokens: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0
    parents: tuple[tuple[int, ...], ...] = ()

    @property
    def tree(self) -> Tree | None:
        """Of the new tokens, in numpy."""
        if not self.parents:
            return None
        trees = [tree_of(parents) for parents in self.parents]
        return Tree(*(np.stack(part) for part in zip(*trees, strict=True)))  # type: ignore[arg-type]


_BUSHY = (0, 0, 1, 2, 1, 0, 5, 5, 0, 8, 9, 10, 3)
_FULL = (0, 0, 1, 2, 3, 4, 4, 3, 3, 2, 2, 1, 11, 11, 1, 14, 14, 0, 17, 18, 17, 0, 21, 21, 0, 24)
_LONG = tuple(max(t - 1 - 3 * (t % 5 == 0), 0) for t in range(32))
"""Trees: `_FULL` is that of 25 drafted tokens, `_LONG` needs all 32 bits."""

NAMED = {
    "decode": Case((5, 130, 0), 1, 4, 2, 300, 64),
    "decode, wide heads": Case((5, 130), 1, 4, 4, 144, 128),
    "decode, window": Case((290, 3), 1, 6, 2, 300, 10, 7),
    "decode, window, several blocks": Case((1000, 700), 1, 2, 1, 1100, 128, 200),
    "decode, soft-cap": Case((17,), 1, 2, 1, 96, 16, 0, 5.0),
    "decode, empty cache and full one": Case((0, 63), 1, 5, 5, 64, 8),
    "decode, seven heads at once": Case((89,), 1, 7, 1, 90, 40),
    "prefill": Case((0, 9), 16, 4, 2, 64, 24),
    "prefill, several blocks": Case((600, 3), 40, 4, 1, 700, 128),
    "prefill, window, soft-cap": Case((600, 3), 33, 2, 2, 700, 12, 50, 8.0),
    "prefill, blocks of queries": Case((1, 30), 70, 32, 1, 128, 16),
    "tree": Case((0, 9), 13, 4, 2, 64, 24, parents=(_BUSHY, tuple(range(-1, 12)))),
    "tree, across blocks": Case((600, 250, 57), 26, 6, 2, 700, 64, parents=(_FULL, _FULL, _FULL)),
    "tree, window, soft-cap": Case((600, 3), 32, 2, 2, 700, 12, 50, 8.0, (_LONG, _LONG)),
    "tree, window within": Case((70, 2), 13, 2, 1, 96, 16, 2, 0.0, (_BUSHY, _BUSHY)),
    "tree, blocks of queries": Case((30,), 26, 32, 1, 128, 16, parents=(_FULL,)),
}

SHAPES = ((1, 8, 2, 16, 128), (3, 6, 3, 12, 96), (2, 4, 1, 64, 700), (1, 4, 4, 80, 1500), (2, 5, 5, 8, 64))
"""B, N, K, H, S: blocks of 256 keys are met whole, in part and not at all."""
TOKENS = (1, 3, 17)
WINDOWS = (0, 1, 7, 600)
SOFTCAPS = (0.0, 30.0)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], tokens: int, window: int, softcap: float) -> Case:
    """A shape with as many rows in use as chance has it."""
    b, n, kv, h, s = shape
    lengths = tuple(int(length) for length in rng.integers(0, s - tokens + 1, b))
    return Case(lengths, tokens, n, kv, s, h, window, softcap)


class Inputs(NamedTuple):
    """What attention is given, in numpy."""

    q: np.ndarray  # [B, T, N, H]
    k: Any  # [P, B, K, S, H]
    v: Any
    lengths: np.ndarray


def inputs(
    rng: np.random.Generator, case: Case, cache: str, unwritten: float, dtype: str = "float32"
) -> Inputs:
    """Random queries of a type, keys and values in a form of the cache; `unwritten` is for no query."""
    caches = []
    shape = SLOTS, len(case.lengths), case.kv_heads, case.capacity, case.head_dim
    for _ in range(2):
        rows = rng.standard_normal(shape, np.float32)
        rows[1 - SLOT] = unwritten
        for b, length in enumerate(case.lengths):
            rows[:, b, :, length + case.tokens :] = unwritten
        caches.append(in_cache(rows, cache))
    q = rng.standard_normal((len(case.lengths), case.tokens, case.heads, case.head_dim), np.float32)
    k, v = caches
    return Inputs(q.astype(getattr(ml_dtypes, dtype, dtype)), k, v, np.array(case.lengths, np.int32))


def in_cache(rows: np.ndarray, cache: str) -> Any:
    """Float rows as a form of the cache holds them."""
    if cache == "int8":
        scale = np.abs(rows).max(-1) * np.float32(1 / 127)
        with np.errstate(invalid="ignore"):
            codes = np.round(rows / np.where(scale > 0, scale, 1)[..., None])
            return QuantizedRows(np.where(np.isnan(codes), 99, codes).astype(np.int8), scale)  # type: ignore[arg-type]
    if cache == "uint16":
        return rows.astype(ml_dtypes.bfloat16).view(np.uint16)
    return rows.astype(getattr(ml_dtypes, cache, cache))


def in_float64(cache: Any) -> np.ndarray:
    """What a cache holds."""
    if isinstance(cache, QuantizedRows):
        return np.asarray(cache.codes, np.float64) * np.asarray(cache.scale, np.float64)[..., None]
    cache = np.asarray(cache)
    return (cache.view(ml_dtypes.bfloat16) if cache.dtype == np.uint16 else cache).astype(np.float64)


def _along_tree(parents: tuple[int, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each new token's position [T, 1], and which keys lead to it, bool [T, S]."""
    count = len(parents)
    position, visible = np.empty((count, 1), int), np.zeros((count, length + count), bool)
    visible[:, :length] = True
    for token in range(count):
        path = [token]
        while path[-1]:
            path.append(parents[path[-1]])
        position[token] = length + len(path) - 1
        visible[token, [length + at for at in path]] = True
    return position, visible


def expected(given: Inputs, case: Case) -> np.ndarray:
    """The definition in float64 [B, T, N, H], one sequence at a time."""
    _, t, n, h = given.q.shape
    keys, values = in_float64(given.k), in_float64(given.v)
    kv, out = keys.shape[2], np.empty(given.q.shape)
    for row, length in enumerate(given.lengths):
        k, v = (c[SLOT, row, :, : length + t] for c in (keys, values))  # [K, S, H]
        q = given.q[row].astype(np.float64).reshape(t, kv, n // kv, h)
        scores = np.einsum("tkgh,ksh->tkgs", q, k) * SCALE
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        position, key = np.arange(length, length + t)[:, None], np.arange(length + t)
        visible, place = key <= position, np.arange(length + t)
        if case.parents:
            position, visible = _along_tree(case.parents[row], length)
            place = np.concatenate([np.arange(length), position[:, 0]])
        visible = visible & ((place > position - case.window) if case.window else True)
        scores = np.where(visible[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row] = np.einsum("tkgs,ksh->tkgh", weights, v).reshape(t, n, h)
    return out
