"""How tokens are drafted, as people write it: `chimera:DIR`, the shape of a draft, what is accepted of it.

Values and text forms only; what drafts are is in `engine/drafts/`. Needs no JAX.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from jaxchat.errors import UsageError, option
from jaxchat.visible import shown

MOST_TOKENS = 32
"""Of a tree, with the token that it follows: what the kernels take."""


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Which token of a draft follows which. Hashable, and the same in every step.

    Attributes:
      parents: of T tokens; the first is the last of the text, which the others follow, and its own parent.
        A token stands behind its parent, and of siblings the one that is drafted first is the likeliest.

    >>> TreeShape((0, 0, 1, 0)).depths
    (0, 1, 2, 1)
    """

    parents: tuple[int, ...]

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each token; 0 of the first."""
        found = [0]
        for parent in self.parents[1:]:
            found.append(found[parent] + 1)
        return tuple(found)

    @property
    def depth(self) -> int:
        """The most tokens that can be accepted."""
        return max(self.depths)

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each token, in order."""
        found: list[list[int]] = [[] for _ in self.parents]
        for token, parent in enumerate(self.parents[1:], 1):
            found[parent].append(token)
        return tuple(map(tuple, found))

    def cut(self, depth: int) -> "TreeShape":
        """Without the tokens that are deeper."""
        kept = [token for token, own in enumerate(self.depths) if own <= depth]
        place = {token: number for number, token in enumerate(kept)}
        return TreeShape(tuple(place[self.parents[token]] for token in kept))


def chain(count: int) -> TreeShape:
    """One token after the other."""
    return TreeShape((0, *range(count)))


def tree(paths: Sequence[str]) -> TreeShape:
    """The tree with these paths from its root, the ranks of their tokens: "01" is the second after the first.

    Tokens lie as in a walk that takes the likeliest first: where only those are accepted, the rows of the
    cache are in their places already.
    """
    place = {"": 0}
    for path in sorted(paths):
        place[path] = len(place)
    return TreeShape((0, *(place[path[:-1]] for path in sorted(paths))))


TREE_25 = tree((
    "0", "1", "2", "3",
    "00", "01", "02", "10", "11", "20", "21", "30",
    "000", "001", "002", "010", "011", "020", "021", "100",
    "0000", "0001", "0002",
    "00000", "00001",
))  # fmt: skip
"""The static tree of EAGLE-1 (Li et al. 2024), which Chimera takes over."""

KINDS = ("chimera",)
"""What `--draft` accepts before the colon."""

ACCEPT = ("lossless", "typical", "top_k")
"""What `--draft_accept` accepts; all but the first change what is generated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftUse:
    """What is asked for.

    Attributes:
      kind: of `KINDS`.
      path: where its files are.
      shape: the tree; None is the 25 tokens, as deep as the draft goes.
      accept: of `ACCEPT`.
    """

    kind: str
    path: str
    shape: TreeShape | None = None
    accept: str = "lossless"


def read_draft(draft: str, shape: str | None = None, accept: str = "lossless") -> DraftUse:
    """A draft from its text forms.

    Raises:
      UsageError: one says nothing; the message names it.

    >>> read_draft("chimera:heads", "chain:3").shape.parents
    (0, 0, 1, 2)
    """
    kind, colon, path = draft.partition(":")
    if kind not in KINDS or not colon or not path:
        forms = ", ".join(f"{known}:DIR" for known in KINDS)
        raise UsageError(f"{option('draft')} is {shown(draft)}; expected {forms}")
    if accept not in ACCEPT:
        raise UsageError(f"{option('draft_accept')} is {shown(accept)}; expected one of {', '.join(ACCEPT)}")
    return DraftUse(kind=kind, path=path, shape=None if shape is None else read_shape(shape), accept=accept)


def read_shape(text: str) -> TreeShape | None:
    """`25`, which is None, the default; or `chain:N`."""
    if text == "25":
        return None
    match = re.fullmatch(r"chain:(\d{1,3})", text)
    if match is None or not 1 <= int(match[1]) < MOST_TOKENS:
        raise UsageError(
            f"{option('draft_tree')} is {shown(text)}; expected 25, a tree of 25 tokens, or chain:N, N "
            f"tokens one after the other, 1 to {MOST_TOKENS - 1}"
        )
    return chain(int(match[1]))
