"""What the JSON files beside a tokenizer say of its special and added tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError
from jaxchat.files import read_optional_json
from jaxchat.text.tokenizer import Added

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Config:
    """tokenizer_config.json with special_tokens_map.json and added_tokens.json folded in."""

    raw: Mapping[str, Any]
    added: tuple[Added, ...]

    def named(self, key: str) -> str | None:
        """The text of a named token such as `eos_token`."""
        return token_text(self.raw.get(key))


def token_text(value: Any) -> str | None:
    """The text of a token given as a string or as a serialised `AddedToken`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def read_config(directory: Path) -> Config:
    """What the files in `directory` say; nothing where there are none.

    Raises:
        JaxchatError: one of them is broken.
    """
    raw = {
        **read_optional_json(directory / "special_tokens_map.json"),
        **read_optional_json(directory / "tokenizer_config.json"),
    }
    named = {token_text(raw.get(name)) for name in NAMED_TOKENS}
    extra = raw.get("additional_special_tokens") or raw.get("extra_special_tokens") or []
    named |= {token_text(token) for token in (extra.values() if isinstance(extra, Mapping) else extra)}
    added = {
        content: Added(content=content, id=token_id, special=content in named)
        for content, token_id in read_optional_json(directory / "added_tokens.json").items()
    }
    for token_id, token in (raw.get("added_tokens_decoder") or {}).items():
        text = token_text(token)
        if text is None or not str(token_id).isdigit():
            raise JaxchatError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder[{token_id!r}] is malformed"
            )
        flags = token if isinstance(token, Mapping) else {}
        added[text] = Added(
            content=text,
            id=int(token_id),
            special=bool(flags.get("special", False)) or text in named,
            lstrip=bool(flags.get("lstrip", False)),
            rstrip=bool(flags.get("rstrip", False)),
        )
    return Config(raw, tuple(sorted(added.values(), key=lambda t: t.id)))
