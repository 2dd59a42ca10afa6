"""What a converted checkpoint says of itself: `jaxchat.json`.

Needs no JAX. The tensors are read in `source.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import ml_dtypes
import msgspec
import numpy as np

from jaxchat.config import MAX_LAYERS, ModelConfig, RopeConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_json
from jaxchat.layer_plan import LayerPlan, PlanError
from jaxchat.typed import Count, Finite, checked
from jaxchat.visible import shown

MANIFEST = "jaxchat.json"
NATIVE_FILE = "model.safetensors"
ORBAX_FOLDER = "orbax"
FORMAT_VERSIONS = (1, 2, 3)
"""2 has `plan` or `stack`, which readers of 1 would ignore, 3 a parameter whose layers are not held alike."""

WEIGHT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Keep = Literal["small", "exact"]
"""What becomes of foreign weights that no format here holds as they are: few bits, or the numbers."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
      format: as given to `--quant`, or what the maker of a mixture calls it.
      parameters: name -> format of each that is quantized; where its layers are not all held alike, a list,
        of formats and dtypes.
    """

    format: str
    parameters: dict[str, str | list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """What a configuration says of its layers; fields as in `ModelConfig`."""

    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[Count, ...]
    layer_windows: tuple[Count, ...]
    layer_attn_scales: tuple[Finite, ...]
    layer_blocks: tuple[Count, ...] = ()
    layer_rows: dict[str, tuple[Count, ...]]

    @classmethod
    def of(cls, config: ModelConfig) -> "Stack":
        """What a configuration says."""
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**fields, "layer_rows": dict(config.layer_rows)})

    def within(self, config: ModelConfig) -> ModelConfig:
        """A configuration with these layers instead of its own.

        Raises:
          ValueError: they are not equally many, or name what is not there.
        """
        layers = len(self.layer_windows)
        lists = (self.layer_ropes, self.layer_attn_scales, self.layer_blocks, *self.layer_rows.values())
        if not 1 <= layers <= MAX_LAYERS or any(len(found) not in (0, layers) for found in lists):
            raise ValueError(f"its layers are not equally many, from 1 to {MAX_LAYERS}")
        indices = (
            (self.layer_ropes, len(self.ropes)),
            (self.layer_blocks, len(config.blocks)),
            *((rows, layers) for rows in self.layer_rows.values()),
        )
        if any(max(found, default=-1) >= limit for found, limit in indices):
            raise ValueError("a layer uses what is not there")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["layer_rows"] = tuple(self.layer_rows.items())
        return dataclasses.replace(config, num_layers=layers, **fields)


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
      quantization: how the parameters are quantized, or None.
      plan: None, or the recorded layer plan over the stacked layers, in `LayerPlan`'s spelling: the model is
        its slots.
      stack: None, or the layers of an assembled stack, which `config.json`, the base model's, knows nothing
        of.
      format_version: of this file.
    """

    format: Annotated[str, msgspec.Meta(pattern="^(native|orbax)$")]
    dtypes: dict[str, Annotated[str, msgspec.Meta(pattern="^(float32|bfloat16|float16)$")]]
    rename: tuple[str, str] = ("", "")
    tied_head: Annotated[str, msgspec.Meta(pattern="^(absent|copy|only|untied)$")] = "absent"
    source: str = ""
    parameters: int = 0
    quantization: Quantization | None = None
    plan: str | None = None
    stack: Stack | None = None

    @property
    def format_version(self) -> int:
        """Of this file."""
        formats = () if self.quantization is None else self.quantization.parameters.values()
        if any(isinstance(found, list) for found in formats):
            return FORMAT_VERSIONS[2]
        return FORMAT_VERSIONS[0] if self.plan is None and self.stack is None else FORMAT_VERSIONS[1]

    def write(self, directory: Path) -> None:
        """Writes the file into a directory."""
        values = {**dataclasses.asdict(self), "format_version": self.format_version}
        if self.stack is not None and not self.stack.layer_blocks:
            del values["stack"]["layer_blocks"]  # readers from before there were several kinds
        (directory / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks the file of a directory."""
        path = directory / MANIFEST
        values = read_json(path)
        version = values.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise JaxchatError(
                f"{path}: format_version is {shown(version)}, this jaxchat reads up to "
                f"{FORMAT_VERSIONS[-1]}; {_ADVICE}"
            )
        return checked(values, cls, where=str(path), advice=_ADVICE)


_ADVICE = "convert the model again"


def weight_dtype(name: str) -> np.dtype:
    """The dtype of a `--dtype` value."""
    if name not in WEIGHT_DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def config_of(manifest: Manifest, config: ModelConfig) -> ModelConfig:
    """A configuration with what the checkpoint decides: its stack, and whether the head is the embedding."""
    config = dataclasses.replace(config, tied_embeddings=manifest.tied_head != "untied")
    if manifest.stack is None:
        return config
    try:
        return manifest.stack.within(config)
    except ValueError as error:
        raise JaxchatError(f"{MANIFEST}: not the description of a stack ({error}); {_ADVICE}") from None


def recorded_plan(manifest: Manifest, config: ModelConfig) -> LayerPlan | None:
    """The layer plan that a checkpoint records over its stack (`config` is `config_of` it), if it does."""
    if manifest.plan is None:
        return None
    try:
        return LayerPlan.recorded(manifest.plan, config.num_layers)
    except PlanError as error:
        raise JaxchatError(f"{MANIFEST}: {error}; {_ADVICE}") from None
