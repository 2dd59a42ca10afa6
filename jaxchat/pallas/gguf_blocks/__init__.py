"""GGUF's blocks of quantized weights, taken apart into a `QuantizedTensor` and put together again."""

import numpy as np

from jaxchat.pallas.gguf_blocks import cpu, reference
from jaxchat.pallas.gguf_blocks.reference import LAYOUTS, blocks_of
from jaxchat.quant import QuantizedTensor

__all__ = ["LAYOUTS", "blocks_of", "tensor_of"]


def tensor_of(name: str, raw: np.ndarray) -> QuantizedTensor:
    """See `reference.tensor_of`; by the native library, where there is one."""
    return (reference if cpu.reader() is None else cpu).tensor_of(name, raw)
