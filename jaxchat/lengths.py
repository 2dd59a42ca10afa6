"""Small arithmetic of lengths that every level uses."""

from collections.abc import Sequence
from typing import Any


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below `n`; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
