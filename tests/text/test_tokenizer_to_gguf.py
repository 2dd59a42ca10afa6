"""Tokenizers written as GGUF metadata make the same tokens when they are read back."""

from pathlib import Path

import pytest

from jaxchat.errors import JaxchatError
from jaxchat.text.tokenizer_config import read_config
from jaxchat.text.tokenizer_files import load_tokenizer
from jaxchat.text.tokenizer_gguf import tokenizer_of
from jaxchat.text.tokenizer_to_gguf import metadata_of

WRITTEN = {
    "tokenizers/gpt2": ("gpt2", "gpt-2"),
    "tokenizers/llama3": ("gpt2", "llama3"),
    "tokenizers/llama2": ("llama", "default"),
    "tokenizers/llama_swift": ("llama", "default"),
    "tokenizers/mistral-minueza-chat": ("llama", "default"),
    "tokenizers/phi-3": ("llama", "default"),
    "models/TinyStories-656K/bf16": ("llama", "default"),
}
SLOW = ("tokenizers/llama3", "tokenizers/llama_swift", "tokenizers/mistral-minueza-chat")
TEXTS = (
    "Hello, World!  It's 12345 o'clock\n\n\tтекст 東京 🦩 e\u0301\r\n x_y = {'a': [1,2]} ",
    " leading",
    "a  b   c    d",
)


def written(folder: Path):
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    return tokenizer, metadata_of(folder, tokenizer, config, tokenizer.vocab_size + 3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in WRITTEN]
)
def test_tokens_are_the_same_when_read_back(shared_data, name):
    tokenizer, metadata = written(shared_data / name)
    kind, pre = WRITTEN[name]
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == (kind, pre)
    again = tokenizer_of(metadata, "again")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    for text, number in tokenizer.special_tokens.items():
        assert again.encode(text, add_special_tokens=False, parse_special=True) == [number]
    assert again.bos_id == tokenizer.bos_id
    assert set(again.eos_ids) >= set(tokenizer.eos_ids)  # and others that end a text by their names


def test_rows_without_a_token_get_fillers(shared_data):
    tokenizer, metadata = written(shared_data / "models/TinyStories-656K/bf16")
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]


def test_what_gguf_only_does_nearly_is_told(shared_data, caplog):
    """SentencePiece may take repeated spaces for one, and llama.cpp's reading of it does not."""
    written(shared_data / "models/stories260K-hf")
    assert "of some texts (repeated spaces, rare scripts) GGUF's tokenizer makes other tokens" in caplog.text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenizers/falcon-tokenizer", "no name for the way in which this tokenizer cuts text"),
        ("models/CraftGPT-hf", "GGUF knows no tokenizer of the type WordPiece"),
    ],
)
def test_what_gguf_cannot_say_is_refused(shared_data, name, says):
    with pytest.raises(JaxchatError, match=says):
        written(shared_data / name)
