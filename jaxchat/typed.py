"""Values that somebody else wrote (parsed JSON or YAML), checked against a type before they are relied on.

The types are msgspec's: annotated numbers, lists, dataclasses. How such text is read is in `files.py`.
"""

import re
from typing import Annotated, Any, TypeVar, cast

import msgspec

from jaxchat.errors import JaxchatError
from jaxchat.visible import shown

T = TypeVar("T")

INT32 = 2**31 - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=INT32)]
"""A size, a length or an id: not negative, and an int32."""
Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""A number that float32 arithmetic survives: not NaN, not infinite, and with room for products."""


def checked(value: Any, kind: type[T], *, where: str, advice: str) -> T:
    """The value as an instance of a type.

    Nothing is converted: `"4"` is no number, and `1` no switch. What a dataclass does not have is left out.

    Args:
      value: what a parser made of somebody's text.
      kind: a type, as `msgspec.convert` takes it.
      where: the file, and the key in it if `value` is not all of it: `config.json: rope_scaling`.
      advice: what to do about it.

    Raises:
      JaxchatError: it is no such value; the message has the place within it, what is there, what should be.
    """
    try:
        return cast("T", msgspec.convert(value, kind))
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `")
        place = place.replace("`", "").removeprefix("$").removeprefix(".")
        raise JaxchatError(f"{_joined(where, place)}{_complaint(said, value, place)}; {advice}") from None


def _joined(where: str, place: str) -> str:
    """`config.json` and `a.b` -> `config.json: a.b`; `config.json: ropes` and `[0].dim` go on."""
    if not place:
        return where
    return f"{where}{'' if place[0] == '[' else '.' if ': ' in where else ': '}{place}"


def _complaint(said: str, value: Any, place: str) -> str:
    if missing := re.fullmatch(r"Object missing required field `(.+)`", said):
        return f": {missing[1]!r} is missing"
    expected = re.sub(r", got .*", "", said)
    for name, words in _WORDS.items():
        expected = expected.replace(f"`{name}`", words).replace(f"{name} |", f"{words} |")
    expected = expected.replace("`", "").replace(" | ", " or ")
    return f" is {_found(value, place)}; {expected[0].lower()}{expected[1:]}"


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "array": "a list",
    "object": "an object {...}",
    "null": "null",
}


def _found(value: Any, place: str) -> str:
    """What is at a place, as far as msgspec names it: not under which key of a mapping."""
    for step in re.findall(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]", place):
        if step == "[...]" or " in " in step:
            return "not what it should be"
        if step[0] == "[":
            value = value[int(step[1:-1])]
        else:
            value = value[step] if isinstance(value, dict) else getattr(value, step)
    return shown(value)
