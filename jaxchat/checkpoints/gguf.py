"""GGUF models as a `Source`: read layer by layer, what llama.cpp's converter has changed in them undone."""

import math

import numpy as np

from jaxchat.checkpoints.gguf_config import dtype_of, model_of
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.gguf_types import dequantize
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Manifest
from jaxchat.checkpoints.safetensors_file import DTYPES
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families import count_parameters, parameter_table
from jaxchat.families.gguf import architecture_of
from jaxchat.families.gguf_rope import TENSORS as ROPE_TENSORS
from jaxchat.families.gguf_tensors import (
    OUTPUT,
    Place,
    input_scale_of,
    place_of,
    rotated_heads,
    scale_of,
    unpermuted,
)

_CHUNK = 1 << 22  # numbers dequantized at a time


class GgufSource:
    """A GGUF file and its parts. Quantized tensors are handed on as the float32 numbers they stand for."""

    def __init__(self, file: GgufFile, config: ModelConfig):
        """Verifies the tensors; no data is read.

        Args:
          file: of the model.
          config: what it says of itself.

        Raises:
          JaxchatError: tensors are missing, unknown or of other shapes; the message has all mismatches.
        """
        self._file, self.config = file, config
        self._architecture = architecture_of(model_of(file))
        self.table = parameter_table(config)
        self._verify()
        self._dtypes = {param.name: self._common_dtype(param) for param in self.table}
        self.manifest = Manifest(
            format="native",
            dtypes={name: dtype.name for name, dtype in self._dtypes.items()},
            tied_head="absent" if config.tied_embeddings else "untied",
            source=file.path.name,
            parameters=count_parameters(config),
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
                place = self._place(param, index)
                expected[place.tensor] = place.shape
                if (scale := scale_of(place.tensor)) in entries:
                    expected[scale] = (1,)
        passed = {*ROPE_TENSORS, *map(input_scale_of, expected)}
        passed |= {OUTPUT} if self.config.tied_embeddings else set()
        found = {
            name: (_PLAIN[dtype_of(entry)], entry.shape)
            for name, entry in entries.items()
            if name not in passed and not name.endswith("attn_rot_embd.weight")
        }
        advice = "take another file of the model"
        verify(str(self._file.path), expected, found, owner="metadata", advice=advice)

    def _place(self, param: Param, index: int) -> Place:
        return place_of(param, index, self.config, self._file.entries)

    def _is_shifted(self, param: Param) -> bool:
        """Whether a number was added to what Hugging Face's layout has."""
        return param.role == "norm" and self._architecture.norm_offset != 0

    def _common_dtype(self, param: Param) -> np.dtype:
        """That of all layers, and of all parts of what is fused in Hugging Face's layout."""
        together = [other for other in self.table if other.hf == param.hf]
        places = [self._place(p, i) for p in together for i in range(p.rows(self.config))]
        found = {dtype_of(self._file.entries[place.tensor]) for place in places}
        scaled = any(scale_of(place.tensor) in self._file.entries for place in places)
        plain = len(found) == 1 and not scaled and not self._is_shifted(param)
        return found.pop() if plain else WEIGHT_DTYPES["float32"]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`. Layers of one stack, and parts of a fused tensor, share the widest of several."""
        return self._dtypes[param.name]

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`: [out, in] of one layer, cut out of a fused tensor and put in order where need be."""
        place = self._place(param, index)
        values = self._values(place)
        if self._architecture.permuted and (heads := rotated_heads(param, self.config)):
            values = unpermuted(values, heads)
        if self._is_shifted(param):
            values = values.astype(np.float32) - np.float32(self._architecture.norm_offset)
        if (scale := scale_of(place.tensor)) in self._file.entries:
            values = values * self._file.values(scale).astype(np.float32)
        return values.astype(self.dtype(param), copy=False)

    def _values(self, place: Place) -> np.ndarray:
        """The numbers of a place, as they are stored or dequantized, some rows at a time."""
        entry = self._file.entries[place.tensor]
        start, stop = place.rows or (0, entry.shape[0])
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


_PLAIN = {dtype: name for name, dtype in DTYPES.items() if dtype in WEIGHT_DTYPES.values()}
"""Names of dtypes as `verify` takes them."""
