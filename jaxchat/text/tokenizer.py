"""Text to token ids and back behind one small interface, whatever file a tokenizer came from.

`tokenizer_files` loads one; `tokenizer_json` and `tokenizer_sentencepiece` are the two kinds. Nothing here
knows a model, a chat template or JAX.
"""

from __future__ import annotations

import abc
import bisect
import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

from jaxchat.errors import UsageError

# Private-use characters, of which one that the text at hand does not contain names a control token that the
# template wrote, and another breaks a control token's spelling inside user text.
_MARKS = tuple(chr(0xF0000 + i) for i in range(64))


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
class Added:
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


def looks_special(text: str) -> bool:
    """Whether a token is spelled as those are that no text contains: `<s>`, `[PAD]`.

    Of special tokens that are pieces of the vocabulary too, these were made for the purpose. Others a file
    may have borrowed, such as `!` for padding: they stay text.
    """
    return re.fullmatch(r"▁?<.+>|\[\w+\]", text) is not None


class TextTokenizer(abc.ABC):
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

    def __init__(self, added: Iterable[Added]) -> None:
        self._added = {token.id: token for token in added}
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token.id for token in self._added.values() if token.special}
        )
        self.control_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token.id for token in self._added.values() if token.control}
        )
        self.control_regex = alternation(self.control_tokens)
        self._special_ids = frozenset(self.special_tokens.values())
        self._control_ids = frozenset(self.control_tokens.values())
        self._bytes: dict[int, bytes] = {}

    @abc.abstractmethod
    def _token_text_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is not an added one."""

    @abc.abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""

    @abc.abstractmethod
    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """Ids of `text`, its special tokens parsed, as the part of a longer text that follows token `after`.

        Args:
            text: the continuation (or, with `after` None, the beginning).
            after: the id before it: nothing gets a dummy prefix that would not get one in the whole text.
            breaker: a character that, inside a control token's spelling, says "this is text"; it is removed.
        """

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

    def break_control(self, text: str, breaker: str, *, but: Collection[str] = ()) -> str:
        """`text` with `breaker` inside the spelling of its control tokens: `encode_after` takes it for text.

        Args:
            text: what a user typed, say.
            breaker: a character that the text does not contain.
            but: control tokens that are to be obeyed.
        """
        return self.control_regex.sub(lambda m: m[0] if m[0] in but else m[0][0] + breaker + m[0][1:], text)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Special and other added tokens by their text."""
        return {token.content: token.id for token in self._added.values()}

    @abc.abstractmethod
    def _ids(self) -> Iterable[int]:
        """The ids that there are: in a broken file far fewer than the largest of them says."""

    @cached_property
    def _by_bytes(self) -> tuple[list[bytes], list[int]]:
        """The bytes of everything but control tokens, sorted, with their ids."""
        spelled = ((self.token_bytes(i), i) for i in self._ids() if i not in self._control_ids)
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


def alternation(contents: Iterable[str]) -> re.Pattern[str]:
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
