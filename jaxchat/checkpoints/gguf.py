"""GGUF models as a `Source`: read layer by layer, what llama.cpp's converter has changed in them undone."""

import logging
import math

import numpy as np

from jaxchat.checkpoints.gguf_config import model_of
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.gguf_storage import KEPT, changed, described, dtype_of, is_shifted, place
from jaxchat.checkpoints.gguf_types import dequantize
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Keep
from jaxchat.checkpoints.quantized import of_row, stored_format_of
from jaxchat.checkpoints.safetensors_file import NAMES
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError, option
from jaxchat.families import parameter_table
from jaxchat.families.gguf import architecture_of
from jaxchat.families.gguf_rope import TENSORS as ROPE_TENSORS
from jaxchat.families.gguf_tensors import (
    OUTPUT,
    Place,
    input_scale_of,
    rotated_heads,
    scale_of,
    unpermuted,
)
from jaxchat.pallas.gguf_blocks import tensor_of
from jaxchat.quant import QuantFormat, QuantizedTensor, quantize

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # numbers dequantized at a time


class GgufSource:
    """A GGUF file and its parts; `gguf_storage` says how quantized tensors are held."""

    def __init__(self, file: GgufFile, config: ModelConfig, keep: Keep = "small"):
        """Verifies the tensors; no data is read.

        Args:
          file: of the model.
          config: what it says of itself.
          keep: what becomes of weights that cannot be held as they are.

        Raises:
          JaxchatError: tensors are missing, unknown or of other shapes; the message has all mismatches.
        """
        self._file, self.config = file, config
        self._architecture = architecture_of(model_of(file))
        self.table = parameter_table(config)
        self._verify()
        self.manifest = described(file, config, self.table, self._architecture, keep)
        self._storage = {p.name: stored_format_of(self.manifest, p) for p in self.table}
        if lossy := {
            old: new for old, new in changed(file, config, self.table, keep).items() if new != "float32"
        }:
            became = ", ".join(f"{old} to {new}" for old, new in lossy.items())
            logger.warning(
                "%s: quantized again, no format here being the same: %s (%s keeps the numbers, at 32 bits)",
                file.path,
                became,
                option("keep", "exact"),
            )

    def _verify(self) -> None:
        entries = self._file.entries
        if not entries:
            raise JaxchatError(
                f"{self._file.path}: holds no tensors: a vocabulary, or a description; give the model's file"
            )
        expected = {}
        for param in self.table:
            for index in range(param.rows(self.config)):
                found_at = self._place(param, index)
                expected[found_at.tensor] = found_at.shape
                if (scale := scale_of(found_at.tensor)) in entries:
                    expected[scale] = (1,)
        passed = {*ROPE_TENSORS, *map(input_scale_of, expected)}
        passed |= {OUTPUT} if self.config.tied_embeddings else set()
        found = {
            name: (NAMES[WEIGHT_DTYPES[dtype_of(entry)]], entry.shape)
            for name, entry in entries.items()
            if name not in passed and not name.endswith("attn_rot_embd.weight")
        }
        advice = "take another file of the model"
        verify(str(self._file.path), expected, found, owner="metadata", advice=advice)

    def _place(self, param: Param, index: int) -> Place:
        return place(self._file, param, index, self.config)

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`. Layers of one stack, and parts of a fused tensor, share the widest of several."""
        return WEIGHT_DTYPES[self.manifest.dtypes[param.name]]

    def layer(self, param: Param, index: int) -> np.ndarray | QuantizedTensor:
        """See `Source`: [out, in] of one layer, cut out of a fused tensor and put in order where need be."""
        found, storage = self._place(param, index), self._storage[param.name]
        held = self.dtype(param) if storage is None else of_row(storage, index)
        entry = self._file.entries[found.tensor]
        if isinstance(held, QuantFormat) and KEPT.get(entry.type.name) == str(held):
            raw = self._file.raw(found.tensor, self._rows(found))
            return tensor_of(entry.type.name, self._ordered(param, raw))
        values = self._ordered(param, self._values(found))
        if is_shifted(param, self._architecture):
            values = values.astype(np.float32) - np.float32(self._architecture.norm_offset)
        if (scale := scale_of(found.tensor)) in self._file.entries:
            values = values * self._file.values(scale).astype(np.float32)
        if isinstance(held, QuantFormat):
            return quantize(values, held, name=found.tensor)
        return values.astype(held, copy=False)

    def _ordered(self, param: Param, rows: np.ndarray) -> np.ndarray:
        """Rows, of numbers or of bytes, as Hugging Face's layout has them."""
        heads = rotated_heads(param, self.config) if self._architecture.permuted else 0
        return unpermuted(rows, heads) if heads else rows

    def _rows(self, found: Place) -> slice:
        return slice(*(found.rows or (0, self._file.entries[found.tensor].shape[0])))

    def _values(self, place: Place) -> np.ndarray:
        """The numbers of a place, as they are stored or dequantized, some rows at a time."""
        entry = self._file.entries[place.tensor]
        start, stop, _ = self._rows(place).indices(entry.shape[0])
        if entry.type.dtype is not None or len(entry.shape) == 1:
            found = self._file.values(place.tensor, slice(start, stop))
            return found[start:stop] if len(entry.shape) == 1 else found
        out = np.empty((stop - start, *entry.shape[1:]), np.float32)
        step = max(1, _CHUNK // math.prod(entry.shape[1:]))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            raw = self._file.raw(place.tensor, rows)
            out[rows.start - start : rows.stop - start] = dequantize(entry.type, raw)
        return out

    def mapped(self, param: Param) -> None:
        """See `Source`: layers are tensors of their own."""
