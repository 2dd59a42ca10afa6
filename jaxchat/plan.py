"""`python -m jaxchat.plan`: converts layer plans between notations, and says what one costs.

Reads `config.json` only. The notations are in `notations.py` and `recipe.py`, the arithmetic in `cost.py`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jaxchat.analysis import cost, show
from jaxchat.checkpoints.assembly import Assembly, assembled_config
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES
from jaxchat.cli import command_line
from jaxchat.cli.command_line import Flag
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan, PlanError
from jaxchat.recipes.recipe import read_recipe, source_plan, to_mergekit

_USAGE = """\
usage: python -m jaxchat.plan (-m DIR | --num_layers N | --recipe FILE) [...]

Converts layer plans between notations, and says what a plan costs: parameters,
bytes, operations, and the tokens a second that a device's memory allows. Reads
config.json only.

  python -m jaxchat.plan -m llama-3-8b --layer_spec '(4,8)' --device h200
  python -m jaxchat.plan --num_layers 80 --layer_spec 0:52,45: --to rys
  python -m jaxchat.plan -m llama-3-8b --layer_spec 0:20,10:32 --to mergekit
  python -m jaxchat.plan --recipe expanded.yml --to spec
"""
_KINDS = ("spec", "json", "rys", "exllama", "mergekit", "table")

_GROUPS: dict[str, tuple[Flag, ...]] = {
    "Plan": (
        command_line.MODEL,
        Flag(
            "num_layers",
            flags.DEFINE_integer,
            "N",
            "How many layers the model has, where there is no model at hand, e.g. --num_layers 32",
            more={"lower_bound": 1},
        ),
        command_line.LAYER_SPEC,
        command_line.RECIPE,
        command_line.MODEL_PATH,
        command_line.KEEP_IDENTITY,
    ),
    "Conversion": (
        Flag(
            "to",
            flags.DEFINE_enum,
            "NOTATION",
            "Print the plan in this notation and nothing else: spec is what --layer_spec takes, json a list "
            "of slots, rys (i,j), exllama a list of ranges, mergekit a recipe, table a line a slot. Which "
            "one is given, the text itself says, e.g. --to mergekit",
            more={"enum_values": _KINDS},
        ),
        Flag(
            "model_name",
            flags.DEFINE_string,
            "NAME",
            "The name of the model in the recipe that --to mergekit prints; what -m says if not given, e.g. "
            "--model_name openchat/openchat-3.5-0106",
        ),
    ),
    "Cost": (
        Flag(
            "device",
            flags.DEFINE_multi_string,
            "DEVICE",
            f"Predict tokens a second on this device, if reading memory is all that takes time: one of "
            f"{', '.join(cost.DEVICES)}, or a bandwidth; may be given more than once, e.g. --device h200 "
            "--device '61.4 GB/s'",
            default=[],
        ),
        Flag(
            "max_length",
            flags.DEFINE_integer,
            "N",
            "The context that the cost is for, beside an empty one, in tokens; the model's own if not "
            "given, e.g. -l 4096",
            short="l",
            more={"lower_bound": 1},
        ),
        command_line.DTYPE._replace(
            help="Count weights in float32, bfloat16 or float16; as stored if not given, e.g. --dtype float16"
        ),
        command_line.QUANT._replace(
            help="Count weights quantized: int8, int4 or any other format of jaxchat.generate --quant; as "
            "stored if not given, e.g. --quant int4"
        ),
        command_line.KV_DTYPE,
    ),
    "Output": (
        Flag(
            "json",
            flags.DEFINE_bool,
            "",
            "Print one JSON object: the plan in every notation that can say it, its cost and its slots, e.g. "
            "--json",
            default=False,
        ),
        command_line.LOG_LEVEL,
        command_line.HELP,
    ),
}


class _Subject(NamedTuple):
    """What the command is about.

    Attributes:
      plan: over the layers of `config`, or over `--num_layers` layers.
      config: None without a model.
      assembly: of the recipe.
      name: of the model, for people and in a recipe; None if there is none.
    """

    plan: LayerPlan
    config: ModelConfig | None
    assembly: Assembly | None
    name: str | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one token of a batch of one costs.

    Attributes:
      weight_format: of the weights, a dtype or a quantization.
      kv_dtype: of the KV cache.
      context: tokens in the context; the other figures are for an empty one and for this one.
      weight_bytes: read, each layer as often as it runs.
      kv_bytes: keys and values read.
      flops: floating-point operations.
      tokens_per_second: on each device, if reading these bytes is all that takes time.
    """

    weight_format: str
    kv_dtype: str
    context: int
    weight_bytes: int
    kv_bytes: tuple[int, int]
    flops: tuple[int, int]
    tokens_per_second: dict[str, tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    return command_line.run(_run, _GROUPS, _USAGE, argv, stray="quote a plan: --layer_spec '(4,8)'")


def _run(values: flags.FlagValues) -> int:
    _refuse_combinations(values)
    devices = [cost.device(text) for text in values.device]
    subject = _subject(values)
    if values.to is not None:
        _warn_of_notes(subject)
        print(_converted(subject, values.to, values.model_name))
    elif subject.config is None:
        print(json.dumps(_without_model(subject), indent=2) if values.json else _render_bare(subject))
    else:
        report = _report(subject, values)
        options = {name: getattr(values, name) for name in ("dtype", "quant", "kv_dtype")}
        token = token_cost(subject.config, subject.plan, devices, report, **options)
        if values.json:
            extra = {"cost": dataclasses.asdict(token), "notations": _notations(subject, values.model_name)}
            print(json.dumps({**show.as_json(report), **extra}, indent=2))
        else:
            print(_render(report, token, subject))
    return 0


def _refuse_combinations(values: flags.FlagValues) -> None:
    given = [f"--{name}" for name in ("model", "num_layers", "recipe") if getattr(values, name) is not None]
    if not given:
        raise UsageError("no model: give its directory with -m, a --recipe, or only --num_layers")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given; give one")
    for name in ("model_path", "keep_identity"):
        if getattr(values, name) and values.recipe is None:
            raise UsageError(f"--{name} needs --recipe: it says how to read one")
    if values.model_name is not None and values.to != "mergekit" and not values.json:
        raise UsageError("--model_name needs --to mergekit: it is the name in the recipe")
    about_cost = [
        name for name in ("device", "max_length", "dtype", "quant", "kv_dtype") if getattr(values, name)
    ]
    if values.to is not None and (values.json or about_cost):
        other = "json" if values.json else about_cost[0]
        raise UsageError(f"--to prints the plan and nothing else; it cannot be combined with --{other}")
    if values.num_layers is not None and about_cost:
        raise UsageError(
            f"--{about_cost[0]} needs a model: give its directory with -m instead of --num_layers"
        )
    if values.dtype and values.quant:
        raise UsageError("--dtype and --quant are given; give one")


def _subject(values: flags.FlagValues) -> _Subject:
    if values.recipe is not None:
        paths = command_line.model_paths(values)
        assembly = read_recipe(values.recipe, paths, keep_identity=values.keep_identity)
        config = assembled_config(assembly, [model.config for model in assembly.models])
        if values.layer_spec is not None:
            assembly = dataclasses.replace(assembly, plan=assembly.plan.select(values.layer_spec))
        return _Subject(assembly.plan, config, assembly, Path(values.recipe).name)
    spec = "all" if values.layer_spec is None else values.layer_spec
    if values.model is None:
        return _Subject(LayerPlan.parse(spec, values.num_layers), None, None, None)
    model = ModelDirectory.at(values.model)
    return _Subject(model.plan.select(spec), model.config, None, values.model)


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

    return {kind: said(kind) for kind in _KINDS if kind != "table"}


def _rows(subject: _Subject) -> list[show.SlotRow]:
    if subject.config is None:
        return [
            show.SlotRow(p, s.layer, "skipped" if s.is_identity else "-", None, s.attn_scale, s.mlp_scale)
            for p, s in enumerate(subject.plan)
        ]
    return _report(subject).layers


def _report(subject: _Subject, values: flags.FlagValues | None = None) -> show.Report:
    options: dict[str, Any] = (
        {} if values is None else {"max_length": values.max_length, "quant": values.quant}
    )
    if subject.assembly is not None:
        return show.describe_assembly(subject.assembly, name=str(subject.name), **options)
    return show.describe_directory(str(subject.name), subject.plan, **options)


def _warn_of_notes(subject: _Subject) -> None:
    for note in subject.assembly.notes if subject.assembly is not None else ():
        command_line.complain(f"note: {note}")


# --- cost


def token_cost(
    config: ModelConfig,
    plan: LayerPlan,
    devices: Sequence[cost.Device],
    report: show.Report,
    *,
    dtype: str | None = None,
    quant: str | None = None,
    kv_dtype: str | None = None,
) -> Cost:
    """What one token costs under a plan.

    Args:
      config: the model.
      plan: what runs.
      devices: to predict a speed for.
      report: of the model under the plan: its context and how its weights are stored.
      dtype, quant: of the weights, instead of as stored; bfloat16 if nothing says how they are.
      kv_dtype: of the KV cache; None is float32 beside float32 weights, else bfloat16, as on an accelerator.
    """
    weight_format = quant or dtype or report.quantization or report.stored_dtype or "bfloat16"
    bytes_of = _layer_bytes(config, weight_format)
    sizes = {param.name: bytes_of(param) for param in parameter_table(config)}
    weight_bytes = cost.weight_bytes_read(config, plan, sizes)
    kv_dtype = kv_dtype or ("float32" if weight_format == "float32" else "bfloat16")
    contexts = (0, report.max_length)
    kv_bytes = [cost.kv_bytes_read(config, plan, n, kv_dtype) for n in contexts]
    return Cost(
        weight_format=weight_format,
        kv_dtype=kv_dtype,
        context=report.max_length,
        weight_bytes=weight_bytes,
        kv_bytes=(kv_bytes[0], kv_bytes[1]),
        flops=(cost.flops_per_token(config, plan, 0), cost.flops_per_token(config, plan, contexts[1])),
        tokens_per_second={
            device.name: (
                device.bandwidth / (weight_bytes + kv_bytes[0]),
                device.bandwidth / (weight_bytes + kv_bytes[1]),
            )
            for device in devices
        },
    )


def _layer_bytes(config: ModelConfig, weight_format: str) -> Callable[[Param], int]:
    """The bytes of a parameter in a format, of one that is per layer in one layer."""
    if weight_format in WEIGHT_DTYPES:
        itemsize = WEIGHT_DTYPES[weight_format].itemsize
        return lambda param: math.prod(param.layer_shape(config)) * itemsize
    # Imports JAX, half a second that plain dtypes do not need.
    from jaxchat.checkpoints.quantized import stored_bytes
    from jaxchat.quant import QuantFormat, format_for

    fmt, plain = QuantFormat.parse(weight_format), WEIGHT_DTYPES["bfloat16"]
    return lambda param: stored_bytes(param.layer_shape(config), format_for(param, fmt) or plain)


# --- output


def _render(report: show.Report, token: Cost, subject: _Subject) -> str:
    """The report of `--show`, with the cost before the table of slots."""
    facts, table = show.render(report).split("\n\n", 1)
    return "\n".join([facts, *_cost_lines(token), *_notation_lines(subject), "", table])


def _cost_lines(token: Cost) -> Iterator[str]:
    at = f"at {token.context:,} tokens"
    weights, kv = show.short_bytes(token.weight_bytes), show.short_bytes(token.kv_bytes[1])
    yield f"{'a token':<12}reads {weights} of {token.weight_format} weights"
    yield f"{'':<12}and {kv} of {token.kv_dtype} KV {at}"
    flops = [f"{count / 1e9:,.3g}" for count in token.flops]
    yield f"{'':<12}takes {flops[0]} GFLOP with an empty context, {flops[1]} {at}"
    for name, (empty, full) in token.tokens_per_second.items():
        yield f"{name:<12}at most {empty:,.1f} tokens/s with an empty context, {full:,.1f} {at}"


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


if __name__ == "__main__":
    command_line.exit_process(main())
