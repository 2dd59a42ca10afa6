"""Models that are published as what is to be added to another: Vicuna v0, Koala, StableVicuna. Needs no JAX.

As `apply_delta.py` of FastChat adds them: number by number, in the delta's dtype. A vocabulary that the delta
has made longer ends in rows that are no sum but the delta's own.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.errors import UsageError, option

if TYPE_CHECKING:
    from jaxchat.checkpoints.manifest import Keep
    from jaxchat.checkpoints.source import Source, Wanted


@dataclasses.dataclass(frozen=True)
class DeltaDirectory(ModelDirectory):
    """A directory of a delta, beside the model that it is to be added to: together a model."""

    base: ModelDirectory

    @classmethod
    def of(cls, delta: str | Path | ModelDirectory, base: str | Path | ModelDirectory) -> "DeltaDirectory":
        """The sum of two models.

        Raises:
          UsageError: one of them is not in Hugging Face's layout.
          JaxchatError: as `ModelDirectory.at`.
        """
        delta, base = ModelDirectory.at(delta), ModelDirectory.at(base)
        for model in (delta, base):
            if type(model) is not ModelDirectory:
                raise UsageError(
                    f"{model}: with {option('base')} both models are directories in Hugging Face's layout; "
                    "give those that were published"
                )
        return cls(delta.path, base)

    @property
    def read_from(self) -> tuple[Path, ...]:
        """See `ModelDirectory`."""
        return (self.path, *self.base.read_from)

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """See `ModelDirectory`."""
        from jaxchat.checkpoints.delta_source import DeltaSource

        return DeltaSource(super().source(wanted, keep), self.base.source(wanted, keep), str(self.base))


def model_at(path: str | Path | ModelDirectory, base: str | Path | ModelDirectory | None) -> ModelDirectory:
    """What is at a path (`ModelDirectory.at`), added to its base if it has one."""
    return ModelDirectory.at(path) if base is None else DeltaDirectory.of(path, base)
