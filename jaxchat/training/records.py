"""What a record of training data says: its kind by its keys, its messages in the words of chat templates.

A new layout is a reader and a row in `KINDS`. Files are read in `data_files`; ids are made in `data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from jaxchat.errors import JaxchatError, option
from jaxchat.files import UnreadableError, parse_json, text_of
from jaxchat.training.data_files import RecordError
from jaxchat.typed import checked
from jaxchat.visible import shown

T = TypeVar("T")

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""What data sets call a role -> what chat templates do."""


class Text(NamedTuple):
    """A text as it is."""

    text: str


class Chat(NamedTuple):
    """A conversation: dicts with "role", "content" and what else a template may read; and its tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class Task(NamedTuple):
    """One instruction, what it is about ("" if it says it all), and the reply."""

    instruction: str
    input: str
    output: str
    system: str


def record_of(data: bytes, place: str) -> Text | Chat | Task:
    """What the JSON text of a record says.

    Args:
      data: the text, UTF-8.
      place: where it stands, for messages.

    Raises:
      RecordError: it is no record, or says nothing that can be learnt as it is.
    """
    try:
        value = parse_json(text_of(data), pairs=_unique)
    except UnreadableError as error:
        raise RecordError(f"{place}: not readable as JSON ({error}); {advice()}") from None
    if not isinstance(value, dict):
        raise RecordError(f"{place}: {shown(value)}; expected an object with {expected_keys()}; {advice()}")
    if b"\\u" in data:
        _refuse_surrogates(value, place)
    for key, read in KINDS.items():
        if key in value:
            return read(value, place)
    keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
    raise RecordError(f"{place}: keys {keys}; expected {expected_keys()}; {advice()}")


def advice() -> str:
    """What to do about a bad record."""
    return f"correct it, or leave such records out ({option('skip_bad_lines')})"


def expected_keys() -> str:
    """The keys that tell the kinds of records, in words."""
    *first, last = (repr(key) for key in KINDS)
    return f"{', '.join(first)} or {last}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return value


def _refuse_surrogates(value: dict[str, Any], place: str) -> None:
    """JSON can spell halves of characters, which no tokenizer takes."""
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"{place}: {error.object[error.start]!a} is half a character; expected both halves, as in "
                f'"\\ud83d\\ude00"; {advice()}'
            ) from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


# --- the kinds of records


class _Text(msgspec.Struct):
    text: str


class _Task(msgspec.Struct):
    instruction: str
    output: str
    input: str | None = None
    system: str | None = None


class _Turn(msgspec.Struct, rename={"role": "from"}):
    role: str
    value: str


class _ShareGpt(msgspec.Struct):
    conversations: list[_Turn]
    system: str | None = None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _OpenAi(msgspec.Struct):
    messages: list[_Message]
    tools: list[dict[str, Any]] | None = None


def _as(value: Mapping[str, Any], kind: type[T], place: str) -> T:
    try:
        return checked(value, kind, where=place, advice=advice())
    except JaxchatError as error:
        raise RecordError(str(error)) from None


def _read_text(value: Mapping[str, Any], place: str) -> Text:
    return Text(_as(value, _Text, place).text)


def _read_task(value: Mapping[str, Any], place: str) -> Task:
    task = _as(value, _Task, place)
    for name in ("instruction", "output"):
        _refuse_empty(getattr(task, name), f"{place}: {name}")
    return Task(task.instruction, task.input or "", task.output, task.system or "")


def _read_sharegpt(value: Mapping[str, Any], place: str) -> Chat:
    found = _as(value, _ShareGpt, place)
    messages = [{"role": "system", "content": found.system}] if found.system else []
    for number, turn in enumerate(found.conversations):
        where = f"{place}: conversations[{number}]"
        messages.append({"role": _role(turn.role, f"{where}.from"), "content": turn.value})
        if messages[-1]["role"] != "system":
            _refuse_empty(turn.value, f"{where}.value")
    return Chat(_in_turns(messages))


def _read_openai(value: Mapping[str, Any], place: str) -> Chat:
    found = _as(value, _OpenAi, place)
    messages = [_message(m, f"{place}: messages[{number}]") for number, m in enumerate(found.messages)]
    return Chat(_in_turns(messages), found.tools or None)


def _message(found: _Message, where: str) -> dict[str, Any]:
    content = found.content or ""
    if not isinstance(content, str):
        content = "".join(_part(part, f"{where}.content[{k}]") for k, part in enumerate(content))
    message = {"role": _role(found.role, f"{where}.role"), "content": content}
    more = {name: getattr(found, name) for name in _MORE}
    message |= {name: entry for name, entry in more.items() if entry}
    if message["role"] != "system" and not found.tool_calls and not found.reasoning_content:
        _refuse_empty(content, f"{where}.content")
    return message


def _part(part: _Part, where: str) -> str:
    if part.type != "text":
        raise RecordError(
            f"{where}.type is {shown(part.type)}; expected 'text', the only kind that is learnt; {advice()}"
        )
    if part.text is None:
        raise RecordError(f"{where}: 'text' is missing; {advice()}")
    return part.text


_MORE = ("reasoning_content", "tool_calls", "tool_call_id", "name")

# What tells a kind first: some data sets add to their records a "text" that is made of the rest.
KINDS: dict[str, Callable[[Mapping[str, Any], str], Text | Chat | Task]] = {
    "messages": _read_openai,
    "conversations": _read_sharegpt,
    "instruction": _read_task,
    "text": _read_text,
}
"""The key that tells a kind of record -> its reader."""


def _role(name: str, where: str) -> str:
    role = ROLES.get(name.lower())
    if role is None:
        known = ", ".join(ROLES)
        raise RecordError(f"{where} is {shown(name)}; expected one of {known}; {advice()}")
    return role


def _refuse_empty(text: str, where: str) -> None:
    if not text.strip():
        raise RecordError(f"{where} is empty; expected a text; {advice()}")


def _in_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chats have them.

    Empty system prompts are left out, and so are replies before the first message to reply to. Two messages
    of one role in a row are one, with a blank line between them; results of tools are not.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system" and not message["content"].strip():
            continue
        if message["role"] == "assistant" and all(turn["role"] == "system" for turn in turns):
            continue
        if turns and _plain(turns[-1]) and _plain(message) and turns[-1]["role"] == message["role"]:
            turns[-1] = {**message, "content": f"{turns[-1]['content']}\n\n{message['content']}"}
        else:
            turns.append(message)
    return turns


def _plain(message: Mapping[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and message["role"] != "tool"
