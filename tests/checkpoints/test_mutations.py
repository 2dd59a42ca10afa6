"""No reader believes a broken file: it is read, or refused in one line, in little time and memory."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoints.adapter import read_adapter
from jaxchat.checkpoints.chimera import read_chimera, write_chimera
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.checkpoints.write import convert
from jaxchat.families import parameter_table, read_config
from jaxchat.layers.chimera import ChimeraConfig, shapes
from tests.support.adapters import lora_tensors, projections, write_adapter
from tests.support.gguf_models import write_gguf, write_gguf_adapter, write_gguf_file
from tests.support.hf_quantized import CASES as QUANTIZED
from tests.support.hf_quantized import write_quantized
from tests.support.mutations import survive
from tests.support.tiny import TINY_CONFIGS, random_hf_tensors, write_tiny_hf
from tests.support.torch_files import LAYOUTS, some_arrays, write_torch

HEADER, WHOLE, END = slice(0, 900), slice(None), slice(-900, None)
WORDS = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b"]}
SMALL = {"num_hidden_layers": 1, "vocab_size": 32}


class Case(NamedTuple):
    """A format: how a whole file of it is made, how all of it is read, and where it says how."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    part: slice


def tensors_of(file: Any) -> None:
    for name in file.entries:
        (file.values if isinstance(file, GgufFile) else file.read)(name)


def model_at(path: Path) -> None:
    """Everything that a model's files say."""
    found = ModelDirectory.at(path)
    _ = found.tokenizer, found.recommended_sampling, found.plan, found.stored_dtype
    source = found.source()
    for param in source.table:
        for layer in range(param.rows(source.config)):
            source.layer(param, layer)


def in_torch(path: Path) -> None:
    tensors_of(TorchFile(path))


def adapter_at(path: Path) -> None:
    read_adapter(path if path.suffix == ".gguf" else path.parent, CONFIG)


def in_folder(path: Path) -> None:
    model_at(path.parent)


def safetensors(folder: Path) -> Path:
    write_tiny_hf(folder, "llama", **SMALL)
    return folder / "model.safetensors"


def torch(layout: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_torch(folder / "model.bin", some_arrays(), layout)
        return folder / "model.bin"

    return write


def configuration(folder: Path) -> Path:
    return safetensors(folder).with_name("config.json")


def gguf_file(folder: Path) -> Path:
    keys = {"b.list": [1, 2, 3], "b.flags": [True, False], "a.text": "é", "a.real": 0.25}
    write_gguf_file(
        folder / "m.gguf", "llama", keys, {"matrix": np.ones((6, 64)), "cube": np.ones((3, 4, 32))}
    )
    return folder / "m.gguf"


def gguf_model(folder: Path) -> Path:
    values = {"model_type": "llama", **TINY_CONFIGS["llama"], **SMALL}
    words = {**WORDS, "tokenizer.ggml.scores": [0.0] * 5, "tokenizer.ggml.token_type": [2, 3, 3, 1, 1]}
    write_gguf(folder / "m.gguf", values, random_hf_tensors(read_config(values)), metadata=words)
    return folder / "m.gguf"


def llama2c(version: int) -> Callable[[Path], Path]:
    """A file of zeros under the header of llama2.c's export.py."""

    def write(folder: Path) -> Path:
        width, hidden, layers, heads, kv, vocab, length = sizes = 16, 24, 2, 4, 2, 32, 8
        head = width // heads
        layer = 2 * width + 2 * width * width + 2 * width * kv * head + 3 * width * hidden
        count = vocab * width + layers * layer + width
        if version == 0:
            header, count = struct.pack("<7i", *sizes), count + length * head
        else:
            header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, 1).ljust(256, b"\0")
        (folder / "m.bin").write_bytes(header + bytes(4 * count))
        return folder / "m.bin"

    return write


def quantized(name: str, file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_quantized(folder, QUANTIZED[name].section, QUANTIZED[name].make, num_hidden_layers=1)
        return folder / file

    return write


def native(file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_tiny_hf(folder / "hf", "llama", **SMALL)
        convert(folder / "hf", folder / "native")
        return folder / "native" / file

    return write


CONFIG = read_config({"model_type": "llama", **TINY_CONFIGS["llama"], **SMALL})
FACTORS = lora_tensors(projections(CONFIG))


def adapter(file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return write_adapter(folder, FACTORS, target_modules="all-linear") / file

    return write


def gguf_adapter(folder: Path) -> Path:
    values = {"model_type": "llama", **TINY_CONFIGS["llama"], **SMALL}
    return write_gguf_adapter(folder / "a.gguf", values, FACTORS)


HEADS = ChimeraConfig(heads=1, rank=2)
BASE = {param.name: jnp.ones(param.stacked_shape(CONFIG)) for param in parameter_table(CONFIG)}


def chimera(file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        params = {name: np.ones(shape, np.float32) for name, shape in shapes(HEADS, CONFIG).items()}
        write_chimera(folder / "heads", HEADS, params, CONFIG, BASE)
        return folder / "heads" / file

    return write


def chimera_at(path: Path) -> None:
    read_chimera(path.parent, CONFIG, BASE)


FORMATS = {
    "safetensors": Case(safetensors, lambda path: tensors_of(SafetensorsFile(path)), HEADER),
    "a model in safetensors": Case(safetensors, in_folder, HEADER),
    "its configuration": Case(configuration, in_folder, WHOLE),
    **{f"torch, {name}": Case(torch(name), in_torch, WHOLE) for name in LAYOUTS},
    "gguf": Case(gguf_file, lambda path: tensors_of(GgufFile(path)), HEADER),
    "a model in gguf": Case(gguf_model, model_at, slice(0, 2500)),
    "llama2.c 0": Case(llama2c(0), model_at, slice(0, 28)),
    "llama2.c 1": Case(llama2c(1), model_at, slice(0, 40)),
    "gptq": Case(quantized("gptq-sym", "model.safetensors"), in_folder, HEADER),
    "gptq's configuration": Case(quantized("gptq-sym", "config.json"), in_folder, WHOLE),
    "native": Case(native("model.safetensors"), in_folder, HEADER),
    "native's manifest": Case(native("jaxchat.json"), in_folder, WHOLE),
    "an adapter": Case(adapter("adapter_model.safetensors"), adapter_at, HEADER),
    "its settings": Case(adapter("adapter_config.json"), adapter_at, WHOLE),
    "an adapter in gguf": Case(gguf_adapter, adapter_at, HEADER),
    "a draft's heads": Case(chimera("chimera.safetensors"), chimera_at, HEADER),
    "their settings": Case(chimera("chimera_config.json"), chimera_at, WHOLE),
}


def outcomes(name: str, folder: Path, count: int, seed: int) -> Any:
    case = FORMATS[name]
    path = case.write(folder)
    return survive(path, lambda: case.read(path), count, seed, part=case.part)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path):
    assert outcomes(name, tmp_path, 100, seed=1)["refused"] > 10


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_very_many_mutated_files_are_read_or_refused(name: str, tmp_path: Path):
    assert outcomes(name, tmp_path, 20_000, seed=2)["refused"] > 1000
