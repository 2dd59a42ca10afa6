"""`jaxchat models`: lists the models that were fetched from the Hugging Face Hub, and removes some."""

import time
from typing import TYPE_CHECKING, Any

from jaxchat.cli.listing import Listing, list_command
from jaxchat.errors import JaxchatError

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


def _listing() -> Listing["CachedModel"]:
    from jaxchat.checkpoints import hub  # numpy and others, which --help need not wait for

    models = hub.cached_models()
    return Listing(
        entries={model.repo: model for model in models},
        table=lambda: _table(models),
        as_json=_as_json,
        question=lambda model: f", {_size(model.size)}",
        remove=lambda model: hub.remove(model.repo),
        missing="no model {name} is in the cache; `jaxchat models` lists those there are",
    )


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


COMMAND = list_command(_USAGE, "a model is removed with --remove NAME", _listing)
