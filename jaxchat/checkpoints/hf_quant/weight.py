"""What a quantized linear layer of a Hugging Face repository is: its tensors, and what they stand for.

One file a method beside this one makes `Weight`s; how they are held here is in `holding.py` and `tensors.py`.
Needs no JAX.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig

Shape = tuple[int, ...]
Get = Callable[..., np.ndarray]
"""`get(suffix)` is a tensor of the layer, `get(suffix, rows)` some rows of it."""

FLOATS = ("F32", "BF16", "F16")
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Found:
    """A linear layer of a repository that is quantized.

    Attributes:
      name: of the module, for messages: `model.layers.0.mlp.up_proj`.
      where: the file that lists its tensors, for messages.
      shape: of the weight, [O, I].
      tensors: what is stored of it, suffix -> (dtype, shape).
      get: reads one.
    """

    name: str
    where: str
    shape: tuple[int, int]
    tensors: Mapping[str, tuple[str, Shape]]
    get: Get

    def dtype(self, suffix: str, default: str = "F32") -> str:
        """The dtype of a tensor that may be missing, which is told later."""
        return self.tensors[suffix][0] if suffix in self.tensors else default

    def fail(self, problem: str, advice: str = "download the files again") -> JaxchatError:
        """An error about this layer."""
        return JaxchatError(f"{self.where}: {self.name}{problem}; {advice}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a quantized layer: what it may be like. The first of each is what a message expects."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """What is known of integer codes before they are read.

    Attributes:
      bits: of a code in the file.
      span: the smallest and the largest code, less the code that stands for zero.
      group: neighbours in a row that share a scale; 0 is the whole row.
      affine: groups have zero points or offsets of their own.
      scale: what the scales are exact in: `float16`, `bfloat16`, `float32`, or `power` of two.
      half_mins: the offsets are float16 numbers themselves, no products.
      reordered: the columns are put in order before they are grouped.
    """

    bits: int
    span: tuple[int, int]
    group: int
    affine: bool
    scale: str
    half_mins: bool = False
    reordered: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Some rows of a weight as integers: w = (codes - zeros) * scales, or codes * scales + mins.

    Attributes:
      codes: integers of 8 or 16 bits [o, I]; `packed`: unsigned, of 4 bits, uint8 [o, I/2], the even one low.
      scales: [o, groups].
      zeros: the code of zero, one number or [o, groups].
      mins: instead of `zeros`, float [o, groups].
      group: G; 0 is the whole row.
      order: None, or [I]: column j of the codes is column `order[j]` of the weight.
      packed: see `codes`.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | int = 0
    mins: np.ndarray | None = None
    group: int
    order: np.ndarray | None = None
    packed: bool = False

    def unpacked(self) -> np.ndarray:
        """The codes, one an element."""
        return nibbles(self.codes) if self.packed else self.codes

    def numbers(self) -> np.ndarray:
        """The weights, float32 [o, I]."""
        codes = self.unpacked()
        columns = codes.shape[1]
        values = codes.astype(np.float32)
        scales = spread(self.scales.astype(np.float32), self.group, columns)
        if self.mins is not None:
            values = values * scales + spread(self.mins.astype(np.float32), self.group, columns)
        else:
            zeros = self.zeros
            if isinstance(zeros, np.ndarray):
                zeros = spread(zeros.astype(np.float32), self.group, columns)
            values = (values - np.asarray(zeros, np.float32)) * scales
        if self.order is None:
            return values
        out = np.empty_like(values)
        out[:, self.order] = values
        return out


class Weight(abc.ABC):
    """One quantized linear layer; `parts` are checked against the file before anything else is read.

    Attributes:
      found: what is there.
      codes: see `Codes`; None where the weights are no integers.
      bits: a weight takes in the file, scales included.
      by_rows: whether some rows are read without the others.
    """

    found: Found
    codes: Codes | None = None
    bits: float
    by_rows: bool = True

    @abc.abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """The tensors there must be, by suffix."""

    @abc.abstractmethod
    def rows(self, rows: slice) -> Grid | np.ndarray:
        """Some rows of the weight, [o, I]: as integers if there are `codes`, or float32 numbers."""

    def numbers(self, rows: slice) -> np.ndarray:
        """Some rows, float32 [o, I]."""
        found = self.rows(rows)
        return found.numbers() if isinstance(found, Grid) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of quantization; a new one is a file in this folder and a row in `methods.py`.

    Attributes:
      name: `quant_method` in the configuration.
      marks: suffixes of which a quantized layer has at least one.
      reader: the section of the configuration -> what makes a `Weight` of a layer; refuses what it does not
        know, before any tensor is looked at.
      label: what to call the model, from the section.
      ignored: suffixes of tensors that are not needed, such as scales of activations.
    """

    name: str
    marks: Sequence[str]
    reader: Callable[[HfConfig], Callable[[Found], Weight]]
    label: Callable[[HfConfig], str]
    ignored: Sequence[str] = ()


def nibbles(packed: np.ndarray) -> np.ndarray:
    """4-bit codes uint8 [o, I] from bytes [o, I/2]; the even one is the low half."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0::2])
    np.right_shift(packed, 4, out=out[..., 1::2])
    return out


def spread(values: np.ndarray, group: int, columns: int) -> np.ndarray:
    """[o, groups] as [o, I], or [o, 1] of one group."""
    if values.shape[1] == 1:
        return values
    return np.repeat(values, group, axis=1)[:, :columns]


def group_of(size: int, columns: int) -> int:
    """The group as `Codes` has it: -1, and what is no less than the row, are the whole of it."""
    return 0 if size < 1 or size >= columns else size


def count(group: int, columns: int) -> int:
    """Groups of a row."""
    return -(-columns // group) if group else 1


def ordered(
    groups: np.ndarray, size: int, most: int, found: Found, suffix: str
) -> tuple[np.ndarray | None, bool]:
    """The columns in the order of their groups, None if they are in it; and whether all groups are full.

    Raises:
      JaxchatError: there is no such group.
    """
    if groups.min(initial=0) < 0 or groups.max(initial=0) >= most:
        raise found.fail(f".{suffix} holds groups {groups.min()} to {groups.max()}; expected 0 to {most - 1}")
    regular = np.arange(len(groups)) // size
    if np.array_equal(groups, regular):
        return None, True
    order = np.argsort(groups, kind="stable")
    full = np.array_equal(groups[order], regular)
    return (order.astype(np.int32), True) if full else (None, False)
