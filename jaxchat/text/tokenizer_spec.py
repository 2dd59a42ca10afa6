"""`tokenizer.json` as data: what is checked before the tokenizers library sees it, and what is changed in it.

The library checks most of a file itself; here is what it would abort the process over, or take at its word.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError
from jaxchat.files import MAX_JSON_BYTES, UnreadableError, read_bytes, text_of
from jaxchat.misplaced import refuse_misplaced
from jaxchat.text.tokenizer_config import fail, token_id
from jaxchat.visible import shown

Spec = Mapping[str, Any]
_SPACE = "▁"


def read_spec(path: Path) -> Spec:
    """Reads and checks a `tokenizer.json`.

    Raises:
        JaxchatError: it is no tokenizer, or one that the library cannot be given.
    """
    refuse_misplaced(path)
    try:
        return checked_spec(path, text_of(read_bytes(path, MAX_JSON_BYTES)))
    except UnreadableError as error:
        raise JaxchatError(f"{path}: not readable as JSON ({error}); download the file again") from None


def checked_spec(path: Path | str, text: str) -> Spec:
    """The text of a `tokenizer.json`, parsed and checked.

    Args:
        path: where it stands, for messages.
        text: at most `MAX_JSON_BYTES` of it.

    Raises:
        JaxchatError: see `read_spec`.
    """
    try:
        spec = json.loads(
            text
        )  # not `parse_json`: a vocabulary is long, and the library bounds the depth itself
    except (ValueError, RecursionError) as error:
        raise JaxchatError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(spec, dict):
        raise JaxchatError(f"{path}: is {shown(spec)}; expected a JSON object: download the file again")
    model = spec.get("model")
    if not isinstance(model, dict):
        fail(path, "model", model, "a tokenizer's model")
    _check_vocabulary(path, model.get("vocab"))
    _check_merges(path, model)
    _check_charsmaps(path, spec.get("normalizer"), "normalizer")
    added = spec.get("added_tokens") or []
    if not isinstance(added, list):
        fail(path, "added_tokens", added, "a list of tokens")
    for number, token in enumerate(added):
        if isinstance(token, dict):
            token_id(path, f"added_tokens[{number}].id", token.get("id"))
    return spec


def _check_vocabulary(path: Path | str, vocab: Any) -> None:
    """That ids are ids, and each is one token's; a list (Unigram) has none."""
    if not isinstance(vocab, dict):
        return
    if bad := next((text for text, value in vocab.items() if type(value) is not int), None):
        fail(path, f"model.vocab.{bad}", vocab[bad], "a token id")
    if vocab:
        token_id(path, "model.vocab", max(vocab.values()))
        token_id(path, "model.vocab", min(vocab.values()))
    if len(set(vocab.values())) < len(vocab):
        first: dict[int, str] = {}
        for text, value in vocab.items():
            if first.setdefault(value, text) != text:
                raise JaxchatError(
                    f"{path}: key 'model.vocab' gives {shown(first[value])} and {shown(text)} one id, "
                    f"{value}; expected an id of its own for every token: download the file again"
                )


def _check_merges(path: Path | str, model: Spec) -> None:
    """That what follows in a merge begins as `continuing_subword_prefix` says: the library cuts it off."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not str(pair[1]).startswith(prefix):
            fail(path, f"model.merges[{number}]", merge, f"two pieces, of which the second begins {prefix!r}")


def _check_charsmaps(path: Path | str, part: Any, key: str) -> None:
    """That a precompiled normalizer is as large as it says: the library reserves that."""
    if not isinstance(part, dict):
        return
    for number, step in enumerate(part.get("normalizers") or ()):
        _check_charsmaps(path, step, f"{key}.normalizers[{number}]")
    charsmap = part.get("precompiled_charsmap")
    if part.get("type") == "Precompiled" and isinstance(charsmap, str):
        try:
            data = base64.b64decode(charsmap)
        except ValueError:
            data = b""
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size > len(data) - 4:
            fail(path, f"{key}.precompiled_charsmap", charsmap, "base64 of a table with its size before it")


# --- add_prefix_space


def with_prefix_space(spec: Spec, wanted: bool) -> Spec:
    """The tokenizer with or without a space of its own at the beginning of a text.

    Byte-level tokenizers have a flag for it; those after SentencePiece a Metaspace step, or a normalizer that
    puts `▁` in front and a decoder that strips a space.
    """
    changed = dict(spec)
    for part, steps in (
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
        ("decoder", "decoders"),
    ):
        found = _flat(spec.get(part), steps)
        new = _CHANGES[part](found, wanted)
        if new != found:
            changed[part] = new[0] if len(new) == 1 else {"type": "Sequence", steps: new} if new else None
    return changed


def _flat(part: Any, steps: str) -> list[Any]:
    if not isinstance(part, dict):
        return []
    return list(part.get(steps) or []) if part.get("type") == "Sequence" else [part]


def _normalizer(steps: list[Any], wanted: bool) -> list[Any]:
    prepends = {"type": "Prepend", "prepend": _SPACE}
    spells = any(
        step.get("type") == "Replace" and step.get("content") == _SPACE
        for step in steps
        if isinstance(step, dict)
    )
    if wanted and spells and prepends not in steps:
        return [prepends, *steps]
    return steps if wanted else [step for step in steps if step != prepends]


def _pre_tokenizer(steps: list[Any], wanted: bool) -> list[Any]:
    return [_prefixing(step, wanted) for step in steps]


def _prefixing(step: Any, wanted: bool) -> Any:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": wanted}
    if kind == "Metaspace":
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if wanted == (scheme != "never"):
            return step
        rest = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return {**rest, "prepend_scheme": "first" if wanted else "never"}
    return step


def _decoder(steps: list[Any], wanted: bool) -> list[Any]:
    strips = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spells = any(
        step.get("type") == "Replace" and step.get("pattern") == {"String": _SPACE}
        for step in steps
        if isinstance(step, dict)
    )
    # Of a byte-level decoder the flag has no effect.
    steps = [
        _prefixing(s, wanted) if isinstance(s, dict) and s.get("type") == "Metaspace" else s for s in steps
    ]
    if wanted and spells and strips not in steps:
        return [*steps, strips]
    return steps if wanted else [step for step in steps if step != strips]


_CHANGES = {"normalizer": _normalizer, "pre_tokenizer": _pre_tokenizer, "decoder": _decoder}


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """Keeps from standard error what the library's Rust code prints there of an error that it raises too."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
