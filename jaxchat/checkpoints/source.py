"""What all formats' parameters look like to the rest: `Source`, and what its implementations share.

A source is verified by name, shape and dtype, and every mismatch reported, before any tensor data is read.
Turning sources into arrays is in `load.py`, writing them in `write.py`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxchat.checkpoints.manifest import Manifest
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.mixed import MixedTensor
from jaxchat.quant import Quantized

_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK = 1 << 22  # elements converted at a time, so that a conversion needs no second copy of a big tensor


_MANY, _LONG = 20, 120  # names, and characters of one, in a message


class Source(Protocol):
    """The parameters of one checkpoint, read layer by layer.

    Attributes:
      config: of the model, with what the checkpoint itself decides (a tied head that is none).
      manifest: what the checkpoint is.
      table: its parameter table.
    """

    config: ModelConfig
    manifest: Manifest
    table: tuple[Param, ...]

    def dtype(self, param: Param) -> np.dtype:
        """The stored dtype; of a quantized parameter, the one it had before."""
        ...

    def layer(self, param: Param, index: int) -> np.ndarray | Quantized:
        """One row of a stacked parameter, or the whole of another (index 0), as a view where possible."""
        ...

    def mapped(self, param: Param) -> np.ndarray | Quantized | MixedTensor | None:
        """The whole parameter, [L, ...] or [...], as a view of the file that maps it; None if none does."""
        ...


Wanted = Mapping[str, Collection[int]]
"""What is to be read of a model: parameter -> its layers ({0} of what is not per layer)."""


def verify(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    dtypes: Mapping[str, str] | None = None,
    *,
    owner: str = "config.json",
    advice: str = "take both from one model",
) -> None:
    """Compares names, shapes and dtypes (safetensors names) and reports every mismatch in one error.

    Args:
      where: the file, for the message.
      expected: name -> shape.
      found: name -> (dtype, shape).
      dtypes: of the tensors that must have a certain one; the others may have any readable one.
      owner: what says how the tensors should be.
      advice: what to do where they are not so.
    """
    exact = dtypes or {}
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name}: expected {list(expected[name])}, found {list(shape)}"
        for name, (_, shape) in found.items()
        if name in expected and shape != expected[name]
    ]
    unreadable = [
        f"{name}: {dtype}"
        for name, (dtype, _) in found.items()
        if name in expected and name not in exact and dtype not in _READABLE
    ]
    wrong = [
        f"{name}: expected {exact[name]}, found {dtype}"
        for name, (dtype, _) in found.items()
        if name in exact and dtype != exact[name]
    ]
    problems = [
        f"{title} {listed(fold_layers(names))}"
        for title, names in (
            ("missing tensors:", missing),
            ("unexpected tensors:", unexpected),
            ("wrong shapes:", shapes),
            (f"unreadable dtypes (readable: {', '.join(_READABLE)}):", unreadable),
            ("wrong dtypes:", wrong),
        )
        if names
    ]
    if problems:
        raise JaxchatError(f"{where}: does not fit its {owner}: {' | '.join(problems)}; {advice}")


def convert_into(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Copies values [...] into an array of another dtype, rounding to nearest even.

    NaN and infinities pass; a finite value that float16 cannot hold is a `JaxchatError` naming the tensor.
    """
    if out.ndim == 0 or out.dtype == values.dtype or out.dtype.itemsize >= values.dtype.itemsize * 2:
        np.copyto(out, values, casting="unsafe")
        return
    for to, of in row_blocks(out, values):
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(to, of, casting="unsafe")
        if out.dtype == np.float16 and (overflow := np.isinf(to) & ~np.isinf(of)).any():
            raise JaxchatError(
                f"{name}: {float(of[overflow][0]):g} is too large for float16 (largest 65504); use bfloat16"
            )


def row_blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of the same rows of arrays of one shape [n, ...], so many rows at a time that they stay small."""
    count = len(arrays[0])
    step = max(1, _CHUNK // max(1, arrays[0][0].size)) if count else 1
    for start in range(0, count, step):
        yield tuple(array[start : start + step] for array in arrays)


def listed(names: Sequence[str]) -> str:
    """Names of a message; of very many, or very long ones, the beginning."""
    shown = [name if len(name) <= _LONG else f"{name[:_LONG]}..." for name in names[:_MANY]]
    more = [f"and {len(names) - _MANY} more"] if len(names) > _MANY else []
    return "; ".join([*shown, *more])


def fold_layers(names: Iterable[str]) -> list[str]:
    """Joins names that differ in their first number only: `h.0.w`, `h.1.w`, `h.2.w` -> `h.{0-2}.w`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        key = (match[1], match[3]) if match else (name, "")
        groups.setdefault(key, []).extend([int(match[2])] if match else [])
    folded = []
    for (start, end), numbers in groups.items():
        ranges: list[list[int]] = []
        for number in sorted(numbers):
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        text = ",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)
        folded.append(start + (f"{{{text}}}" if len(numbers) > 1 else text) + end)
    return folded
