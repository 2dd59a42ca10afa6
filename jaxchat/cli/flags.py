"""Flags, derived from the dataclasses that they fill: defined for absl, explained, and read back.

A field `name: Annotated[TYPE, Flag(...)] = DEFAULT` is a flag; without a default it must be given. A field
that is a dataclass brings the flags of its own fields. Any other field is no flag and keeps its default.
"""

import dataclasses
import difflib
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

from absl import flags

from jaxchat.errors import UsageError
from jaxchat.options import Flag
from jaxchat.values import Range, read_choice, read_number, read_switch
from jaxchat.visible import shown

R = TypeVar("R")
_REQUIRED = dataclasses.MISSING
_BYTES = ("DIR", "FILE", "NAME=DIR")
"""Values that may be anything a file can be called; all else is UTF-8 text."""


class FlagField(NamedTuple):
    """A field that is a flag.

    Attributes:
      name: the flag's.
      flag: what its help says.
      type: the field's, without None.
      default: the field's; `dataclasses.MISSING` if it must be given.
    """

    name: str
    flag: Flag
    type: Any
    default: Any

    @property
    def spelled(self) -> str:
        """Its name as it is typed."""
        return self.name.upper() if self.flag.positional else f"--{self.name}"


class Given(NamedTuple):
    """What a command line says.

    Attributes:
      names: of the flags that are there, switches that are off not counted.
      texts: of the places without a flag, in order.
      values: of all flags, as absl holds them: texts, of switches True or False.
    """

    names: frozenset[str]
    texts: list[str]
    values: flags.FlagValues


def flag_fields(request: type) -> list[FlagField]:
    """The flags of a dataclass, in the order of its fields.

    Raises:
      TypeError: a field's type is none that a flag can be read as.
    """
    found: list[FlagField] = []
    for field, flag, kind in _fields(request):
        if flag is not None:
            default = field.default
            if field.default_factory is not _REQUIRED:
                default = field.default_factory()
            found.append(FlagField(flag.name or field.name, flag, kind, default))
            _check_type(found[-1])
        elif _is_request(kind):
            found += flag_fields(kind)
    return found


