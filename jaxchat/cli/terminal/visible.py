"""Text that a terminal shows instead of obeying."""

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
