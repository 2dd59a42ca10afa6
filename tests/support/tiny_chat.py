"""A tiny random chat model with a byte-level tokenizer and a chat template, for tests of text in and out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxchat.families import read_config
from tests.support.tiny import random_hf_tensors, write_tiny_hf

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


def write_parrot(directory: Path, text: str, **options: Any) -> Path:
    """Writes a model that says `text`, whatever it is told: each token of it leads to the next.

    Args:
      directory: created if need be.
      text: what it says, special tokens among it; its tokens are all different. `</s>` ends it.
      **options: of `write_tiny_chat`.
    """
    sizes = {"hidden_size": 264, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None}
    write_tiny_chat(directory, **{"tie_word_embeddings": False, **sizes, **options})
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    assert len(set(ids)) == len(ids), f"a token of {text!r} is there twice"
    config = read_config(json.loads((directory / "config.json").read_text()))
    tensors = {
        name: np.ones_like(value) if value.ndim == 1 else np.zeros_like(value)
        for name, value in random_hf_tensors(config).items()
    }
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    following = np.full(len(embed), ids[0])
    following[ids[:-1]] = ids[1:]
    embed[:, : len(embed)] = np.eye(len(embed))
    head[following, np.arange(len(embed))] = 1
    save_file(tensors, directory / "model.safetensors")
    return directory
