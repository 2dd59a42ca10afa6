"""How to continue a text: the options, their text form, and the flags that they are. Needs no JAX."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

from jaxchat import arguments
from jaxchat.errors import UsageError
from jaxchat.values import Range, read_choice, read_number, read_switch
from jaxchat.visible import shown

Format = Literal["chat", "completion"]
Overflow = Literal["error", "truncate_oldest"]
PrefixIn = Literal["content", "reasoning"]

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What the KV cache can be kept in."""

MAX_SLOTS = 1 << 16
"""Of a KV cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """Makes a field a flag of the command line: `name: Annotated[TYPE, Flag(...)] = DEFAULT`.

    The type says how the flag is read, the default what it is when it is not given (`cli/flags.py`).

    Attributes:
      help: what it does; the example and the default are added.
      example: a use of it, such as `-t 0.7`.
      group: the title it stands under.
      value: what the help calls its value; `DIR` and `FILE` may be any bytes, all else is UTF-8 text.
      short: a letter.
      name: its name, if not the field's.
      choices: the values there are, where the type does not say so.
      low, high: the least and the greatest number.
      limits: the same with more words, instead of both.
      or_none: of a file or directory, `''` is a value, too: none.
      many: it may be given more than once.
      read: from the text (of `many` the texts) to the field's value; a `UsageError` says what is wrong.
      shown: how the default is written, where that is not as Python prints it.
      positional: it has no name on the command line, only its place.
      elsewhere: what other programs call it, for those who type that.
      aliases: other names that it answers to.
    """

    help: str
    example: str
    group: str = "Flags"
    value: str = ""
    short: str | None = None
    name: str | None = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    limits: Range | None = None
    or_none: bool = False
    many: bool = False
    read: Callable[[Any], Any] | None = None
    shown: str | None = None
    positional: bool = False
    elsewhere: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_MAX, _TINY = float.fromhex("0x1.fffffep127"), 2.0**-126  # of float32
SAMPLING_RANGES: Mapping[str, Range] = {
    "temperature": Range(float, 0, _MAX, words="a number, 0 or more", note="0 takes the most probable token"),
    "top_k": Range(int, 0, 2**31 - 1, note="0 is off"),
    "top_p": Range(float, _TINY, 1, words="a number above 0, at most 1", note="1 is off"),
    "min_p": Range(float, 0, 1, note="0 is off"),
    "repetition_penalty": Range(float, _TINY, _MAX, words="a number above 0", note="1 is off"),
    "presence_penalty": Range(float, -_MAX, _MAX, words="a finite number", note="0 is off"),
    "frequency_penalty": Range(float, -_MAX, _MAX, words="a finite number", note="0 is off"),
}
"""The numbers that each sampling parameter may be."""
_TOP_K = Range(int, -1, 2**31 - 1, words="a whole number, 0 or more", note="0 or -1 is off")
SEEDS = Range(int, 0, 2**32 - 1)
LENGTHS = Range(int, 1)
"""Of a text, a context, a batch: at least one."""
_RANGES: Mapping[str, Range] = {
    "max_new_tokens": LENGTHS,
    **SAMPLING_RANGES,
    "top_k": _TOP_K,
    "seed": SEEDS,
}
"""What the options may be, as people write them."""


_length = functools.partial(Flag, group="How long")
_sampling = functools.partial(Flag, group="Sampling")


def _ranged(name: str, **more: Any) -> Flag:
    return _sampling(limits=_RANGES[name], **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to continue a text: what every generating function, the command line and `/set` take.

    No flag: `stop_token_ids` end a text, beside the model's own. Strings of `stop` are no part of it.
    Prompt i of a batch draws with `seed + i`. None of `stop` and `stop_token_ids` is nothing of the kind.

    Raises:
      UsageError: a value of the wrong type, or out of its range; the message names the option.
    """

    max_new_tokens: Annotated[
        int | None,
        _length(
            help="At most so many new tokens; if not given, until the model ends or the context is full",
            example="--max_new_tokens 200",
            limits=LENGTHS,
            elsewhere=("n", "n_predict", "num_predict", "predict", "max_tokens"),
        ),
    ] = None
    temperature: Annotated[
        float,
        _ranged(
            "temperature",
            help="0 always takes the most probable token, higher is more varied. Where this and the next "
            "four are not given, they are as the model's generation_config.json recommends, if it does",
            example="-t 0.7",
            short="t",
            elsewhere=("temp",),
        ),
    ] = 0.0
    top_k: Annotated[
        int,
        _ranged(
            "top_k",
            help="Choose among the N most probable tokens; 0 or -1 is off",
            example="-k 40",
            short="k",
        ),
    ] = 0
    top_p: Annotated[
        float,
        _ranged(
            "top_p",
            help="Choose among the fewest tokens with this total probability; 1 is off",
            example="-q 0.9",
            short="q",
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        _ranged(
            "min_p",
            help="Leave out tokens less probable than this fraction of the most probable; 0 is off",
            example="--min_p 0.05",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        _ranged(
            "repetition_penalty",
            help="Weaken every token of prompt and output (CTRL); 1 is off",
            example="--repetition_penalty 1.1",
            elsewhere=("repeat_penalty",),
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        _ranged(
            "presence_penalty",
            help="Subtract from the logit of tokens already generated; 0 is off",
            example="--presence_penalty 0.5",
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        _ranged(
            "frequency_penalty",
            help="The same for every time they were generated; 0 is off",
            example="--frequency_penalty 0.5",
        ),
    ] = 0.0
    seed: Annotated[
        int,
        _sampling(
            help="The same seed gives the same text on the same kind of machine. A chat that is not given "
            "one draws its own, which /stats and /set tell, and /retry draws the next",
            example="--seed 7",
            limits=SEEDS,
        ),
    ] = 0
    stop: Annotated[
        str | Sequence[str] | None,
        _length(
            help="End before this text; may be given more than once; \\n, \\t and \\\\ are a line break, a "
            "tab and a backslash",
            example="--stop '\\n\\n' --stop END",
            elsewhere=("r", "reverse_prompt", "stop_sequence", "stop_sequences"),
            value="TEXT",
            many=True,
            read=lambda texts: tuple(unescape(text, "--stop") for text in texts),
        ),
    ] = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: Annotated[
        bool,
        _length(
            help="Go on at the model's own end-of-text tokens", example="--ignore_eos --max_new_tokens 100"
        ),
    ] = False
    overflow: Annotated[
        Overflow,
        _length(
            help="When the context is full: error ends the reply and refuses a longer prompt, "
            "truncate_oldest forgets the oldest, as a chat does if this is not given",
            example="--overflow truncate_oldest",
            elsewhere=("context_shift", "no_context_shift"),
            value="HOW",
        ),
    ] = "error"

    def __post_init__(self) -> None:
        for name, limits in _RANGES.items():
            if name != "max_new_tokens" or self.max_new_tokens is not None:
                object.__setattr__(self, name, arguments.number(name, getattr(self, name), limits))
        if self.top_k == -1:  # as others write "off"
            object.__setattr__(self, "top_k", 0)
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, without empty strings."""
        return tuple(s for s in ((self.stop,) if isinstance(self.stop, str) else self.stop or ()) if s)


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "stop": lambda name, value: (
        value if isinstance(value, str) else tuple(arguments.texts(name, value or ()))
    ),
    "stop_token_ids": lambda name, value: tuple(arguments.token_ids(name, () if value is None else value)),
    "ignore_eos": arguments.switch,
    "overflow": lambda name, value: arguments.one_of(name, value, get_args(Overflow)),
}
"""What the fields that are no numbers may be, see `arguments`."""

DEFAULTS = GenerateOptions()


class GenerateOverrides(TypedDict, total=False):
    """The fields of `GenerateOptions` as keyword arguments of functions that also take the value itself."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    overflow: Overflow


def checked_options(overrides: GenerateOverrides, options: GenerateOptions = DEFAULTS) -> GenerateOptions:
    """The options that a function was called with: one value, and keyword arguments that replace some of it.

    Raises:
      UnknownOptionError: a keyword that is no option.
      UsageError: a value of the wrong type, or out of its range.
    """
    if not isinstance(options, GenerateOptions):
        raise arguments.refused("options", options, "GenerateOptions(...)")
    known = {field.name for field in dataclasses.fields(GenerateOptions)}
    if unknown := sorted(overrides.keys() - known):
        raise UnknownOptionError(unknown[0])
    return dataclasses.replace(options, **overrides)


class UnknownOptionError(UsageError, TypeError):
    """A name that is no field of `GenerateOptions`; the message says which one may be meant."""

    def __init__(self, name: str, where: str = ""):
        hints = get_type_hints(GenerateOptions, include_extras=True)
        elsewhere = {
            other: field
            for field, hint in hints.items()
            for flag in getattr(hint, "__metadata__", ())
            for other in flag.elsewhere
        }
        advice = f"; did you mean {elsewhere[name]}?" if name in elsewhere else arguments.meant(name, hints)
        options = f"The options are {', '.join(hints)}"
        super().__init__(f"{where}unknown option {shown(name)}{advice or '.'} {options}")


def with_setting(options: GenerateOptions, name: str, value: str, *, where: str = "") -> GenerateOptions:
    """`options` with one field read from text, as `/set name=value` gives it.

    Args:
      options: those that stay.
      name: the field's.
      value: its text.
      where: what to put before its name in an error.

    Raises:
      UsageError: no such field, or no such value.

    >>> with_setting(GenerateOptions(), "top_k", "40").top_k
    40
    """
    if name not in _READERS:
        raise UnknownOptionError(name, where)
    return dataclasses.replace(options, **{name: _READERS[name](where + name, value)})


def setting_text(value: Any) -> str:
    """A field's value as `with_setting` reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return "none" if value is None else str(value)
    texts = [repr(v)[1:-1].replace(",", "\\x2c") if isinstance(v, str) else str(v) for v in value]
    return ",".join(texts) or "none"


_NONE = ("", "none")


def _number_reader(limits: Range) -> Callable[[str, str], Any]:
    return lambda name, text: read_number(name, text, limits)


def _read_limit(name: str, text: str) -> int | None:
    return None if text in _NONE else read_number(name, text, LENGTHS._replace(note="or none"))


def _read_texts(name: str, text: str) -> tuple[str, ...]:
    return () if text in _NONE else tuple(unescape(part, name) for part in text.split(","))


def _read_ids(name: str, text: str) -> tuple[int, ...]:
    parts = [] if text in _NONE else text.split(",")
    return tuple(read_number(name, part, Range(int, note="ids with commas between them")) for part in parts)


_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "max_new_tokens": _read_limit,
    **{name: _number_reader(limits) for name, limits in _RANGES.items() if name != "max_new_tokens"},
    "stop": _read_texts,
    "stop_token_ids": _read_ids,
    "ignore_eos": read_switch,
    "overflow": lambda name, text: read_choice(name, text, get_args(Overflow)),
}
"""How the text of each field of `GenerateOptions` is read, given the name to call it by."""


# --- escapes in text from the command line and the chat's commands

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
