"""SentencePiece tokenizers: a `.model` file, whose few settings are read from its protobuf here.

By hand: the message classes in the sentencepiece wheel refuse every protobuf older than what generated
them (0.2.3: 7.36.1), and much else holds it back.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from jaxchat.text.tokenizer import Added, TextTokenizer, looks_special, unused_marks
from jaxchat.text.tokenizer_config import NAMED_TOKENS, Config


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece `.model` with the special tokens of the files beside it.

    Text after a special token gets no dummy prefix, or, where tokenizer_config.json says `"legacy": true`,
    one unless it starts with a space (transformers' two conventions). A user-defined symbol that the
    configuration calls special becomes a control piece, which SentencePiece does not make from text; an
    ordinary piece that it calls special stays text.

    `add_prefix_space` in tokenizer_config.json decides whether a text begins with a dummy space, the model
    file where the key is not there.
    """

    def __init__(self, proto: bytes, config: Config) -> None:
        base = sentencepiece.SentencePieceProcessor(model_proto=proto)
        added = _sentencepiece_added(base, config, proto)
        super().__init__(added)
        symbols = [t.content for t in added if t.special and _is_user_defined(base, t.id)]
        proto = _as_control_pieces(proto, symbols)
        dummy_prefix = _adds_dummy_prefix(proto)
        if config.prefix_space is not None and config.prefix_space != dummy_prefix:
            dummy_prefix = config.prefix_space
            proto += _DUMMY_PREFIX if dummy_prefix else _NO_DUMMY_PREFIX
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._rest = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_WHITESPACE_CHANGES)
        self._strip = int(dummy_prefix)
        self.prefixes_segments = dummy_prefix and bool(config.raw.get("legacy", False))
        self._set_named_ids(config)
        self.vocab_size = max([self._first.vocab_size() - 1, *self._added]) + 1
        self._added_regex = re.compile("|".join(map(_added_pattern, _longest_first(added))) or r"(?!)")
        self._ids_by_content = {t.content: t.id for t in added}

    @property
    def model(self) -> sentencepiece.SentencePieceProcessor:
        """The model file, with the special tokens of those beside it."""
        return self._first

    def _set_named_ids(self, config: Config) -> None:
        bos_id = self._named_id(config.named("bos_token"), self._first.bos_id())
        eos_id = self._named_id(config.named("eos_token"), self._first.eos_id())
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_ids = (eos_id,) if eos_id >= 0 else ()
        adds_bos = config.raw.get("add_bos_token", True) and self.bos_id is not None
        self._bos_affix = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self._eos_affix = list(self.eos_ids) if config.raw.get("add_eos_token", False) else []

    def _named_id(self, content: str | None, default: int) -> int:
        """The id of a token that a file names; an ordinary piece is no added token."""
        if content is None:
            return default
        added = next((t.id for t in self._added.values() if t.content == content), None)
        return _piece_id(self._first, content) if added is None else added

    def _ids(self) -> Iterable[int]:
        return sorted({*range(self._first.vocab_size()), *self._added})

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
        if not parse_special and self.control_regex.search(text):
            breaker = unused_marks(text)[0]
            ids = self.encode_after(self.break_control(text, breaker), breaker=breaker)
        else:
            ids = self.encode_after(text)
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


def _piece_id(base: sentencepiece.SentencePieceProcessor, piece: str) -> int:
    """The id of a piece, -1 where there is none: SentencePiece answers with the unknown id then."""
    found: int = base.piece_to_id(piece)
    return found if base.id_to_piece(found) == piece else -1


def _is_text(base: sentencepiece.SentencePieceProcessor, token: Added, proto: bytes) -> bool:
    """Whether a token is an ordinary piece of the model, see `looks_special`."""
    if looks_special(token.content) or not 0 <= token.id < base.vocab_size():
        return False
    return base.id_to_piece(token.id) == token.content and _piece_kind(proto, token.id) == _NORMAL


def _longest_first(added: Iterable[Added]) -> list[Added]:
    return sorted(added, key=lambda t: len(t.content), reverse=True)


def _added_pattern(token: Added) -> str:
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}{re.escape(token.content)}{right}"


def _sentencepiece_added(
    base: sentencepiece.SentencePieceProcessor, config: Config, proto: bytes
) -> list[Added]:
    """Control pieces, the unknown piece, and the tokens of the configuration files."""
    size = base.vocab_size()
    found = {
        i: Added(content=base.id_to_piece(i), id=i, special=True)
        for i in range(size)
        if base.is_control(i) or base.is_unknown(i)
    }
    for token in config.added:
        if not _is_text(base, token, proto):
            found[token.id] = token
    by_content = {t.content for t in found.values()}
    for name in NAMED_TOKENS:
        content = config.named(name)
        if content is not None and content not in by_content:
            known = _piece_id(base, content)
            token_id = known if known >= 0 else max([size - 1, *found]) + 1  # the next free id
            token = Added(content=content, id=token_id, special=True)
            if not _is_text(base, token, proto):
                found[token_id] = token
            by_content.add(content)
    return [found[i] for i in sorted(found)]


# sentencepiece_model.proto: ModelProto.normalizer_spec is field 3, in it add_dummy_prefix is field 3 and
# remove_extra_whitespaces field 4. A message that occurs twice is merged, so appending overrides.
_NO_WHITESPACE_CHANGES = b"\x1a\x04\x18\x00\x20\x00"
_NO_DUMMY_PREFIX, _DUMMY_PREFIX = b"\x1a\x02\x18\x00", b"\x1a\x02\x18\x01"


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


_NORMAL = 1  # SentencePiece.type, field 3 of a piece


def _piece_kind(proto: bytes, token_id: int) -> int | bytes:
    """The type of a piece; ModelProto.pieces is field 1."""
    pieces = (piece for number, piece in _fields(proto) if number == 1)
    piece = next(itertools.islice(pieces, token_id, None))
    assert isinstance(piece, bytes)
    return next((kind for number, kind in _fields(piece) if number == 3), _NORMAL)


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