def define(fields: Sequence[FlagField]) -> flags.FlagValues:
    """The flags for absl, apart from its global ones; all are None until they are given."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for field in fields:
        if field.flag.positional:
            continue
        definer: Callable[..., Any] = flags.DEFINE_multi_string if field.flag.many else flags.DEFINE_string
        if field.type is bool:
            definer = flags.DEFINE_bool
        definer(field.name, None, help="", short_name=field.flag.short, flag_values=values)
        if field.type is bool:
            values[field.name].parser = _Switch(field.spelled)
    return values


def parse(fields: Sequence[FlagField], argv: Sequence[str], stray: str) -> Given:
    """Reads a command line.

    Args:
      fields: its flags.
      argv: the arguments, the program's name first.
      stray: what to do about an argument that is one too many.

    Raises:
      UsageError: what is wrong with it.
    """
    values = define(fields)
    try:
        rest = values([argv[0], *_as_defined(fields, values, argv[1:])])[1:]
    except flags.UnrecognizedFlagError as error:
        dashes = "-" if f"-{error.flagname}" in (word.partition("=")[0] for word in argv) else "--"
        advice = _advice(error.flagname.replace("-", "_").lower(), fields)
        raise UsageError(f"unknown flag {dashes}{error.flagname}; {advice}") from None
    except flags.Error as error:  # the last flag has no value
        name = re.split(r"flag --?", " ".join(str(error).split()))[-1]
        full = next((f.spelled for f in fields if name in (f.name, f.flag.short)), f"--{name}")
        raise UsageError(f"{full} needs a value; --help shows examples") from None
    places = [field for field in fields if field.flag.positional]
    if len(rest) > len(places):
        raise UsageError(f"unexpected argument {rest[len(places)]!r}; {stray}")
    named = {field.name: values[field.name].value for field in fields if not field.flag.positional}
    names = frozenset(name for name, value in named.items() if value is not None and value is not False)
    return Given(names, rest, values)


def _advice(name: str, fields: Sequence[FlagField]) -> str:
    """What to type instead of a flag that there is not."""
    named = [field for field in fields if not field.flag.positional]
    for field in named:
        if name in field.flag.elsewhere:
            return f"jaxchat calls it --{field.name}"
    if name in _NO_FLAGS:
        return _NO_FLAGS[name]
    known = sorted(field.name for field in named)
    close = [other for other in known if len(name) > 2 and other.startswith(name)]
    close += difflib.get_close_matches(name, known, 1, cutoff=0.75)
    return f"did you mean --{close[0]}?" if close else "--help lists the flags"


_THREADS = "all cores are used; `taskset -c 0-3 jaxchat ...` uses four of them"
_DEVICE = "JAX chooses the device; JAX_PLATFORMS=cpu in the environment makes it the CPU"
_ONE_DEVICE = "all layers are on one device, a GPU or TPU where JAX finds one"
_MAPPED = "converted models are mapped where that is possible; see `jaxchat convert`"
_NO_FLAGS = {
    **dict.fromkeys(("threads", "threads_batch", "tb", "num_threads", "n_threads"), _THREADS),
    **dict.fromkeys(("device", "dev", "main_gpu", "gpu", "cpu"), _DEVICE),
    **dict.fromkeys(("ngl", "gpu_layers", "n_gpu_layers", "num_gpu"), _ONE_DEVICE),
    **dict.fromkeys(("mlock", "mmap", "no_mmap"), _MAPPED),
    **dict.fromkeys(
        ("color", "colors"), "terminals get colours; NO_COLOR=1 in the environment turns them off"
    ),
}
"""Flags of other programs without a counterpart, and what to do instead."""


def read(request: type[R], given: Given) -> R:
    """The dataclass that a command line fills.

    Raises:
      UsageError: a flag is missing or its text says nothing that the field can hold.
    """
    fields = flag_fields(request)
    texts = dict(zip((f.name for f in fields if f.flag.positional), given.texts, strict=False))
    missing = [
        field.spelled
        for field in fields
        if field.default is _REQUIRED
        and not (field.name in texts if field.flag.positional else field.name in given.names)
    ]
    if missing:
        for field in fields:  # what is there, and wrong, is the nearer mistake
            if field.name in given.names and not field.flag.positional:
                value: Any = given.values[field.name].value
                _value(field, tuple(value) if field.flag.many else value)
        raise UsageError(f"{' and '.join(missing)} must be given; --help shows examples")
    return _filled(request, given, texts)


def _filled(request: type[R], given: Given, texts: dict[str, str]) -> R:
    values: dict[str, Any] = {}
    for field, flag, kind in _fields(request):
        if flag is None:
            if _is_request(kind):
                values[field.name] = _filled(kind, given, texts)
            continue
        found = FlagField(flag.name or field.name, flag, kind, field.default)
        value = texts.get(found.name) if flag.positional else given.values[found.name].value
        if value is not None:
            values[field.name] = _value(found, tuple(value) if flag.many else value)
    return request(**values)


def _value(field: FlagField, value: Any) -> Any:
    """What a flag's text says; that of a switch is read already."""
    flag = field.flag
    if isinstance(value, bool):
        return value
    if flag.value in _BYTES:
        for text in value if flag.many else (value,):
            _check_path(field, text)
    else:
        value = tuple(_text(field, text) for text in value) if flag.many else _text(field, value)
    return value if flag.read is None and flag.many else (flag.read or _reader(field))(value)


