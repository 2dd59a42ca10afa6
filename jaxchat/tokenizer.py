"""Text to token ids and back, for every tokenizer file an open LLM ships with, behind one small interface.

Reads `tokenizer.json`, SentencePiece `.model`, Llama-3's rank file (`tokenizer.model` in tiktoken's text
format) and `vocab.json` + `merges.txt`. Chat templates are in `chat_template`;
nothing here knows a model or JAX.

A tokenizer's files are taken at their word. transformers 5 rebuilds a Llama `tokenizer.json` from its class
instead of using the normalizer in the file, and then loses a leading space; the file, SentencePiece and
llama.cpp agree with each other, so the file wins here.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_optional_json

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Every file name of a tokenizer or chat template that a conversion copies beside the weights."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Private-use characters, of which one that the text at hand does not contain names a control token that the
# template wrote, and another breaks a control token's spelling inside user text.
_MARKS = tuple(chr(0xF0000 + i) for i in range(64))

# The pre-tokenizer regexes as published with the models (Llama-3 tokenizer.py; Qwen2 differs in `\p{N}`).
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_RANKS = 128_000
_LLAMA3_STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class Tokenizer(Protocol):
    """What the rest of jaxchat asks of a tokenizer.

    Attributes:
        vocab_size: number of ids, added tokens included.
        bos_id: the beginning-of-sequence id, if the tokenizer has one.
        eos_ids: ids that end a sequence according to the tokenizer's own files.
        special_tokens: the tokens that `skip_special_tokens` removes, by their text.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string.
            add_special_tokens: add BOS and the like as the tokenizer's files say (transformers' default).
            parse_special: a special token spelled out in `text` is that token; otherwise it is text.
        """

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; ids outside the vocabulary have none, bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes the token stands for (possibly half a character); `b""` for an unknown id."""


@dataclass(frozen=True, kw_only=True)
class _Added:
    """One added token: its text, id and the matching flags `tokenizers.AddedToken` documents."""

    content: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False

    @property
    def control(self) -> bool:
        """Never to be made from user text: special, or spelled like it (DeepSeek's are not marked)."""
        return self.special or re.fullmatch(r"<[|｜].*[|｜]>", self.content) is not None


class TextTokenizer:
    """What the backends share: special tokens, and decoding as a concatenation of per-token bytes.

    Attributes beyond `Tokenizer`'s:
        control_tokens: what user text must not turn into: special tokens, and others spelled `<|...|>`.
        prefixes_segments: the text after any special token gets a dummy leading space (Llama's older layout).
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefixes_segments: bool
    _strip: int  # leading spaces that decoding removes (SentencePiece's dummy prefix)

    def __init__(self, added: Iterable[_Added]) -> None:
        self._added = {token.id: token for token in added}
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token.id for token in self._added.values() if token.special}
        )
        self.control_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token.id for token in self._added.values() if token.control}
        )
        self.control_regex = _alternation(self.control_tokens)
        self._special_ids = frozenset(self.special_tokens.values())
        self._control_ids = frozenset(self.control_tokens.values())
        self._bytes: dict[int, bytes] = {}

    def _token_text_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        raise NotImplementedError

    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """Ids of `text`, its special tokens parsed, as the part of a longer text that follows token `after`.

        Args:
            text: the continuation (or, with `after` None, the beginning).
            after: the id before it: nothing gets a dummy prefix that would not get one in the whole text.
            breaker: a character that, inside a control token's spelling, says "this is text"; it is removed.
        """
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes the token stands for (possibly half a character); `b""` for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._token_text_bytes(int(token_id))
        return found

    def is_special(self, token_id: int) -> bool:
        """True for the ids that `skip_special_tokens` removes."""
        return token_id in self._special_ids

    def is_control(self, token_id: int) -> bool:
        """True for what text never turns into, see `control_tokens`."""
        return token_id in self._control_ids

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Special and other added tokens by their text."""
        return {token.content: token.id for token in self._added.values()}

    @cached_property
    def _by_bytes(self) -> tuple[list[bytes], list[int]]:
        """The bytes of everything but control tokens, sorted, with their ids."""
        spelled = ((self.token_bytes(i), i) for i in range(self.vocab_size) if i not in self._control_ids)
        pairs = sorted(pair for pair in spelled if pair[0])
        return [text for text, _ in pairs], [token_id for _, token_id in pairs]

    @cached_property
    def longest_token(self) -> int:
        """The most bytes that a token stands for."""
        return max(map(len, self._by_bytes[0]), default=0)

    def ids_starting_with(self, start: bytes) -> list[int]:
        """The tokens, control tokens excepted, whose bytes begin with `start`."""
        texts, ids = self._by_bytes
        first = bisect.bisect_left(texts, start)
        # No UTF-8 text, whole or cut, contains the byte 0xff.
        return ids[first : bisect.bisect_left(texts, start + b"\xff", lo=first)]

    def dummy_spaces(self, prompt_ids: Sequence[int]) -> int:
        """How many leading spaces of a continuation are the tokenizer's own, no part of the text (0 or 1)."""
        if prompt_ids and self.prefixes_segments and prompt_ids[-1] in self._added:
            return 1
        return self._strip if all(token in self._special_ids for token in prompt_ids) else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """See `Tokenizer.decode`."""
        special = self._special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in special).decode("utf-8", "replace")
        return _strip_spaces(text, self._strip)


