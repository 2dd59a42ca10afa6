"""Tokenizers of the `tokenizers` library: `tokenizer.json`, and what is converted to it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxchat.errors import JaxchatError
from jaxchat.text.tokenizer import Added, TextTokenizer, looks_special, unused_marks


class JsonTokenizer(TextTokenizer):
    """A `tokenizers.Tokenizer` behind the `Tokenizer` interface.

    User text with a control token's spelling goes through a second backend in which every control token has
    another name. It is plain text there, tokenized in its context like any other text, with no cut around it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: Sequence[str],
        path: Path | str = "tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._path = backend, path
        added = backend.get_added_tokens_decoder()
        super().__init__(
            Added(content=t.content, id=i, special=t.special, lstrip=t.lstrip, rstrip=t.rstrip)
            for i, t in sorted(added.items())
        )
        # A token matched in normalized text can be spelled in ways a search for its name does not find.
        self._always_literal = any(t.normalized and self._added[i].control for i, t in added.items())
        self._literal: dict[str, tokenizers.Tokenizer] = {}
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        prefix = [i for i in backend.encode("").ids if i in self._special_ids][:1]
        self.bos_id = backend.token_to_id(bos) if bos is not None else (prefix[0] if prefix else None)
        self.eos_ids = tuple(i for i in map(backend.token_to_id, eos) if i is not None)
        self._piece = _piece_decoder(backend)
        self._strip = self._piece.strip if self._piece else 0
        self.prefixes_segments = _prefixes_segments(backend)

    def spec(self) -> dict[str, Any]:
        """What `tokenizer.json` says, or would say."""
        found: dict[str, Any] = json.loads(self._backend.to_str())
        return found

    def _token_text_bytes(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        return self._piece(piece) if self._piece else piece.encode()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """See `Tokenizer.decode`."""
        if self._piece is None:
            with no_panic(self._path):
                return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return super().decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def decodes_by_piece(self) -> bool:
        """False for the rare decoders (WordPiece, CTC) whose text of a token depends on its neighbours."""
        return self._piece is not None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        backend = self._backend
        if not parse_special and (self._always_literal or self.control_regex.search(text)):
            backend = self._literal_backend(unused_marks(text)[0])
        return self._encoded(backend, text, add_special_tokens)

    def _encoded(
        self, backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False
    ) -> list[int]:
        with no_panic(self._path):
            return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """See `TextTokenizer.encode_after`."""
        backend, mark = self._backend, ""
        if breaker and breaker in text:
            mark = next(m for m in unused_marks(text, breaker))
            backend = self._literal_backend(mark)
            text = self.control_regex.sub(lambda m: f"{mark}{m[0]}{mark}", text).replace(breaker, "")
        if after is None or not text:
            return self._encoded(backend, text)
        return self._after_anchor(backend, text, after, mark)

    def _after_anchor(self, backend: tokenizers.Tokenizer, text: str, after: int, mark: str) -> list[int]:
        """Encode behind a stand-in for what precedes, and cut the stand-in's ids off again."""
        if after in self._added:
            token = self._added[after]
            anchors = [f"{mark}{token.content}{mark}" if token.control else token.content]
        elif self._needs_anchor:
            anchors = ["\n", "a", ".", "0"]
        else:
            anchors = []
        for anchor in anchors:
            head = self._encoded(backend, anchor)
            ids = self._encoded(backend, anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._encoded(backend, text)

    @cached_property
    def _needs_anchor(self) -> bool:
        """Whether the start of a text is treated differently from its middle (a dummy prefix space)."""
        return (
            self._strip > 0
            or self.prefixes_segments
            or "prepend" in json.dumps(_settings(self._backend)).lower()
        )

    def _literal_backend(self, mark: str) -> tokenizers.Tokenizer:
        if mark not in self._literal:
            with no_panic(self._path):
                self._literal[mark] = _rename_control_tokens(self._backend, self.control_tokens, mark)
        return self._literal[mark]

    def _ids(self) -> Iterable[int]:
        return sorted(set(self._backend.get_vocab(with_added_tokens=True).values()))


@contextlib.contextmanager
def no_panic(path: Path | str) -> Iterator[None]:
    """Turns what the tokenizers library raises into one line that names the tokenizer's file.

    It raises bare `Exception`s and, where its Rust code panics, a `BaseException` of its own.
    """
    try:
        yield
    except JaxchatError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = " ".join(str(error).split())[:200]
        raise JaxchatError(f"{path}: not a readable tokenizer ({reason}): download the file again") from error


def is_text(backend: tokenizers.Tokenizer, name: str) -> bool:
    """Whether a token that a file calls special is a piece of text in the vocabulary, see `looks_special`."""
    model = backend.model
    if looks_special(name) or model.token_to_id(name) is None:
        return False
    if isinstance(model, tokenizers.models.BPE) and not model.ignore_merges:
        return [token.value for token in model.tokenize(name)] == [name]
    # Nothing tells here how a piece came into the vocabulary but what it looks like: a character or a word.
    return len(name) == 1 or (not name.isupper() and re.fullmatch(r"(##|[▁ĠĊ]*)[^\W\d_]*", name) is not None)


def _settings(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The normalizer, pre-tokenizer and decoder as JSON."""
    parts = {
        "normalizer": backend.normalizer,
        "pre_tokenizer": backend.pre_tokenizer,
        "decoder": backend.decoder,
    }
    return {
        name: json.loads(part.__getstate__()) if part is not None else None for name, part in parts.items()
    }


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of steps."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _prefixes_segments(backend: tokenizers.Tokenizer) -> bool:
    settings = _settings(backend)
    prepend = any(s["type"] == "Prepend" for s in _steps(settings["normalizer"], "normalizers"))
    always = any(
        s["type"] == "Metaspace" and s.get("prepend_scheme", "always") == "always"
        for s in _steps(settings["pre_tokenizer"], "pretokenizers")
    )
    return prepend or always


def _rename_control_tokens(
    backend: tokenizers.Tokenizer, control: Mapping[str, int], mark: str
) -> tokenizers.Tokenizer:
    """The same tokenizer with each control token called `mark + name + mark`: its plain name is text."""
    names = {name: f"{mark}{name}{mark}" for name in control}
    renamed = _renamed_over_same_model(backend, names) or _renamed_copy(backend, names)
    for name, token_id in control.items():
        if renamed.token_to_id(names[name]) != token_id:
            raise JaxchatError(
                f"tokenizer: the special token {name!r} cannot be told apart from text in this tokenizer"
            )
    return renamed


def _renamed_over_same_model(
    backend: tokenizers.Tokenizer, names: Mapping[str, str]
) -> tokenizers.Tokenizer | None:
    """The tokenizer with added tokens renamed, in a millisecond: its vocabulary is not copied.

    None where a name is in the vocabulary itself, or the ids would be others.
    """
    if backend.truncation or backend.padding or any(backend.model.token_to_id(n) is not None for n in names):
        return None
    renamed = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(renamed, part, value)
    added = sorted(backend.get_added_tokens_decoder().items())
    tokens = [_renamed_token(token, names) for _, token in added]
    renamed.add_tokens(tokens)
    same = all(renamed.token_to_id(t.content) == i for (i, _), t in zip(added, tokens, strict=True))
    return renamed if same else None


def _renamed_token(token: tokenizers.AddedToken, names: Mapping[str, str]) -> tokenizers.AddedToken:
    # Matching in normalized text can fail in the middle of a text, and would leave the mark there.
    return tokenizers.AddedToken(
        names.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized and token.content not in names,
        special=token.special,
    )


def _renamed_copy(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer with tokens renamed in its vocabulary too."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)  # see `_renamed_token`
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        in_vocab = names.keys() & model["vocab"].keys()
        for name in in_vocab - (_merged(model) if in_vocab else set()):
            model["vocab"][names[name]] = model["vocab"].pop(name)
    if model.get("unk_token") in names and names[model["unk_token"]] in model["vocab"]:
        model["unk_token"] = names[model["unk_token"]]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _merged(model: Mapping[str, Any]) -> set[str]:
    """What a BPE model's merges take and make, which has to stay in its vocabulary."""
    pairs = [m if isinstance(m, list) else m.split(" ") for m in model.get("merges", ())]
    return {piece for pair in pairs for piece in (*pair, "".join(pair))}


@dataclass(frozen=True)
class _PieceDecoder:
    """A decoder whose text is the concatenation of each token's bytes, less `strip` leading spaces."""

    byte_level: bool
    byte_fallback: bool
    replace: tuple[tuple[str, str], ...]
    strip: int

    def __call__(self, piece: str) -> bytes:
        if self.byte_level:
            table = byte_level_table()
            try:
                return bytes([table[c] for c in piece])
            except KeyError:
                return piece.encode()
        if self.byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        for old, new in self.replace:
            piece = piece.replace(old, new)
        return piece.encode()


def _piece_decoder(backend: tokenizers.Tokenizer) -> _PieceDecoder | None:
    """What the decoder does to a token; None where its text is not a concatenation of tokens' bytes."""
    byte_level, byte_fallback, replace, strip = False, False, [], 0
    for step in _steps(_settings(backend)["decoder"], "decoders"):
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) == 1:
                replace.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replace.append((old, " "))
                strip = int(step.get("prepend_scheme", "always") != "never")
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                strip = start
            case _:
                return None
    if not (byte_level or byte_fallback or replace) or (byte_level and (replace or byte_fallback or strip)):
        return None
    return _PieceDecoder(byte_level, byte_fallback, tuple(replace), strip)


@cache
def byte_level_table() -> Mapping[str, int]:
    """Character to byte of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
