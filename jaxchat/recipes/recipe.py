"""mergekit's passthrough recipes: what to load from which model under which plan; and plans as recipes.

Needs only the models' `config.json`; loading is `checkpoints/`, the grammar `mergekit_file.py`. Semantics are
those of mergekit 0.1.5 (plan.py, parameter_resolver.py), where it is not silent or arbitrary.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxchat import demo
from jaxchat.checkpoints import hub
from jaxchat.checkpoints.assembly import Assembly, LayerSource, may_differ
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.gguf_config import is_gguf
from jaxchat.config import EMBED, FINAL_NORM, HEAD, Half, ModelConfig, Param
from jaxchat.errors import JaxchatError, option, told
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan, PlanError, Slot
from jaxchat.recipes import mergekit_file
from jaxchat.recipes.mergekit_file import ModelName, Recipe, RecipeError, Rule, Slice

__all__ = ["RecipeError", "read_recipe", "source_plan", "to_mergekit"]

_BASE_DECIDES = ("max_position_embeddings", "norm_eps")
_GLOBALS_FIRST = ("embedding", "positions")
"""Roles of what is read from the first slice's model with its parameters; the others are the last slice's."""

_HALVES: tuple[Half, ...] = ("attention", "mlp")
_BEFORE_POST_NORM = {
    "o.weight": ("attention", "attn_post_norm"),
    "v.weight": ("attention", "attn_post_norm"),
    "down.weight": ("MLP", "mlp_post_norm"),
    "up.weight": ("MLP", "mlp_post_norm"),
}
_BEFORE_QK_NORM = {"q.weight": "queries", "k.weight": "keys"}


def read_recipe(
    path: str | Path, model_paths: Mapping[str, str | Path] | None = None, *, keep_identity: bool = False
) -> Assembly:
    """Reads a mergekit recipe with `merge_method: passthrough` and `slices`.

    A scale on the attention output or MLP down projection becomes a scale of the plan's slot, which is exact
    and costs nothing; any other becomes a scaled copy of that one tensor. `Assembly.notes` says which.

    Args:
      path: the YAML file.
      model_paths: model names as the recipe spells them -> directories. Other references are directories,
        relative to the recipe or to the working directory, or else `box`, the model in the box.
      keep_identity: slots with both scales 0 become layers of their own whose projections are zero, as
        mergekit writes them, and are executed; else they are counted but take no compute and no KV cache.

    Raises:
      RecipeError: the recipe is malformed or asks for what a layer plan cannot do, a model or one of its
        layers does not exist, or models differ in architecture or shape.
      JaxchatError: a model's `config.json` is missing or malformed.
    """
    path = Path(path)
    recipe = mergekit_file.read(path)
    models = _Models(path, model_paths or {})
    for part in recipe.slices:
        models.add(part.model)
    base = models.add(recipe.base_model or recipe.slices[0].model)
    tokenizer = base if recipe.tokenizer_source is None else models.add(recipe.tokenizer_source)
    models.check(base)
    _check_ranges(recipe.slices, models)
    scales = _Scales(recipe, models)
    slots = list(scales.slots())
    globals_ = tuple(scales.globals(models.configs[base]))
    notes = _Notes(models, base)
    layers, plan = _stack(slots, models, keep_identity, notes)
    notes.about_globals(dict(globals_), scales.head_scale())
    return Assembly(
        models=tuple(models.directories),
        layers=layers,
        plan=plan,
        globals=globals_,
        base=base,
        tokenizer=tokenizer,
        dtype=recipe.out_dtype or recipe.dtype,
        notes=(*recipe.notes, *models.notes, *scales.notes(), *_about_dtypes(recipe), *notes.lines),
    )


def source_plan(assembly: Assembly, num_layers: int) -> LayerPlan:
    """The plan over the one source model's `num_layers` layers that an assembly amounts to.

    Raises:
      PlanError: there is more than one model, or a scaled copy of a tensor: no plan says that.
    """
    used = {source.model for source in assembly.layers} | {model for _, (model, _) in assembly.globals}
    if len(used) > 1:
        raise PlanError(f"the recipe stacks layers of {len(used)} models; a layer plan is over one")
    scaled = [f"{name} of layer {source.layer}" for source in assembly.layers for name, _ in source.scales]
    scaled += [name for name, (_, factor) in assembly.globals if factor != 1.0]
    if scaled:
        raise PlanError(f"the recipe scales {scaled[0]}, which a layer plan cannot say")
    slots = (dataclasses.replace(s, layer=assembly.layers[s.layer].layer) for s in assembly.plan)
    return LayerPlan(tuple(slots), num_layers)


# --- models


def _is_model(path: Path) -> bool:
    """Whether there is something at a path that can be a model."""
    return path.is_dir() or is_gguf(path)


def _place_of(name: str, directory: object) -> str:
    """How a caller says where a model that a recipe names is."""
    return told(f"model_paths={{{name!r}: {str(directory)!r}}}", f"--model_path {name}={directory}")


class _Models:
    """The models of a recipe, by the order in which it names them."""

    def __init__(self, recipe: Path, model_paths: Mapping[str, str | Path]):
        self._recipe, self._paths = recipe, {name: Path(path) for name, path in model_paths.items()}
        self._places: list[mergekit_file.Place] = []
        self._by_name: dict[str, int] = {}
        self.directories: list[ModelDirectory] = []
        self.configs: list[ModelConfig] = []
        self.notes: list[str] = []

    def add(self, model: ModelName) -> int:
        """The number of a model; equal directories are one model."""
        if model.name not in self._by_name:
            directory = self._find(model)
            found = ModelDirectory.at(directory)
            resolved = [os.path.realpath(known.path) for known in self.directories]
            if os.path.realpath(found.path) in resolved:
                self._by_name[model.name] = resolved.index(os.path.realpath(found.path))
            else:
                self._by_name[model.name] = len(self.directories)
                self.configs.append(found.config)
                if not found.is_plain:
                    model.place.fail(
                        f"{directory} records a layer plan, whose slots a recipe does not know; write them "
                        f"out: jaxchat convert --src {directory} --dst DIR --plan bake, or use the original"
                    )
                self.directories.append(found)
                self._places.append(model.place)
        return self._by_name[model.name]

    def _find(self, model: ModelName) -> Path:
        advice = f"give it with {_place_of(model.name, 'DIR')}"
        if model.name in self._paths:
            directory = demo.place(self._paths[model.name])
            if not _is_model(directory):
                raise RecipeError(f"{_place_of(model.name, directory)}: no such directory or GGUF file")
            return directory
        for sign, what in (("+", "a LoRA"), ("@", "a revision")):
            if sign in model.name:
                model.place.fail(
                    f"{model.name!r} names {what}, which is not supported; "
                    f"{mergekit_file.ADVICE}, or {advice}"
                )
        tried = list(dict.fromkeys((self._recipe.parent / os.path.expanduser(model.name), Path(model.name))))
        for directory in tried:
            if _is_model(directory):
                return directory
        if demo.place(model.name).is_dir():
            return demo.place(model.name)
        missing = f"no model {model.name!r}: tried {' and '.join(str(directory) for directory in tried)}"
        name = hub.HubName.parse(model.name)
        if name is None:
            return model.place.fail(f"{missing}; {advice}")
        try:
            return hub.fetch(name)
        except JaxchatError as error:
            return model.place.fail(f"{missing}, and the Hub: {error}; {advice}")

    def check(self, base: int) -> None:
        """Refuses models that cannot be one stack, and names for which there is no model."""
        for name in self._paths:
            if name not in self._by_name:
                raise RecipeError(
                    f"{option('model_paths', flag='model_path')} {name}: the recipe has no model of that "
                    f"name; it has {', '.join(self._by_name)}"
                )
        # Of a head that is tied in one model only, mergekit's result depends on what files happen to hold.
        allowed = may_differ(self.configs[base]) - {"tied_embeddings"}
        for number, config in enumerate(self.configs):
            for field in dataclasses.fields(ModelConfig):
                values = [getattr(c, field.name) for c in (self.configs[base], config)]
                if values[0] == values[1]:
                    continue
                names = (
                    f"{self.directories[base]} has {values[0]}, {self.directories[number]} has {values[1]}"
                )
                if field.name not in allowed:
                    self._places[number].fail(
                        f"models differ in {field.name}: {names}; layers stack only if architecture, shapes "
                        "and vocabulary are the same"
                    )
                if field.name in _BASE_DECIDES:
                    self.notes.append(f"models differ in {field.name}: {names}; the first of them counts")


def _check_ranges(slices: Sequence[Slice], models: _Models) -> None:
    for part in slices:
        count = models.configs[models.add(part.model)].num_layers
        if part.stop > count:
            part.range_place.fail(
                f"[{part.first}, {part.stop}] is out of range: {part.model.name} has {count} layers; "
                f"expected 0 <= first < stop <= {count}"
            )


# --- scales


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One output layer: where it comes from, and the scale of each parameter (`q.weight`) that is not 1."""

    model: int
    layer: int
    scales: dict[str, float]


