"""Values that people type: numbers, switches and choices, read from text, and what was expected instead.

Flags, `/set`, panels and the library's options say the same words. Files that programs write: `typed.py`.
"""

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxchat.errors import UsageError
from jaxchat.visible import shown


class Range(NamedTuple):
    """Numbers of one kind.

    Attributes:
      type: `int` or `float`.
      low, high: the least and the greatest; None where there is none.
      words: what to expect, where type and limits do not say it well: `a number above 0`.
      note: what some of them mean: `0 is off`.
    """

    type: type
    low: float | None = None
    high: float | None = None
    words: str = ""
    note: str = ""

    @property
    def expected(self) -> str:
        """`a whole number, 1 or more`, and the note."""
        kind = "a whole number" if self.type is int else "a number"
        limits = _limits(self.low, self.high)
        words = self.words or (f"{kind}, {limits}" if limits else kind)
        return f"{words} ({self.note})" if self.note else words

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them; NaN and infinity never are."""
        kind: Any = numbers.Integral if self.type is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        try:
            if self.type is float and not math.isfinite(value):
                return False
            above = self.low is None or self.low <= value
            return above and (self.high is None or value <= self.high)
        except OverflowError:  # an int beyond all floats
            return False


def _limits(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:.10g} to {high:.10g}"
    return f"{low:.10g} or more" if low is not None else f"at most {high:.10g}" if high is not None else ""


def wrong(name: str, value: Any, expected: str) -> UsageError:
    """The error about a value: what it is, and what should be there."""
    return UsageError(f"{name} is {shown(value)}; expected {expected}")


def check_number(name: str, value: Any, limits: Range) -> None:
    """Raises UsageError for what is no number of a range."""
    if not limits.holds(value):
        raise wrong(name, value, limits.expected)


def read_number(name: str, text: str, limits: Range) -> Any:
    """A number from its text: decimal digits, as `40`, `-1`, `0.7`, `1e-3` or `4_096`.

    Raises:
      UsageError: it is no number, not finite, or out of its range.
    """
    pattern = _WHOLE if limits.type is int else _DECIMAL
    if not pattern.fullmatch(text.strip()):
        raise wrong(name, text, limits.expected)
    try:
        value = limits.type(text)
    except ValueError:  # of thousands of digits
        raise wrong(name, text, limits.expected) from None
    if not limits.holds(value):
        raise wrong(name, text, limits.expected)
    return value


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_WHOLE = re.compile(rf"[+-]?{_DIGITS}")
_DECIMAL = re.compile(rf"[+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?")


def read_switch(name: str, text: str) -> bool:
    """`on` or `off`, also `true`, `yes`, `1` and their opposites.

    Raises:
      UsageError: it is anything else.
    """
    words = {"on": True, "true": True, "1": True, "yes": True}
    words |= {"off": False, "false": False, "0": False, "no": False}
    if text.strip().lower() not in words:
        raise wrong(name, text, "on or off")
    return words[text.strip().lower()]


def read_choice(name: str, text: str, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
      UsageError: it is none of them.
    """
    if text not in choices:
        raise wrong(name, text, either(choices))
    return text


def either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
