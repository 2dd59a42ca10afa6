"""`--show`: what a model is under a layer plan, from its `config.json` alone. Needs no weights.

JAX is imported only where there is a quantization to show.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.analysis import cost
from jaxchat.checkpoints.assembly import Assembly, LayerSource, assembled_config
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Manifest
from jaxchat.config import GLOBAL_WINDOW, ModelConfig, Param
from jaxchat.errors import UsageError, option
from jaxchat.families import count_parameters, parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import KV_DTYPES

MAX_ROWS = 64
"""Plans with more slots are shown in runs, if all layers are of one kind."""


@dataclasses.dataclass(frozen=True)
class SlotRow:
    """One slot of the plan.

    Attributes:
      slot: its position p; the KV cache slot, counted without skipped slots, is not the same number.
      layer: the source layer.
      kind: `global`, `sliding` (attention window) or `skipped` (both scales 0: no compute, no KV cache).
      window: tokens the attention sees; None is all.
      attn_scale, mlp_scale: of the slot.
      source: which layer of which model that is, where a recipe loads others than 0, 1, 2 ... of one model.
    """

    slot: int
    layer: int
    kind: str
    window: int | None
    attn_scale: float
    mlp_scale: float
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `--show` prints; `dataclasses.asdict` of it is what `--show --json` prints.

    Attributes:
      model: name of the directory.
      family, model_type: which code reads it.
      shapes: sizes by name.
      layer_spec: the plan in canonical spelling.
      source_layers: layers stored.
      slots, executed_slots, allocated_slots: of the plan; without those skipped; of the KV cache, which has a
        slot for every source layer even if the plan is shorter, so that another plan can follow it.
      parameters: with a layer counted as often as the plan uses it, tied embeddings once.
      stored_parameters: with every layer counted once.
      stored_dtype: of the weights, as far as the files say; of quantized ones the format.
      weight_bytes: of the stored parameters, by dtype, not quantized.
      quantization: the format as stored or asked for, None for plain numbers.
      quantized_bytes: of the stored parameters in that format, scales included, by group and in `total`.
      max_length: the context that `kv_bytes` is for, in tokens.
      kv_dtype: what the KV cache is asked to be in; None is float32 on CPU and with float32 weights, else
        bfloat16.
      kv_bytes_per_token, kv_bytes: of the executed slots, by dtype, scales included.
      kv_bytes_allocated: of the allocated slots, by dtype.
      layers: the slots.
      notes: of the recipe, if the model comes from one.
    """

    model: str
    family: str
    model_type: str
    shapes: dict[str, int | bool]
    layer_spec: str
    source_layers: int
    slots: int
    executed_slots: int
    allocated_slots: int
    parameters: int
    stored_parameters: int
    stored_dtype: str | None
    weight_bytes: dict[str, int]
    quantization: str | None
    quantized_bytes: dict[str, int] | None
    max_length: int
    kv_dtype: str | None
    kv_bytes_per_token: dict[str, int]
    kv_bytes: dict[str, int]
    kv_bytes_allocated: dict[str, int]
    layers: list[SlotRow]
    notes: tuple[str, ...] = ()


def describe_directory(
    directory: str | Path | ModelDirectory,
    plan: str | LayerPlan | None = None,
    *,
    max_length: int | None = None,
    quant: str | None = None,
) -> Report:
    """The report on a model directory, of which `config.json` is enough.

    Args:
      directory: the model.
      plan: over the stacked layers, or as text over the slots of the plan that the directory records, which
        is the default; where none is recorded it is every layer once.
      max_length: the context that the KV cache is counted for; None is the model's own.
      quant: the format to count weights in; None is as stored.

    Raises:
      UsageError: no such directory, or a bad plan, length or format.
      JaxchatError: a file is missing or malformed.
    """
    directory = ModelDirectory.at(directory)
    config = directory.config
    if not isinstance(plan, LayerPlan):
        plan = directory.plan if plan is None else directory.plan.select(plan)
    report = describe(
        config, plan, name=directory.name, max_length=max_length, stored_dtype=directory.stored_dtype
    )
    return _with_quantization(report, directory, config, quant)


def describe_assembly(
    assembly: Assembly,
    *,
    name: str,
    max_length: int | None = None,
    quant: str | None = None,
) -> Report:
    """The report on a model put together from others, of which `config.json` is enough; see there for errors.

    Args:
      assembly: the model and its plan, as `read_recipe` gives them.
      name: what to call it.
      max_length, quant: as for `describe_directory`.
    """
    config = assembled_config(assembly, [model.config for model in assembly.models])
    base = assembly.models[assembly.base]
    report = describe(
        config,
        assembly.plan,
        name=name,
        max_length=max_length,
        stored_dtype=assembly.dtype or base.stored_dtype,
    )
    sources = [_source(assembly, layer) for layer in assembly.layers]
    rows = report.layers
    if sources != [str(layer) for layer in range(len(sources))]:
        rows = [dataclasses.replace(row, source=sources[row.layer]) for row in rows]
    report = dataclasses.replace(report, layers=rows, notes=assembly.notes)
    return _with_quantization(report, base, config, quant)