class _Scales:
    """Resolves the scale of every tensor as mergekit does, and keeps an account of which rules applied.

    Precedence is source, slice, recipe; within one, the first rule whose filter is a substring of the input
    tensor's name. Over a slice of n layers a gradient is interpolated at t = i / (n - 1), at 1 if n is 1, and
    for embedding, final norm and head at 0.
    """

    def __init__(self, recipe: Recipe, models: _Models):
        self._recipe, self._models = recipe, models
        self._matched: set[Rule] = set()
        self._applied: set[Rule] = set()
        self._lengths: dict[Rule, set[int]] = {}
        self._global_gradients: dict[Rule, list[str]] = {}

    def slots(self) -> Iterator[_Layer]:
        """The output layers in order."""
        for part in self._recipe.slices:
            model = self._models.add(part.model)
            table = [p for p in parameter_table(self._models.configs[model]) if p.per_layer]
            count = part.stop - part.first
            for number in range(count):
                layer = part.first + number
                t = number / (count - 1) if count > 1 else 1.0
                factors = {p.layer_name: self._scale(part, p.hf.format(layer), t, count) for p in table}
                yield _Layer(
                    model, layer, {name: factor for name, factor in factors.items() if factor != 1.0}
                )

    def globals(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, float]]]:
        """Model and scale of the tensors that are not per layer."""
        for param in parameter_table(config):
            if not param.per_layer:
                part = self._recipe.slices[0 if param.role in _GLOBALS_FIRST else -1]
                yield param.name, (self._models.add(part.model), self._scale(part, param.hf, 0.0, None))

    def head_scale(self) -> float:
        """What the recipe says for `lm_head.weight`, which a model with a tied head does not have."""
        found = _first_match(self._levels(self._recipe.slices[-1]), HEAD)
        return _interpolated(found.values, 0.0) if found else 1.0

    def _levels(self, part: Slice) -> tuple[tuple[Rule, ...], ...]:
        return part.source_scale, part.slice_scale, self._recipe.scale

    def _scale(self, part: Slice, tensor: str, t: float, count: int | None) -> float:
        levels = self._levels(part)
        self._matched.update(rule for rules in levels for rule in rules if rule.matches(tensor))
        rule = _first_match(levels, tensor)
        if rule is None:
            return 1.0
        self._applied.add(rule)
        if count is None and len(rule.values) > 1:
            self._global_gradients.setdefault(rule, []).append(tensor)
        elif count is not None:
            self._lengths.setdefault(rule, set()).add(count)
        return _interpolated(rule.values, t)

    def notes(self) -> Iterator[str]:
        """What is odd about the rules: filters without effect, gradients that do not fit their slice."""
        rules = dict.fromkeys(
            rule
            for part in self._recipe.slices
            for rule in (*part.source_scale, *part.slice_scale, *self._recipe.scale)
        )
        for rule in rules:
            if rule.filter is not None and rule not in self._matched:
                names = self._examples()
                yield (
                    f"{rule.place}: filter {rule.filter!r} matches no tensor it could apply to, so it has no "
                    f"effect; tensors are called {', '.join(names)} and so on"
                )
            elif rule.filter is not None and rule not in self._applied:
                yield (
                    f"{rule.place}: filter {rule.filter!r} has no effect: an earlier entry, or one nearer to "
                    "the source, always comes first"
                )
            elif len(rule.values) > min(self._lengths.get(rule, {len(rule.values)})):
                shortest = min(self._lengths[rule])
                uses = "only the last is used" if shortest == 1 else "some are passed over"
                yield (
                    f"{rule.place}: {len(rule.values)} values for a slice of {shortest} "
                    f"layer{'s' * (shortest > 1)}: {uses}, as in mergekit"
                )
        for rule, tensors in self._global_gradients.items():
            yield f"{rule.place}: {', '.join(tensors)} get the first of the values, as in mergekit"

    def _examples(self) -> list[str]:
        """The names of tensors that a filter could apply to."""
        part = self._recipe.slices[0]
        config = self._models.configs[self._models.add(part.model)]
        return [_output_weight(half, config).hf.format(part.first) for half in _HALVES]


