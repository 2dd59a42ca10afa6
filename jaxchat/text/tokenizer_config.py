"""What the JSON files beside a tokenizer say of its special and added tokens, checked key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxchat.errors import JaxchatError
from jaxchat.files import read_optional_json
from jaxchat.text.tokenizer import Added
from jaxchat.visible import shown

CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates that are files of their own, `NAME.jinja`."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN_ID = 2**22 - 1
"""Four times the largest vocabularies; what is beyond is a broken file, not a reason to reserve memory."""


@dataclass(frozen=True)
class Config:
    """tokenizer_config.json with special_tokens_map.json and added_tokens.json folded in."""

    raw: Mapping[str, Any]
    added: tuple[Added, ...]

    def named(self, key: str) -> str | None:
        """The text of a named token such as `eos_token`."""
        return token_text(self.raw.get(key))

    @property
    def prefix_space(self) -> bool | None:
        """`add_prefix_space`; None where the tokenizer's own file decides."""
        return self.raw.get("add_prefix_space")


def token_text(value: Any) -> str | None:
    """The text of a token given as a string or as a serialised `AddedToken`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def fail(path: Path | str, key: str, value: Any, expected: str) -> NoReturn:
    """Raises the error about a value of the wrong type."""
    raise JaxchatError(
        f"{path}: key {shown(key)} is {shown(value)}; expected {expected}: download the file again"
    )


def token_id(path: Path | str, key: str, value: Any) -> int:
    """A token id, checked.

    Raises:
        JaxchatError: it is none, or beyond any vocabulary.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKEN_ID:
        fail(path, key, value, f"a token id, a whole number from 0 to {MAX_TOKEN_ID}")
    return value


def read_config(directory: Path) -> Config:
    """What the files in `directory` say; nothing where there are none.

    Raises:
        JaxchatError: one of them is broken, or a value in it is of the wrong type.
    """
    files = {name: directory / name for name in (SPECIAL_TOKENS, CONFIG, ADDED_TOKENS)}
    special, config, added_ids = (read_optional_json(path) for path in files.values())
    named: set[str] = set()
    for path, values in ((files[SPECIAL_TOKENS], special), (files[CONFIG], config)):
        _check(path, values)
        named |= set(_special_names(path, values))
    added = {
        content: Added(
            content=content, id=token_id(files[ADDED_TOKENS], content, value), special=content in named
        )
        for content, value in added_ids.items()
    }
    for token in _added_tokens(files[CONFIG], config.get("added_tokens_decoder"), named):
        added[token.content] = token
    return Config({**special, **config}, tuple(sorted(added.values(), key=lambda t: t.id)))


def _check(path: Path, values: Mapping[str, Any]) -> None:
    """The types of the single keys that are read."""
    for key in NAMED_TOKENS:
        if values.get(key) is not None and not token_text(values[key]):
            fail(path, key, values[key], "the text of a token")
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        if not isinstance(values.get(key), bool | None):
            fail(path, key, values[key], "true or false")
    if not isinstance(values.get("tokenizer_class"), str | None):
        fail(path, "tokenizer_class", values["tokenizer_class"], "the name of a class")


def _special_names(path: Path, values: Mapping[str, Any]) -> Iterator[str]:
    """The texts of all tokens that a file calls special by a key."""
    yield from (text for key in NAMED_TOKENS if (text := token_text(values.get(key))) is not None)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = values.get(key) or ()
        found = list(tokens.values()) if isinstance(tokens, Mapping) else tokens
        if not isinstance(found, list | tuple) or not all(map(token_text, found)):
            fail(path, key, tokens, "a list of tokens")
        yield from map(str, map(token_text, found))


def _added_tokens(path: Path, entries: Any, named: set[str]) -> Iterator[Added]:
    """`added_tokens_decoder`: id -> token."""
    if not isinstance(entries, Mapping | None):
        fail(path, "added_tokens_decoder", entries, "tokens by their id")
    for number, token in (entries or {}).items():
        key = f"added_tokens_decoder.{number}"
        text, digits = token_text(token), number.isascii() and number.isdigit()
        if not text or not digits:
            fail(path, key, token, "a token, and a number for its key")
        flags = token if isinstance(token, Mapping) else {}
        for flag in ("special", "lstrip", "rstrip"):
            if not isinstance(flags.get(flag), bool | None):
                fail(path, f"{key}.{flag}", flags[flag], "true or false")
        yield Added(
            content=text,
            id=token_id(path, key, int(number[:20])),
            special=bool(flags.get("special")) or text in named,
            lstrip=bool(flags.get("lstrip")),
            rstrip=bool(flags.get("rstrip")),
        )
