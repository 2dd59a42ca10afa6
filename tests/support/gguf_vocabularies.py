"""Tokenizer metadata as GGUF files have it: read from real ones, or made of Hugging Face's files."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@functools.cache
def metadata(name: str) -> dict[str, Any]:
    """The metadata of one of `NAMES`."""
    if name in _MADE:
        return _MADE[name]()
    gguf = __import__("gguf")
    fields = gguf.GGUFReader(DATA / _FILES[name]).fields
    return {key: f.contents() for key, f in fields.items() if key.startswith(("tokenizer.", "general."))}


def _qwen2() -> dict[str, Any]:
    folder = DATA / "tokenizers" / "qwen2"
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [line for line in (folder / "merges.txt").read_text().split("\n") if line]
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fillers = [f"[PAD{number}]" for number in range(len(tokens), 151_936)]
    return bpe(
        [*tokens, *fillers],
        [merge for merge in merges if not merge.startswith("#version")],
        "qwen2",
        types=[NORMAL] * len(vocab) + [CONTROL] * 3 + [UNUSED] * len(fillers),
        eos_token_id=len(tokens) - 1,
    )


def _llama3() -> dict[str, Any]:
    from jaxchat.text.tokenizer_files import load_tokenizer

    spec = json.loads(load_tokenizer(DATA / "tokenizers" / "llama3")._backend.to_str())  # type: ignore[attr-defined]
    vocab = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    types = [NORMAL] * 128_000 + [CONTROL] * (len(tokens) - 128_000)
    ids = {"bos_token_id": 128_000, "eos_token_id": vocab["<|eot_id|>"]}
    return bpe(tokens, merges, "llama-bpe", types=types, **ids)


def _t5() -> dict[str, Any]:
    spec = json.loads((DATA / "tokenizers" / "t5-small" / "tokenizer.json").read_text())
    vocab = [*spec["model"]["vocab"]]
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    vocab += [[added[number], 0.0] for number in range(len(vocab), max(added) + 1)]
    types = [CONTROL if number in added else NORMAL for number in range(len(vocab))]
    types[2] = UNKNOWN
    return {
        f"{KEY}model": "t5",
        f"{KEY}tokens": [text for text, _ in vocab],
        f"{KEY}scores": [score for _, score in vocab],
        f"{KEY}token_type": types,
        f"{KEY}add_space_prefix": True,
        f"{KEY}remove_extra_whitespaces": True,
        f"{KEY}precompiled_charsmap": list(base64.b64decode(spec["normalizer"]["precompiled_charsmap"])),
    }


def bpe(
    tokens: list[str], merges: list[str], pre: str | None, types: list[int] | None = None, **ids: int
) -> dict[str, Any]:
    """Byte-pair encoding's metadata."""
    values = {f"{KEY}model": "gpt2", f"{KEY}tokens": tokens, f"{KEY}merges": merges, f"{KEY}pre": pre}
    if types is not None:
        values[f"{KEY}token_type"] = types
    values |= {f"{KEY}{name}": value for name, value in ids.items()}
    return {key: value for key, value in values.items() if value is not None}


_MADE = {"qwen2": _qwen2, "llama-bpe": _llama3, "t5": _t5}
_FILES = {
    **{
        name: f"vocab-gguf/ggml-vocab-{name}.gguf"
        for name in (
            "baichuan bert-bge deepseek-coder falcon gpt-2 gpt-neox llama-spm phi-3".split()  # noqa: SIM905
        )
    },
    **{
        name: f"gguf-small-vocab/vocab-bpe-{name}.gguf"
        for name in ("gpt4o", "llama3", "qwen35", "smollm", "spm-gemma4")
    },
    "stories": "models/stories260K/stories260K.gguf",
}
NAMES = (*_FILES, *_MADE)
