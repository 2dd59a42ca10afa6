"""The tokenizer and the chat templates in a GGUF file's metadata, checked key by key.

What is made of them for the `tokenizers` library is in `tokenizer_gguf_spec.py`. Metadata is a mapping here,
whoever read the container.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import tokenizers

from jaxchat.errors import JaxchatError
from jaxchat.files import MAX_JSON_BYTES, MAX_SMALL_BYTES
from jaxchat.text.chat_template import ChatTemplate, special_texts
from jaxchat.text.named_templates import NAMED
from jaxchat.text.tokenizer import Added, TextTokenizer, looks_special
from jaxchat.text.tokenizer_config import CONFIG, MAX_TOKEN_ID
from jaxchat.text.tokenizer_gguf_spec import (
    KEY,
    KINDS,
    TokenType,
    Vocabulary,
    added_tokens,
    flag,
    pre_tokenizer_of,
    spec_of,
)
from jaxchat.text.tokenizer_json import JsonTokenizer, no_panic
from jaxchat.text.tokenizer_rwkv import VOCABULARY, RwkvTokenizer, unescaped, vocabulary_text
from jaxchat.text.tokenizer_spec import checked_spec, quiet_panics
from jaxchat.visible import shown

logger = logging.getLogger(__name__)

_ORIGINAL = "tokenizer.huggingface.json"
_TEMPLATE = "tokenizer.chat_template"
_AGAIN = "convert the model to GGUF again"


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> TextTokenizer | None:
    """The tokenizer that a GGUF holds, with llama.cpp's ids for every text.

    Args:
        metadata: by key, arrays as lists or numpy arrays.
        where: the file, for messages.

    Returns:
        None where there is none, as in a file of an adapter.

    Raises:
        JaxchatError: the metadata contradict themselves, or are of a kind that is not supported.
    """
    vocabulary = _read(metadata, where)
    if vocabulary is None:
        return None
    ends = _end_ids(vocabulary)
    if vocabulary.kind == "rwkv":
        return _rwkv(vocabulary, ends)
    with no_panic(where), quiet_panics():
        backend = tokenizers.Tokenizer.from_str(_json(vocabulary))
        _check_ids(vocabulary, backend)
        return JsonTokenizer(
            backend,
            bos=vocabulary.text("bos"),
            eos=[vocabulary.tokens[i] for i in ends],
            path=where,
        )


def hugging_face_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The same tokenizer and the chat templates as files, by name, that stand beside a model's weights.

    `tokenizer.json` (RWKV's vocabulary file instead), `tokenizer_config.json`, and `generation_config.json`
    where there are more ends than the EOS. Empty where the GGUF holds no tokenizer.

    Raises:
        JaxchatError: see `tokenizer_of`.
    """
    vocabulary = _read(metadata, where)
    if vocabulary is None:
        return {}
    if vocabulary.kind == "rwkv":
        files = {VOCABULARY: vocabulary_text(_rwkv_tokens(vocabulary)).encode()}
    else:
        files = {"tokenizer.json": _json(vocabulary).encode()}
    files[CONFIG] = _dumped(_config(vocabulary, templates_of(metadata, where)))
    ends = _end_ids(vocabulary)
    if len(ends) > 1:
        files["generation_config.json"] = _dumped({"eos_token_id": ends})
    return files


def chat_template_of(
    metadata: Mapping[str, Any], where: str, tokenizer: TextTokenizer
) -> ChatTemplate | None:
    """The chat template in a GGUF, and others by name; None where there is none.

    What is wrong with one is told by its `check` and `render`.
    """
    special = special_texts(tokenizer)
    try:
        found = templates_of(metadata, where)
    except JaxchatError as error:
        return ChatTemplate({}, path=where, variables=special, problem=error)
    return ChatTemplate(found, path=where, variables=special) if found else None


