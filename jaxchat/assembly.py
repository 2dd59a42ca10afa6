"""A stack assembled from the layers of one or several model directories: what to load from where.

What lives here says which source layer becomes which row of the stack, and what is scaled while it is read.
Reading a recipe into an `Assembly` is `jaxchat/recipe.py`.
"""

from dataclasses import dataclass
from pathlib import Path

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

    models: tuple[Path, ...]
    layers: tuple[LayerSource, ...]
    plan: LayerPlan
    globals: tuple[tuple[str, tuple[int, float]], ...]
    base: int
    tokenizer: int
    dtype: str | None
    notes: tuple[str, ...]
