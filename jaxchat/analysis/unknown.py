"""What a tokenizer cannot read of a text. Needs no JAX."""

from collections.abc import Sequence

from jaxchat.text.tokenizer import Tokenizer

_NOWHERE = "\U0010fffd"
"""A character of private use, the last there is: what is not made of bytes has no token for it."""


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of what a tokenizer does not know; None of one that knows every byte."""
    ids = tokenizer.encode(_NOWHERE, add_special_tokens=False)
    if not ids or _NOWHERE.encode() in b"".join(map(tokenizer.token_bytes, ids)):
        return None
    return ids[-1]  # a space that begins every text may stand before it


def unknown_characters(tokenizer: Tokenizer, text: str, unknown: int) -> str:
    """The first few characters of a text that a tokenizer does not know, for a message."""
    found = []
    for character in dict.fromkeys(text[:10_000]):
        if character != " " and tokenizer.encode(character, add_special_tokens=False)[-1:] == [unknown]:
            found.append(character)
    few = " ".join(map(repr, found[:8]))
    return few + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def problem(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> str | None:
    """What is wrong with ids most of which are the unknown one, in words; None if nothing is."""
    unknown = unknown_id(tokenizer)
    count = sum(token == unknown for token in ids)
    if unknown is None or 2 * count <= len(ids) or not count:
        return None
    what = "the unknown one" if len(ids) == 1 else f"{count} of them the unknown one"
    characters = unknown_characters(tokenizer, text, unknown)
    return (
        f"{len(text):,} characters became {len(ids):,} {'token' if len(ids) == 1 else 'tokens'}, {what}: "
        f"its tokenizer does not know {characters}"
    )
