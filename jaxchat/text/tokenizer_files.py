"""Finds and loads the tokenizer of a model directory, for every file an open LLM ships with.

Reads `tokenizer.json`, SentencePiece `.model`, Llama-3's rank file (`tokenizer.model` in tiktoken's text
format), `vocab.json` + `merges.txt`, and RWKV's vocabulary.

A tokenizer's files are taken at their word. transformers 5 rebuilds a Llama `tokenizer.json` from its class
instead of using the normalizer in the file, and then loses a leading space; the file, SentencePiece and
llama.cpp agree with each other, so the file wins here. One key of tokenizer_config.json wins over the
tokenizer's own file, as in transformers: `add_prefix_space`, whether a text begins with a space of the
tokenizer's own; where it is not there, the file decides.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import MAX_JSON_BYTES, UnreadableError, read_bytes, read_optional_json
from jaxchat.misplaced import refuse_misplaced
from jaxchat.text.tokenizer import Added, TextTokenizer
from jaxchat.text.tokenizer_config import (
    ADDED_TOKENS,
    ADDITIONAL_TEMPLATES,
    CONFIG,
    NAMED_TOKENS,
    SPECIAL_TOKENS,
    Config,
    read_config,
)
from jaxchat.text.tokenizer_json import JsonTokenizer, byte_level_table, is_text, no_panic
from jaxchat.text.tokenizer_rwkv import VOCABULARY, read_vocabulary
from jaxchat.text.tokenizer_spec import quiet_panics, read_spec, with_prefix_space

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# The pre-tokenizer regexes as published with the models (Llama-3 tokenizer.py; Qwen2 differs in `\p{N}`).
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_RANKS = 128_000
_LLAMA3_STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def text_files(directory: Path) -> list[Path]:
    """Every file of the tokenizer and the chat templates in `directory`: what belongs beside the weights."""
    found = [directory / name for name in _FILES]
    if (tokenizer := _tokenizer_file(directory)) is not None:
        found.append(tokenizer)  # it may have a name of its own
    found += sorted((directory / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def has_tokenizer(directory: Path) -> bool:
    """True if `directory` holds the files of a tokenizer that `load_tokenizer` reads."""
    return _tokenizer_file(Path(directory)) is not None


def _tokenizer_file(directory: Path) -> Path | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if os.path.lexists(directory / name):  # whatever it is: what is no file is not passed over
            return directory / name
    if os.path.lexists(directory / "vocab.json") and os.path.lexists(directory / "merges.txt"):
        return directory / "vocab.json"
    if os.path.lexists(directory / VOCABULARY):
        return directory / VOCABULARY
    found = sorted(p for p in directory.glob("*.model*") if p.is_file()) if directory.is_dir() else []
    return found[0] if len(found) == 1 else None


def load_tokenizer(directory: Path, config: Config | None = None) -> TextTokenizer:
    """Load the tokenizer in `directory`: tokenizer.json, else tokenizer.model, else vocab.json + merges.txt,
    else RWKV's vocabulary.

    Args:
        directory: a model's folder.
        config: what `read_config` read there, if it has been.

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
    config = config or read_config(directory)
    refuse_misplaced(path)
    with no_panic(path), quiet_panics():
        if path.name == "tokenizer.json":
            return _from_json(path, config)
        if path.name == "vocab.json":
            return _from_vocab_and_merges(path, config, read_optional_json(directory / "config.json"))
        if path.name == VOCABULARY:
            return read_vocabulary(path, _bytes_of(path), config)
        return _from_model_file(path, config)


def _from_json(path: Path, config: Config) -> JsonTokenizer:
    spec = read_spec(path)
    changed = spec if config.prefix_space is None else with_prefix_space(spec, config.prefix_space)
    if changed == spec:
        backend = tokenizers.Tokenizer.from_file(str(path))
    else:
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
    added = backend.get_added_tokens_decoder().values()
    if borrowed := {token.content for token in added if token.special and is_text(backend, token.content)}:
        rest = [token for token in changed["added_tokens"] if token["content"] not in borrowed]
        backend = tokenizers.Tokenizer.from_str(json.dumps({**changed, "added_tokens": rest}))
    return _with_config(path, backend, config)


def _with_config(
    path: Path,
    backend: tokenizers.Tokenizer,
    config: Config,
    *,
    bos: str | None = None,
    eos: Sequence[str] = (),
) -> JsonTokenizer:
    """Add the tokens only the configuration names, as transformers does, and wrap.

    Not the ones that are text in the vocabulary: as added tokens they would be cut out of it.
    """
    present = {t.content for t in backend.get_added_tokens_decoder().values()}
    missing = [t for t in config.added if t.content not in present and not _is_borrowed(backend, t)]
    named = {t for t in map(config.named, NAMED_TOKENS) if t is not None and not is_text(backend, t)}
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
        path=path,
    )


def _is_borrowed(backend: tokenizers.Tokenizer, token: Added) -> bool:
    return token.special and is_text(backend, token.content)


def _from_vocab_and_merges(path: Path, config: Config, model_config: Mapping[str, Any]) -> JsonTokenizer:
    """Byte-level BPE in GPT-2's file layout; Qwen2 and Qwen3 differ in the pre-tokenizer."""
    merges = path.with_name("merges.txt")
    refuse_misplaced(merges)
    for file in (path, merges):  # the library opens whatever it is
        _bytes_of(file)
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(merges)))
    family = f"{config.raw.get('tokenizer_class', '')} {model_config.get('model_type', '')}".lower()
    if "qwen" in family:
        backend.normalizer = normalizers.NFC()
        split: Any = pre_tokenizers.Split(Regex(_QWEN2_REGEX), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.prefix_space))
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return _with_config(path, backend, config, eos=["<|endoftext|>"])


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_JSON_BYTES)
    except UnreadableError as error:
        raise JaxchatError(f"{path}: not readable ({error}); download the file again") from None


def _from_model_file(path: Path, config: Config) -> TextTokenizer:
    data = _bytes_of(path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        return _from_ranks(path, data, config)
    # Not at the top: most models come without, and the library takes a while to import.
    from jaxchat.text.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(data, config)


def _from_ranks(path: Path, data: bytes, config: Config) -> JsonTokenizer:
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
    chars = {byte: char for char, byte in byte_level_table().items()}
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
    return _with_config(path, backend, config, bos=specials[0], eos=_LLAMA3_STOP)


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
