"""What is asked for: how to continue a text, and all that one command line says. Needs no JAX."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_optional_json

Format = Literal["chat", "completion"]
Overflow = Literal["error", "truncate_oldest"]
PrefixIn = Literal["content", "reasoning"]

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What the KV cache can be kept in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to continue a text. Every generating function takes these as keyword arguments.

    Attributes:
      max_new_tokens: at most so many; None is until the model stops or the context is full.
      temperature: divides the logits; 0 is greedy.
      top_k: sample from the k most probable tokens; 0 is off.
      top_p: sample from the fewest tokens with this total probability; 1 is off.
      min_p: leave out tokens less probable than this fraction of the most probable; 0 is off.
      repetition_penalty: weakens tokens of prompt and output (CTRL); 1 is off.
      presence_penalty: subtracted once from the logit of a token already generated; 0 is off.
      frequency_penalty: subtracted for every time it was generated; 0 is off.
      seed: the same seed gives the same text on the same backend; prompt i of a batch uses seed + i.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: token ids that end it, beside the model's own.
      ignore_eos: do not end at the model's own end-of-sequence tokens.
      overflow: `error` or `truncate_oldest`, see `Session.generate`.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    overflow: Overflow = "error"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, without empty strings."""
        return tuple(s for s in ((self.stop,) if isinstance(self.stop, str) else self.stop) if s)


_RECOMMENDABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """The sampling options that a model directory's `generation_config.json` recommends, by name.

    Nothing is recommended where the file does not say `do_sample` (transformers' GenerationConfig). Ranges
    are `sampling_params`' business.

    Raises:
      JaxchatError: the file is broken.
    """
    path = directory / "generation_config.json"
    config = read_optional_json(path)
    if config.get("do_sample") is not True:
        return {}
    found = {name: config[name] for name in _RECOMMENDABLE if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise JaxchatError(f"{path}: {name} is {value!r}, not a number; download the file again")
    return found


def checked_options(options: Mapping[str, Any]) -> GenerateOptions:
    """The options that a function was called with; an unknown one is a `TypeError`."""
    known = {f.name for f in dataclasses.fields(GenerateOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return GenerateOptions(**options)


def with_setting(options: GenerateOptions, name: str, value: str) -> GenerateOptions:
    """`options` with one field read from text, as `/set name=value` gives it.

    Sampling parameters are checked for being numbers; their ranges are `sampling_params`' business.

    Raises:
      UsageError: no such field, or no such value.

    >>> with_setting(GenerateOptions(), "top_k", "40").top_k
    40
    """
    types = {field.name: field.type for field in dataclasses.fields(options)}
    if name not in types:
        raise UsageError(f"no option {name!r}; options: {', '.join(types)}")
    expected, read = _READERS.get(name) or _READERS[types[name]]
    try:
        return dataclasses.replace(options, **{name: read(value)})
    except (ValueError, OverflowError):
        raise UsageError(f"{name}={value}: expected {expected}") from None


def setting_text(value: Any) -> str:
    """A field's value as `with_setting` reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return "none" if value is None else str(value)
    texts = [repr(v)[1:-1].replace(",", "\\x2c") if isinstance(v, str) else str(v) for v in value]
    return ",".join(texts) or "none"


def read_switch(text: str) -> bool:
    """`on` or `off`, also `true`, `1`, `yes` and their opposites; anything else is a `ValueError`."""
    words = {"on": True, "true": True, "1": True, "yes": True}
    words |= {"off": False, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _read_integer(text: str, low: int, high: float) -> int:
    if not low <= (value := int(text)) <= high:
        raise ValueError(text)
    return value


def _read_limit(text: str) -> int | None:
    return None if text in ("", "none") else _read_integer(text, 1, math.inf)


def _read_seed(text: str) -> int:
    return _read_integer(text, 0, 2**32 - 1)


def _read_choice(text: str) -> str:
    if text not in get_args(Overflow):
        raise ValueError(text)
    return text


def _read_texts(text: str) -> tuple[str, ...]:
    return () if text in ("", "none") else tuple(unescape(part, "stop") for part in text.split(","))


def _read_numbers(text: str) -> tuple[int, ...]:
    return () if text in ("", "none") else tuple(map(int, text.split(",")))


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    "max_new_tokens": ("an integer of at least 1, or none", _read_limit),
    "seed": (f"an integer from 0 to {2**32 - 1}", _read_seed),
    float: ("a number", float),
    int: ("an integer", int),
    bool: ("on or off", read_switch),
    str | Sequence[str]: ("texts with commas between them (\\x2c is a comma), or none", _read_texts),
    Sequence[int]: ("token ids with commas between them, or none", _read_numbers),
    Overflow: (" or ".join(get_args(Overflow)), _read_choice),
}
"""How a field of `GenerateOptions` is read from text, by its name or its type: what to expect, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One run of the command line.

    Attributes:
      model: the model directory; None with a recipe.
      model_name: what people call it.
      recipe, model_paths, keep_identity: as in `jaxchat.load`.
      layer_spec, dtype, quant, kv_dtype, kernels, max_length, compilation_cache_dir: as in `jaxchat.load`.
      format: None is chat where the model has a template.
      system: the system prompt.
      reversed_role: the model plays the user, and the prompt is its opening line.
      thought_tags: what the model thinks between; None is what its template says.
      ai_prefix, ai_prefix_in: what the next reply begins with, and in which part of it.
      ai_prefix_every_turn: every reply does.
      load_session, save_session: files of a conversation to go on with, and to keep this one in.
      prompt: the prompt, or with `interactive` the first message.
      interactive: chat, reading messages from standard input.
      markdown: render replies.
      history_file: where typed messages are kept; None is a file of the user's, "" is nowhere.
      json: print one JSON object.
      hide_banner: start without one.
      options: how to continue.
    """

    model: str | None
    model_name: str
    recipe: str | None
    model_paths: Mapping[str, str]
    keep_identity: bool
    layer_spec: str | None
    dtype: str | None
    quant: str | None
    kv_dtype: str | None
    kernels: str
    max_length: int | None
    compilation_cache_dir: str | None
    format: Format | None
    system: str | None
    reversed_role: bool
    thought_tags: tuple[str, str] | None
    ai_prefix: str
    ai_prefix_in: PrefixIn
    ai_prefix_every_turn: bool
    load_session: str | None
    save_session: str | None
    prompt: str | None
    interactive: bool
    markdown: bool
    history_file: str | None
    json: bool
    hide_banner: bool
    options: GenerateOptions


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
