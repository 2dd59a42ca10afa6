"""In which of our formats a foreign weight is held: the smallest that is the same, or one that is near.

As words, as `jaxchat.json` has them; needs no JAX.
"""

from typing import Literal, NamedTuple

from jaxchat.checkpoints.hf_quant.weight import Codes, Weight
from jaxchat.checkpoints.manifest import Keep

_SLACK = 1.2
"""`small` holds a weight exactly if that takes no more than this many times the bits it has in the file.

Offsets in float32 take 8 % more than zero points of 4 bits in groups of 128, 16 to 19 % in smaller ones.
"""

_FEWEST = 4
"""Bits of our smallest codes; a file with fewer cannot be met."""

_SPANS = ((4, -8, 7), (5, -16, 15), (8, -128, 127))
"""Bits, smallest and largest code of formats without offsets."""


class Holding(NamedTuple):
    """How a weight is held.

    Attributes:
      format: a format of `QuantFormat`, or a dtype.
      kind: `same`, `narrow` (codes as they are, scales and offsets in float16, which they may not fit in)
        or `again` (quantized anew).
    """

    format: str
    kind: Literal["same", "narrow", "again"]


def held(weight: Weight, keep: Keep, *, reordering: bool) -> Holding:
    """How a weight is held.

    Args:
      weight: as it is stored.
      keep: what is more important where no format is the same and as small.
      reordering: whether columns may be put in another order: not where rows are looked up.
    """
    _, columns = weight.found.shape
    codes = weight.codes
    if codes is not None and (group := _group(codes)) is not None and (reordering or not codes.reordered):
        same, narrow = _same(codes, group, columns), _narrow(codes, group)
        limit = max(_SLACK * (weight.bits + max(0, _FEWEST - codes.bits)), _cost(narrow, columns))
        if keep == "exact" or narrow == same or _cost(same, columns) <= limit:
            return Holding(same, "same")
        return Holding(narrow, "narrow")
    return Holding("float32", "same") if keep == "exact" else Holding(_nearest(weight.bits, columns), "again")


def _group(codes: Codes) -> int | None:
    """The group of ours that divides theirs; 0 is the row, None is none."""
    return 0 if codes.group == 0 else next((g for g in (128, 64, 32) if codes.group % g == 0), None)


def _same(codes: Codes, group: int, columns: int) -> str:
    """The smallest format that is exact: offsets are products of two numbers, which float16 may not hold."""
    narrow = codes.scale == "float16"
    if not codes.affine:
        return _symmetric(codes, group, narrow)
    wide = _affine(codes, group, narrow and codes.half_mins)
    if not _SPANS[-1][1] <= codes.span[0] <= codes.span[1] <= _SPANS[-1][2] or codes.half_mins:
        return wide
    return min(wide, _symmetric(codes, group, narrow), key=lambda text: _cost(text, columns))


def _narrow(codes: Codes, group: int) -> str:
    return _affine(codes, group, True) if codes.affine else _symmetric(codes, group, True)


def _symmetric(codes: Codes, group: int, narrow: bool) -> str:
    bits = next(bits for bits, low, high in _SPANS if low <= codes.span[0] and codes.span[1] <= high)
    return _spelled(bits, group, False, narrow, codes.reordered)


def _affine(codes: Codes, group: int, narrow: bool) -> str:
    bits = next(bits for bits, _, _ in _SPANS if codes.bits <= bits)
    return _spelled(bits, group, True, narrow, codes.reordered)


def _spelled(bits: int, group: int, affine: bool, narrow: bool, reordered: bool) -> str:
    """A format in `QuantFormat`'s words."""
    options = [] if group == 32 else [str(group or "channel")]
    options += ["affine"] if affine else []
    options += [] if narrow else ["f32"]
    options += ["reordered"] if reordered else []
    return ":".join([f"int{bits}", *options])


def _cost(text: str, columns: int) -> float:
    """Bits a weight takes in a format that `_spelled` gave."""
    kind, *options = text.split(":")
    group = next((int(option) for option in options if option.isdigit()), 32)
    scales = (1 + ("affine" in options)) * (32 if "f32" in options else 16)
    return int(kind[3:]) + scales / (columns if "channel" in options else group)


def _nearest(bits: float, columns: int) -> str:
    """The smallest format that is finer than codes of so many bits, whatever those stand for."""
    if bits > 6.6:
        return "q8_0"
    whole = columns % 256 == 0
    if bits > 4:
        return "q5_k" if whole else "int5:affine"
    return "q4_k" if whole else "int4:affine"