def _first_match(levels: Iterable[Iterable[Rule]], tensor: str) -> Rule | None:
    return next((rule for rules in levels for rule in rules if rule.matches(tensor)), None)


def _interpolated(values: Sequence[float], t: float) -> float:
    """The value at `t` in [0, 1] of the line through `values`."""
    position = t * (len(values) - 1)
    left = int(position)
    right = min(left + 1, len(values) - 1)
    return (1 - (position - left)) * values[left] + (position - left) * values[right]


# --- layers -> a stack and a plan


def _stack(
    slots: Sequence[_Layer], models: _Models, keep_identity: bool, notes: "_Notes"
) -> tuple[tuple[LayerSource, ...], LayerPlan]:
    """Distinct layers, those of the models in order and scaled copies after them, and the plan over them."""
    found: list[tuple[LayerSource, float, float]] = []
    for slot in slots:
        scales = dict(slot.scales)
        halves = {half: _take_half(scales, half, models.configs[slot.model]) for half in _HALVES}
        if keep_identity and not any(halves.values()):
            scales |= {
                name: 0.0
                for half in halves
                for name in _outputs(half, models.configs[slot.model])
            }  # fmt: skip
            halves = dict.fromkeys(halves, 1.0)
        notes.about_slot(slot, halves, scales)
        source = LayerSource(slot.model, slot.layer, tuple(sorted(scales.items())))
        found.append((source, halves["attention"], halves["mlp"]))
    sources = sorted(
        {source for source, *_ in found}, key=lambda s: (bool(s.scales), s.model, s.layer, s.scales)
    )
    rows = {source: row for row, source in enumerate(sources)}
    plan = LayerPlan(tuple(Slot(rows[source], *scales) for source, *scales in found), len(sources))
    return tuple(sources), plan


