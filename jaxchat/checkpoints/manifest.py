"""What a converted checkpoint says of itself: `jaxchat.json`.

Needs no JAX. The tensors are read in `source.py`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.config import ModelConfig, RopeConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_json
from jaxchat.layer_plan import LayerPlan, PlanError

MANIFEST = "jaxchat.json"
NATIVE_FILE = "model.safetensors"
ORBAX_FOLDER = "orbax"
FORMAT_VERSIONS = (1, 2)
"""2 has `plan` or `stack`, which readers of 1 would ignore."""

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
      plan: None, or the recorded layer plan over the stacked layers, in `LayerPlan`'s spelling: the model is
        its slots.
      stack: None, or the per-layer half of the configuration of an assembled stack (`stack_entry`), which
        `config.json`, the base model's, knows nothing of.
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
    stack: Mapping[str, Any] | None = None

    @property
    def format_version(self) -> int:
        """Of this file."""
        return FORMAT_VERSIONS[0] if self.plan is None and self.stack is None else FORMAT_VERSIONS[1]

    def write(self, directory: Path) -> None:
        """Writes the file into a directory."""
        values = {**dataclasses.asdict(self), "format_version": self.format_version}
        (directory / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks the file of a directory."""
        path = directory / MANIFEST
        values = read_json(path)
        version = values.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise JaxchatError(
                f"{path}: format_version is {version!r}, this jaxchat reads up to {FORMAT_VERSIONS[-1]}; "
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
        stack = dict(manifest.stack)
        ropes = tuple(_rope(values) for values in stack.pop("ropes"))
        rows = tuple((name, tuple(layers)) for name, layers in stack.pop("layer_rows").items())
        layers: dict[str, Any] = {name: tuple(stack[name]) for name in _PER_LAYER}
        layers[_KINDS] = tuple(stack.get(_KINDS, ()))
        if len({len(values) for values in layers.values() if values}) != 1:
            raise ValueError("its layers are not equally many")
        config = dataclasses.replace(config, ropes=ropes, layer_rows=rows, **layers)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise JaxchatError(f"{MANIFEST}: not the description of a stack ({error}); convert again") from None
    return dataclasses.replace(config, num_layers=len(config.layer_windows))


_PER_LAYER = ("layer_ropes", "layer_windows", "layer_attn_scales")
_KINDS = "layer_blocks"  # of a stack of several kinds of layers


def _rope(values: Mapping[str, Any]) -> RopeConfig:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return RopeConfig(**fields)


def stack_entry(config: ModelConfig) -> dict[str, Any]:
    """`Manifest.stack`: what a configuration says of its layers, as JSON takes it."""
    ropes = [dataclasses.asdict(rope) for rope in config.ropes]
    names = (*_PER_LAYER, *((_KINDS,) if config.layer_blocks else ()))
    layers = {name: list(getattr(config, name)) for name in names}
    return {"ropes": ropes, **layers, "layer_rows": {name: list(rows) for name, rows in config.layer_rows}}


def recorded_plan(manifest: Manifest, config: ModelConfig) -> LayerPlan | None:
    """The layer plan that a checkpoint records over its stack (`config` is `config_of` it), if it does."""
    if manifest.plan is None:
        return None
    try:
        if not isinstance(manifest.plan, str) or manifest.plan.lstrip().startswith("@"):
            raise PlanError(f"{manifest.plan!r} is not spelled out")
        return LayerPlan.parse(manifest.plan, config.num_layers)
    except PlanError as error:
        reason = str(error).splitlines()[0]
        raise JaxchatError(f"{MANIFEST}: the recorded plan is malformed ({reason}); convert again") from None
