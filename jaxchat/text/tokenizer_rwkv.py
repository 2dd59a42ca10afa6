"""RWKV's World tokenizer: at every byte the longest token that fits, and its vocabulary file.

`tokenizers` has no such model (its WordPiece takes time cubed for it). The vocabulary comes from the file
read here, or from a GGUF.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxchat.errors import JaxchatError
from jaxchat.text.tokenizer import Added, TextTokenizer, alternation, unused_marks
from jaxchat.text.tokenizer_config import MAX_TOKEN_ID, NAMED_TOKENS, Config
from jaxchat.visible import shown

VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The name of the file beside a model of Hugging Face's."""
_ONE = (1,)
_END = "<s>"  # id 0, which the file leaves out


class RwkvTokenizer(TextTokenizer):
    """Greedy longest match over bytes.

    Args:
        tokens: bytes by id; those of added tokens are only found where special tokens are parsed.
        added: special and other added tokens.
        eos: ids that end a text.
        affixes: ids before and after a text where special tokens are added.
    """

    def __init__(
        self,
        tokens: Mapping[int, bytes],
        added: Iterable[Added] = (),
        *,
        eos: Sequence[int] = (),
        unknown: int | None = None,
        affixes: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        super().__init__(added)
        self._tokens = {i: text for i, text in tokens.items() if i not in self._added}
        self._found = {text: i for i, text in sorted(self._tokens.items(), reverse=True) if text}
        self._sizes = _sizes(self._found)
        self._unknown, self._affixes = unknown, affixes
        self._added_regex = alternation(self.added_tokens)
        self._literal_regex = alternation(self.added_tokens.keys() - self.control_tokens.keys())
        self.vocab_size = max([*tokens, *self._added], default=-1) + 1
        self.bos_id = affixes[0][0] if affixes[0] else None
        self.eos_ids = tuple(eos)
        self.prefixes_segments, self._strip = False, 0

    def _token_text_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        return self._tokens.get(token_id, b"")

    def _ids(self) -> Iterable[int]:
        return sorted({*self._tokens, *self._added})

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        ids = self._split(text, self._added_regex if parse_special else self._literal_regex, None)
        return [*self._affixes[0], *ids, *self._affixes[1]] if add_special_tokens else ids

    def encode_after(self, text: str, *, after: int | None = None, breaker: str | None = None) -> list[int]:
        """See `TextTokenizer.encode_after`."""
        if breaker is None:
            breaker = unused_marks(text)[0]
        return self._split(text, self._added_regex, breaker)

    def _split(self, text: str, added: re.Pattern[str], breaker: str | None) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in added.finditer(text):
            ids += self._greedy(text[start : match.start()], breaker)
            ids.append(self.added_tokens[match[0]])
            start = match.end()
        return ids + self._greedy(text[start:], breaker)

    def _greedy(self, text: str, breaker: str | None) -> list[int]:
        data = (text.replace(breaker, "") if breaker else text).encode(errors="replace")
        ids, at, found, sizes = [], 0, self._found, self._sizes
        while at < len(data):
            for size in sizes.get(data[at : at + 2], _ONE):
                token = found.get(data[at : at + size])
                if token is not None:
                    ids.append(token)
                    at += size
                    break
            else:
                at += 1
                if self._unknown is not None:
                    ids.append(self._unknown)
        return ids


def _sizes(found: Mapping[bytes, int]) -> dict[bytes, list[int]]:
    """How long the tokens are that begin with these two bytes, the longest first."""
    sizes: dict[bytes, set[int]] = {}
    for text in found:
        sizes.setdefault(text[:2], set()).add(len(text))
    return {
        start: sorted({*lengths, *sizes.get(start[:1], ())}, reverse=True) for start, lengths in sizes.items()
    }


def unescaped(text: str) -> bytes:
    """The bytes of a token as llama.cpp's converter writes them: `\\xff` and `\\n` as in Python."""
    if "\\" not in text:
        return text.encode(errors="replace")
    out, at = bytearray(), 0
    while at < len(text):
        char = text[at]
        if char != "\\":
            out += char.encode(errors="replace")
            at += 1
            continue
        code = text[at + 1 : at + 2]
        digits = text[at + 2 : at + 4]
        if code == "x" and len(digits) == 2 and all(d in "0123456789abcdefABCDEF" for d in digits):
            out.append(int(digits, 16))
            at += 4
            continue
        out += {"t": b"\t", "n": b"\n", "r": b"\r"}.get(code, code.encode(errors="replace"))
        at += 2
    return bytes(out)


def vocabulary_text(tokens: Mapping[int, bytes]) -> str:
    """The vocabulary as its file has it: a line an id, with Python's text of the token and its length."""
    lines = []
    for token_id, data in sorted(tokens.items()):
        try:
            shown_token = repr(data.decode())
        except UnicodeDecodeError:
            shown_token = repr(data)
        lines.append(f"{token_id} {shown_token} {len(data)}\n")
    return "".join(lines)


def read_vocabulary(path: Path, data: bytes, config: Config) -> RwkvTokenizer:
    """The tokenizer in a vocabulary file, with the special tokens of the files beside it.

    Raises:
        JaxchatError: it is not such a file.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.decode(errors="replace").split("\n"), 1):
        if line.strip():
            token_id, token = _parsed(path, number, line)
            tokens[token_id] = token
    added = {token.id: token for token in config.added}
    if 0 not in tokens:
        added.setdefault(0, Added(content=_END, id=0, special=True))
    ids = {token.content: token.id for token in added.values()}
    named = {key: ids[name] for key in NAMED_TOKENS if (name := config.named(key)) in ids and name}
    begin = [named["bos_token"]] if config.raw.get("add_bos_token") and "bos_token" in named else []
    end = [named["eos_token"]] if config.raw.get("add_eos_token") and "eos_token" in named else []
    return RwkvTokenizer(tokens, added.values(), eos=[named.get("eos_token", 0)], affixes=(begin, end))


def _parsed(path: Path, number: int, line: str) -> tuple[int, bytes]:
    first, _, rest = line.strip().partition(" ")
    literal, _, size = rest.rpartition(" ")
    try:
        value = ast.literal_eval(literal) if len(literal) < 4096 and literal[:1] in "b'\"" else None
        token = value.encode() if isinstance(value, str) else value
        if isinstance(token, bytes) and len(token) == int(size) and 0 <= int(first) <= MAX_TOKEN_ID:
            return int(first), token
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise JaxchatError(
        f"{path}: line {number} is {shown(line)}; expected an id, a token as Python writes it and its length "
        "in bytes: download the file again"
    )
