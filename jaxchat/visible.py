"""Text that somebody else wrote (a file, a model), made fit to print: no control characters, no megabytes."""

import reprlib
from typing import Any

MAX_MESSAGE = 1900
"""Characters of a message: what fits a screen."""

_PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """`text` with its control characters as pictures: an escape is ␛, so no sequence of its can begin.

    >>> visible("\x1b[2J")
    '␛[2J'
    """
    return text.translate(_PICTURES)


def shown(value: Any) -> str:
    """A value as a message has it: like `repr`, of some hundred characters at most.

    >>> shown("x" * 10**6)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    return _SHORT.repr(value)


def message(text: str) -> str:
    """A message that may quote what somebody else wrote: visible, and with the middle of a long one left out.

    What to do stands at the end, so that stays.
    """
    # Of bytes that Python could not read and kept: as UTF-8, which they mostly are.
    text = visible(text.encode(errors="surrogateescape").decode(errors="replace"))
    if len(text) > MAX_MESSAGE:
        head, tail = text[: MAX_MESSAGE - 600], text[-500:]
        text = f"{head} [... {len(text) - len(head) - len(tail):,} characters ...] {tail}"
    return text


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 76, 76, 40
