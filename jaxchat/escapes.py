"""C escapes in text from the command line and the chat's commands: `\\n` is a line break. Text only."""

import re

from jaxchat.errors import UsageError

_SIMPLE = dict(zip("abfnrtve\\'\"?", b"\a\b\f\n\r\t\v\x1b\\'\"?", strict=True))
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S)


def unescape(text: str, flag: str) -> str:
    r"""`text` with the escapes of C and Bash (`$'...'`) replaced; any other backslash stays.

    They are `\n`, `\t`, `\r`, `\\`, `\'`, `\"`, `\?`, `\a`, `\b`, `\e`, `\f`, `\v`, bytes of UTF-8 as
    `\x41` or `\101`, and characters as `\u00e9` or `\U0001f600`.

    Args:
      text: as typed.
      flag: what it was given to, for the error.

    Raises:
      UsageError: the bytes are not UTF-8, or there is no such character.

    >>> unescape(r"a\tb", "--stop")
    'a\tb'
    """

    def replace(match: re.Match[bytes]) -> bytes:
        octal, byte, short, long, other = match.groups()
        if octal or byte:
            return bytes([int(octal, 8) & 255 if octal else int(byte, 16)])
        if short or long:
            return chr(int(short or long, 16)).encode()
        known = _SIMPLE.get(other.decode("latin-1"))
        return match[0] if known is None else bytes([known])

    try:
        return _ESCAPE.sub(replace, text.encode()).decode()
    except (UnicodeError, ValueError, OverflowError):
        raise UsageError(
            f"{flag}: {text!r} has an escape that is no UTF-8 text; write \\\\ for a backslash"
        ) from None
