"""Native checkpoints as a `Source`: the stacks themselves, mapped."""

from pathlib import Path

import numpy as np

from jaxchat.checkpoints.manifest import NATIVE_FILE, WEIGHT_DTYPES, Manifest, config_of
from jaxchat.checkpoints.quantized import (
    Mixture,
    TensorSpec,
    from_arrays,
    of_row,
    place,
    stored_format_of,
    tensor_specs,
)
from jaxchat.checkpoints.safetensors_file import DTYPES, NAMES, SafetensorsFile
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families import parameter_table
from jaxchat.mixed import MixedTensor
from jaxchat.quant import Quantized


class NativeSource:
    """A native checkpoint: the stacks themselves, mapped."""

    def __init__(self, directory: Path, config: ModelConfig, manifest: Manifest):
        """Opens and verifies the file; raises as `HfSource` does."""
        self.manifest = manifest
        self.config = config_of(manifest, config)
        self.table = parameter_table(self.config)
        self.file = SafetensorsFile(directory / NATIVE_FILE)
        self._formats = {p.name: stored_format_of(manifest, p) for p in self.table}
        for p in self.table:
            storage = self._formats[p.name]
            if isinstance(storage, Mixture) and len(storage.rows) != p.rows(self.config):
                raise JaxchatError(
                    f"{directory}: jaxchat.json has formats of {len(storage.rows)} layers of {p.name}, the "
                    f"model has {p.rows(self.config)}; convert the model again"
                )
        shapes: dict[str, tuple[int, ...]] = {}
        part_dtypes: dict[str, str] = {}
        for p in self.table:
            specs = self._specs(p)
            shapes |= {name: shape for name, (_, shape) in specs.items()}
            if self._formats[p.name] is not None:
                part_dtypes |= {name: NAMES[dtype] for name, (dtype, _) in specs.items()}
        found = {name: (entry.dtype, entry.shape) for name, entry in self.file.entries.items()}
        verify(str(self.file.path), shapes, found, part_dtypes)

    def _specs(self, param: Param) -> dict[str, TensorSpec]:
        """The tensors of a parameter; the dtype of plain ones is the file's to say."""
        storage = self._formats[param.name] or WEIGHT_DTYPES["float32"]
        return tensor_specs(param.name, param.stacked_shape(self.config), storage)

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        if self._formats[param.name] is not None:
            return WEIGHT_DTYPES[self.manifest.dtypes[param.name]]
        return DTYPES[self.file.entries[param.name].dtype]

    def mapped(self, param: Param) -> np.ndarray | Quantized | MixedTensor:
        """See `Source`."""
        storage = self._formats[param.name] or self.dtype(param)
        columns = param.layer_shape(self.config)[-1]
        if not isinstance(storage, Mixture):
            return from_arrays(param.name, columns, storage, self.file.view)
        return storage.joined(
            [
                from_arrays(f"{param.name}.{number}", columns, part, self.file.view)
                for number, part in enumerate(storage.parts)
            ]
        )

    def layer(self, param: Param, index: int) -> np.ndarray | Quantized:
        """See `Source`."""
        storage = self._formats[param.name] or self.dtype(param)
        name, row = place(param.name, storage, index)
        return from_arrays(
            name,
            param.layer_shape(self.config)[-1],
            of_row(storage, index),
            lambda array: self.file.read(array, row if param.per_layer else slice(None)),
        )
