"""Adapters for the tests: tiny PEFT directories of any model, and logits of what runs with them."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxchat import model
from jaxchat.adapter_use import Uses
from jaxchat.checkpoints.adapter import modules_of
from jaxchat.config import ModelConfig
from jaxchat.runtime import Model

PREFIX = "base_model.model."


@functools.partial(jax.jit)
def _logits(step, cache):
    return model.logits(step, model.forward(step, cache)[0])


def logits_of(loaded: Model, ids: Sequence[Sequence[int]], uses: Sequence[Uses | None] = ()) -> np.ndarray:
    """float32 [B, T, V] of token ids [B, T], in one prefill; `uses` a sequence, None the model's own."""
    tokens = np.asarray(ids, np.int32)
    batch, length = tokens.shape
    session = loaded.engine.session(loaded.plan, batch=batch, uses=loaded.uses)
    for row, own in enumerate(uses):
        session.set_adapters(loaded.uses if own is None else own, row)
    session._reserve(length)
    pad = session.padded_batch - batch
    tokens = np.pad(tokens, ((0, pad), (0, 0)))
    full, none = np.full(batch + pad, length, np.int32), np.zeros(batch + pad, np.int32)
    return np.asarray(_logits(session.step(tokens, none, full, full), session._cache))[:batch]


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The modules of a model's layers that are multiplied with, each with its outputs and inputs."""
    found = {}
    for name, module in modules_of(config).items():
        weight = module.params["weight"][0]
        if weight.role == "weight":
            shape = weight.hf_shape(config)
            found[name] = shape[::-1] if weight.transposed else shape
    return found


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    file: str = "adapter_model.safetensors",
    **config: Any,
) -> Path:
    """Writes an adapter's two files; keys of `config` that are None are left out."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    values = {name: value for name, value in values.items() if value is not None}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / file)
    return directory


def lora_tensors(
    modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, size: float = 0.2
) -> dict[str, np.ndarray]:
    """Random factors of modules, under PEFT's names."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (out, inp) in modules.items():
        for factor, shape in (("A", (rank, inp)), ("B", (out, rank))):
            found[f"{PREFIX}{name}.lora_{factor}.weight"] = size * rng.standard_normal(shape, np.float32)
    return found
