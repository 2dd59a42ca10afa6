"""A tokenizer's files as GGUF metadata: the inverse of `tokenizer_gguf.py`, and checked against it.

Keys and values only; the container is `checkpoints/`'. The kinds are llama.cpp's: `gpt2` is byte-level BPE,
`llama` SentencePiece's BPE, `t5` its Unigram, `bert` WordPiece.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from jaxchat.errors import JaxchatError
from jaxchat.text.pre_tokenizers import PRE_TOKENIZERS
from jaxchat.text.tokenizer import TextTokenizer
from jaxchat.text.tokenizer_config import Config
from jaxchat.text.tokenizer_gguf import tokenizer_of
from jaxchat.text.tokenizer_gguf_spec import KEY, TokenType
from jaxchat.text.tokenizer_json import JsonTokenizer, no_panic
from jaxchat.text.tokenizer_sentencepiece import SentencePieceTokenizer
from jaxchat.visible import shown

logger = logging.getLogger(__name__)

_INSTEAD = "give --to_hf instead, which takes the tokenizer's files as they are"


@dataclass(frozen=True)
class _Pieces:
    """A vocabulary.

    Attributes:
        kind: `tokenizer.ggml.model`.
        tokens: text by id.
        types: `TokenType` by id.
        more: further keys, without what all begin with.
    """

    kind: str
    tokens: dict[int, str]
    types: dict[int, int]
    more: Mapping[str, Any]


def metadata_of(where: Path, tokenizer: TextTokenizer, config: Config, vocab_size: int) -> dict[str, Any]:
    """The keys that stand for a tokenizer.

    Args:
        where: its directory, for messages.
        tokenizer: any that is of the library `tokenizers` or of SentencePiece.
        config: of it.
        vocab_size: rows of the embedding; what of them has no token gets a filler.

    Raises:
        JaxchatError: GGUF has no such kind, or what is read back makes other tokens of some text.
    """
    if not isinstance(tokenizer, JsonTokenizer | SentencePieceTokenizer):
        raise JaxchatError(f"{where}: GGUF knows no tokenizer of this kind; {_INSTEAD}")
    pieces = _pieces(where, tokenizer)
    count = max(vocab_size, max(pieces.tokens, default=-1) + 1)
    tokens = [pieces.tokens.get(i, f"[PAD{i}]") for i in range(count)]
    types = [int(pieces.types.get(i, TokenType.UNUSED)) for i in range(count)]
    for added in tokenizer.added_tokens.values():
        types[added] = int(TokenType.CONTROL if tokenizer.is_special(added) else TokenType.USER_DEFINED)
    for text, added in tokenizer.added_tokens.items():
        tokens[added] = text
    more = {
        name: _filled(values, count) if name == "scores" else values for name, values in pieces.more.items()
    }
    found = {
        "model": pieces.kind,
        **more,
        "tokens": tokens,
        "token_type": types,
        **_special(tokenizer, config),
    }
    metadata = {f"{KEY}{name}": value for name, value in found.items()}
    _check(where, tokenizer, metadata)
    return metadata


def _filled(scores: Mapping[int, float], count: int) -> list[float]:
    return [float(scores.get(i, -1e6)) for i in range(count)]


def _special(tokenizer: TextTokenizer, config: Config) -> dict[str, Any]:
    """Ids by name, and which of them a text begins and ends with."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    eos, *others = tokenizer.eos_ids or (None,)
    ids = {"bos": tokenizer.bos_id, "eos": eos, "eot": others[0] if others else None}
    for name, key in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = config.named(key)
        ids[name] = tokenizer.added_tokens.get(text) if text is not None else None
    begins = bool(whole) and whole[0] == tokenizer.bos_id and whole[:1] != plain[:1]
    ends = bool(whole) and whole[-1] == eos and whole[-1:] != plain[-1:]
    known = {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    return {**known, "add_bos_token": begins, "add_eos_token": ends}


def _pieces(where: Path, tokenizer: JsonTokenizer | SentencePieceTokenizer) -> _Pieces:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer.model)
    spec = tokenizer.spec()
    kind = str(spec["model"].get("type"))
    if kind not in _FROM_JSON:
        raise JaxchatError(f"{where}: GGUF knows no tokenizer of the type {kind}; {_INSTEAD}")
    return _FROM_JSON[kind](where, spec)


# --- the kinds


def _bpe(path: Path, spec: Mapping[str, Any]) -> _Pieces:
    model = spec["model"]
    tokens = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, int(TokenType.NORMAL))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    if not merges:
        raise JaxchatError(f"{path}: GGUF knows no BPE that merges nothing; {_INSTEAD}")
    if _steps(spec.get("pre_tokenizer"), "ByteLevel"):
        spelled = [f"{left} {right}" for left, right in merges]
        return _Pieces("gpt2", tokens, types, {"pre": _pre(path, spec), "merges": spelled})
    if not model.get("byte_fallback"):
        raise JaxchatError(
            f"{path}: GGUF knows no BPE that is neither of bytes nor falls back on them; {_INSTEAD}"
        )
    for number, text in tokens.items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = int(TokenType.BYTE)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    # What is merged first scores best. Single characters are never the result of a merge.
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    scores = {number: -float(order.get(text, len(order))) for number, text in tokens.items()}
    prefix = bool(_steps(spec.get("normalizer"), "Prepend")) or any(
        step.get("prepend_scheme", "always") != "never"
        for step in _steps(spec.get("pre_tokenizer"), "Metaspace")
    )
    return _Pieces("llama", tokens, types, {"pre": "default", "scores": scores, "add_space_prefix": prefix})


