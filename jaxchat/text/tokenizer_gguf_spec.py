"""GGUF's kinds of tokenizers as `tokenizer.json`: a function a kind, and the table of them.

Each gives what the `tokenizers` library builds from. The metadata has been read and checked before, in
`tokenizer_gguf.py`; how the names of pre-tokenizers cut text is in `pre_tokenizers.py`.
"""

from __future__ import annotations

import base64
import enum
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.errors import JaxchatError
from jaxchat.text.pre_tokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from jaxchat.visible import shown

logger = logging.getLogger(__name__)

_SPACE = "▁"
KEY = "tokenizer.ggml."


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type` (gguf's TokenType)."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A GGUF's tokenizer metadata, checked.

    Attributes:
        where: the file, for messages.
        kind: `tokenizer.ggml.model`.
        pre: how text is cut, see `PreTokenizer`.
        tokens: texts by id, each another.
        ids: the reverse.
        types: of each token.
        scores: of each token, or empty.
        merges: pairs in their order, each of two tokens that make a third.
        special: ids of the tokens by name (`bos`, `eos`, ...) that the file or its kind gives.
        adds: which of `bos`, `eos` and `sep` a text gets.
        raw: the metadata itself, for what is of one kind only.
    """

    where: str
    kind: str
    pre: PreTokenizer
    tokens: Sequence[str]
    ids: Mapping[str, int]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    raw: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        """The text of a special token by its name."""
        return self.tokens[self.special[name]] if name in self.special else None

    def flag(self, key: str, default: bool) -> bool:
        """See `flag`."""
        return flag(self.raw, self.where, key, default)


def flag(metadata: Mapping[str, Any], where: str, key: str, default: bool) -> bool:
    """A switch of the metadata.

    Raises:
        JaxchatError: it is there, and no switch.
    """
    value = metadata.get(KEY + key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise JaxchatError(
            f"{where}: key '{KEY}{key}' is {shown(value)}; expected true or false: "
            "convert the model to GGUF again"
        )
    return value


def pre_tokenizer_of(where: str, kind: str, name: str) -> PreTokenizer:
    """What a kind and `tokenizer.ggml.pre` say; with a warning, where that is nothing known, the default."""
    if kind == "gemma4":
        return PRE_TOKENIZERS["gemma4"]
    if kind != "gpt2" or name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS.get(name, DEFAULT) if kind == "gpt2" else DEFAULT
    found = f"is {shown(name)}, which is not known" if name else "is missing"
    logger.warning(
        "%s: key '%spre' %s: text is cut the default way, so some tokens may be wrong", where, KEY, found
    )
    return DEFAULT


# --- the kinds


def _gpt2(vocabulary: Vocabulary) -> dict[str, Any]:
    """Byte-level BPE, or BPE over text where the pre-tokenizer says so."""
    pre = vocabulary.pre
    if not pre.byte_level:
        return _text_bpe(vocabulary)
    steps = [*map(_split, pre.patterns), _byte_level(add_prefix_space=False)]
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _byte_level(add_prefix_space=True),
        "model": _bpe(vocabulary, vocabulary.merges, ignore_merges=pre.ignore_merges),
    }


def _text_bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    """BPE over text with `▁` for a space, line by line; what has no token is bytes (Gemma 4)."""
    return {
        "normalizer": _replaces({"String": " "}, _SPACE),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_split, vocabulary.pre.patterns)]},
        "decoder": _sequence("decoders", [_replaces({"String": _SPACE}, " "), _BYTES, _FUSE]),
        "model": _bpe(vocabulary, vocabulary.merges, byte_fallback=_has_bytes(vocabulary)),
    }


def _llama(vocabulary: Vocabulary) -> dict[str, Any]:
    """SentencePiece's BPE: the pair whose result scores best is merged first."""
    normalizers, decoders = [_replaces({"String": " "}, _SPACE)], [_replaces({"String": _SPACE}, " ")]
    decoders += [_BYTES, _FUSE]
    if vocabulary.flag("add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": _sequence("normalizers", normalizers),
        "decoder": _sequence("decoders", decoders),
        "model": _bpe(vocabulary, _merges_by_score(vocabulary), byte_fallback=_has_bytes(vocabulary)),
    }


def _t5(vocabulary: Vocabulary) -> dict[str, Any]:
    """SentencePiece's Unigram: the most probable pieces, after a normalization that comes as a table."""
    prefixed = vocabulary.flag("add_space_prefix", False)
    collapses = vocabulary.flag("remove_extra_whitespaces", False)
    normalizers = _charsmap(vocabulary)
    if collapses:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append(_replaces({"Regex": " {2,}"}, " "))
    if prefixed or collapses:
        normalizers.append({"type": "Prepend", "prepend": _SPACE})
    normalizers.append(_replaces({"String": " "}, _SPACE))
    scheme = "always" if prefixed or collapses else "never"
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    return {
        "normalizer": _sequence("normalizers", normalizers),
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.special.get("unk"),
            "vocab": list(map(list, zip(vocabulary.tokens, _log_probabilities(vocabulary), strict=True))),
            "byte_fallback": _has_bytes(vocabulary),
        },
    }


def _bert(vocabulary: Vocabulary) -> dict[str, Any]:
    """WordPiece. The file marks where a word begins, with `▁`; WordPiece what goes on in it, with `##`."""
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": vocabulary.flag("normalizer.strip_accents", lowercase),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": vocabulary.text("unk") or "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": _word_pieces(vocabulary),
        },
    }