def _outputs(half: Half, config: ModelConfig) -> list[str]:
    """The layer names of the projection that makes a half's output."""
    return [param.layer_name for param in parameter_table(config) if param.half == half and param.is_output]


def _output_weight(half: Half, config: ModelConfig) -> Param:
    return next(
        param
        for param in parameter_table(config)
        if param.half == half and param.is_output and param.role == "weight"
    )


def _take_half(scales: dict[str, float], half: Half, config: ModelConfig) -> float:
    """The scale of a half's output, taken out of `scales`; 1 if weight and bias disagree and stay there."""
    names = _outputs(half, config)
    factors = {scales.get(name, 1.0) for name in names}
    if len(factors) > 1:
        return 1.0
    for name in names:
        scales.pop(name, None)
    return factors.pop()


# --- what the user should know


def _about_dtypes(recipe: Recipe) -> Iterator[str]:
    if recipe.dtype and recipe.out_dtype and recipe.dtype not in (recipe.out_dtype, "float32"):
        yield (
            f"dtype {recipe.dtype} then out_dtype {recipe.out_dtype}: weights are converted to "
            f"{recipe.out_dtype} at once, where mergekit rounds to {recipe.dtype} first"
        )


class _Notes:
    """Gathers remarks on slots, and says each once however many slots it is about."""

    def __init__(self, models: _Models, base: int):
        self._models, self._base = models, base
        self._counts: dict[str, int] = {}
        self._lines: list[str] = []

    def about_slot(self, slot: _Layer, halves: Mapping[Half, float], copies: Mapping[str, float]) -> None:
        """What became of the scales of one slot."""
        config = self._models.configs[slot.model]
        hf = {p.layer_name: p.hf_layer_name for p in parameter_table(config) if p.per_layer}
        outputs = {half: _output_weight(half, config) for half in halves}
        if not any(halves.values()):
            runs = f"{option('keep_identity')} runs them"
            self._count(f"{{}} with both scales 0: counted and exported, but not executed ({runs})")
        elif any(scale != 1 for scale in halves.values()):
            names = [
                outputs[half].hf_layer_name.removesuffix(".weight") for half, s in halves.items() if s != 1
            ]
            self._count(f"{{}} with {' and '.join(names)} scaled by the plan, without a copy")
        if copies:
            names = list(dict.fromkeys(hf[name] for name in hf if name in copies))
            self._count(f"{{}} with scaled copies of {', '.join(names)}")
        scales = {**copies, **{outputs[half].layer_name: scale for half, scale in halves.items()}}
        for name, scale in scales.items():
            if abs(scale) not in (0, 1) and (norm := _norm_after(name, config)):
                self._count(
                    f"{{}} where a scale on {hf[name]} has next to no effect: {norm} normalizes it away"
                )

    def _count(self, text: str) -> None:
        self._counts[text] = self._counts.get(text, 0) + 1

    def about_globals(self, found: Mapping[str, tuple[int, float]], head_scale: float) -> None:
        """What became of the scales of embedding, final norm and head."""
        config, directories = self._models.configs[self._base], self._models.directories
        scaled = [f"{name} ({factor:g})" for name, (_, factor) in found.items() if factor != 1]
        if scaled:
            self._lines.append(f"scaled copies of {', '.join(scaled)}")
        if not config.tied_embeddings:
            return
        embedding, factor = found[EMBED]
        if factor != 1:
            self._lines.append(f"the output head is the embedding (tied), so the scale {factor:g} is on both")
        if head_scale not in (1, factor):
            self._lines.append(
                f"the output head is the embedding (tied): the scale {head_scale:g} for lm_head.weight has "
                "no effect, as in mergekit"
            )
        if embedding != found[FINAL_NORM][0]:
            self._lines.append(
                f"the output head is the embedding (tied), of {directories[embedding]}; the final norm is of "
                f"{directories[found[FINAL_NORM][0]]}"
            )

    @property
    def lines(self) -> tuple[str, ...]:
        counted = (text.format(f"{count} slot{'s' * (count > 1)}") for text, count in self._counts.items())
        return (*counted, *self._lines)


