"""Loads models for a conversation, each set of weights once whatever plans run over it."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.runtime import Model, load


class ModelLoader:
    """Gives models by directory and layer plan; the same directory is loaded once.

    Args:
      max_slots: cache slots to reserve, so that longer plans share the executables.
      said: told once for every directory that is loaded.
      **settings: of `jaxchat.load`, for every model.
    """

    def __init__(self, *, max_slots: int = 0, said: Callable[[str], None] | None = None, **settings: object):
        self._settings = {**settings, "max_slots": max_slots}
        self._said = said
        self._loaded: dict[Path, Model] = {}

    def __call__(self, directory: str | Path, layer_spec: str | None = None) -> Model:
        """The model in a directory under a plan; None is every layer once, or the plan it was saved with."""
        found = ModelDirectory.at(directory)
        path = Path(os.path.realpath(found.path))
        if path not in self._loaded:
            if self._said:
                self._said(f"loading {directory}")
            self._loaded[path] = load(found, **self._settings)  # type: ignore[arg-type]
        model = self._loaded[path]
        return model if layer_spec is None else model.with_plan(layer_spec)
