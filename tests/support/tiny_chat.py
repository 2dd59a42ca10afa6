"""A tiny random chat model with a byte-level tokenizer and a chat template, for tests of text in and out."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.tiny import write_tiny_hf

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = len(SPECIAL) + 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_chat(
    directory: Path, *, template: str | None = TEMPLATE, model_type: str = "llama", **options: Any
) -> Path:
    """Writes a model directory: one token a byte, no BOS added, `TEMPLATE` as its chat template.

    Args:
      directory: created if need be.
      template: another template; None writes none.
      model_type: see `tiny.write_tiny_hf`.
      **options: of `tiny.write_tiny_hf`.
    """
    write_tiny_hf(directory, model_type, vocab_size=VOCAB_SIZE, **options)
    symbols = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
