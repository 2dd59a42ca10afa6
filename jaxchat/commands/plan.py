"""`jaxchat plan`: converts layer plans between notations, and says what one costs. Reads `config.json` only.

The notations are in `notations.py` and `recipes/`, the arithmetic in `analysis/`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jaxchat.analysis import cost, show
from jaxchat.analysis.token_cost import Cost, cost_lines, token_cost
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES
from jaxchat.cli.command_line import Command, complain
from jaxchat.cli.flags import flag_fields
from jaxchat.cli.model_flags import KV_DTYPE, RECIPE_NEEDS, BoxedModel, ModelFlags
from jaxchat.config import MAX_LAYERS, ModelConfig
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan, PlanError
from jaxchat.options import Flag
from jaxchat.recipes.recipe import source_plan, to_mergekit

_USAGE = """\
usage: {program} [-m DIR | --num_layers N | --recipe FILE] [...]

Converts layer plans between notations, and says what a plan costs: parameters,
bytes, operations, and the tokens a second that a device's memory allows. Reads
config.json only.

  {program} -m llama-3-8b --layer_spec '(4,8)' --device h200
  {program} --num_layers 80 --layer_spec 0:52,45: --to rys
  {program} -m llama-3-8b --layer_spec 0:20,10:32 --to mergekit
  {program} --recipe expanded.yml --to spec
