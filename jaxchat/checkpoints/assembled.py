"""Sources made of other sources: the stack of an `Assembly`, and a stack with its layer plan baked in.

Nothing is read before it is asked for, and nothing but what is: layers that no slot uses stay on the disk.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxchat.checkpoints.assembly import Assembly, Tensor, assembled_config, global_tensor, stack_of
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Keep, Manifest, Quantization, Stack
from jaxchat.checkpoints.quantized import Held, alike, described, of_row, stored_format_of
from jaxchat.checkpoints.source import Source, convert_into, row_blocks
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.families import count_parameters, parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.mixed import MixedTensor
from jaxchat.quant import Quantized, Reordered

T = TypeVar("T")


class AssembledSource:
    """The stack of an `Assembly` as a `Source`; its plan is not part of it.

    Plain tensors are converted to the assembly's dtype and then scaled, each time rounding to nearest even,
    as mergekit does; of quantized ones the scales and offsets are scaled, the codes are kept.
    """

    def __init__(self, assembly: Assembly, dtype: np.dtype | None = None, keep: Keep = "small"):
        """Opens and verifies what the assembly uses of its models; no tensor data is read.

        Args:
          assembly: what to assemble.
          dtype: of the tensors that are not quantized, instead of the assembly's.
          keep: see `ModelDirectory.source`.

        Raises:
          UsageError: the models cannot share a stack, or are not quantized alike.
          JaxchatError: a model's files are missing or malformed.
        """
        self.assembly = assembly
        self._dtype = dtype or (None if assembly.dtype is None else WEIGHT_DTYPES[assembly.dtype])
        stated = [model.config for model in assembly.models]
        assembled_config(assembly, stated)  # models that do not fit are refused before they are opened
        self._sources = [
            model.source(_wanted(assembly, stated, number), keep)
            for number, model in enumerate(assembly.models)
        ]
        configs = [source.config for source in self._sources]
        self.config = assembled_config(assembly, configs)
        self.table = parameter_table(self.config)
        self._params = [{p.name: p for p in source.table} for source in self._sources]
        self._tensors = {p.name: _tensors(assembly, configs, p) for p in self.table}
        self.manifest = self._describe()

    def _describe(self) -> Manifest:
        base, names = (
            self._sources[self.assembly.base],
            [model.name for model in self.assembly.models],
        )
        formats = [source.manifest.quantization for source in self._sources]
        labels = [None if found is None else found.format for found in formats]
        for path, found in zip(self.assembly.models, labels, strict=True):
            if found != labels[self.assembly.base]:
                kinds = [
                    f"{p} holds {_weights(s)}"
                    for p, s in zip(self.assembly.models, self._sources, strict=True)
                ]
                raise UsageError(
                    f"{path} is quantized in another way than {self.assembly.models[self.assembly.base]} "
                    f"({', '.join(kinds)}); use the original models and give {option('quant')}"
                )
        manifest = Manifest(
            format="native",
            dtypes={},
            rename=base.manifest.rename,
            tied_head="absent" if self.config.tied_embeddings else "untied",
            source=" + ".join(names),
            parameters=count_parameters(self.config),
            stack=Stack.of(self.config),
        )
        dtypes = {p.name: self.dtype(p).name for p in self.table}
        label, quantization = formats[self.assembly.base], None
        if label is not None:
            held = {
                p.name: alike([self._held(p, row) for row in range(len(self._tensors[p.name]))])
                for p in self.table
            }
            quantization = described(label.format, held)
        return dataclasses.replace(manifest, dtypes=dtypes, quantization=quantization)

    def _held(self, param: Param, index: int) -> Held:
        """How one row is stored in its model."""
        source, own, tensor = self._find(param, index)
        return of_row(stored_format_of(source.manifest, own) or source.dtype(own), tensor.row)

    def _find(self, param: Param, index: int) -> tuple[Source, Param, Tensor]:
        tensor = self._tensors[param.name][index]
        return self._sources[tensor.model], self._own(param.name, tensor.model), tensor

    def _own(self, name: str, model: int) -> Param:
        """A parameter in a model's own table; a head that is tied there is its embedding."""
        return self._params[model].get(name) or self._params[model][EMBED]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`. Tensors of one stack stored in different dtypes share the widest."""
        models = dict.fromkeys(tensor.model for tensor in self._tensors[param.name])
        found = {self._sources[model].dtype(self._own(param.name, model)) for model in models}
        if self._dtype is not None and not any(self._is_quantized(param.name, model) for model in models):
            return self._dtype
        return found.pop() if len(found) == 1 else WEIGHT_DTYPES["float32"]

    def _is_quantized(self, name: str, model: int) -> bool:
        return stored_format_of(self._sources[model].manifest, self._own(name, model)) is not None

    def layer(self, param: Param, index: int) -> np.ndarray | Quantized:
        """See `Source`."""
        source, own, tensor = self._find(param, index)
        values, label = source.layer(own, tensor.row), f"{own.name}[{tensor.row}]"
        if self._dtype is not None and isinstance(values, np.ndarray):
            values = _converted(values, self._dtype, label)
        return scaled(values, tensor.scale, label)

    def mapped(self, param: Param) -> np.ndarray | Quantized | MixedTensor | None:
        """See `Source`: neighbouring rows of one model's file, as they are; of a mixed stack, all or none."""
        tensors = self._tensors[param.name]
        first = tensors[0]
        run = [Tensor(first.model, first.row + i, 1.0) for i in range(len(tensors))]
        source = self._sources[first.model]
        whole = source.mapped(self._own(param.name, first.model)) if list(tensors) == run else None
        if whole is None or (isinstance(whole, np.ndarray) and self._dtype not in (None, whole.dtype)):
            return None
        if not param.per_layer:
            return whole
        if isinstance(whole, MixedTensor):
            return whole if whole.shape[0] == len(tensors) else None
        rows = slice(first.row, first.row + len(tensors))
        return jax.tree.map(lambda array: array[rows], whole)


class BakedSource:
    """A source under a layer plan, physically unrolled: layer p is slot p, with its scales multiplied in.

    The scales are on the weight and bias of the attention output and MLP down projections. An identity slot
    is a layer like any other, whose two projections are zero.
    """

    def __init__(self, source: Source, plan: LayerPlan):
        """`plan` is over the source's stacked layers."""
        self._source, self._plan = source, plan
        self.config = gathered_config(source.config, [slot.layer for slot in plan])
        self.table = source.table
        self.manifest = dataclasses.replace(
            source.manifest,
            rename=("", ""),
            tied_head="absent" if self.config.tied_embeddings else "untied",
            parameters=count_parameters(self.config),
            quantization=self._gathered(source.manifest.quantization),
            plan=None,
            stack=None,
        )

    def _gathered(self, quantization: Quantization | None) -> Quantization | None:
        """With the formats of the plan's layers."""
        if quantization is None:
            return None
        held = {}
        for param in self.table:
            storage = stored_format_of(self._source.manifest, param) or self._source.dtype(param)
            rows = [of_row(storage, self._row(param, index)) for index in range(param.rows(self.config))]
            held[param.name] = alike(rows)
        return described(quantization.format, held)

    def _row(self, param: Param, index: int) -> int:
        if not param.per_layer:
            return 0
        return self._source.config.rows_of(param.name)[self._plan.slots[index].layer]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        return self._source.dtype(param)

    def layer(self, param: Param, index: int) -> np.ndarray | Quantized:
        """See `Source`."""
        values = self._source.layer(param, self._row(param, index))
        factor = 1.0
        if param.half is not None and param.is_output:
            factor = self._plan.slots[index].scale_of(param.half)
        return scaled(values, factor, f"{param.name} of slot {index}")

    def mapped(self, param: Param) -> None:
        """See `Source`: no file holds the plan's layers."""


def gathered_config(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The configuration of a model whose layer p is stacked layer `layers[p]`, tensors and all."""

    def gather(values: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(values[layer] for layer in layers) if values else ()

    return dataclasses.replace(
        config,
        num_layers=len(layers),
        layer_ropes=gather(config.layer_ropes),
        layer_windows=gather(config.layer_windows),
        layer_blocks=gather(config.layer_blocks),
        layer_attn_scales=gather(config.layer_attn_scales),
        layer_rows=(),
    )


def scaled(values: np.ndarray | Quantized, factor: float, name: str) -> np.ndarray | Quantized:
    """Values times a factor in their own dtype: the product in float32, rounded to nearest even.

    Raises:
      JaxchatError: a finite value becomes too large for its dtype.
    """
    if factor == 1.0:
        return values
    if isinstance(values, Reordered):
        return dataclasses.replace(values, weight=scaled(values.weight, factor, name))
    if not isinstance(values, np.ndarray):
        names = ("super_scales", "super_mins") if values.two_level else ("scales", "mins")
        parts = {part: found for part in names if (found := getattr(values, part)) is not None}
        scales: dict[str, Any] = {part: _product(found, factor, name) for part, found in parts.items()}
        return dataclasses.replace(values, **scales)
    return _product(values, factor, name)


def _product(values: Any, factor: float, name: str) -> np.ndarray:
    values = np.asarray(values)
    out = np.empty(values.shape, values.dtype)
    for to, of in row_blocks(out, values):
        with np.errstate(over="ignore", invalid="ignore"):
            product = of.astype(np.float32) * np.float32(factor)
            to[...] = product
        if (~np.isfinite(to) & np.isfinite(of)).any():
            raise JaxchatError(f"{name}: times {factor:g} is too large for {values.dtype}; scale it less")
    return out


def _converted(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    convert_into(out, values, name)
    return out


def _tensors(assembly: Assembly, configs: Sequence[ModelConfig], param: Param) -> tuple[Tensor, ...]:
    if param.per_layer:
        return stack_of(assembly, configs, param.name)[0]
    return (global_tensor(assembly, configs, param.name),)


def _wanted(assembly: Assembly, configs: Sequence[ModelConfig], model: int) -> dict[str, set[int]]:
    """What is read of a model, as far as configurations say: whether a head is tied its tensors decide."""
    wanted: dict[str, set[int]] = {}
    for param in parameter_table(dataclasses.replace(configs[assembly.base], tied_embeddings=False)):
        for tensor in _tensors(assembly, configs, param):
            if tensor.model == model:
                both = param.name in (EMBED, HEAD) and configs[model].tied_embeddings
                for name in (EMBED, HEAD) if both else (param.name,):
                    wanted.setdefault(name, set()).add(tensor.row)
    return wanted


def _weights(source: Source) -> str:
    held = source.manifest.quantization
    return "plain weights" if held is None else f"{held.format} weights"
