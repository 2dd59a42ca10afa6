"""The model that a command is about: found and its plan parsed, before anything is loaded. Needs no JAX."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxchat.adapter_use import Uses
from jaxchat.analysis import show
from jaxchat.checkpoints.assembly import Assembly, assembled_config
from jaxchat.checkpoints.delta import model_at
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.recipes.recipe import read_recipe
from jaxchat.text.named_templates import chosen_template

logger = logging.getLogger(__name__)


def choose(
    model: str | None,
    layer_spec: str | None,
    *,
    recipe: str | None,
    model_paths: Mapping[str, str],
    keep_identity: bool,
    name: str,
    base: str | None = None,
    adapters: Uses = (),
) -> "ChosenModel":
    """The model that flags ask for, of which small files are read and no weights.

    Adapters are looked at for the layers that they repeat.

    Raises:
      UsageError: neither a model nor a recipe or both, no such directory, a bad plan or recipe.
      JaxchatError: a file is missing or malformed.
    """
    if model is not None and recipe is not None:
        raise UsageError("--model and --recipe are given; a recipe names its own models, give one")
    source: ModelDirectory | Assembly
    if recipe is not None:
        assembly = read_recipe(recipe, model_paths, keep_identity=keep_identity)
        config = assembled_config(assembly, [found.config for found in assembly.models])
        plan, source = assembly.plan, assembly
    elif model is not None:
        source = model_at(model, base)
        config, plan = source.config, source.plan
    else:
        raise UsageError("no model: give its directory with -m, or a --recipe")
    repeated = None
    if adapters:
        from jaxchat.checkpoints.adapter import replicated_config, replication  # imports JAX

        repeated = replication((use.name for use in adapters), config)
        if repeated is not None:
            config, plan = replicated_config(config, repeated), LayerPlan.identity(len(repeated))
    if layer_spec is not None:
        plan = plan.select(layer_spec)
    return ChosenModel(name=name, source=source, recipe=recipe, config=config, plan=plan, repeated=repeated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """A model that is there, and the plan it is to run under. No weights are read yet.

    Attributes:
      name: what people call it.
      source: its directory, or what its recipe assembles.
      recipe: the recipe's file, if there is one.
      config: of the stacked layers.
      plan: over the stacked layers.
      repeated: the layers of the source that these are, where an adapter repeats some.
    """

    name: str
    source: ModelDirectory | Assembly
    recipe: str | None
    config: ModelConfig
    plan: LayerPlan
    repeated: tuple[int, ...] | None = None

    @property
    def assembly(self) -> Assembly | None:
        """What a recipe assembles, under the chosen plan; None without a recipe."""
        if isinstance(self.source, Assembly):
            return dataclasses.replace(self.source, plan=self.plan)
        return None

    def location(self) -> dict[str, Any]:
        """The arguments of `jaxchat.load` that say where the model is; a recipe's remarks become warnings."""
        if not isinstance(self.source, Assembly):
            return {"path": self.source}
        for note in self.source.notes:
            logger.warning("%s: %s", self.recipe, note)
        return {"recipe": self.source}

    @property
    def advice(self) -> Mapping[str, Any]:
        """Sampling options that the model recommends; a recipe recommends none."""
        return {} if isinstance(self.source, Assembly) else self.source.recommended_sampling

    def check_max_length(self, max_length: int | None) -> None:
        """Refuses a context longer than the model has positions for."""
        show.check_max_length(self.config, max_length)

    @property
    def _words(self) -> ModelDirectory:
        """Whose tokenizer and chat template there are."""
        words = self.source if self.assembly is None else self.assembly.models[self.assembly.tokenizer]
        assert isinstance(words, ModelDirectory)
        return words

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can read text."""
        return self._words.tokenizer is not None

    def has_template(self, choice: str | None = None) -> bool:
        """Whether it has a chat template; raises what is wrong with one before weights are read for it.

        Args:
          choice: what is asked for in place of its own, a name or a file.
        """
        words = self._words
        template = words.template
        if choice is not None and words.tokenizer is not None:
            template = chosen_template(choice, words.tokenizer, template)
        if template is not None:
            template.check()
        return template is not None

    def report(self, *, max_length: int | None = None, quant: str | None = None) -> show.Report:
        """What `--show` tells about it."""
        if self.assembly is not None:
            return show.describe_assembly(self.assembly, name=self.name, max_length=max_length, quant=quant)
        assert isinstance(self.source, ModelDirectory)
        plan = self.plan
        if self.repeated is not None:
            slots = [dataclasses.replace(slot, layer=self.repeated[slot.layer]) for slot in plan]
            plan = LayerPlan(tuple(slots), self.source.config.num_layers)
        return show.describe_directory(self.source, plan, max_length=max_length, quant=quant)
