"""Native checkpoints as a `Source`: the stacks themselves, mapped."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxchat.checkpoints.manifest import NATIVE_FILE, WEIGHT_DTYPES, Manifest, config_of
from jaxchat.checkpoints.quantized import Storage, TensorSpec, from_arrays, stored_format_of, tensor_specs
from jaxchat.checkpoints.safetensors_file import DTYPES, NAMES, SafetensorsFile
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.families import parameter_table
from jaxchat.quant import QuantizedTensor


class NativeSource:
    """A native checkpoint: the stacks themselves, mapped."""

    def __init__(self, directory: Path, config: ModelConfig, manifest: Manifest):
        """Opens and verifies the file; raises as `HfSource` does."""
        self.manifest = manifest
        self.config = config_of(manifest, config)
        self.table = parameter_table(self.config)
        self.file = SafetensorsFile(directory / NATIVE_FILE)
        self._formats = {p.name: stored_format_of(manifest, p) for p in self.table}
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

    def mapped(self, param: Param) -> np.ndarray | QuantizedTensor:
        """See `Source`."""
        return self._arrays(param, self.file.view)

    def layer(self, param: Param, index: int) -> np.ndarray | QuantizedTensor:
        """See `Source`."""
        return self._arrays(
            param, lambda name: self.file.read(name, index if param.per_layer else slice(None))
        )

    def _arrays(self, param: Param, get: Callable[[str], np.ndarray]) -> np.ndarray | QuantizedTensor:
        storage: Storage = self._formats[param.name] or self.dtype(param)
        return from_arrays(param.name, param.layer_shape(self.config)[-1], storage, get)