KINDS: dict[str, Callable[[Vocabulary], dict[str, Any]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "gemma4": _text_bpe,
}
"""By `tokenizer.ggml.model`; `rwkv` is no `tokenizer.json`, see `tokenizer_rwkv.py`."""


def spec_of(vocabulary: Vocabulary) -> dict[str, Any]:
    """All of `tokenizer.json`."""
    parts = KINDS[vocabulary.kind](vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
        "decoder": None,
        **parts,
    }


# --- models


def _bpe(
    vocabulary: Vocabulary,
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    end = _end_of_text(vocabulary)
    return {
        "type": "BPE",
        "unk_token": vocabulary.text("unk") if vocabulary.special.get("unk", end) < end else None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(zip(vocabulary.tokens[:end], range(end), strict=True)),
        "merges": merges,
    }


def _end_of_text(vocabulary: Vocabulary) -> int:
    """How many tokens the model itself needs: at the end stand added ones, and fillers for rows of the table.

    Left out of the model, as Hugging Face's files have it, an added token can be told from its text cheaply.
    """
    end = len(vocabulary.tokens)
    while end and _is_filler(vocabulary, end - 1):
        end -= 1
    while end and _is_added(vocabulary, end - 1):
        end -= 1
    return end


def _is_filler(vocabulary: Vocabulary, token_id: int) -> bool:
    unused = vocabulary.types[token_id] == TokenType.UNUSED
    return unused and re.fullmatch(r"\[PAD\d+\]", vocabulary.tokens[token_id]) is not None


_ADDED = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED})


def _is_added(vocabulary: Vocabulary, token_id: int) -> bool:
    return vocabulary.types[token_id] in _ADDED


_LONGEST_MERGED = 256
"""Characters of a piece: SentencePiece learns 16, and trying every cut takes time squared."""


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token; first the best score, of one score the longest left part.

    The order within a score is that of transformers' conversion of SentencePiece models.
    """
    made = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    parts = {text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in made}
    scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
    ranked = sorted(zip((-score for score in scores), vocabulary.tokens, strict=True), key=lambda p: p[0])
    merges = []
    for _, same in itertools.groupby(ranked, key=lambda pair: pair[0]):
        pairs = [
            (text[:cut], text[cut:])
            for _, text in same
            if text in parts and len(text) <= _LONGEST_MERGED
            for cut in range(1, len(text))
            if text[:cut] in parts and text[cut:] in parts
        ]
        merges += sorted(pairs, key=lambda pair: -len(pair[0])) if len(pairs) > 1 else pairs
    return merges


def _log_probabilities(vocabulary: Vocabulary) -> list[float]:
    """Scores, where no token that text does not make (a byte's) is better than the worst that it makes."""
    made = (TokenType.NORMAL, TokenType.UNUSED)
    worst = min(
        (s for s, kind in zip(vocabulary.scores, vocabulary.types, strict=True) if kind in made), default=0.0
    )
    by_type: dict[int, float] = {TokenType.USER_DEFINED: 0.0, TokenType.BYTE: worst, TokenType.CONTROL: worst}
    return [by_type.get(k, s) for s, k in zip(vocabulary.scores, vocabulary.types, strict=True)]


def _word_pieces(vocabulary: Vocabulary) -> dict[str, int]:
    pieces: dict[str, int] = {}
    for token_id, text in enumerate(vocabulary.tokens):
        if not _is_added(vocabulary, token_id):
            text = text[1:] if text.startswith(_SPACE) and len(text) > 1 else f"##{text}"
        if pieces.setdefault(text, token_id) != token_id:
            raise JaxchatError(
                f"{vocabulary.where}: key '{KEY}tokens' has {shown(text)} twice, as {pieces[text]} and "
                f"{token_id}; expected each token once: convert the model to GGUF again"
            )
    return pieces


def _has_bytes(vocabulary: Vocabulary) -> bool:
    return all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))


