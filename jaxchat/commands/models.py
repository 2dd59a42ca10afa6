"""`jaxchat models`: lists the models that were fetched from the Hugging Face Hub, and removes some."""

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

from jaxchat.cli.command_line import Command, Conflict, Need, agreed
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.checkpoints.hub import CachedModel

_USAGE = """\
usage: {program} [--json | --remove NAME]

Lists the models in the Hugging Face Hub's cache: their names, which -m takes,
family, layers, size on disk, and when they were last used. HF_HOME says where
the cache is.

  {program}
  {program} --remove Qwen/Qwen2.5-0.5B-Instruct
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsRequest:
    """What to do with the list."""

    remove: Annotated[
        tuple[str, ...],
        Flag(
            help="Remove the model of this name, after a question; may be given more than once",
            example="--remove Qwen/Qwen2.5-0.5B-Instruct",
            value="NAME",
            many=True,
        ),
    ] = ()
    yes: Annotated[bool, Flag(help="Remove without a question", example="--remove Qwen/Qwen3-0.6B --yes")] = (
        False
    )
    json: Annotated[
        bool, Flag(help="Print a JSON list of objects, with the directory of each", example="--json")
    ] = False


def _run(request: ModelsRequest, given: frozenset[str]) -> int:
    from jaxchat.checkpoints import hub  # half a second with huggingface_hub, which --help need not wait for
    from jaxchat.visible import visible

    models = hub.cached_models()
    if request.json:
        print(json.dumps([_as_json(model) for model in models], ensure_ascii=False, indent=2))
        return 0
    if not request.remove:
        table = _table(models)
        print(visible(table) if sys.stdout.isatty() else table)
        return 0
    known = {model.repo: model for model in models}
    if missing := [name for name in request.remove if name not in known]:
        raise UsageError(f"no model {missing[0]} is in the cache; `jaxchat models` lists those there are")
    for name in dict.fromkeys(request.remove):
        if request.yes or agreed(f"remove {name}, {_size(known[name].size)}?"):
            hub.remove(name)
            print(f"removed {name}, {_size(known[name].size)}")
    return 0


def _table(models: "list[CachedModel]") -> str:
    if not models:
        return "no models are in the cache; jaxchat chat -m org/name fetches one"
    rows = [("name", "family", "layers", "size", "last used")]
    rows += [(m.repo, *_kind(m), _size(m.size), _day(m.last_used)) for m in models]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _kind(model: "CachedModel") -> tuple[str, str]:
    """Family and layers, or what stands in for them where jaxchat does not run the model."""
    from jaxchat.checkpoints.directory import ModelDirectory

    try:
        config = ModelDirectory.at(model.path).config
    except JaxchatError:
        return "not supported", "-"
    return config.family, str(config.num_layers)


def _as_json(model: "CachedModel") -> dict[str, Any]:
    family, layers = _kind(model)
    known = layers != "-"
    return {
        "name": model.repo,
        "path": str(model.path),
        "family": family if known else None,
        "layers": int(layers) if known else None,
        "bytes": model.size,
        "last_used": model.last_used,
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


COMMAND = Command(
    usage=_USAGE,
    request=ModelsRequest,
    run=_run,
    stray="a model is removed with --remove NAME",
    conflicts=(Conflict("json", "remove", "one lists, the other removes"),),
    needs=(Need("yes", ("remove",), "it answers the question before removing"),),
)