def _source(assembly: Assembly, layer: LayerSource) -> str:
    """`xwin 17`, or `17` where there is one model; with the scaled copies after it."""
    name = f"{assembly.models[layer.model].name} " if len(assembly.models) > 1 else ""
    scales = "".join(f", {parameter} x {factor:g}" for parameter, factor in layer.scales)
    return f"{name}{layer.layer}{scales}"


def _with_quantization(
    report: Report, directory: ModelDirectory, config: ModelConfig, quant: str | None
) -> Report:
    manifest = directory.manifest
    if quant is None and (manifest is None or manifest.quantization is None):
        return report
    manifest = manifest or Manifest(
        format="native",
        dtypes={p.name: report.stored_dtype or "float32" for p in parameter_table(config)},
        source=report.model,
    )
    return dataclasses.replace(report, **_quantized(directory, config, manifest, quant))


def _quantized(
    directory: ModelDirectory, config: ModelConfig, manifest: Manifest, quant: str | None
) -> dict[str, Any]:
    """The fields of a report that a format decides."""
    # Imports JAX, half a second that `--show` without a format does not need.
    from jaxchat.checkpoints.quantized import choose_format, stored_bytes, stored_format_of
    from jaxchat.quant import QuantFormat, format_for

    fmt = choose_format(directory, manifest, "auto" if quant is None else QuantFormat.parse(quant))
    stored = manifest.quantization
    if fmt is None and stored is None:
        return {}
    sizes: dict[str, int] = {}
    for param in parameter_table(config):
        held = stored_format_of(manifest, param) or format_for(param, fmt)
        storage = held or WEIGHT_DTYPES[manifest.dtypes[param.name]]
        group = _group(param)
        sizes[group] = sizes.get(group, 0) + stored_bytes(param.stacked_shape(config), storage)
    label = str(fmt) if stored is None else stored.format
    return {"quantization": label, "quantized_bytes": {**sizes, "total": sum(sizes.values())}}


_GROUPS = {
    "embedding": "embedding",
    "positions": "embedding",
    "head": "output head",
    "norm": "norms and biases",
    "bias": "norms and biases",
}


def _group(param: Param) -> str:
    """What a parameter is a part of, for people."""
    if param.role == "weight":
        return "MLP" if param.half == "mlp" else "attention"
    return _GROUPS[param.role]


def check_max_length(config: ModelConfig, max_length: int | None) -> None:
    """Refuses a context longer than a model has positions for."""
    most = config.max_position_embeddings
    if config.learned_positions and max_length and max_length > most:
        raise UsageError(
            f"{option('max_length')} is {max_length}, but this model has {most} learned positions; choose at "
            f"most {most}"
        )


def describe(
    config: ModelConfig,
    plan: LayerPlan,
    *,
    name: str,
    max_length: int | None = None,
    stored_dtype: str | None = None,
) -> Report:
    """The report on a model under a plan; the arguments are as in `Report`."""
    check_max_length(config, max_length)
    length = max_length or config.max_position_embeddings
    executed = len(plan.executed())
    allocated = max(executed, config.num_layers)
    stored = count_parameters(config)
    per_slot = {dtype: cost.kv_row_bytes(config, dtype) for dtype in KV_DTYPES}
    per_token = {dtype: size * executed for dtype, size in per_slot.items()}
    return Report(
        model=name,
        family=config.family,
        model_type=config.model_type,
        shapes=_shapes(config),
        layer_spec=str(plan),
        source_layers=config.num_layers,
        slots=len(plan),
        executed_slots=executed,
        allocated_slots=allocated,
        parameters=count_parameters(config, len(plan)),
        stored_parameters=stored,
        stored_dtype=stored_dtype,
        weight_bytes={name: stored * dtype.itemsize for name, dtype in WEIGHT_DTYPES.items()},
        quantization=None,
        quantized_bytes=None,
        max_length=length,
        kv_dtype=None,
        kv_bytes_per_token=per_token,
        kv_bytes={d: n * length for d, n in per_token.items()},
        kv_bytes_allocated={dtype: size * allocated * length for dtype, size in per_slot.items()},
        layers=[_slot_row(config, plan, position) for position in range(len(plan))],
    )


def short_count(count: int) -> str:
    """A number of parameters for people: 13264949248 -> `13.3B`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def counted(count: int) -> str:
    """A number of parameters, exactly and for people."""
    return f"{count:,} ({short_count(count)})"


def short_bytes(count: int) -> str:
    """A number of bytes for people: 1610612736 -> `1.5 GiB`."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} B"


