"""The quantized layers of one repository: which they are, how each is held, and their weights."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from jaxchat.checkpoints.hf_quant.holding import Holding, held
from jaxchat.checkpoints.hf_quant.methods import Stated
from jaxchat.checkpoints.hf_quant.tensors import tensor_of
from jaxchat.checkpoints.hf_quant.weight import Found, Grid, Shape, Weight
from jaxchat.checkpoints.manifest import Keep
from jaxchat.errors import option
from jaxchat.quant import QuantFormat, Quantized, QuantizedTensor, empty, quantize, row_slice

logger = logging.getLogger(__name__)

WEIGHT = ".weight"
_CHUNK = 1 << 22  # numbers at a time


@dataclasses.dataclass(frozen=True)
class QuantizedLayers:
    """What is quantized in a repository.

    Attributes:
      where: the file that lists the tensors, for messages.
      stated: what the configuration says; None of a plain model.
      keep: see `Keep`.
      suffixes: of each quantized layer, by the name that its weight would have: `X.weight` -> those of its
        tensors, `qweight`.
      weights: the layers that are wanted, by the same name; filled by `open`.
      told: not empty once the user knows that something was rounded.
    """

    where: str
    stated: Stated | None
    keep: Keep
    suffixes: Mapping[str, tuple[str, ...]]
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    told: list[bool] = dataclasses.field(default_factory=list)

    def tensors_of(self, name: str) -> list[str]:
        """The names of a layer's tensors, by that of its weight: the one, if it is plain."""
        module = name.removesuffix(WEIGHT)
        return [f"{module}.{suffix}" for suffix in self.suffixes.get(name, ())] or [name]

    def ignores(self, name: str) -> bool:
        """Whether a tensor is not needed: of activations, say."""
        ignored = () if self.stated is None else self.stated.method.ignored
        return name.endswith(tuple(f".{suffix}" for suffix in ignored))

    def open(
        self,
        shapes: Mapping[str, tuple[int, int]],
        entries: Mapping[str, tuple[str, Shape]],
        read: Callable[[str, slice], np.ndarray],
    ) -> None:
        """Makes `weights` of those that are wanted.

        Args:
          shapes: [O, I] by the name of the weight, of those.
          entries: what there is: tensor -> (dtype, shape).
          read: reads rows of a tensor.
        """
        for name, shape in shapes.items():
            if name not in self.suffixes:
                continue
            assert self.stated is not None
            module = name.removesuffix(WEIGHT)
            tensors = {
                suffix: entries[f"{module}.{suffix}"]
                for suffix in self.suffixes[name]
                if f"{module}.{suffix}" in entries
            }

            def get(suffix: str, rows: slice = slice(None), module: str = module) -> np.ndarray:
                return read(f"{module}.{suffix}", rows)

            found = Found(module, self.where, shape, tensors, get)
            self.weights[name] = self.stated.reader(found)

    def expected(self, name: str) -> dict[str, tuple[str, Shape]]:
        """The tensors of a layer there must be -> (dtype, shape)."""
        weight, module = self.weights[name], name.removesuffix(WEIGHT)
        found: dict[str, tuple[str, Shape]] = {}
        for suffix, part in weight.parts().items():
            there = weight.found.tensors.get(suffix)
            if there is None and not part.required:
                continue
            dtype, shape = there or (part.dtypes[0], part.shapes[0])
            found[f"{module}.{suffix}"] = (
                dtype if dtype in part.dtypes else part.dtypes[0],
                shape if shape in part.shapes else part.shapes[0],
            )
        return found

    def holding(self, name: str, *, reordering: bool) -> Holding:
        """How a layer is held."""
        return held(self.weights[name], self.keep, reordering=reordering)

    def read(self, name: str, rows: slice, fmt: QuantFormat | np.dtype) -> np.ndarray | Quantized:
        """Some rows of a layer's weight [o, I], held as `holding` says.

        Raises:
          JaxchatError: the file's numbers are not what its configuration says.
        """
        weight = self.weights[name]
        outputs, columns = weight.found.shape
        start, stop, _ = rows.indices(outputs)
        same = isinstance(fmt, QuantFormat) and self._is_kept(weight, fmt)
        if same:
            grid = weight.rows(slice(start, stop))
            assert isinstance(grid, Grid)
            assert isinstance(fmt, QuantFormat)
            return tensor_of(grid, fmt, columns, name, self._tell_of_rounding)
        shape = (stop - start, columns)
        out = empty(shape, fmt) if isinstance(fmt, QuantFormat) else np.empty(shape, fmt)
        step = max(1, _CHUNK // columns) if weight.by_rows else max(1, stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values, part = weight.numbers(slice(first, last)), slice(first - start, last - start)
            if isinstance(out, QuantizedTensor):
                assert isinstance(fmt, QuantFormat)
                target = row_slice(out, part)
                assert isinstance(target, QuantizedTensor)
                quantize(values, fmt, name=name, out=target)
            else:
                out[part] = values
        return out

    def _tell_of_rounding(self) -> None:
        """Says once that what the configuration leaves open has come out."""
        if not self.told:
            logger.warning(
                "%s: scales or offsets are rounded to float16 (%s keeps them, and takes more memory)",
                self.where,
                option("keep", "exact"),
            )
        self.told.append(True)

    def _is_kept(self, weight: Weight, fmt: QuantFormat) -> bool:
        """Whether a format is one for the codes as they are."""
        choices = [held(weight, self.keep, reordering=reordering) for reordering in (True, False)]
        return any(choice.format == str(fmt) and choice.kind != "again" for choice in choices)

    def remarks(self, holdings: Iterable[Holding]) -> list[str]:
        """What the user should know of how the layers are held."""
        if self.stated is None:
            return []
        if not self.suffixes:
            return [
                f"{self.stated.settings.source} says {self.stated.method.name}, but no tensor of "
                f"{self.where} is quantized; they are read as they are"
            ]
        again = ", ".join(sorted({choice.format for choice in holdings if choice.kind == "again"}))
        if not again:
            return []
        return [
            f"{self.where}: {self.stated.label} is quantized again, to {again}, no format here being the "
            f"same ({option('keep', 'exact')} keeps the numbers, at 32 bits)"
        ]


def find_layers(
    where: str, stated: Stated | None, keep: Keep, weights: Collection[str], tensors: Iterable[str]
) -> QuantizedLayers:
    """The quantized layers among those whose weights would have these names."""
    if stated is None:
        return QuantizedLayers(where, None, keep, {})
    suffixes: dict[str, list[str]] = {}
    for tensor in tensors:
        module = tensor
        while "." in module:
            module = module.rpartition(".")[0]
            if module + WEIGHT in weights:
                suffixes.setdefault(module + WEIGHT, []).append(tensor[len(module) + 1 :])
                break
    ignored = {"bias", *stated.method.ignored}
    return QuantizedLayers(
        where,
        stated,
        keep,
        {
            name: tuple(suffix for suffix in found if suffix not in ignored)
            for name, found in suffixes.items()
            if set(found) & set(stated.method.marks)
        },
    )
