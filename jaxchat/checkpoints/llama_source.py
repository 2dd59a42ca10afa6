"""Llama's own files as a `Source`: see `llama_files.py`."""

import numpy as np

from jaxchat.checkpoints.llama_files import NAMES, LlamaFiles
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Manifest
from jaxchat.checkpoints.safetensors_file import NAMES as DTYPE_NAMES
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.families import count_parameters, parameter_table
from jaxchat.families.gguf_tensors import rotated_heads, unpermuted


class LlamaSource:
    """Tensors by Meta's names, the rows of query and key heads put in order."""

    def __init__(self, files: LlamaFiles, config: ModelConfig):
        """Verifies names and shapes; no tensor data is read.

        Raises:
          JaxchatError: tensors are missing, unknown or of other shapes; the message has all mismatches.
        """
        self._files, self.config = files, config
        self.table = parameter_table(config)
        expected = {
            self._name(param, layer): param.layer_shape(config)
            for param in self.table
            for layer in range(param.rows(config))
        }
        found = {
            name: (DTYPE_NAMES.get(files.dtype(name), str(files.dtype(name))), shape)
            for name, shape in files.shapes.items()
        }
        verify(files.where, expected, found, owner="params", advice="take all files from one model")
        self.manifest = Manifest(
            format="native",
            dtypes={param.name: self.dtype(param).name for param in self.table},
            tied_head="absent" if config.tied_embeddings else "untied",
            source=files.where.rpartition("/")[2],
            parameters=count_parameters(config),
        )

    @staticmethod
    def _name(param: Param, layer: int) -> str:
        return NAMES[param.hf].format(layer)

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        names = [self._name(param, layer) for layer in range(param.rows(self.config))]
        found = {self._files.dtype(name) for name in names}
        return found.pop() if len(found) == 1 else WEIGHT_DTYPES["float32"]

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`."""
        values = self._files.read(self._name(param, index))
        heads = rotated_heads(param, self.config)
        return unpermuted(values, heads) if heads else values

    def mapped(self, param: Param) -> None:
        """See `Source`: layers are tensors of their own."""
