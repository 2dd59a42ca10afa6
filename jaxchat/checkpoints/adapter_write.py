"""LoRA adapters written as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`.

A projection that is part of a fused one there (Phi-3's `qkv_proj`, GPT-2's `c_attn`) becomes a block of a
delta of the whole: ranks add up, and `alpha_pattern` keeps each part's strength.
Source: peft/tuners/lora/config.py and layer.py of PEFT 0.21.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from jaxchat.checkpoints.adapter_config import CONFIG
from jaxchat.checkpoints.directory import write_json
from jaxchat.config import ModelConfig, Param
from jaxchat.families import parameter_table
from jaxchat.files import write_atomically

TENSORS = "adapter_model.safetensors"


class Strength(NamedTuple):
    """What every delta is multiplied with, as PEFT says it."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or by its square root."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def alpha_of(self, rank: int) -> float:
        """What keeps the scale at another rank."""
        return self.scale * (math.sqrt(rank) if self.rslora else rank)


def write_adapter(
    directory: Path,
    config: ModelConfig,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    strength: Strength,
    *,
    base: str,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
) -> None:
    """Writes an adapter that PEFT, and `read_adapter`, load; the directory is there.

    Args:
      directory: where.
      config: of the model; its layers are the adapter's.
      factors: weight -> a float32 [L, R, I] and b [L, O, R] of every layer, the strength not included.
      strength: of all of them.
      base: what the model is called.
      dropout: that it was trained with; it changes nothing afterwards.
      layers: the model's layer that each of the configuration's is, where those are others
        (`layer_replication`).
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    targets: dict[str, None] = {}
    fused = _modules(config, factors)
    for module, params in fused.items():
        targets[module.split("{}.")[1]] = None
        for layer in range(config.num_layers):
            name = module.format(layer)
            a, b = _fused(
                [(param, *(part[layer] for part in factors[param.name])) for param in params], config
            )
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
            if len(a) != strength.rank:
                ranks[name] = len(a)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": strength.rank,
        "lora_alpha": strength.alpha,
        "use_rslora": strength.rslora,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "rank_pattern": ranks,
        "alpha_pattern": {name: strength.alpha_of(rank) for name, rank in ranks.items()},
        "fan_in_fan_out": any(param.transposed for params in fused.values() for param in params),
        "bias": "none",
        "inference_mode": True,
    }
    if layers is not None:
        values["layer_replication"] = runs_of(layers)
    write_atomically(directory / TENSORS, save(tensors, metadata={"format": "pt"}))
    write_json(directory / CONFIG, values)


def _modules(config: ModelConfig, names: Mapping[str, Any]) -> dict[str, list[Param]]:
    """Module (`{}` for the layer) -> those of some weights that it holds, in its order."""
    found: dict[str, list[Param]] = {}
    for param in sorted(parameter_table(config), key=lambda param: param.part):
        if param.name in names:
            found.setdefault(param.hf.removesuffix(".weight"), []).append(param)
    return found


def _fused(
    parts: list[tuple[Param, np.ndarray, np.ndarray]], config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The factors [R, I] and [O, R] of a module: of a fused one, blocks of them one below the other."""
    first = parts[0][0]
    if not first.fused:
        return parts[0][1:]
    a = np.concatenate([part[1] for part in parts])
    b = np.zeros((first.fused_outputs(config), len(a)), np.float32)
    column = 0
    for param, own, out in parts:
        start, stop = param.fused_range(config)
        b[start:stop, column : column + len(own)] = out
        column += len(own)
    return a, b


def runs_of(layers: Sequence[int]) -> list[list[int]]:
    """Layers as PEFT's `layer_replication` has them: [first, last + 1] of each run of neighbours.

    >>> runs_of([0, 1, 2, 2, 5, 6])
    [[0, 3], [2, 3], [5, 7]]
    """
    groups = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    return [[run[0][1], run[-1][1] + 1] for _, group in groups if (run := list(group))]
