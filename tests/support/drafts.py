"""Drafts that know what the model will say, and say as much of it as a test wants."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxchat.draft_use import TreeShape


@dataclasses.dataclass(frozen=True, eq=False)
class KnowingDraft:
    """A draft whose tokens are right on the path to one place of its tree, and wrong everywhere else.

    Attributes:
      shape: of its trees.
      texts: what each sequence will be.
      target: sequence and number of the step -> the place of the tree to which its tokens are right.
      changes: whether the texts may become others, so that what it is told is not looked at.
      observed: the positions that each session's drafts were told of, in order: (row, first, count).
    """

    shape: TreeShape
    texts: Sequence[Sequence[int]]
    target: Callable[[int, int], int]
    changes: bool = False
    observed: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def drafting(self, engine: Any, batch: int) -> "_Knowing":
        return _Knowing(self, engine.config.vocab_size, batch)


class _Knowing:
    def __init__(self, draft: KnowingDraft, vocabulary: int, batch: int):
        self._draft, self._vocabulary = draft, vocabulary
        self._end = np.zeros(batch, int)
        self.steps = 0

    def observe(self, step, before, hidden, capacity):
        lengths, new = np.asarray(step.lengths), np.asarray(step.new)
        tokens = np.asarray(step.tokens)
        for row, text in enumerate(self._draft.texts):
            at, count = int(lengths[row]), int(new[row])
            if not count:
                continue
            self._draft.observed.append((row, at, count))
            self._end[row] = at + count
            if self._draft.changes:
                continue
            assert np.isfinite(np.asarray(hidden)[row, :count]).all()
            # What it is told is what the texts are: drafts would learn rubbish otherwise.
            assert tokens[row, :count].tolist() == list(text[at : at + count])
            two = list(text[max(at - 2, 0) : at])
            assert before[row, 2 - len(two) :].tolist() == two

    def ready(self, row, length):
        return bool(self._end[row] == length)

    def propose(self, step, tokens):
        shape, out = self._draft.shape, np.zeros((len(tokens), len(self._draft.shape.parents)), np.int32)
        out[:, 0] = tokens[:, 2]
        for row, text in enumerate(self._draft.texts):
            length = int(np.asarray(step.lengths)[row]) + 1
            path, node = [], self._draft.target(row, self.steps)
            while node:
                path.append(node)
                node = shape.parents[node]
            for token in range(1, len(shape.parents)):
                place = length + shape.depths[token] - 1
                right = text[place] if place < len(text) else 0
                rank = shape.children[shape.parents[token]].index(token)
                out[row, token] = right if token in path else (right + 1 + rank) % self._vocabulary
        self.steps += 1
        return jnp.asarray(out)

    def forget(self, row):
        self._end[row] = 0
