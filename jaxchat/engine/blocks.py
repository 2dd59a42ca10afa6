"""Blocks that a text is computed in, where its numbers are not to depend on what else is computed with it.

How many tokens a step takes decides, on some devices, in which order sums are taken and how activations are
rounded. Here each text has its own steps: as many tokens as fit of the largest block, then of the next.
"""

BLOCKS = (1024, 256, 64, 16)


def block_of(left: int) -> int:
    """The size of the block that begins where `left` tokens are left; the last is not full.

    >>> block_of(300), block_of(44), block_of(5)
    (256, 16, 16)
    """
    return next((size for size in BLOCKS if size <= left), BLOCKS[-1])


def computed_alike(one: int, other: int, common: int) -> int:
    """How many leading tokens of two texts are computed in the same blocks.

    Args:
      one, other: their lengths.
      common: how many of their leading tokens are the same.

    >>> computed_alike(300, 280, 290), computed_alike(300, 200, 150)
    (256, 0)
    """
    at = 0
    while at < min(one, other):
        size = block_of(one - at)
        end = min(at + size, one)
        if end > common or size != block_of(other - at) or end != min(at + size, other):
            break
        at = end
    return at
