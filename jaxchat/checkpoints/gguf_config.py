"""What a GGUF file says of its model besides the weights, as Hugging Face's small files would say it.

Needs no JAX. How architectures map is in `families/gguf.py`, tokenizers are in `text/`, weights in `gguf.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.checkpoints.gguf_file import MAGIC, OLD_MAGICS, GgufFile, part_of
from jaxchat.checkpoints.gguf_storage import dtype_of
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families.gguf import Architecture, architecture_of, hugging_face_config
from jaxchat.families.gguf_keys import GgufModel
from jaxchat.families.gguf_tensors import EMBEDDING, OUTPUT
from jaxchat.visible import shown, visible

SUFFIX = ".gguf"
_COMPARED = 1 << 24  # bytes at a time
_MAX_NAME = 80


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name, or by what it begins with; or of GGML, which the reader tells of."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) in (MAGIC, *OLD_MAGICS)
    except OSError:
        return False


def only_model_in(directory: Path) -> Path | None:
    """The one model in GGUF in a folder: its file, or the first of its parts; None where there is none.

    Raises:
      UsageError: there are several; the message lists them.
    """
    names = sorted(p.name for p in directory.iterdir() if p.suffix.lower() == SUFFIX and p.is_file())
    parts = {name: part_of(name) for name in names}
    firsts = [name for name, part in parts.items() if part is None or part[1] == 1] or names[:1]
    models = [name for name in firsts if "mmproj" not in name.lower()] or firsts  # what llama.cpp calls those
    if len(models) > 1:
        more = f" and {len(models) - 20} more" if len(models) > 20 else ""
        raise UsageError(
            f"{directory}: holds several models: {', '.join(models[:20])}{more}; give the file of one"
        )
    return directory / models[0] if models else None


def model_of(file: GgufFile) -> GgufModel:
    """What a configuration needs to know of a file."""
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    return GgufModel(file.metadata, shapes, lambda name: _small(file, name), str(file.path))


def _small(file: GgufFile, name: str) -> np.ndarray:
    return file.values(name).astype(np.float32)


def stored_dtype(file: GgufFile) -> str | None:
    """The dtype of the matrices, float32 where those differ; None of a file without tensors."""
    found = {dtype_of(entry) for entry in file.entries.values() if len(entry.shape) > 1}
    return found.pop() if len(found) == 1 else "float32" if found else None


def config_values(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of the model in Hugging Face's layout; errors as of `hugging_face_config`."""
    model = model_of(file)
    values = hugging_face_config(model)
    if (dtype := stored_dtype(file)) is not None:
        values["dtype"] = dtype
    if not values["tie_word_embeddings"] and _head_is_copy(file, architecture_of(model)):
        values["tie_word_embeddings"] = True
    return values


def _head_is_copy(file: GgufFile, architecture: Architecture) -> bool:
    """Whether the output head equals the embedding bit by bit, of architectures where it may be a copy."""
    names = (EMBEDDING, OUTPUT)
    if not architecture.is_tied or not file.entries.keys() >= set(names):
        return False
    one, other = (file.entries[name] for name in names)
    if (one.type, one.shape) != (other.type, other.shape):
        return False
    step = max(1, _COMPARED // one.row_bytes)
    pieces = (slice(start, start + step) for start in range(0, one.shape[0], step))
    return all(np.array_equal(file.raw(names[0], rows), file.raw(names[1], rows)) for rows in pieces)


def name_of(file: GgufFile) -> str:
    """`general.name`, or what the file is called."""
    said = file.metadata.get("general.name")
    name = " ".join(visible(said).split())[:_MAX_NAME] if isinstance(said, str) else ""
    part = part_of(file.path.name)
    return name or (part[0] if part else file.path.stem)


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""`general.sampling.*` -> keys of `generation_config.json`."""


def generation_values(file: GgufFile) -> dict[str, Any]:
    """The `generation_config.json` that would recommend the same sampling; empty where nothing is."""
    found: dict[str, Any] = {
        theirs: file.metadata[f"general.sampling.{ours}"]
        for ours, theirs in _SAMPLING.items()
        if f"general.sampling.{ours}" in file.metadata
    }
    numbers = {key: float(str(np.float32(v))) for key, v in found.items() if type(v) is float}
    return {"do_sample": True, **found, **numbers} if found else {}


def chat_templates(file: GgufFile) -> dict[str, str]:
    """The Jinja texts of the chat templates by name, of which "default" is the one without."""
    names = file.metadata.get("tokenizer.chat_templates", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise JaxchatError(
            f"{file.path}: tokenizer.chat_templates is {shown(names)}; expected a list of names"
        )
    keys = {"default": "tokenizer.chat_template"}
    keys |= {name: f"tokenizer.chat_template.{name}" for name in names if name != "default"}
    found = {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}
    for name, text in found.items():
        if not isinstance(text, str):
            raise JaxchatError(f"{file.path}: {keys[name]} is {shown(text)}; expected a text")
    return found


_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "mask": "mask_token",
}
"""What GGUF calls a special token (its spelling) -> what a template calls it."""


def template_variables(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a chat template may refer to."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    found = {}
    for ours, theirs in _TOKENS.items():
        number = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(tokens, list) and type(number) is int and 0 <= number < len(tokens):
            found[theirs] = str(tokens[number])
    return found