def _unigram(path: Path, spec: Mapping[str, Any]) -> _Pieces:
    pieces = spec["model"]["vocab"]
    tokens = {number: text for number, (text, _) in enumerate(pieces)}
    types = dict.fromkeys(tokens, int(TokenType.NORMAL))
    if (unknown := spec["model"].get("unk_id")) is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    more: dict[str, Any] = {"pre": "default", "scores": {n: score for n, (_, score) in enumerate(pieces)}}
    for step in _steps(spec.get("normalizer"), "Precompiled"):
        more["precompiled_charsmap"] = list(base64.b64decode(step["precompiled_charsmap"]))
    collapses = bool(_steps(spec.get("pre_tokenizer"), "WhitespaceSplit")) or any(
        step.get("pattern") == {"Regex": " {2,}"} for step in _steps(spec.get("normalizer"), "Replace")
    )
    more |= {"remove_extra_whitespaces": collapses, "add_space_prefix": True}
    return _Pieces("t5", tokens, types, more)


_FROM_JSON: Mapping[str, Callable[[Path, Mapping[str, Any]], _Pieces]] = {"BPE": _bpe, "Unigram": _unigram}


def _from_sentencepiece(base: sentencepiece.SentencePieceProcessor) -> _Pieces:
    asked = (
        (base.IsUnknown, TokenType.UNKNOWN),
        (base.IsControl, TokenType.CONTROL),
        (base.IsUnused, TokenType.UNUSED),
        (base.IsByte, TokenType.BYTE),
    )
    ids = range(base.GetPieceSize())
    tokens = {i: base.IdToPiece(i) for i in ids}
    types = {i: int(next((kind for test, kind in asked if test(i)), TokenType.NORMAL)) for i in ids}
    prefix = base.EncodeAsPieces("a")[:1] not in (["a"], [])
    more = {"pre": "default", "scores": {i: base.GetScore(i) for i in ids}, "add_space_prefix": prefix}
    return _Pieces("llama", tokens, types, more)


def _steps(part: Any, kind: str) -> list[dict[str, Any]]:
    """The steps of a type in a part of `tokenizer.json`, sequences gone through."""
    if not isinstance(part, dict):
        return []
    inner = [step for key in ("pretokenizers", "normalizers", "decoders") for step in part.get(key, ())]
    return [part] * (part.get("type") == kind) + [found for step in inner for found in _steps(step, kind)]


# --- how text is cut


_PROBE = (
    "Hello, World!  It's 3.14159 or 12345678; I'LL see\n\n\tTABS,  spaces   \r\n(x_y)->[z]; don't  Éa "
    "cafe\u0301 été  東京都 カタカナ 한국어 ไทย हिन्दी русский ١٢٣ ½ 🦩🦩 <|x|> https://a.b/c?d=e&f 'tis ''' "
    "... …“q” camelCase ALLCAPS A1b2 -- --- /usr/bin\n  indented\n\n\n$100,000.00 # @ ~` "
)


def _pre(path: Path, spec: Mapping[str, Any]) -> str:
    """The name of the pre-tokenizer that cuts a long and strange text as this tokenizer does.

    llama.cpp's converter tells them by what they make of a text, too.
    """
    ours = _cut(path, spec.get("pre_tokenizer"))
    ignore = bool(spec["model"].get("ignore_merges"))
    alike = [
        name
        for name, pre in PRE_TOKENIZERS.items()
        if pre.byte_level and _cut(path, _pre_spec(pre.patterns)) == ours
    ]
    exact = [name for name in alike if PRE_TOKENIZERS[name].ignore_merges == ignore]
    if not alike:
        raise JaxchatError(
            f"{path}: GGUF has no name for the way in which this tokenizer cuts text before its merges; "
            f"{_INSTEAD}"
        )
    return (exact or alike)[0]


def _pre_spec(patterns: Sequence[str]) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, last]}


def _cut(path: Path, pre: Any) -> list[str]:
    """The pieces of the probe."""
    spec = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
        "pre_tokenizer": pre, "model": {"type": "BPE", "vocab": {}, "merges": []},
    }  # fmt: skip
    with no_panic(path):
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_PROBE)]


_MOST_CHECKED = 64


def _check(where: Path, tokenizer: TextTokenizer, metadata: Mapping[str, Any]) -> None:
    """Compares what is read back: plain text and special tokens must be the same, else a line says so."""
    again = tokenizer_of(metadata, str(where))
    assert again is not None
    special = dict(list(tokenizer.special_tokens.items())[:_MOST_CHECKED])
    wanted = {text: tokenizer.encode(text, add_special_tokens=False) for text in ("Hello world", "")}
    wanted |= {text: [number] for text, number in special.items()}
    for text, ids in wanted.items():
        if again.encode(text, add_special_tokens=False, parse_special=text in special) != ids:
            raise JaxchatError(
                f"{where}: a GGUF of this tokenizer would make other tokens of {shown(text)}; {_INSTEAD}"
            )
    if again.encode(_PROBE) != tokenizer.encode(_PROBE):
        logger.warning(
            "%s: of some texts (repeated spaces, rare scripts) GGUF's tokenizer makes other tokens", where
        )