def templates_of(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """Jinja texts by name: `tokenizer.chat_template` is "default", `tokenizer.chat_template.NAME` is NAME.

    Raises:
        JaxchatError: one is no text, or too long for one.
    """
    found = {}
    for key, value in metadata.items():
        if key != _TEMPLATE and not key.startswith(f"{_TEMPLATE}."):
            continue
        if not isinstance(value, str) or len(value) > MAX_SMALL_BYTES or not _is_unicode(value):
            raise JaxchatError(
                f"{where}: key {shown(key)} is {shown(value)}; expected a chat template: {_AGAIN}"
            )
        # Files of RWKV's name llama.cpp's template instead of holding one.
        named = NAMED.get(value)
        found[key[len(_TEMPLATE) + 1 :] or "default"] = value if named is None else named.source
    return found


# --- reading


def _read(metadata: Mapping[str, Any], where: str) -> Vocabulary | None:
    metadata = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in metadata.items()}
    kind = metadata.get(f"{KEY}model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    if not isinstance(kind, str) or kind not in (*KINDS, "rwkv"):
        known = ", ".join([*KINDS, "rwkv"])
        raise JaxchatError(
            f"{where}: key '{KEY}model' is {shown(kind)}; expected one of {known}: "
            "take the model's Hugging Face files"
        )
    name = metadata.get(f"{KEY}pre", "")
    if not isinstance(name, str):
        _fail(where, "pre", name, "the name of a pre-tokenizer")
    pre = pre_tokenizer_of(where, kind, name)
    tokens = _tokens(metadata, where)
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) < len(tokens):
        _fail_twice(where, tokens, ids)
    types = _types(metadata, where, tokens)
    special = _special(metadata, where, kind, tokens, types, pre.defaults_bos)
    merges = _merges(metadata, where, ids) if kind in _BPE else []
    _mark_control(tokens, ids, types, special, merges)
    return Vocabulary(
        where=where,
        kind=kind,
        pre=pre,
        tokens=tokens,
        ids=ids,
        types=types,
        scores=_scores(metadata, where, kind, len(tokens)),
        merges=merges,
        special=special,
        adds=_adds(metadata, where, kind, pre.adds_bos),
        raw=metadata,
    )


def _adds(metadata: Mapping[str, Any], where: str, kind: str, adds_bos: bool) -> dict[str, bool]:
    """Which special tokens a text gets."""
    default = _ADDS.get(kind, {}) | ({"bos": adds_bos} if kind in _BPE else {})
    adds = {
        name: flag(metadata, where, f"add_{name}_token", default.get(name, False))
        for name in ("bos", "eos", "sep")
    }
    # Gemma 4's files say false, wrongly (llama.cpp's pull request 21500); BERT's have no say.
    return adds | _ALWAYS_ADDS.get(kind, {})


_BPE = ("gpt2", "gemma4")
_ADDS = {"llama": {"bos": True}, "t5": {"eos": True}}
_ALWAYS_ADDS = {"bert": {"bos": True, "sep": True}, "gemma4": {"bos": True}}
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "gpt2": {"bos": 11, "eos": 11},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}
"""Of tokens that the file does not name (llama.cpp's)."""
_ID_KEYS = {
    "bos": ("bos_token_id", "cls_token_id"),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "sep": ("seperator_token_id",),
    "pad": ("padding_token_id",),
    "mask": ("mask_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
}


def _fail(where: str, key: str, value: Any, expected: str) -> NoReturn:
    raise JaxchatError(f"{where}: key '{KEY}{key}' is {shown(value)}; expected {expected}: {_AGAIN}")


def _fail_twice(where: str, tokens: Sequence[str], ids: Mapping[str, int]) -> NoReturn:
    first = next(i for i, text in enumerate(tokens) if ids[text] != i)
    raise JaxchatError(
        f"{where}: key '{KEY}tokens' has {shown(tokens[first])} twice, as {first} and {ids[tokens[first]]}; "
        f"expected each token once: {_AGAIN}"
    )


def _array(metadata: Mapping[str, Any], where: str, key: str, what: str) -> list[Any]:
    value = metadata.get(f"{KEY}{key}")
    if not isinstance(value, list | tuple):
        _fail(where, key, value, f"a list of {what}")
    return list(value)


def _tokens(metadata: Mapping[str, Any], where: str) -> list[str]:
    tokens = _array(metadata, where, "tokens", "texts, one a token")
    if not 0 < len(tokens) <= MAX_TOKEN_ID + 1:
        _fail(where, "tokens", f"{len(tokens):,} tokens", f"1 to {MAX_TOKEN_ID + 1:,} tokens")
    if not all(type(text) is str for text in tokens) or not _is_unicode("".join(tokens)):
        number = next(i for i, text in enumerate(tokens) if type(text) is not str or not _is_unicode(text))
        _fail(where, f"tokens[{number}]", tokens[number], "the text of a token, in UTF-8")
    if "" in tokens:  # the name is llama.cpp's
        tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(tokens)]
    return tokens


