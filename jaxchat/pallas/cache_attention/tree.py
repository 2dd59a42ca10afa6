"""New tokens that are not all of one text: a tree of them, each of which sees only those that lead to it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST = 32
"""Tokens of a tree: which lead to one is a word of so many bits."""


class Tree(NamedTuple):
    """A tree of T new tokens, at most `MOST`, of each sequence; a token stands behind its parent.

    Their keys lie in the cache in this order, one behind the other; their positions follow from their depths.
    """

    ancestors: jax.Array  # int32 [B, T], bit j: token j leads to it, or is it
    depths: jax.Array  # int32 [B, T], of the first token 0

    def within(self, window: jax.Array) -> "Tree":
        """With the bits alone of those that are among the last `window` positions; 0 is all."""
        count = self.depths.shape[1]
        near = (window == 0) | (self.depths[:, None] > self.depths[:, :, None] - window)  # [B, T, T]
        bits = jnp.left_shift(jnp.int32(1), jnp.arange(count, dtype=jnp.int32))
        return self._replace(
            ancestors=self.ancestors & jnp.sum(jnp.where(near, bits, 0), -1, dtype=jnp.int32)
        )


def tree_of(parents: Sequence[int]) -> Tree:
    """The tree in which token t follows token `parents[t]`, without B; that of the first counts not.

    >>> tree_of([0, 0, 0, 1]).depths.tolist()
    [0, 1, 1, 2]
    """
    words, depths = [1], [0]
    for token, parent in enumerate(parents[1:], 1):
        words.append(words[parent] | 1 << token)
        depths.append(depths[parent] + 1)
    return Tree(np.array(words, np.uint32).view(np.int32), np.array(depths, np.int32))  # type: ignore[arg-type]
