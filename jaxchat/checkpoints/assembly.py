"""A stack assembled from the layers of one or several model directories: what to load from where.

Says which source layer becomes which row of the stack, what is scaled while it is read, and which
configuration results; opens no file. `recipes/` reads recipes, `assembled.py` the weights.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.config import EMBED, HEAD, LAYERS, ModelConfig, RopeConfig
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan


@dataclass(frozen=True)
class LayerSource:
    """Where one layer of an assembled stack comes from.

    Attributes:
      model: index into `Assembly.models`.
      layer: the layer of that model.
      scales: (parameter, factor) of the tensors that differ from the source's, sorted by name. A parameter is
        named as in the family's parameter table without `layers.`: `("q.weight", 0.5)`. Every other tensor of
        the layer is the source's own.
    """

    model: int
    layer: int
    scales: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Assembly:
    """A model put together from source layers, and the layer plan that runs it.

    Attributes:
      models: distinct model directories of one architecture and one set of shapes.
      layers: distinct source layers, each loaded once; row i of the stack is `layers[i]`.
      plan: over the `len(layers)` rows of the stack.
      globals: (parameter, (model, factor)) for every parameter that is not per layer: `embed.weight`,
        `norm.weight`, `lm_head.weight` and so on, with the model it is read from and its factor.
      base: index into `models`; its `config.json` describes the result.
      tokenizer: index into `models`; its tokenizer and chat template are used.
      dtype: of the weights, as in the recipe (`float32`, `bfloat16` or `float16`); None is as stored.
      notes: what the user should know, a line each: warnings, and which scales became copies of tensors.
    """

    models: tuple[ModelDirectory, ...]
    layers: tuple[LayerSource, ...]
    plan: LayerPlan
    globals: tuple[tuple[str, tuple[int, float]], ...]
    base: int
    tokenizer: int
    dtype: str | None
    notes: tuple[str, ...]


class Tensor(NamedTuple):
    """One tensor of an assembled stack: a row of a model's parameter (0 if it is not per layer), scaled."""

    model: int
    row: int
    scale: float


def whole(model: str | Path | ModelDirectory, plan: LayerPlan) -> Assembly:
    """The assembly that is one model under a plan over its stacked layers."""
    layers = tuple(LayerSource(0, layer) for layer in range(plan.num_layers))
    return Assembly((ModelDirectory.at(model),), layers, plan, (), base=0, tokenizer=0, dtype=None, notes=())


def under(assembly: Assembly, plan: LayerPlan) -> Assembly:
    """An assembly under a plan over its rows, without the rows that no slot uses."""
    used = sorted({slot.layer for slot in plan})
    slots = tuple(dataclasses.replace(slot, layer=used.index(slot.layer)) for slot in plan)
    layers = tuple(assembly.layers[row] for row in used)
    return dataclasses.replace(assembly, layers=layers, plan=LayerPlan(slots, len(used)))


def stack_of(
    assembly: Assembly, configs: Sequence[ModelConfig], parameter: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The distinct tensors of a per-layer parameter's stack, and [L] which of them each stacked layer uses.

    `configs` are those of `assembly.models`.
    """
    name = parameter.removeprefix(LAYERS)
    rows = [config.rows_of(parameter) for config in configs]
    wanted = [
        Tensor(source.model, rows[source.model][source.layer], dict(source.scales).get(name, 1.0))
        for source in assembly.layers
    ]
    tensors = tuple(dict.fromkeys(wanted))
    return tensors, tuple(map(tensors.index, wanted))


def global_tensor(assembly: Assembly, configs: Sequence[ModelConfig], parameter: str) -> Tensor:
    """Where a parameter that is not per layer comes from; the head of a tied base model is its embedding."""
    given = dict(assembly.globals)
    if parameter == HEAD and HEAD not in given and configs[assembly.base].tied_embeddings:
        parameter = EMBED
    model, scale = given.get(parameter, (assembly.base, 1.0))
    return Tensor(model, 0, scale)


def assembled_config(assembly: Assembly, configs: Sequence[ModelConfig]) -> ModelConfig:
    """The configuration of an assembled stack: the base model's, with every per-layer field gathered.

    Args:
      assembly: what to assemble.
      configs: the configuration of each of its models.

    Raises:
      UsageError: the models differ in architecture, vocabulary or a shape; the message has the first field.
    """
    base = configs[assembly.base]
    for model, config in zip(assembly.models, configs, strict=True):
        _check_equal(assembly.models[assembly.base], base, model, config)
    ropes = tuple(dict.fromkeys(rope for config in (base, *configs) for rope in config.ropes))
    _check_ropes(assembly, ropes)
    layers = [(configs[source.model], source.layer) for source in assembly.layers]
    words = configs[assembly.tokenizer]
    head, embed = (global_tensor(assembly, configs, name) for name in (HEAD, EMBED))
    result = dataclasses.replace(
        base,
        num_layers=len(layers),
        ropes=ropes,
        layer_ropes=tuple(ropes.index(c.ropes[c.layer_ropes[i]]) for c, i in layers) if ropes else (),
        layer_windows=tuple(c.layer_windows[i] for c, i in layers),
        layer_blocks=tuple(c.layer_blocks[i] for c, i in layers if c.layer_blocks),
        layer_attn_scales=tuple(c.layer_attn_scales[i] for c, i in layers),
        layer_rows=(),
        tied_embeddings=head == embed and configs[head.model].tied_embeddings,
        bos_id=words.bos_id,
        eos_ids=words.eos_ids,
    )
    names = [param.name for param in parameter_table(result) if param.per_layer]
    _check_scales(assembly, names)
    rows = ((name, stack_of(assembly, configs, name)[1]) for name in names)
    ordinary = tuple(range(len(layers)))
    return dataclasses.replace(result, layer_rows=tuple((n, found) for n, found in rows if found != ordinary))


def may_differ(base: ModelConfig) -> frozenset[str]:
    """The fields in which models of one stack may differ: a layer's own, and those the base model decides."""
    # A table of learned positions is a shape, a trained context is not.
    return _MAY_DIFFER - ({"max_position_embeddings"} if base.learned_positions else set())


_MAY_DIFFER = frozenset({
    "model_type",  # of one family, which has one parameter table
    "num_layers", "ropes", "layer_ropes", "layer_windows", "layer_attn_scales", "layer_blocks", "layer_rows",
    "tied_embeddings", "bos_id", "eos_ids", "max_position_embeddings", "norm_eps",
})  # fmt: skip


def _check_equal(
    base_model: ModelDirectory, base: ModelConfig, model: ModelDirectory, config: ModelConfig
) -> None:
    for field in dataclasses.fields(ModelConfig):
        found, expected = getattr(config, field.name), getattr(base, field.name)
        if found != expected and field.name not in may_differ(base):
            raise UsageError(
                f"{base_model} and {model} cannot share a stack: {field.name} is {expected!r} in the one and "
                f"{found!r} in the other; layers stack only if architecture, shapes and vocabulary are equal"
            )


def _check_ropes(assembly: Assembly, ropes: Sequence[RopeConfig]) -> None:
    dims = sorted({rope.dim for rope in ropes})
    if len(dims) > 1:
        names = " and ".join(map(str, assembly.models))
        raise UsageError(f"{names} cannot share a stack: they rotate {dims[0]} and {dims[-1]} numbers a head")


def _check_scales(assembly: Assembly, names: Sequence[str]) -> None:
    for source in assembly.layers:
        for name, _ in source.scales:
            if f"{LAYERS}{name}" not in names:
                raise ValueError(f"layer {source.layer} scales {name}, which the architecture does not have")
