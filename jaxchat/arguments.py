"""Values that a function was called with, checked before anything is done with them.

Each check returns the value, numpy's numbers as Python's, or raises a `UsageError` that names the parameter.
What parsers made of files is `typed.py`'s, the numbers and what people type `values.py`'s.
"""

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxchat.errors import UsageError, option
from jaxchat.values import Range, check_number, either, wrong


def refused(name: str, value: Any, expected: str) -> UsageError:
    """The error for a value that is not what was expected. `name` may say where within: `token_ids[2]`."""
    return wrong(option(name), value, expected)


def number(name: str, value: Any, limits: Range) -> Any:
    """A number of a range."""
    check_number(option(name), value, limits)
    return limits.type(value)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer from `low` to `high`."""
    found: int = number(name, value, Range(int, low, high))
    return found


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refused(name, value, "a text")
    return value


def switch(name: str, value: Any) -> bool:
    """True or False."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's, too
        raise refused(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words."""
    if value not in choices or not isinstance(value, str):
        raise refused(name, value, either(choices))
    return value


def several(name: str, value: Any, expected: str) -> list[Any]:
    """The entries of what has some in order: a list, a tuple, an array."""
    if isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        raise refused(name, value, expected)
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        raise refused(name, value, expected) from None


def texts(name: str, value: Any) -> list[str]:
    """Strings; one string is a list of one."""
    if isinstance(value, str):
        return [value]
    entries = several(name, value, "a text, or a list of texts")
    return [text(f"{name}[{number}]", entry) for number, entry in enumerate(entries)]


def token_ids(name: str, value: Any) -> list[int]:
    """Token ids of one text."""
    ids = []
    for number, entry in enumerate(several(name, value, "a list of token ids")):
        found = _index(entry)
        if found is None or found < 0:
            raise refused(f"{name}[{number}]", entry, "a token id, an integer of at least 0")
        ids.append(found)
    return ids


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Names and values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refused(name, value, "a dict with texts as keys")
    return value


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is unknown, "" where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _index(value: Any) -> int | None:
    """An integer of any kind, and no boolean; None of all else."""
    if type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