def render(report: Report, *, in_memory: str | None = None) -> str:
    """The report as text for a terminal of 80 columns (long plans may be wider).

    Args:
      report: what to show.
      in_memory: what a loaded model has there; None tells what its weights will take.
    """
    shapes = ", ".join(f"{name} {_number(value)}" for name, value in report.shapes.items())
    facts = [
        ("model", report.model),
        ("family", f"{report.family} (model_type {report.model_type})"),
        *((label if number == 0 else "", line) for number, line in enumerate(_wrap(shapes, 66))
          for label in ("shapes",)),
        ("layer plan", report.layer_spec),
        ("layers", _layers_line(report)),
        ("parameters", f"{counted(report.parameters)} as run"),
        ("", f"{counted(report.stored_parameters)} as stored"),
        *_weight_facts(report),
        *(("in memory", line) for line in (in_memory or _loaded(report),) if line),
        ("KV cache", f"{_by_dtype(report.kv_bytes_per_token)} a token"),
        ("", f"{_by_dtype(report.kv_bytes)} at {report.max_length:,} tokens"),
    ]  # fmt: skip
    if report.allocated_slots != report.executed_slots:
        facts.append(("", f"{_by_dtype(report.kv_bytes_allocated)} with room for every plan of its layers"))
    default = "float32 on CPU and with float32 weights, else bfloat16"
    facts.append(("", f"{report.kv_dtype or default}; grows as it fills"))
    lines = [f"{label:<12}{text}" for label, text in facts]
    lines += [f"{'note':<12}{note}" for note in report.notes]
    return "\n".join([*lines, "", *slot_table(report.layers)])


def _loaded(report: Report) -> str:
    """What the weights will take as they are stored or asked for; "" where the files do not say."""
    if report.quantized_bytes is not None:
        size: int | None = report.quantized_bytes["total"]
    else:
        size = report.weight_bytes.get(report.stored_dtype or "")
    return "" if size is None else f"{short_bytes(size)} of weights, once loaded"


def _weight_facts(report: Report) -> Iterator[tuple[str, str]]:
    plain = _by_dtype(report.weight_bytes, mark=report.stored_dtype)
    if report.quantized_bytes is None:
        yield "weights", plain
        return
    sizes = dict(report.quantized_bytes)
    mark = " (as stored)" if report.stored_dtype == report.quantization else ""
    yield (
        "weights",
        f"{report.quantization} {short_bytes(sizes.pop('total'))}{mark}, scales included:",
    )
    groups = ", ".join(f"{name} {short_bytes(size)}" for name, size in sizes.items())
    yield from (("", line) for line in _wrap(groups, 66))
    yield "", f"not quantized {plain}"


def _shapes(config: ModelConfig) -> dict[str, int | bool]:
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "feed-forward": config.intermediate_size,
        "query heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "head size": config.head_dim,
        "trained context": config.max_position_embeddings,
        "tied embeddings": config.tied_embeddings,
    }


def _slot_row(config: ModelConfig, plan: LayerPlan, position: int) -> SlotRow:
    slot = plan.slots[position]
    window = config.layer_windows[slot.layer]
    kind = "skipped" if slot.is_identity else "global" if window == GLOBAL_WINDOW else "sliding"
    return SlotRow(position, slot.layer, kind, window or None, slot.attn_scale, slot.mlp_scale)


def _layers_line(report: Report) -> str:
    skipped = report.slots - report.executed_slots
    text = f"{report.slots} slots over {report.source_layers} source layers"
    return text + (f", {skipped} of them skipped" if skipped else "")


def _number(value: int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:,}"


def _by_dtype(sizes: dict[str, int], mark: str | None = None) -> str:
    parts = (f"{name} {short_bytes(size)}{' (as stored)' * (name == mark)}" for name, size in sizes.items())
    return ", ".join(parts)


def _wrap(text: str, width: int) -> Iterator[str]:
    """Lines of whole comma-separated parts."""
    line = ""
    for part in text.split(", "):
        if line and len(line) + len(part) + 2 > width:
            yield line + ","
            line = ""
        line += (", " if line else "") + part
    yield line


# --- the table of slots


def slot_table(rows: Sequence[SlotRow]) -> Iterator[str]:
    """Lines of a table with a slot each; long plans of one kind of layer in runs."""
    scaled = any((r.attn_scale, r.mlp_scale) != (1.0, 1.0) for r in rows)
    sources = any(r.source is not None for r in rows)
    uniform = len({(r.kind, r.window) for r in rows}) == 1 and not scaled and not sources
    groups = list(_runs(rows)) if len(rows) > MAX_ROWS and uniform else [(r, r) for r in rows]
    header = f"{'slot':>9}  {'layer':>9}  {'kind':<8}{'window':>8}"
    yield header + ("  attn scale  mlp scale" if scaled else "") + ("  source" if sources else "")
    for first, last in groups:
        window = "-" if first.window is None else f"{first.window:,}"
        line = f"{_span(first.slot, last.slot):>9}  {_span(first.layer, last.layer):>9}"
        line += f"  {first.kind:<8}{window:>8}"
        line += f"  {first.attn_scale:>10g}  {first.mlp_scale:>9g}" if scaled else ""
        yield line + (f"  {first.source}" if sources else "")


def _runs(rows: Sequence[SlotRow]) -> Iterator[tuple[SlotRow, SlotRow]]:
    """First and last row of every run of consecutive layers."""
    start = 0
    for position in range(1, len(rows) + 1):
        if position == len(rows) or rows[position].layer != rows[position - 1].layer + 1:
            yield rows[start], rows[position - 1]
            start = position


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def as_json(report: Report) -> dict[str, Any]:
    """The report as what `json.dumps` takes."""
    return dataclasses.asdict(report)