def _alternation(contents: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of `contents`, the longest first; one that never matches if there are none."""
    ordered = sorted((c for c in contents if c), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _strip_spaces(text: str, most: int) -> str:
    while most and text.startswith(" "):
        text, most = text[1:], most - 1
    return text


def unused_marks(*texts: str) -> tuple[str, str]:
    """Two private-use characters that occur in none of `texts`: a `breaker`, and an internal mark."""
    free = [mark for mark in _MARKS if not any(mark in text for text in texts)]
    if len(free) < 2:
        raise UsageError(
            "the text uses the private-use characters U+F0000 to U+F003F: remove them from the prompt"
        )
    return free[0], free[1]


# --- tokenizer.json, and what is converted to it ----------------------------------------------------------


class JsonTokenizer(TextTokenizer):
    """A `tokenizers.Tokenizer` behind the `Tokenizer` interface.

    User text with a control token's spelling goes through a second backend in which every control token has
    another name. It is plain text there, tokenized in its context like any other text, with no cut around it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str | None, eos: Sequence[str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        super().__init__(
            _Added(content=t.content, id=i, special=t.special, lstrip=t.lstrip, rstrip=t.rstrip)
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

    def _token_text_bytes(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        return self._piece(piece) if self._piece else piece.encode()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """See `Tokenizer.decode`."""
        if self._piece is None:
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
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """See `TextTokenizer.encode_after`."""
        backend, mark = self._backend, ""
        if breaker and breaker in text:
            mark = next(m for m in unused_marks(text, breaker))
            backend = self._literal_backend(mark)
            text = self.control_regex.sub(lambda m: f"{mark}{m[0]}{mark}", text).replace(breaker, "")
        if after is None or not text:
            return backend.encode(text, add_special_tokens=False).ids
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
            head = backend.encode(anchor, add_special_tokens=False).ids
            ids = backend.encode(anchor + text, add_special_tokens=False).ids
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return backend.encode(text, add_special_tokens=False).ids

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
            self._literal[mark] = _rename_control_tokens(self._backend, self.control_tokens, mark)
        return self._literal[mark]


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
    spec = json.loads(backend.to_str())
    model, names = spec["model"], {name: f"{mark}{name}{mark}" for name in control}
    for token in spec["added_tokens"]:
        if token["content"] in names:
            # Matching in normalized text can fail in the middle of a text, and would leave the mark there.
            token.update(content=names[token["content"]], normalized=False)
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        in_vocab = names.keys() & model["vocab"].keys()
        for name in in_vocab - (_merge_products(model) if in_vocab else set()):
            model["vocab"][names[name]] = model["vocab"].pop(name)
    if model.get("unk_token") in names and names[model["unk_token"]] in model["vocab"]:
        model["unk_token"] = names[model["unk_token"]]
    renamed = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for name, token_id in control.items():
        if renamed.token_to_id(names[name]) != token_id:
            raise JaxchatError(
                f"tokenizer: the special token {name!r} cannot be told apart from text in this tokenizer"
            )
    return renamed


def _merge_products(model: Mapping[str, Any]) -> set[str]:
    """What a BPE model's merges make, which has to stay in its vocabulary."""
    return {"".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model.get("merges", ())}


@dataclass(frozen=True)
class _PieceDecoder:
    """A decoder whose text is the concatenation of each token's bytes, less `strip` leading spaces."""

    byte_level: bool
    byte_fallback: bool
    replace: tuple[tuple[str, str], ...]
    strip: int

    def __call__(self, piece: str) -> bytes:
        if self.byte_level:
            table = _byte_level_table()
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


_BYTE_LEVEL: dict[str, int] = {}


def _byte_level_table() -> dict[str, int]:
    """Character to byte of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted)."""
    if not _BYTE_LEVEL:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        _BYTE_LEVEL.update({chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)})
    return _BYTE_LEVEL


# --- SentencePiece ----------------------------------------------------------------------------------------


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece `.model` with the special tokens of the files beside it.

    Text after a special token gets no dummy prefix, or, where tokenizer_config.json says `"legacy": true`,
    one unless it starts with a space (transformers' two conventions). A user-defined symbol that the
    configuration calls special becomes a control piece, which SentencePiece does not make from text.
    """

    def __init__(self, proto: bytes, config: _Config) -> None:
        base = sentencepiece.SentencePieceProcessor(model_proto=proto)
        added = _sentencepiece_added(base, config)
        super().__init__(added)
        symbols = [t.content for t in added if t.special and _is_user_defined(base, t.id)]
        proto = _as_control_pieces(proto, symbols)
        dummy_prefix = _adds_dummy_prefix(proto)
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._rest = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_WHITESPACE_CHANGES)
        self._strip = int(dummy_prefix)
        self.prefixes_segments = dummy_prefix and bool(config.raw.get("legacy", False))
        self._set_named_ids(config)
        self.vocab_size = max([self._first.vocab_size() - 1, *self._added]) + 1
        self._added_regex = re.compile("|".join(map(_added_pattern, _longest_first(added))) or r"(?!)")
        self._ids_by_content = {t.content: t.id for t in added}

    def _set_named_ids(self, config: _Config) -> None:
        ids = {t.content: t.id for t in self._added.values()}
        bos, eos = config.named("bos_token"), config.named("eos_token")
        bos_id = ids.get(bos, self._first.bos_id()) if bos is not None else self._first.bos_id()
        eos_id = ids.get(eos, self._first.eos_id()) if eos is not None else self._first.eos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_ids = (eos_id,) if eos_id >= 0 else ()
        adds_bos = config.raw.get("add_bos_token", True) and self.bos_id is not None
        self._bos_affix = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self._eos_affix = list(self.eos_ids) if config.raw.get("add_eos_token", False) else []

    def _token_text_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if not 0 <= token_id < self._first.vocab_size():
            return b""
        piece = self._first.id_to_piece(token_id)
        if self._first.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        ids = self.encode_after(text) if parse_special else self._first.encode(text)
        return [*self._bos_affix, *ids, *self._eos_affix] if add_special_tokens else ids

    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """See `TextTokenizer.encode_after`."""
        ids: list[int] = []
        for segment, token in self._split(text):
            if segment:
                clean = segment.replace(breaker, "") if breaker else segment
                ids += self._encode_segment(clean, ids[-1] if ids else after)
            if token is not None:
                ids.append(token)
        return ids

    def _split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The plain text before each added token in `text`, with that token's id, and the rest at the end."""
        start = 0
        for match in self._added_regex.finditer(text):
            content = match[0] if match[0] in self._ids_by_content else match[0].strip()
            yield text[start : match.start()], self._ids_by_content[content]
            start = match.end()
        yield text[start:], None

    def _encode_segment(self, text: str, after: int | None) -> list[int]:
        if after is None:
            return self._first.encode(text)
        if self.prefixes_segments and after in self._added and not text.startswith((" ", "▁")):
            text = " " + text
        return self._rest.encode(text)


def _is_user_defined(base: sentencepiece.SentencePieceProcessor, token_id: int) -> bool:
    """Whether SentencePiece makes this piece from its plain text, which it does for no control piece."""
    if token_id >= base.vocab_size() or base.is_unknown(token_id) or base.is_control(token_id):
        return False
    return token_id in base.encode(base.id_to_piece(token_id))


def _longest_first(added: Iterable[_Added]) -> list[_Added]:
    return sorted(added, key=lambda t: len(t.content), reverse=True)


def _added_pattern(token: _Added) -> str:
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}{re.escape(token.content)}{right}"


def _sentencepiece_added(base: sentencepiece.SentencePieceProcessor, config: _Config) -> list[_Added]:
    """Control pieces, the unknown piece, and the tokens of the configuration files."""
    size = base.vocab_size()
    found = {
        i: _Added(content=base.id_to_piece(i), id=i, special=True)
        for i in range(size)
        if base.is_control(i) or base.is_unknown(i)
    }
    for token in config.added:
        found[token.id] = token
    by_content = {t.content for t in found.values()}
    for name in NAMED_TOKENS:
        content = config.named(name)
        if content is not None and content not in by_content:
            known = base.piece_to_id(content)
            # SentencePiece answers an unknown piece with the unknown id; such a name gets the next free id.
            token_id = known if base.id_to_piece(known) == content else max([size - 1, *found]) + 1
            found[token_id] = _Added(content=content, id=token_id, special=True)
            by_content.add(content)
    return [found[i] for i in sorted(found)]


# sentencepiece_model.proto: ModelProto.normalizer_spec is field 3, in it add_dummy_prefix is field 3 and
# remove_extra_whitespaces field 4. A message that occurs twice is merged, so appending overrides.
_NO_WHITESPACE_CHANGES = b"\x1a\x04\x18\x00\x20\x00"


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one protobuf message (protobuf's wire format)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _adds_dummy_prefix(proto: bytes) -> bool:
    dummy = True
    for number, value in _fields(proto):
        if number == 3 and isinstance(value, bytes):
            dummy = next((bool(flag) for inner, flag in _fields(value) if inner == 3), dummy)
    return dummy


def _as_control_pieces(proto: bytes, contents: Sequence[str]) -> bytes:
    """The model with these pieces retyped as CONTROL (SentencePiece.type is field 3, CONTROL is 3)."""
    if not contents:
        return proto
    heads = {b"\x0a" + _encode_varint(len(c.encode())) + c.encode() for c in contents}
    out = bytearray()
    at = 0
    while at < len(proto):
        start = at
        tag, at = _varint(proto, at)
        size, at = _varint(proto, at)
        payload, at = proto[at : at + size], at + size
        if tag == 0x0A and any(payload.startswith(head) for head in heads):
            payload += b"\x18\x03"
            out += b"\x0a" + _encode_varint(len(payload)) + payload
        else:
            out += proto[start:at]
    return bytes(out)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# --- loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """tokenizer_config.json with special_tokens_map.json and added_tokens.json folded in."""

    raw: Mapping[str, Any]
    added: tuple[_Added, ...]

    def named(self, key: str) -> str | None:
        """The text of a named token such as `eos_token`."""
        return token_text(self.raw.get(key))


def token_text(value: Any) -> str | None:
    """The text of a token given as a string or as a serialised `AddedToken`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _read_config(directory: Path) -> _Config:
    raw = {
        **read_optional_json(directory / "special_tokens_map.json"),
        **read_optional_json(directory / "tokenizer_config.json"),
    }
    named = {token_text(raw.get(name)) for name in NAMED_TOKENS}
    extra = raw.get("additional_special_tokens") or raw.get("extra_special_tokens") or []
    named |= {token_text(token) for token in (extra.values() if isinstance(extra, Mapping) else extra)}
    added = {
        content: _Added(content=content, id=token_id, special=content in named)
        for content, token_id in read_optional_json(directory / "added_tokens.json").items()
    }
    for token_id, token in (raw.get("added_tokens_decoder") or {}).items():
        text = token_text(token)
        if text is None or not str(token_id).isdigit():
            raise JaxchatError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder[{token_id!r}] is malformed"
            )
        flags = token if isinstance(token, Mapping) else {}
        added[text] = _Added(
            content=text,
            id=int(token_id),
            special=bool(flags.get("special", False)) or text in named,
            lstrip=bool(flags.get("lstrip", False)),
            rstrip=bool(flags.get("rstrip", False)),
        )
    return _Config(raw, tuple(sorted(added.values(), key=lambda t: t.id)))


def has_tokenizer(directory: Path) -> bool:
    """True if `directory` holds the files of a tokenizer that `load_tokenizer` reads."""
    return _tokenizer_file(Path(directory)) is not None


def _tokenizer_file(directory: Path) -> Path | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return directory / "vocab.json"
    found = sorted(p for p in directory.glob("*.model*") if p.is_file()) if directory.is_dir() else []
    return found[0] if len(found) == 1 else None


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Load the tokenizer in `directory`: tokenizer.json, else tokenizer.model, else vocab.json + merges.txt.

    Raises:
        UsageError: `directory` does not exist.
        JaxchatError: it holds no tokenizer, or one of its files is corrupt.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(
            f"{directory}: no such directory: pass the folder of a model with its tokenizer files"
        )
    path = _tokenizer_file(directory)
    if path is None:
        raise JaxchatError(
            f"{directory}: no tokenizer found: expected tokenizer.json, tokenizer.model or vocab.json and "
            "merges.txt: copy them from the original model"
        )
    config = _read_config(directory)
    try:
        if path.name == "tokenizer.json":
            return _from_json(path, config)
        if path.name == "vocab.json":
            return _from_vocab_and_merges(path, config, read_optional_json(directory / "config.json"))
        return _from_model_file(path, config)
    except JaxchatError:
        raise
    except Exception as error:  # the tokenizer libraries raise bare Exception, RuntimeError, ValueError, ...
        reason = " ".join(str(error).split())
        raise JaxchatError(f"{path}: not a readable tokenizer ({reason}): download the file again") from error


def _from_json(path: Path, config: _Config) -> JsonTokenizer:
    backend = tokenizers.Tokenizer.from_file(str(path))
    return _with_config(backend, config)


def _with_config(
    backend: tokenizers.Tokenizer, config: _Config, *, bos: str | None = None, eos: Sequence[str] = ()
) -> JsonTokenizer:
    """Add the tokens only the configuration names, as transformers does, and wrap."""
    present = {t.content for t in backend.get_added_tokens_decoder().values()}
    missing = [t for t in config.added if t.content not in present]
    named = {t for t in map(config.named, NAMED_TOKENS) if t is not None}
    known = present | {t.content for t in missing}
    backend.add_tokens(
        [
            AddedToken(
                t.content, special=t.special, lstrip=t.lstrip, rstrip=t.rstrip, normalized=not t.special
            )
            for t in missing
        ]
        + [AddedToken(t, special=True, normalized=False) for t in sorted(named - known)]
    )
    configured = config.named("eos_token")
    return JsonTokenizer(
        backend,
        bos=config.named("bos_token") or bos,
        eos=[configured] if configured is not None else list(eos),
    )


def _from_vocab_and_merges(path: Path, config: _Config, model_config: Mapping[str, Any]) -> JsonTokenizer:
    """Byte-level BPE in GPT-2's file layout; Qwen2 and Qwen3 differ in the pre-tokenizer."""
    merges = path.with_name("merges.txt")
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(merges)))
    family = f"{config.raw.get('tokenizer_class', '')} {model_config.get('model_type', '')}".lower()
    if "qwen" in family:
        backend.normalizer = normalizers.NFC()
        split: Any = pre_tokenizers.Split(Regex(_QWEN2_REGEX), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        prefix_space = bool(config.raw.get("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return _with_config(backend, config, eos=["<|endoftext|>"])


def _from_model_file(path: Path, config: _Config) -> TextTokenizer:
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        return _from_ranks(path, data, config)
    return SentencePieceTokenizer(data, config)


def _from_ranks(path: Path, data: bytes, config: _Config) -> JsonTokenizer:
    """Llama-3's rank file as BPE: a merge's priority is the rank of its result, as in tiktoken."""
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise JaxchatError(f"{path}: malformed rank file ({error}): download the file again") from error
    if len(ranks) != _LLAMA3_RANKS or set(ranks.values()) != set(range(_LLAMA3_RANKS)):
        raise JaxchatError(
            f"{path}: a rank file with {len(ranks)} tokens, but only Llama-3's ({_LLAMA3_RANKS}) is known: "
            "use a tokenizer.json instead"
        )
    chars = {byte: char for char, byte in _byte_level_table().items()}
    spell: Callable[[bytes], str] = lambda token: "".join([chars[b] for b in token])  # noqa: E731
    text = {token: spell(token) for token in ranks}
    merges = [
        (text[left], text[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _splits(token, ranks)
    ]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split: Any = pre_tokenizers.Split(Regex(_LLAMA3_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    names = {t.id: t.content for t in config.added}
    specials = [names.get(_LLAMA3_RANKS + i, name) for i, name in enumerate(_llama3_special_tokens())]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if config.raw.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], _LLAMA3_RANKS)]
        )
    return _with_config(backend, config, bos=specials[0], eos=_LLAMA3_STOP)


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to merge two known tokens into `token`, the pair of lowest ranks first."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return sorted(
        (p for p in cuts if p[0] in ranks and p[1] in ranks), key=lambda p: (ranks[p[0]], ranks[p[1]])
    )


def _llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later, by id (meta-llama's tokenizer_config.json)."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    return [named[i] if i in named else next(reserved) for i in range(256)]


# --- incremental decoding ---------------------------------------------------------------------------------


class Detokenizer:
    """Text of a growing sequence of ids, piece by piece, never half a character.

    The pieces of `push` and the one of `flush`, joined, are `tokenizer.decode(ids, ...)`; after `prompt_ids`
    they are what the ids add to the prompt's text, so the space of a first word stays.

    Args:
        tokenizer: the tokenizer the ids belong to.
        prompt_ids: what precedes the first pushed id.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._skip = skip_special_tokens
        by_piece = isinstance(tokenizer, TextTokenizer) and getattr(tokenizer, "decodes_by_piece", True)
        self._impl: _ByteDecoding | _WholeDecoding
        if by_piece:
            assert isinstance(tokenizer, TextTokenizer)
            self._impl = _ByteDecoding(tokenizer, prompt_ids, skip_special_tokens)
        else:
            self._impl = _WholeDecoding(tokenizer, prompt_ids, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Add one id; returns the text that is now certain (often one piece, sometimes nothing)."""
        return self._impl.push(int(token_id))

    @property
    def pending(self) -> bool:
        """True while part of a character is held back."""
        return self._impl.pending

    def flush(self) -> str:
        """End the sequence; returns what was held back, an unfinished character as U+FFFD."""
        return self._impl.flush()


class _ByteDecoding:
    """Concatenation of token bytes through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int], skip: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # An unfinished character is at most three bytes long, so the end of the prompt is enough.
        for token_id in prompt_ids[-8:]:
            self._utf8.decode(self._bytes(token_id))
        self._strip = tokenizer.dummy_spaces(prompt_ids)

    def _bytes(self, token_id: int) -> bytes:
        if self._skip and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _stripped(self, text: str) -> str:
        if not self._strip or not text:
            return text
        short = _strip_spaces(text, self._strip)
        self._strip = self._strip - (len(text) - len(short)) if not short else 0
        return short

    def push(self, token_id: int) -> str:
        return self._stripped(self._utf8.decode(self._bytes(token_id)))

    @property
    def pending(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        text = self._stripped(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text


class _WholeDecoding:
    """Decode everything again and emit what was added, for decoders that look at neighbouring tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        self._ids = list(prompt_ids)
        self._emitted = self._text()

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)

    def _take(self, text: str) -> str:
        if not text.startswith(self._emitted):
            return ""
        piece, self._emitted = text[len(self._emitted) :], text
        return piece

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._take(self._text().rstrip("\ufffd"))

    @property
    def pending(self) -> bool:
        return self._text() != self._emitted

    def flush(self) -> str:
        return self._take(self._text())
