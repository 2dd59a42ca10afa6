"""The native reader of `cpu.cc`: blocks are taken apart at the speed of memory, on all cores."""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxchat.pallas import native
from jaxchat.pallas.gguf_blocks.reference import LAYOUTS
from jaxchat.quant import QuantizedTensor, available_cores, empty

_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""In the order of `kReaders`."""
_POINTERS = [ctypes.c_void_p] * 6
_BYTES = 1 << 20  # taken apart at a time


@functools.cache
def reader() -> Callable[..., None] | None:
    """The library's function; None without the library. The interpreter's lock is not held while it runs."""
    return native.function("JaxchatReadBlocks", [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *_POINTERS])


def tensor_of(name: str, raw: np.ndarray, out: QuantizedTensor | None = None) -> QuantizedTensor:
    """The same as `reference.tensor_of`, into `out` if it is given: [O, I] in contiguous arrays."""
    layout = LAYOUTS[name]
    raw = np.ascontiguousarray(raw)
    if out is None:
        out = empty((len(raw), raw.shape[-1] // layout.bytes * layout.elements), layout.format)
    read = reader()
    assert read is not None
    parts: list[Any] = [out.codes, out.high, out.scales, out.mins, out.super_scales, out.super_mins]
    count = raw.size // layout.bytes
    sizes = [0 if part is None else part.nbytes // count for part in parts]
    starts = [0 if part is None else part.ctypes.data for part in parts]

    def work(first: int) -> None:
        blocks = min(step, count - first)
        to = [start + first * size for start, size in zip(starts, sizes, strict=True)]
        read(_TYPES.index(name), raw.ctypes.data + first * layout.bytes, blocks, *to)

    step = max(1, _BYTES // layout.bytes)
    pieces = range(0, count, step)
    if len(pieces) == 1:
        work(0)
    elif pieces:
        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(work, pieces):
                pass
    return out
