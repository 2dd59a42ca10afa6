"""Tokenizers and chat templates of real models, from the reference data beside the repository."""

import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer import TextTokenizer
from jaxchat.text.tokenizer_files import load_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real templates and tokenizers are not at {DATA}")

TEMPLATES = "templates/llama.cpp/"
# Name -> (files of the directory, end of turn). A tokenizer that is not here is stood in for by one with the
# same special tokens (Gemma: Llama-2's pieces with Gemma's turn markers added).
MODELS = {
    "llama-3.1": (
        {
            "tokenizer.model": "tokenizers/llama3/tokenizer.model",
            "chat_template.jinja": TEMPLATES + "meta-llama-Llama-3.1-8B-Instruct.jinja",
        },
        "<|eot_id|>",
    ),
    "qwen2.5": (
        {
            "vocab.json": "tokenizers/qwen2/vocab.json",
            "merges.txt": "tokenizers/qwen2/merges.txt",
            "tokenizer_config.json": "tokenizers/qwen2/Qwen2.5-0.5B-Instruct.tokenizer_config.json",
        },
        "<|im_end|>",
    ),
    "qwen3": (
        {
            "vocab.json": "tokenizers/qwen2/vocab.json",
            "merges.txt": "tokenizers/qwen2/merges.txt",
            "tokenizer_config.json": "templates/tokenizer_config/qwen3/tokenizer_config.json",
            "chat_template.jinja": TEMPLATES + "Qwen-Qwen3-0.6B.jinja",
        },
        "<|im_end|>",
    ),
    "mistral-nemo": (
        {
            "tokenizer.model": "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3",
            "chat_template.jinja": TEMPLATES + "mistralai-Mistral-Nemo-Instruct-2407.jinja",
        },
        "</s>",
    ),
    "gemma-2": (
        {
            "tokenizer.model": "tokenizers/llama2/tokenizer.model",
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "32000": {"content": "<start_of_turn>", "special": True},
                    "32001": {"content": "<end_of_turn>", "special": True},
                }
            },
            "chat_template.jinja": TEMPLATES + "google-gemma-2-2b-it.jinja",
        },
        "<end_of_turn>",
    ),
    "phi-3": (
        {
            "tokenizer.json": "tokenizers/phi-3/tokenizer.json",
            "tokenizer_config.json": "tokenizers/phi-3/tokenizer_config.json",
        },
        "<|end|>",
    ),
    "phi-3.5": (
        {
            "tokenizer.json": "tokenizers/phi-3/tokenizer.json",
            "tokenizer_config.json": "tokenizers/phi-3/tokenizer_config.json",
            "chat_template.jinja": TEMPLATES + "microsoft-Phi-3.5-mini-instruct.jinja",
        },
        "<|end|>",
    ),
    "deepseek-r1": (
        {
            "tokenizer.json": "tokenizers/deepseek-r1/tokenizer.json.gz",
            "chat_template.jinja": TEMPLATES + "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
            "tokenizer_config.json": {
                "bos_token": "<｜begin▁of▁sentence｜>",
                "eos_token": "<｜end▁of▁sentence｜>",
            },
        },
        "<｜end▁of▁sentence｜>",
    ),
    "minueza": (
        {
            "tokenizer.json": "tokenizers/mistral-minueza-chat/tokenizer.json",
            "tokenizer_config.json": "tokenizers/mistral-minueza-chat/tokenizer_config.json",
        },
        "<|im_end|>",
    ),
    "minueza-model": (
        {
            "tokenizer.model": "tokenizers/mistral-minueza-chat/tokenizer.model",
            "tokenizer_config.json": "tokenizers/mistral-minueza-chat/tokenizer_config.json",
        },
        "<|im_end|>",
    ),
    "craftgpt": (
        {
            "tokenizer.json": "models/CraftGPT-hf/tokenizer.json",
            "tokenizer_config.json": "models/CraftGPT-hf/tokenizer_config.json",
        },
        "_[inst]",
    ),
}


Files = Mapping[str, str | dict[str, Any]]
"""By name in a model directory, the name in the data or what it says itself."""


@functools.cache
def load(name: str) -> tuple[TextTokenizer, ChatTemplate, str]:
    """The tokenizer, the chat template and the end of turn of one of `MODELS`; each is loaded once."""
    files, end = MODELS[name]
    tokenizer = tokenizer_of({target: source for target, source in files.items() if "template" not in target})
    with tempfile.TemporaryDirectory() as folder:
        _put_together(files, Path(folder))
        template = ChatTemplate.load(Path(folder), tokenizer)
    assert template is not None
    return tokenizer, template, end


def tokenizer_of(files: Files) -> TextTokenizer:
    """The tokenizer of these files; each is loaded once."""
    return _tokenizer(json.dumps(dict(sorted(files.items()))))


@functools.cache
def _tokenizer(files: str) -> TextTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        _put_together(json.loads(files), Path(folder))
        return load_tokenizer(Path(folder))


def _put_together(files: Files, folder: Path) -> None:
    for target, source in files.items():
        if isinstance(source, dict):
            (folder / target).write_text(json.dumps(source))
        elif not (DATA / source).is_file():
            pytest.skip(f"no {DATA / source}")
        elif source.endswith(".gz"):
            (folder / target).write_bytes(gzip.decompress((DATA / source).read_bytes()))
        else:
            shutil.copy(DATA / source, folder / target)
