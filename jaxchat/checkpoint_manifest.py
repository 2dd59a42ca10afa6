"""What a converted checkpoint says of itself (`jaxchat.json`), and how a model directory is recognised.

Needs no JAX. The tensors are read in `jaxchat/checkpoint_source.py`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.config import ModelConfig, read_json
from jaxchat.errors import JaxchatError, UsageError

MANIFEST = "jaxchat.json"
NATIVE_FILE = "model.safetensors"
ORBAX_FOLDER = "orbax"
FORMAT_VERSION = 1

WEIGHT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`jaxchat.json`: what a converted checkpoint is and where it came from.

    Attributes:
      format: `native` or `orbax`.
      dtypes: parameter name -> `float32`, `bfloat16` or `float16`; of a quantized parameter, what it had
        before.
      rename: the (start, replacement) under which the source spelled its tensors.
      tied_head: what the source stored of a tied output head: `absent`, `copy` (equal to the embedding),
        `only` (the head and no embedding), or `untied` (both, and they differ: the model has its own head,
        whatever its configuration says). Models that are not tied have `untied`.
      source: name of the source directory.
      parameters: number of scalars.
      quantization: None, or `format`, as given to `--quant`, and `parameters`: name -> format of each that
        is quantized.
      plan: of a restructured checkpoint.
      format_version: of this file.
    """

    format: str
    dtypes: Mapping[str, str]
    rename: tuple[str, str] = ("", "")
    tied_head: str = "absent"
    source: str = ""
    parameters: int = 0
    quantization: Mapping[str, Any] | None = None
    plan: str | None = None
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        """Writes the file into a directory."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks the file of a directory."""
        path = directory / MANIFEST
        values = read_json(path)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise JaxchatError(
                f"{path}: format_version is {version!r}, this jaxchat reads {FORMAT_VERSION}; "
                "convert the model again"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            result = cls(**{key: value for key, value in values.items() if key in known})
            result = dataclasses.replace(result, rename=(result.rename[0], result.rename[1]))
        except (TypeError, IndexError, KeyError) as error:
            raise JaxchatError(
                f"{path}: not a checkpoint description ({error}); convert the model again"
            ) from None
        if result.format not in ("native", "orbax") or not isinstance(result.dtypes, dict):
            raise JaxchatError(f"{path}: format is {result.format!r}; expected 'native' or 'orbax'")
        if not isinstance(result.quantization, dict | None):
            raise JaxchatError(f"{path}: quantization is {result.quantization!r}; convert the model again")
        return result


def load_config(directory: str | Path) -> ModelConfig:
    """The configuration of a model directory of any format, without opening its tensors."""
    directory = check_directory(directory)
    config = ModelConfig.from_directory(directory)
    return config_of(Manifest.read(directory), config) if (directory / MANIFEST).exists() else config


def check_directory(directory: str | Path) -> Path:
    """The path of an existing directory; anything else is a `UsageError`."""
    directory = Path(directory)
    if not directory.exists():
        raise UsageError(f"{directory}: no such model directory; give the folder that holds config.json")
    if not directory.is_dir():
        raise UsageError(f"{directory}: not a directory; give the folder that holds config.json")
    return directory


def weight_dtype(name: str) -> np.dtype:
    """The dtype of a `--dtype` value."""
    if name not in WEIGHT_DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def config_of(manifest: Manifest, config: ModelConfig) -> ModelConfig:
    """A configuration with what the checkpoint decides: whether the output head is the embedding."""
    return dataclasses.replace(config, tied_embeddings=manifest.tied_head != "untied")
