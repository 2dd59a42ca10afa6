"""The sum of a delta and its base as a `Source`: see `delta.py`."""

import dataclasses

import numpy as np

from jaxchat.checkpoints.manifest import Manifest
from jaxchat.checkpoints.source import Source, convert_into
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError, option


class DeltaSource:
    """The sum of two sources."""

    def __init__(self, delta: Source, base: Source, where: str):
        """Compares shapes; no tensor data is read.

        Args:
          delta, base: of one architecture; the delta's vocabulary may be longer.
          where: names the base in messages.

        Raises:
          UsageError: they are quantized, or not of one shape; names the first parameter.
        """
        self._delta, self._base = delta, base
        self.config: ModelConfig = delta.config
        self.table: tuple[Param, ...] = delta.table
        self._own = {param.name: param for param in base.table}
        for manifest in (delta.manifest, base.manifest):
            if manifest.quantization is not None:
                raise UsageError(
                    f"{manifest.source}: holds {manifest.quantization.format} weights, to which nothing can "
                    "be added; take the model as it was published"
                )
        for param in self.table:
            self._check(param, where)
        named = f"{delta.manifest.source} + {base.manifest.source}"
        self.manifest: Manifest = dataclasses.replace(delta.manifest, source=named)

    def _check(self, param: Param, where: str) -> None:
        own = self._own.get(param.name)
        found = None if own is None else own.stacked_shape(self._base.config)
        wanted = param.stacked_shape(self.config)
        if found == wanted:
            return
        is_words = param.role in ("embedding", "head")
        if found is not None and is_words and found[0] <= wanted[0] and found[1:] == wanted[1:]:
            return
        has = "no such parameter" if found is None else f"one of shape {list(found)}"
        raise UsageError(
            f"{where}: is not what the delta was made from: {param.name} has the shape {list(wanted)} there, "
            f"and here is {has}; give the right {option('base')}"
        )

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        return self._delta.dtype(param)

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`."""
        delta, base = self._delta.layer(param, index), self._base.layer(self._own[param.name], index)
        assert isinstance(delta, np.ndarray)
        assert isinstance(base, np.ndarray)
        whole = delta.astype(np.float32)
        whole[: len(base)] += base.astype(np.float32)
        out = np.empty(delta.shape, delta.dtype)
        convert_into(out, whole, param.name)
        if not np.isfinite(whole).all():
            raise JaxchatError(f"{param.name}: the sum of delta and base holds NaN or infinite numbers")
        return out

    def mapped(self, param: Param) -> None:
        """See `Source`: no file holds the sum."""
