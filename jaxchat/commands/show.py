"""`jaxchat show`: a model's shapes, layers, parameters and memory under a layer plan; reads no weights."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

from jaxchat.cli.command_line import Command
from jaxchat.cli.model_flags import (
    KV_DTYPE,
    MAX_LENGTH,
    QUANT,
    RECIPE_NEEDS,
    BoxedModel,
    ModelFlags,
)
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.cli.chosen_model import ChosenModel

_USAGE = """\
usage: {program} [-m DIR | --recipe FILE] [...]

Shows what a model is under a layer plan, before anything is loaded: shapes,
layers, parameters, and the memory that weights and KV cache take.

  {program}
  {program} -m llama-3-8b --layer_spec 0:10,10:20:2,20:
  {program} -m llama-3-8b --quant int4 --max_length 32768
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowRequest(ModelFlags):
    """A model under a plan, and what to count."""

    model: BoxedModel = None
    quant: Annotated[str | None, QUANT] = None
    kv_dtype: Annotated[str | None, KV_DTYPE] = None
    max_length: Annotated[int | None, MAX_LENGTH] = None
    json: Annotated[bool, Flag(help="Print one JSON object", example="--json", group="Output")] = False


def print_report(
    chosen: "ChosenModel",
    *,
    max_length: int | None,
    quant: str | None,
    kv_dtype: str | None,
    as_json: bool,
) -> None:
    """Writes what there is to know of a model to standard output."""
    from jaxchat.analysis import show  # numpy and others, which --help need not wait for

    report = chosen.report(max_length=max_length, quant=quant)
    report = dataclasses.replace(report, kv_dtype=kv_dtype)
    print(json.dumps(show.as_json(report), indent=2) if as_json else show.render(report))


def _run(request: ShowRequest, given: frozenset[str]) -> int:
    chosen = request.or_boxed().chosen()
    print_report(
        chosen,
        max_length=request.max_length,
        quant=request.quant,
        kv_dtype=request.kv_dtype,
        as_json=request.json,
    )
    return 0


COMMAND = Command(usage=_USAGE, request=ShowRequest, run=_run, needs=RECIPE_NEEDS)