def _is_unicode(text: str) -> bool:
    """Whether the file's bytes were UTF-8: what was not is kept in surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _counted(where: str, key: str, values: Sequence[Any], tokens: int) -> None:
    if len(values) != tokens:
        _fail(where, key, f"a list of {len(values):,}", f"one value for each of the {tokens:,} tokens")


def _types(metadata: Mapping[str, Any], where: str, tokens: Sequence[str]) -> list[int]:
    if f"{KEY}token_type" not in metadata:
        return [TokenType.NORMAL] * len(tokens)
    types = _array(metadata, where, "token_type", "numbers, one a token")
    _counted(where, "token_type", types, len(tokens))
    if not all(type(kind) is int for kind in types):
        number = next(i for i, kind in enumerate(types) if type(kind) is not int)
        _fail(where, f"token_type[{number}]", types[number], "a whole number, 1 to 6")
    return types


def _scores(metadata: Mapping[str, Any], where: str, kind: str, tokens: int) -> list[float]:
    if f"{KEY}scores" not in metadata and kind != "t5":
        return []
    scores = _array(metadata, where, "scores", "numbers, one a token")
    _counted(where, "scores", scores, tokens)
    for number, score in enumerate(scores):
        if type(score) not in (float, int) or not math.isfinite(score):
            _fail(where, f"scores[{number}]", score, "a finite number")
    return scores


def _merges(metadata: Mapping[str, Any], where: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens. The first space behind a first character parts them, as llama.cpp has it."""
    merges: dict[tuple[str, str], None] = {}  # of a pair that occurs twice the first counts
    for number, merge in enumerate(
        _array(metadata, where, "merges", "texts, two tokens with a space between")
    ):
        cut = merge.find(" ", 1) if type(merge) is str else -1
        if cut < 0:
            _fail(where, f"merges[{number}]", merge, "two tokens with a space between")
        left, right = merge[:cut], merge[cut + 1 :]
        if left not in ids or right not in ids or left + right not in ids:
            missing = next(text for text in (left, right, left + right) if text not in ids)
            _fail(
                where, f"merges[{number}]", merge, f"tokens of the vocabulary, which has no {shown(missing)}"
            )
        merges[left, right] = None
    return list(merges)


def _special(
    metadata: Mapping[str, Any],
    where: str,
    kind: str,
    tokens: Sequence[str],
    types: Sequence[int],
    defaults_bos: bool,
) -> dict[str, int]:
    """Ids by name. What lies outside the vocabulary, as -1 does, is none."""
    found = {}
    for name, keys in _ID_KEYS.items():
        key = next((key for key in keys if metadata.get(KEY + key) is not None), None)
        if key is not None:
            value = metadata[KEY + key]
            if type(value) is not int:
                _fail(where, key, value, "a token id")
            if 0 <= value < len(tokens):
                found[name] = value
            continue
        default = _DEFAULT_IDS.get(kind, {}).get(name, len(tokens))
        usable = default < len(tokens) and (name != "bos" or defaults_bos)
        if usable and (types[default] in _MARKED or looks_special(tokens[default])):
            found[name] = default
    return found


_MARKED = (TokenType.CONTROL, TokenType.UNKNOWN)


# --- tokens that end a text

_END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        "<｜end▁of▁sentence｜>",
    }
)
"""Whatever a file says of them (llama.cpp's list: files name one end, and models have several)."""


def _mark_control(
    tokens: Sequence[str],
    ids: Mapping[str, int],
    types: list[int],
    special: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
) -> None:
    """Tokens that end a text, and named ones made for the purpose, are control tokens; older files differ.

    Not those that merges make: they are text, as `</s>` is in Qwen's vocabulary.
    """
    named = {tokens[token_id] for token_id in special.values() if looks_special(tokens[token_id])}
    for text in (named | (_END_TEXTS & ids.keys())) - {left + right for left, right in merges}:
        if types[ids[text]] not in _MARKED:
            types[ids[text]] = TokenType.CONTROL


def _ends(vocabulary: Vocabulary) -> list[str]:
    """The texts that end a text in this vocabulary."""
    ids = vocabulary.ids
    found = {t for t in _END_TEXTS & ids.keys() if vocabulary.types[ids[t]] == TokenType.CONTROL}
    if {"<|return|>", "<|call|>"} <= found or {"<|calls|>", "<|flush|>"} <= found:
        found.discard("<|end|>")  # ends a message there, not the turn
    if "<|tool_response>" in found:
        found.discard("</s>")
    return sorted(found, key=ids.__getitem__)