def _norm_after(name: str, config: ModelConfig) -> str | None:
    """The norm right after the parameter, up to linear operations, that makes a scale meaningless."""
    half, norm = _BEFORE_POST_NORM.get(name, ("", ""))
    if norm in config.block.norms:
        return f"the norm after the {half}"
    if config.block.qk_norm and name in _BEFORE_QK_NORM:
        return f"the norm of {_BEFORE_QK_NORM[name]}"
    return None


# --- plan -> recipe


def to_mergekit(
    plan: LayerPlan, model: str, config: ModelConfig | None = None, dtype: str | None = None
) -> str:
    """A plan as a mergekit recipe, which `read_recipe` and mergekit itself read.

    Args:
      plan: over the layers of one model.
      model: the path or name of that model.
      config: the model's, for the names of its tensors; None takes Llama's.
      dtype: `dtype` of the recipe; None leaves the key out.
    """
    names = ("o_proj", "down_proj") if config is None else _filters(config)
    slices: list[dict[str, Any]] = []
    for run in _runs(plan):
        first, last = run[0], run[-1]
        source: dict[str, Any] = {"model": model, "layer_range": [first.layer, last.layer + 1]}
        if not first.is_plain:
            scales = [
                {"filter": name, "value": scale}
                for name, scale in zip(names, (first.attn_scale, first.mlp_scale), strict=True)
            ]
            source["parameters"] = {"scale": [*scales, {"value": 1.0}]}
        slices.append({"sources": [source]})
    recipe = {"slices": slices, "merge_method": "passthrough", **({"dtype": dtype} if dtype else {})}
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _filters(config: ModelConfig) -> tuple[str, str]:
    """Substrings that only the attention output projection and only the MLP down projection have."""
    stems = {p.hf_layer_name.rsplit(".", 1)[0] for p in parameter_table(config) if p.per_layer}
    found = []
    for half in _HALVES:
        stem = _output_weight(half, config).hf_layer_name.rsplit(".", 1)[0]
        short = stem.rsplit(".", 1)[-1]
        found.append(short if sum(short in other for other in stems) == 1 else stem)
    return found[0], found[1]


def _runs(plan: LayerPlan) -> list[list[Slot]]:
    """Slots in runs of consecutive layers with equal scales."""
    runs: list[list[Slot]] = []
    for slot in plan:
        if runs and slot == dataclasses.replace(runs[-1][-1], layer=runs[-1][-1].layer + 1):
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


class _Dumper(yaml.SafeDumper):
    """Writes `layer_range: [0, 32]` on one line, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list[Any]) -> yaml.Node:
        flow = all(isinstance(item, int) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)
