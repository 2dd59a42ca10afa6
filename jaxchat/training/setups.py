"""What `jaxchat train --task` names: a task over a loaded model, what it begins with, and what becomes of it.

A new task is a function here and a row in `SETUPS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxchat.checkpoints import write
from jaxchat.checkpoints.adapter import replicated_config
from jaxchat.checkpoints.adapter_write import Strength, write_adapter
from jaxchat.checkpoints.chimera import write_chimera
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.low_rank import Adapter
from jaxchat.checkpoints.merged import MergedDirectory
from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError, option
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.chimera import ChimeraConfig, initial_params
from jaxchat.layers.step import Params
from jaxchat.training import lora
from jaxchat.training.chimera import DEFAULT_LOSSES, ChimeraTask, losses_of
from jaxchat.training.forward import Kept
from jaxchat.training.parts import LowRank, Part, WholeLayers, copies, plain
from jaxchat.training.tasks import Everything, Healing, Text
from jaxchat.training.trainer import Task

ADAPTER, MODEL, CHIMERA = "adapter", "hf", "chimera"
"""What is written into a run's directory in the end: an adapter as PEFT's, a model in HF's layout, heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The model that something is trained on.

    Attributes:
      directory: its files.
      name: what it is called.
      config, params: as loaded; the parameters may be quantized.
      plan: the layers that are to run, over those of the directory.
      dtype: of the activations.
    """

    directory: ModelDirectory
    name: str
    config: ModelConfig
    params: Params
    plan: LayerPlan
    dtype: jnp.dtype

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each slot."""
        return tuple(slot.layer for slot in self.plan)

    @property
    def is_whole(self) -> bool:
        """Whether every layer runs once, in order."""
        return self.layers == tuple(range(self.config.num_layers))

    @property
    def running(self) -> ModelConfig:
        """The configuration of the slots, over the same stacks of weights."""
        return self.config if self.is_whole else replicated_config(self.config, self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What tasks can be told; each heeds its own.

    Attributes:
      strength, dropout, targets: of LoRA.
      heal_with: what of the layers that are left is trained: `lora`, or the `layers` whole.
      temperature, label_weight: see `tasks.Healing`.
      kept: see `forward.Kept`.
      chimera, chimera_losses: what heads there are, and what of `chimera.LOSSES` they learn.
      seed: of what training begins with.
    """

    strength: Strength
    dropout: float = 0.0
    targets: str = "all"
    heal_with: Literal["lora", "layers"] = "lora"
    temperature: float = 1.0
    label_weight: float = 0.0
    kept: Kept = "products"
    chimera: ChimeraConfig = dataclasses.field(default_factory=ChimeraConfig)
    chimera_losses: str = ",".join(DEFAULT_LOSSES)
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A task that is ready to be trained.

    Attributes:
      task, frozen, initial, decayed: what a `Trainer` takes.
      export: writes what was trained into a run's directory, and returns where.
      use: what to do with that, given the place, in words.
    """

    task: Task
    frozen: Any
    initial: Any
    decayed: Any
    export: Callable[[Any, Path], Path]
    use: Callable[[Path], str]


def low_rank(base: Base, choices: Choices) -> Setup:
    """LoRA on text."""
    part = LowRank(choices.strength.scale, choices.dropout)
    return _of_low_rank(base, choices, Text(base.running, base.dtype, part, choices.kept))


def blocks(base: Base, choices: Choices) -> Setup:
    """New layers on text, the model's own frozen: block expansion (LLaMA-Pro, Wu et al. 2024)."""
    _refuse_scales(base)
    new = new_slots(base.plan)
    if not any(new):
        raise UsageError(
            f"{option('layer_spec')}: there is no new layer in this plan: repeat some, as in 0:4,3,4:8,7, or "
            "give a recipe that scales o_proj and down_proj to 0"
        )
    kept = [layer for layer, own in zip(base.layers, new, strict=True) if not own]
    if kept != list(range(base.config.num_layers)):
        raise UsageError(
            f"{option('layer_spec')}: without the new layers this plan is not the model's own, each layer "
            f"once and in order; heal such a plan with {option('task', 'heal')}"
        )
    layers = [layer for layer, own in zip(base.layers, new, strict=True) if own]
    part = WholeLayers(new)
    initial = copies(base.config, base.params, layers, silent=True)
    return _of_layers(base, part, initial, Text(base.running, base.dtype, part, choices.kept))


def healing(base: Base, choices: Choices) -> Setup:
    """The layers that a plan leaves, at the distributions of the whole model."""
    _refuse_scales(base)
    if base.is_whole:
        raise UsageError(
            f"{option('layer_spec')}: this plan is the whole model, there is nothing to heal; leave some "
            "layers out, as in 0:5,7:"
        )
    config = base.config

    def task(part: Part) -> Healing:
        return Healing(
            base.running, base.dtype, part, config, choices.temperature, choices.label_weight, choices.kept
        )

    if choices.heal_with == "lora":
        return _of_low_rank(base, choices, task(LowRank(choices.strength.scale, choices.dropout)))
    part = WholeLayers((True,) * len(base.plan))
    initial = copies(config, base.params, base.layers, silent=False)
    return _of_layers(base, part, initial, task(part))


def everything(base: Base, choices: Choices) -> Setup:
    """Every parameter, on text."""
    if not base.is_whole:
        raise UsageError(
            f"{option('task', 'full')} trains the model's own layers, each once; write the plan as a model "
            "of its own first: jaxchat convert --layer_spec ... --to_hf"
        )
    initial = plain(base.params)
    roles = {param.name: param.role not in ("norm", "bias") for param in parameter_table(base.config)}

    def export(trained: Params, directory: Path) -> Path:
        replaced = {
            param.name: dict(enumerate(values if param.per_layer else values[None]))
            for param in parameter_table(base.config)
            if (values := np.asarray(trained[param.name])) is not None
        }
        return _write_model(base, replaced, None, directory / MODEL)

    return Setup(
        task=Everything(base.config, base.dtype, choices.dropout, choices.kept),
        frozen=(),
        initial=initial,
        decayed=roles,
        export=export,
        use=lambda place: f"jaxchat chat -m {place}",
    )


def chimera(base: Base, choices: Choices) -> Setup:
    """Chimera's heads, which draft what the model says."""
    if not base.is_whole:
        raise UsageError(
            f"{option('task', 'chimera')} trains heads for the model's own layers, each once; leave "
            f"{option('layer_spec')} out (they draft under any plan)"
        )
    losses = losses_of(choices.chimera_losses)
    config = choices.chimera
    initial = initial_params(config, base.config, base.params, jax.random.key(choices.seed))

    def export(trained: Params, directory: Path) -> Path:
        place = directory / CHIMERA
        params = {name: np.asarray(value, ml_dtypes.bfloat16) for name, value in trained.items()}
        training = {"base": base.name, "losses": losses, "seed": choices.seed}
        write_chimera(place, config, params, base.config, base.params, training=training)
        return place

    return Setup(
        task=ChimeraTask(base.config, base.dtype, config, losses),
        frozen=base.params,
        initial=initial,
        decayed={name: name.endswith(".weight") and "norm" not in name for name in initial},
        export=export,
        use=lambda place: f"jaxchat chat -m {base.name} --draft chimera:{place}",
    )


SETUPS: Mapping[str, Callable[[Base, Choices], Setup]] = {
    "lora": low_rank,
    "blocks": blocks,
    "heal": healing,
    "chimera": chimera,
    "full": everything,
}
"""`--task` -> what makes it ready."""


def new_slots(plan: LayerPlan) -> tuple[bool, ...]:
    """Which slots of a plan are new layers: those scaled to nothing; if there are none, repetitions."""
    if any(slot.is_identity for slot in plan):
        return tuple(slot.is_identity for slot in plan)
    layers = [slot.layer for slot in plan]
    return tuple(layer in layers[:place] for place, layer in enumerate(layers))


def _refuse_scales(base: Base) -> None:
    for number, slot in enumerate(base.plan):
        if not (slot.is_plain or slot.is_identity):
            raise UsageError(
                f"{option('layer_spec')}: slot {number} is scaled by {slot.attn_scale:g} and "
                f"{slot.mlp_scale:g}; training takes layers as they are, or new ones, which are scaled by 0"
            )


# --- what comes of it


def _of_low_rank(base: Base, choices: Choices, task: Task) -> Setup:
    _refuse_scales(base)
    running, strength = base.running, choices.strength
    targets = lora.targets_of(base.config, choices.targets)
    initial = lora.initial(running, targets, strength.rank, jax.random.key(choices.seed))

    def export(trained: lora.Trained, directory: Path) -> Path:
        place = directory / ADAPTER
        place.mkdir(exist_ok=True)
        factors = {
            name: (np.asarray(own.a), np.swapaxes(np.asarray(own.b), 1, 2)) for name, own in trained.items()
        }
        write_adapter(
            place,
            running,
            factors,
            strength,
            base=base.name,
            dropout=choices.dropout,
            layers=None if base.is_whole else base.layers,
        )
        return place

    return Setup(
        task=task,
        frozen=base.params,
        initial=initial,
        decayed=jax.tree.map(lambda _: True, initial),
        export=export,
        use=lambda place: f"jaxchat chat -m {base.name} --adapter {place}",
    )


def _of_layers(base: Base, part: WholeLayers, initial: Params, task: Task) -> Setup:
    roles = {param.name: param.role not in ("norm", "bias") for param in parameter_table(base.config)}
    slots = [number for number, own in enumerate(part.trained) if own]

    def export(trained: Params, directory: Path) -> Path:
        replaced = {
            name: dict(zip(slots, np.asarray(values), strict=True)) for name, values in trained.items()
        }
        return _write_model(base, replaced, base.layers, directory / MODEL)

    return Setup(
        task=task,
        frozen=base.params,
        initial=initial,
        decayed={name: roles[name] for name in initial},
        export=export,
        use=lambda place: f"jaxchat chat -m {place}",
    )


def _write_model(
    base: Base,
    replaced: Mapping[str, Mapping[int, np.ndarray]],
    layers: Sequence[int] | None,
    place: Path,
) -> Path:
    """Writes the base with some tensors replaced, in Hugging Face's layout.

    Args:
      base: the model.
      replaced: parameter -> layer of the result -> values.
      layers: the base's layer that each layer of the result is; None is all of them.
      place: the directory.
    """
    trained = Adapter(
        name=place.name,
        path=base.directory.path,
        replicated=None if layers is None else tuple(layers),
        low_rank={},
        added={},
        replaced=replaced,
        rows={},
        digest="",
        keeps_tie=True,
    )
    merged = MergedDirectory(base.directory.path, base.directory, ((trained, 1.0),), True)
    write.to_hf(merged, place, dequantize=True, overwrite=True)
    return place
