"""What one line of a job asks for: OpenAI's batch format or a plain one, checked field by field.

A new field is a row of a table here. Needs no model: prompts are texts still.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from jaxchat import arguments
from jaxchat.errors import UsageError, in_flags
from jaxchat.files import UnreadableError, parse_json
from jaxchat.options import SEEDS, GenerateOptions
from jaxchat.values import Range
from jaxchat.visible import shown

Kind = Literal["chat", "completion", "embedding"]
MAX_CHOICES = 128
"""Of one line: OpenAI's limit."""
MAX_INPUTS = 2048
"""Texts of one line: OpenAI's limit of embeddings."""


class LineError(UsageError):
    """What is wrong with a line.

    Attributes:
      param: the field at fault, None where it is the whole line.
    """

    def __init__(self, text: object, param: str | None = None):
        super().__init__(text)
        self.param = param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a line asks for.

    Attributes:
      url: where OpenAI's line goes, "" of a plain one.
      key: its `custom_id` or `id`; None if it has none.
      kind: what to do.
      inputs: messages of one conversation each, texts, or token ids.
      listed: whether the input was a list of several.
      settings: fields of `GenerateOptions` that it says.
      choices: how many answers to draw for each input.
      layer_plan, adapter: as `Model.with_plan` and `with_adapters` take them.
      plan_given, adapter_given: whether it says them at all.
      logprobs: whether it wants the log-probabilities of the tokens.
      encoding: of embeddings, `float` or `base64`.
      model: what it calls the model.
    """

    url: str = ""
    key: str | int | None = None
    kind: Kind = "completion"
    inputs: Sequence[Any] = ()
    listed: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: int = 1
    layer_plan: Any = None
    adapter: Any = None
    adapter_given: bool = False
    logprobs: bool = False
    encoding: str = "float"
    model: str | None = None

    def options(self, defaults: GenerateOptions, *, seed: int) -> GenerateOptions:
        """How to answer; a line that gives no seed draws with this one.

        Raises:
          UsageError: a value of the wrong type, or out of its range; names the field.
        """
        with in_flags(False):
            return dataclasses.replace(defaults, **({"seed": seed % (SEEDS.high + 1)} | dict(self.settings)))  # type: ignore[operator]


class Identity(NamedTuple):
    """Whose line it is, as far as that can be told: also of a line that is refused."""

    key: str | int | None = None
    url: str | None = None  # None of a plain line


def read_line(data: bytes) -> tuple[Identity, Ask | LineError]:
    """What a line asks for, or what is wrong with it."""
    identity = Identity()
    try:
        value = _object(data)
        is_openai = not _OPENAI.isdisjoint(value)
        identity = Identity(_known_key(value.get("custom_id" if is_openai else "id")), None)
        if is_openai:
            url = value.get("url")
            identity = Identity(identity.key, url if isinstance(url, str) else "")
        return identity, _openai(value) if is_openai else _plain(value)
    except LineError as error:
        return identity, error


_OPENAI = {"custom_id", "method", "url", "body"}


def _object(data: bytes) -> dict[str, Any]:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)  # strict: no NaN, no half of a surrogate pair, all UTF-8
        value = parse_json(data.decode(), pairs=_distinct)
    except (msgspec.MsgspecError, UnicodeDecodeError, UnreadableError, RecursionError) as error:
        raise LineError(f"not a line of JSON: {error}; expected one object {{...}}") from None
    if not isinstance(value, dict):
        raise LineError(f"the line is {shown(value)}; expected an object {{...}}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _known_key(value: Any) -> str | int | None:
    return value if isinstance(value, str) or type(value) is int else None


# --- fields: what each may be, and where it goes


class _Field(NamedTuple):
    """A field of a line or of its body.

    Attributes:
      target: of `Ask`; "" is nowhere.
      read: from its name and value to what that is to be.
    """

    target: str
    read: Callable[[str, Any], Any]


_Fields = Mapping[str, _Field]


def _any(name: str, value: Any) -> Any:
    return value


def _only(*values: Any) -> _Field:
    """One that says nothing but what is the case anyway."""

    def read(name: str, value: Any) -> None:
        if not any(value == known and type(value) is type(known) for known in values):
            known = " or ".join(map(shown, values))
            raise LineError(f"{name} is {shown(value)}; jaxchat knows only {known} here", name)

    return _Field("", read)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise LineError(f"{name} is {shown(value)}; expected a text", name)
    return value


def _key(name: str, value: Any) -> str | int:
    if (found := _known_key(value)) is None:
        raise LineError(f"{name} is {shown(value)}; expected a text or a whole number", name)
    return found


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise LineError(f"{name} is {shown(value)}; expected true or false", name)
    return value


def _number(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        limits = Range(int, low, high)
        if not limits.holds(value):
            raise LineError(f"{name} is {shown(value)}; expected {limits.expected}", name)
        return int(value)

    return read


def _messages(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise LineError(f"{name} is {shown(value)}; expected a list of messages with role and content", name)
    return [value]


def _ids(name: str, value: Any) -> list[list[int]]:
    with in_flags(False):
        try:
            return [arguments.token_ids(name, value)]
        except UsageError as error:
            raise LineError(error, name) from None


class _Several(list[Any]):
    """Inputs that came as a list."""


def _inputs(name: str, value: Any) -> list[Any]:
    """Texts or token ids: one, or a list of some."""
    if isinstance(value, str):
        return [value]
    expected = "a text, token ids, or a list of such"
    if not isinstance(value, list) or not value:
        raise LineError(f"{name} is {shown(value)}; expected {expected}", name)
    if type(value[0]) is int:
        return _ids(name, value)
    if len(value) > MAX_INPUTS:
        raise LineError(f"{name} has {len(value):,} entries; expected at most {MAX_INPUTS:,}", name)
    found = _Several()
    for number, entry in enumerate(value):
        place = f"{name}[{number}]"
        found += [_text(place, entry)] if not isinstance(entry, list) else _ids(place, entry)
    return found


def _one_input(name: str, value: Any) -> list[Any]:
    return [_text(name, value)]


def _completion_logprobs(name: str, value: Any) -> bool:
    if value != 0 or type(value) is not int:
        raise LineError(
            f"{name} is {shown(value)}; expected 0: the log-probability of each chosen token, and no others",
            name,
        )
    return True


def _encoding(name: str, value: Any) -> str:
    if value not in ("float", "base64"):
        raise LineError(f"{name} is {shown(value)}; expected float or base64", name)
    return str(value)


def _plan(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("@"):
        raise LineError(f"{name} is {shown(value)}; expected the plan itself, for no line opens a file", name)
    if not isinstance(value, str | list):
        raise LineError(
            f"{name} is {shown(value)}; expected a text such as '0:8,4:', or a list of layers", name
        )
    return value


def _option(option: str) -> _Field:
    """One of `GenerateOptions`, under the name that the line has for it."""

    def read(name: str, value: Any) -> Any:
        with in_flags(False):
            try:
                return getattr(GenerateOptions(**{option: value}), option)
            except UsageError as error:
                raise LineError(name + str(error).removeprefix(option), name) from None

    return _Field(f"settings.{option}", read)


_SAMPLING = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty",
             "top_k", "min_p", "repetition_penalty", "ignore_eos")  # fmt: skip
_OWN: _Fields = {"layer_plan": _Field("layer_plan", _plan), "adapter": _Field("adapter", _any)}
_ANY_BODY: _Fields = {
    **_OWN,
    "model": _Field("model", _text),
    "user": _Field("", _text),  # says who asks, and changes nothing
}
_DRAWN: _Fields = {
    **_ANY_BODY,
    **{name: _option(name) for name in _SAMPLING},
    "max_tokens": _option("max_new_tokens"),
    "n": _Field("choices", _number(1, MAX_CHOICES)),
    "stream": _only(False),
    "logit_bias": _only({}),
}
_BODIES: Mapping[str, tuple[Kind, str, _Fields]] = {
    "/v1/chat/completions": (
        "chat",
        "messages",
        {
            **_DRAWN,
            "messages": _Field("inputs", _messages),
            "max_completion_tokens": _option("max_new_tokens"),
            "logprobs": _Field("logprobs", _switch),
            "top_logprobs": _only(0),
            "response_format": _only({"type": "text"}),
            "metadata": _Field("", _any),
            "store": _only(False),
        },
    ),
    "/v1/completions": (
        "completion",
        "prompt",
        {
            **_DRAWN,
            "prompt": _Field("inputs", _inputs),
            "logprobs": _Field("logprobs", _completion_logprobs),
            "echo": _only(False),
            "best_of": _only(1),
        },
    ),
    "/v1/embeddings": (
        "embedding",
        "input",
        {
            **_ANY_BODY,
            "input": _Field("inputs", _inputs),
            "encoding_format": _Field("encoding", _encoding),
        },
    ),
}
"""URL -> what it is for, the field that must be there, and all fields."""
_PLAIN_INPUTS: Mapping[str, tuple[Kind, _Field]] = {
    "prompt": ("completion", _Field("inputs", _one_input)),
    "messages": ("chat", _Field("inputs", _messages)),
    "token_ids": ("completion", _Field("inputs", _ids)),
}
_PLAIN: _Fields = {
    **_OWN,
    **{field.name: _option(field.name) for field in dataclasses.fields(GenerateOptions)},
    **{name: field for name, (_, field) in _PLAIN_INPUTS.items()},
    "id": _Field("key", _key),
}


def _openai(value: dict[str, Any]) -> Ask:
    for name in value:
        if name not in _OPENAI:
            raise LineError(f"unknown field {shown(name)}; a line has {', '.join(sorted(_OPENAI))}", name)
    for name in sorted(_OPENAI):
        if value.get(name) is None:
            raise LineError(f"{name!r} is missing; a line has {', '.join(sorted(_OPENAI))}", name)
    key, url, body = _text("custom_id", value["custom_id"]), value["url"], value["body"]
    if value["method"] != "POST":
        raise LineError(f"method is {shown(value['method'])}; expected POST", "method")
    if not isinstance(url, str) or url not in _BODIES:
        raise LineError(f"url is {shown(url)}; expected {' or '.join(_BODIES)}", "url")
    if not isinstance(body, dict):
        raise LineError(f"body is {shown(body)}; expected an object {{...}}", "body")
    kind, needed, fields = _BODIES[url]
    if body.get(needed) is None:
        raise LineError(f"{needed!r} is missing in the body", needed)
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise LineError("max_tokens and max_completion_tokens are both given; give one", "max_tokens")
    return Ask(url=url, key=key, kind=kind, **_read(body, fields, "in the body"))


def _plain(value: dict[str, Any]) -> Ask:
    given = [name for name in _PLAIN_INPUTS if value.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise LineError(f"expected one of {', '.join(_PLAIN_INPUTS)} in the line, found {found}")
    return Ask(kind=_PLAIN_INPUTS[given[0]][0], **_read(value, _PLAIN, ""))


def _read(value: dict[str, Any], fields: _Fields, where: str) -> dict[str, Any]:
    """The fields of `Ask` that an object gives; null is as if it were not there, but of `adapter`."""
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, entry in value.items():
        if name not in fields:
            known = arguments.meant(name, fields) or f". The fields are {', '.join(sorted(fields))}"
            raise LineError(" ".join(f"unknown field {shown(name)} {where}".split()) + known, name)
        if entry is None:
            continue
        target, read = fields[name]
        read_value = read(name, entry)
        if target.startswith("settings."):
            settings[target.removeprefix("settings.")] = read_value
        elif target:
            found[target] = read_value
    found["adapter_given"] = "adapter" in found
    found["listed"] = isinstance(found.get("inputs"), _Several)
    return {**found, "settings": settings}