def _charsmap(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The normalization that SentencePiece compiled: a trie, its size in four bytes before it, and texts."""
    key = f"{KEY}precompiled_charsmap"
    value = vocabulary.raw.get(key)
    if value is None:
        return []
    try:
        data = bytes(int(byte) & 0xFF for byte in value)
    except (TypeError, ValueError):
        data = b""
    if data[:4] == b"\0\0\0\0":
        return []
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size + 4 >= len(data) or data[-1] != 0:
        raise JaxchatError(
            f"{vocabulary.where}: key '{key}' is {shown(value)}; expected the bytes of a table with its size "
            "before it: convert the model to GGUF again"
        )
    return [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}]


# --- added tokens, and what a text is put between


def added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Control and unknown tokens, which are special, and user-defined ones."""
    lstrip, rstrip = _stripping(vocabulary)
    return [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": text in lstrip,
            "rstrip": text in rstrip or ("*" in rstrip and text not in _PHI3_KEEPS),
            "normalized": False,
            "special": kind != TokenType.USER_DEFINED,
        }
        for token_id, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in _ADDED
    ]


_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def _stripping(vocabulary: Vocabulary) -> tuple[Sequence[str], Sequence[str]]:
    """The tokens that swallow spaces before and after them: no key says it, so llama.cpp goes by names."""
    name = str(vocabulary.raw.get("general.name", "")).lower()
    pre, architecture = (
        str(vocabulary.raw.get(f"{KEY}pre", "")),
        str(vocabulary.raw.get("general.architecture")),
    )
    if architecture in ("nomic-bert-moe", "jina-bert-v3") or pre in (
        "jina-v2-de",
        "jina-v2-es",
        "jina-v2-code",
    ):
        return ["<mask>"], []
    if "phi-3" in name or "phi3" in name:
        return [], ["*"]
    return (["[MASK]"], []) if "modern-bert" in name else ([], [])


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    begin = vocabulary.special.get("bos") if vocabulary.adds["bos"] else None
    end = vocabulary.special.get("eos") if vocabulary.adds["eos"] else None
    between = vocabulary.special.get("sep") if vocabulary.adds["sep"] else end
    if vocabulary.kind == "bert":
        end = between
    if begin is None and end is None and between is None:
        return None
    single = [
        _affix(vocabulary, begin, 0),
        {"Sequence": {"id": "A", "type_id": 0}},
        _affix(vocabulary, end, 0),
    ]
    second = [
        _affix(vocabulary, between if end is None else None, 0),
        {"Sequence": {"id": "B", "type_id": 1}},
        _affix(vocabulary, between, 1),
    ]
    used = {token: vocabulary.tokens[token] for token in (begin, end, between) if token is not None}
    return {
        "type": "TemplateProcessing",
        "single": [step for step in single if step],
        "pair": [step for step in single + second if step],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in used.items()},
    }


def _affix(vocabulary: Vocabulary, token: int | None, type_id: int) -> dict[str, Any] | None:
    return None if token is None else {"SpecialToken": {"id": vocabulary.tokens[token], "type_id": type_id}}


# --- steps

_BYTES, _FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, add_prefix_space: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": False,
    }


def _replaces(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}