"""
NOTATIONS = ("spec", "json", "rys", "exllama", "mergekit")

_cost = functools.partial(Flag, group="Cost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest(ModelFlags):
    """A plan, what to write it as, and what to count."""

    model: BoxedModel = None
    num_layers: Annotated[
        int | None,
        Flag(
            help="How many layers the model has, where there is no model at hand",
            example="--num_layers 32",
            group="Model",
            low=1,
            high=MAX_LAYERS,
        ),
    ] = None
    to: Annotated[
        Literal["spec", "json", "rys", "exllama", "mergekit", "table"] | None,
        Flag(
            help="Print the plan in this notation and nothing else: spec is what --layer_spec takes, json a "
            "list of slots, rys (i,j), exllama a list of ranges, mergekit a recipe, table a line a slot. "
            "Which one is given, the text itself says",
            example="--to mergekit",
            group="Conversion",
            value="NOTATION",
        ),
    ] = None
    recipe_name: Annotated[
        str | None,
        Flag(
            name="model_name",
            help="The name of the model in the recipe that --to mergekit prints; what -m says if not given",
            example="--model_name openchat/openchat-3.5-0106",
            group="Conversion",
            value="NAME",
        ),
    ] = None
    device: Annotated[
        tuple[cost.Device, ...],
        _cost(
            help="Predict tokens a second on this device, if reading memory is all that takes time: one of "
            f"{', '.join(cost.DEVICES)}, or a bandwidth; may be given more than once",
            example="--device h200 --device '61.4 GB/s'",
            value="DEVICE",
            many=True,
            read=lambda texts: tuple(cost.device(text) for text in texts),
        ),
    ] = ()
    max_length: Annotated[
        int | None,
        _cost(
            help="The context that the cost is for, beside an empty one, in tokens; the model's own if not "
            "given",
            example="-l 4096",
            short="l",
            low=1,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        _cost(
            help="Count weights in float32, bfloat16 or float16; as stored if not given",
            example="--dtype float16",
            value="TYPE",
            choices=tuple(WEIGHT_DTYPES),
        ),
    ] = None
    quant: Annotated[
        str | None,
        _cost(
            help="Count weights quantized: int8, int4 or any other format of `jaxchat generate --quant`; as "
            "stored if not given",
            example="--quant int4",
            value="FORMAT",
        ),
    ] = None
    kv_dtype: Annotated[str | None, dataclasses.replace(KV_DTYPE, group="Cost")] = None
    json: Annotated[
        bool,
        Flag(
            help="Print one JSON object: the plan in every notation that can say it, its cost and its slots",
            example="--json",
            group="Output",
        ),
    ] = False


class _Subject(NamedTuple):
    """What the command is about.

    Attributes:
      plan: over the layers of `config`, or over `--num_layers` layers.
      config: None without a model.
      assembly: of the recipe.
      name: of the model, for people and in a recipe; None if there is none.
      base: the model, of several the one whose configuration is used.
    """

    plan: LayerPlan
    config: ModelConfig | None
    assembly: Assembly | None
    name: str | None
    base: ModelDirectory | None


def _run(request: PlanRequest, given: frozenset[str]) -> int:
    _refuse(request, given)
    subject = _subject(request)
    if request.to is not None:
        _warn_of_notes(subject)
        print(_converted(subject, request.to, request.recipe_name))
    elif subject.config is None:
        print(json.dumps(_without_model(subject), indent=2) if request.json else _render_bare(subject))
    else:
        _print_cost(request, subject, subject.config)
    return 0


def _print_cost(request: PlanRequest, subject: _Subject, config: ModelConfig) -> None:
    report = _report(subject, request.max_length, request.quant)
    token = token_cost(
        config,
        subject.plan,
        request.device,
        report,
        dtype=request.dtype,
        quant=request.quant,
        kv_dtype=request.kv_dtype,
        manifest=None if subject.base is None else subject.base.manifest,
    )
    if not request.json:
        print(_render(report, token, subject))
        return
    extra = {"cost": dataclasses.asdict(token), "notations": _notations(subject, request.recipe_name)}
    print(json.dumps({**show.as_json(report), **extra}, indent=2))


def _refuse(request: PlanRequest, given: frozenset[str]) -> None:
    models = [f"--{name}" for name in ("model", "num_layers", "recipe") if name in given]
    if not models and request.to is not None:  # which prints no name that would tell whose layers these are
        raise UsageError(
            "--to needs to know how many layers there are: give a model with -m (box is the one in the box), "
            "a --recipe, or only --num_layers"
        )
    if len(models) > 1:
        raise UsageError(f"{' and '.join(models)} are given; give one")
    if request.recipe_name is not None and request.to != "mergekit" and not request.json:
        raise UsageError("--model_name needs --to mergekit: it is the name in the recipe")
    about_cost = [name for name in _ABOUT_COST if name in given]
    if request.to is not None and (request.json or about_cost):
        other = "json" if request.json else about_cost[0]
        raise UsageError(f"--to prints the plan and nothing else; it cannot be combined with --{other}")
    if request.num_layers is not None and about_cost:
        raise UsageError(
            f"--{about_cost[0]} needs a model: give its directory with -m instead of --num_layers"
        )
    if request.dtype and request.quant:
        raise UsageError("--dtype and --quant are given; give one")


def _subject(request: PlanRequest) -> _Subject:
    if request.num_layers is not None:
        spec = "all" if request.layer_spec is None else request.layer_spec
        return _Subject(LayerPlan.parse(spec, request.num_layers), None, None, None, None)
    request = request.or_boxed()
    chosen = request.chosen()
    name = request.model if request.recipe is None else Path(request.recipe).name
    source, assembly = chosen.source, chosen.assembly
    base = source if isinstance(source, ModelDirectory) else source.models[source.base]
    return _Subject(chosen.plan, chosen.config, assembly, name, base)


_ABOUT_COST = [field.name for field in flag_fields(PlanRequest) if field.flag.group == "Cost"]
COMMAND = Command(
    usage=_USAGE,
    request=PlanRequest,
    run=_run,
    stray="quote a plan: --layer_spec '(4,8)'",
    needs=RECIPE_NEEDS,
)


# --- conversion


def _converted(subject: _Subject, kind: str, model_name: str | None) -> str:
    """The plan in a notation; a recipe must be a plan over one model."""
    if kind == "table":
        return "\n".join(show.slot_table(_rows(subject)))
    plan, config, name = subject.plan, subject.config, subject.name
    if subject.assembly is not None:
        base = subject.assembly.models[subject.assembly.base]
        name, config = str(base), base.config
        plan = source_plan(subject.assembly, config.num_layers)
    if kind != "mergekit":
        return plan.to_notation(kind)
    name = model_name or name
    if name is None:
        raise UsageError("--to mergekit needs the model's name: give -m or --model_name")
    dtype = None if subject.assembly is None else subject.assembly.dtype
    return to_mergekit(plan, name, config, dtype).rstrip("\n")


def _notations(subject: _Subject, model_name: str | None) -> dict[str, str | None]:
    """The plan in every notation; None where one cannot say it."""

    def said(kind: str) -> str | None:
        try:
            return _converted(subject, kind, model_name)
        except (PlanError, UsageError):
            return None

    return {kind: said(kind) for kind in NOTATIONS}


def _rows(subject: _Subject) -> list[show.SlotRow]:
    if subject.config is None:
        return [
            show.SlotRow(p, s.layer, "skipped" if s.is_identity else "-", None, s.attn_scale, s.mlp_scale)
            for p, s in enumerate(subject.plan)
        ]
    return _report(subject).layers


def _report(subject: _Subject, max_length: int | None = None, quant: str | None = None) -> show.Report:
    name = str(subject.name)
    if subject.assembly is not None:
        return show.describe_assembly(subject.assembly, name=name, max_length=max_length, quant=quant)
    return show.describe_directory(name, subject.plan, max_length=max_length, quant=quant)


def _warn_of_notes(subject: _Subject) -> None:
    for note in subject.assembly.notes if subject.assembly is not None else ():
        complain(f"note: {note}")


# --- output


def _render(report: show.Report, token: Cost, subject: _Subject) -> str:
    """The report of `--show`, with the cost before the table of slots."""
    facts, table = show.render(report).split("\n\n", 1)
    return "\n".join([facts, *cost_lines(token), *_notation_lines(subject), "", table])


def _notation_lines(subject: _Subject) -> Iterator[str]:
    """The notations that are another spelling than the layer plan's own."""
    found = _notations(subject, None)
    for kind in ("rys", "exllama"):
        if found[kind] is not None:
            yield f"{kind:<12}{found[kind]}"
    if found["spec"] not in (None, str(subject.plan)):  # a recipe's own plan is over what it loads
        yield f"{'as a plan':<12}{found['spec']}"


def _without_model(subject: _Subject) -> dict[str, Any]:
    return {
        "source_layers": subject.plan.num_layers,
        "slots": len(subject.plan),
        "executed_slots": len(subject.plan.executed()),
        "notations": _notations(subject, None),
        "layers": [dataclasses.asdict(row) for row in _rows(subject)],
    }


def _render_bare(subject: _Subject) -> str:
    skipped = len(subject.plan) - len(subject.plan.executed())
    lines = [
        f"{'layer plan':<12}{subject.plan}",
        f"{'layers':<12}{len(subject.plan)} slots over {subject.plan.num_layers} source layers"
        + (f", {skipped} of them skipped" if skipped else ""),
        *_notation_lines(subject),
        "",
        *show.slot_table(_rows(subject)),
    ]
    return "\n".join(lines)