def _end_ids(vocabulary: Vocabulary) -> list[int]:
    """EOS first, then whatever else ends a text."""
    named = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    ids = [vocabulary.special[name] for name in named if name in vocabulary.special]
    return list(dict.fromkeys(ids + [vocabulary.ids[text] for text in _ends(vocabulary)]))


# --- what is made of it


def _json(vocabulary: Vocabulary) -> str:
    original = vocabulary.raw.get(_ORIGINAL)
    if isinstance(original, str) and _is_consistent(vocabulary, original):
        return original
    return json.dumps(spec_of(vocabulary), ensure_ascii=False)


def _is_consistent(vocabulary: Vocabulary, original: str) -> bool:
    """Whether the model's own tokenizer.json, which the file holds too, is of the same tokens."""
    try:
        if len(original) > MAX_JSON_BYTES:
            raise JaxchatError(f"{len(original):,} characters long")
        spec = checked_spec(_ORIGINAL, original)
        if wrong := _other_token(vocabulary, spec):
            raise JaxchatError(wrong)
    except JaxchatError as error:
        logger.warning("%s: key '%s' is left aside: %s", vocabulary.where, _ORIGINAL, error)
        return False
    return True


def _other_token(vocabulary: Vocabulary, spec: Mapping[str, Any]) -> str | None:
    """What tells the two vocabularies apart."""
    model = spec["model"].get("vocab")
    listed = ((entry[0], i) for i, entry in enumerate(model)) if isinstance(model, list) else model.items()
    theirs = {i: text for text, i in listed}
    theirs |= {token["id"]: token["content"] for token in spec.get("added_tokens") or ()}
    ours = (
        {i: text for text, i in spec_of(vocabulary)["model"]["vocab"].items()}
        if vocabulary.kind == "bert"
        else {}
    )
    for token_id, text in theirs.items():
        known = token_id < len(vocabulary.tokens) and ours.get(token_id, vocabulary.tokens[token_id])
        if known != text:
            return f"token {token_id} is {shown(text)} there, and {shown(known or None)} in '{KEY}tokens'"
    kept = (TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED)
    missing = next((i for i, kind in enumerate(vocabulary.types) if kind in kept and i not in theirs), None)
    return None if missing is None else f"it has no token {missing}, {shown(vocabulary.tokens[missing])}"


def _check_ids(vocabulary: Vocabulary, backend: tokenizers.Tokenizer) -> None:
    """That the library gave added tokens the ids they have: it counts them on by itself."""
    if _ORIGINAL in vocabulary.raw:
        return
    for token in added_tokens(vocabulary):
        if backend.token_to_id(token["content"]) != token["id"]:
            raise JaxchatError(
                f"{vocabulary.where}: the token {shown(token['content'])} cannot keep its id {token['id']} "
                f"among the {len(vocabulary.tokens):,} of '{KEY}tokens': {_AGAIN}"
            )


def _rwkv_tokens(vocabulary: Vocabulary) -> dict[int, bytes]:
    kinds = (TokenType.NORMAL, TokenType.BYTE)
    return {
        i: unescaped(text)
        for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in kinds
    }


def _rwkv(vocabulary: Vocabulary, ends: Sequence[int]) -> RwkvTokenizer:
    special = vocabulary.special
    affixes = [
        [special[name]] if vocabulary.adds[name] and name in special else [] for name in ("bos", "eos")
    ]
    added = [
        Added(content=token["content"], id=token["id"], special=token["special"])
        for token in added_tokens(vocabulary)
    ]
    return RwkvTokenizer(
        _rwkv_tokens(vocabulary),
        added,
        eos=ends,
        unknown=special.get("unk"),
        affixes=(affixes[0], affixes[1]),
    )


def _named(vocabulary: Vocabulary) -> dict[str, str]:
    """Texts of special tokens by the names that transformers has for them."""
    names = {name: name for name in ("bos", "eos", "unk", "sep", "pad", "mask")}
    if vocabulary.kind == "bert":
        names["cls"] = names.pop("bos")
    return {theirs: text for theirs, ours in names.items() if (text := vocabulary.text(ours)) is not None}


def _config(vocabulary: Vocabulary, templates: Mapping[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": vocabulary.adds["bos"],
        "add_eos_token": vocabulary.adds["eos"],
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": text for name, text in _named(vocabulary).items()}
    if vocabulary.kind != "rwkv":  # transformers has none for that
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added_tokens(vocabulary)}
    if templates:
        only = templates.get("default") if len(templates) == 1 else None
        config["chat_template"] = only or [{"name": n, "template": t} for n, t in templates.items()]
    return config


def _dumped(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True).encode()