def _text(field: FlagField, text: str) -> str:
    """What was typed, as UTF-8 whatever the locale: Python keeps bytes it cannot read as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise UsageError(f"{field.spelled} is not UTF-8 text; give it in UTF-8, or in a file") from None
    return text


def _check_path(field: FlagField, text: str) -> None:
    what = "directory" if "DIR" in field.flag.value else "file"
    if not text and not field.flag.or_none:
        raise UsageError(f"{field.spelled} is empty; give the name of a {what}")
    if len(text) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in text.split("/")):
        raise UsageError(
            f"{field.spelled} is {shown(text)}, {len(text):,} characters; give the name of a {what}, which "
            "cannot be so long"
        )


_LONGEST_PATH, _LONGEST_NAME = 4095, 255
"""Characters of a path, and of each of its names, on Linux; others allow no more."""


def _reader(field: FlagField) -> Callable[[str], Any]:
    """How the text of a flag becomes a value, by its type."""
    flag, name = field.flag, field.spelled
    if choices := flag.choices or _choices(field.type):
        return lambda text: read_choice(name, text, choices)
    if field.type in (int, float):
        limits = flag.limits or Range(field.type, flag.low, flag.high)
        return lambda text: read_number(name, text, limits)
    return lambda text: text


def _choices(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def help_text(usage: str, fields: Sequence[FlagField]) -> str:
    """What `--help` prints: every flag with an example, in 80 columns."""
    lines = [usage]
    places_first = sorted(fields, key=lambda field: not field.flag.positional)
    for title in dict.fromkeys(field.flag.group for field in places_first):
        lines.append(f"{title}:")
        for field in fields:
            if field.flag.group == title:
                lines += _explained(field)
        lines.append("")
    lines.append("Flags may be spelled with dashes too: --layer-spec is --layer_spec.")
    return "\n".join(lines)


def _explained(field: FlagField) -> Iterator[str]:
    flag = field.flag
    named = (f"-{flag.short}, " if flag.short else "") + f"--{field.name}"
    yield f"  {field.spelled if flag.positional else named} {_placeholder(field)}".rstrip()
    yield from textwrap.wrap(f"{flag.help}, e.g. {flag.example}{_default_text(field)}", 78,
                             initial_indent=" " * 6, subsequent_indent=" " * 6,
                             break_on_hyphens=False)  # fmt: skip


def _default_text(field: FlagField) -> str:
    default = field.default
    if default is _REQUIRED or default is None or default is False or default in ("", (), {}):
        return ""
    return f" (default: {field.flag.shown or default})"


def _placeholder(field: FlagField) -> str:
    if field.flag.positional or field.type is bool:
        return ""
    return field.flag.value or {int: "N", float: "X"}.get(field.type, "TEXT")


# --- fields and their types


def _is_request(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _fields(request: type) -> Iterator[tuple[dataclasses.Field[Any], Flag | None, Any]]:
    """Every field of a dataclass, what makes it a flag if anything does, and its type without None."""
    hints = typing.get_type_hints(request, include_extras=True)
    for field in dataclasses.fields(request):
        hint, flag = hints[field.name], None
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
            flag = next((extra for extra in extras if isinstance(extra, Flag)), None)
        yield field, flag, _without_none(hint)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _check_type(field: FlagField) -> None:
    known = field.type in (int, float, bool, str) or _choices(field.type)
    if not (known or field.flag.many or field.flag.read is not None):
        raise TypeError(f"--{field.name}: no flag can be read as {field.type}; give it `read`")


class _Switch(flags.BooleanParser):
    """Reads the value of a switch that has one: `--json=off`."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str | int) -> bool:
        """See absl; a `UsageError` passes through it."""
        return read_switch(self._name, str(argument))


def _as_defined(fields: Sequence[FlagField], values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """`--layer-spec` -> `--layer_spec`, other names -> the flag's, `--json True` -> `--json=True`.

    Values are left alone.
    """
    names = {alias: field.name for field in fields for alias in field.flag.aliases}
    result: list[str] = []
    is_value = is_switch = False
    for number, argument in enumerate(arguments):
        if argument == "--" and not is_value:
            return result + list(arguments[number:])
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        name = names.get(name, name)
        known = name in values or name.removeprefix("no") in values
        if is_switch and argument in ("True", "False"):  # as transformers' scripts are called
            result[-1] += f"={argument}"
            is_value = is_switch = False
        elif is_value or not argument.startswith("-") or not known:
            result.append(argument)
            is_value = is_switch = False
        else:
            result.append(f"--{name}{equals}{value}")
            is_value = name in values and not equals and not values[name].boolean
            is_switch = name in values and not equals and bool(values[name].boolean)
    return result
