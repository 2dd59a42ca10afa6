"""Model directories with adapters merged into their weights: what `jaxchat convert --adapter` reads.

Merged in float32 and rounded once, to the dtype that the weights have. PEFT rounds a delta first, and merges
the deltas of repeated layers all into the one that they share; here each becomes a layer of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchat.adapter_use import AdapterUse
from jaxchat.checkpoints.adapter import common_replication, read_adapter, replicated_config
from jaxchat.checkpoints.assembled import BakedSource
from jaxchat.checkpoints.directory import CONFIG, ModelDirectory, write_json
from jaxchat.checkpoints.low_rank import Adapter
from jaxchat.checkpoints.manifest import Manifest
from jaxchat.checkpoints.source import convert_into
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError, told
from jaxchat.families import count_parameters, parameter_table, relayered_config
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.quant import InParts, dequantize
from jaxchat.visible import shown

if TYPE_CHECKING:
    from jaxchat.checkpoints.manifest import Keep
    from jaxchat.checkpoints.source import Source, Wanted

Merged = tuple[Adapter, float]
"""An adapter, and how much of it."""


def merged_directory(
    directory: str | Path | ModelDirectory, uses: Sequence[AdapterUse], *, dequantized: bool = False
) -> "MergedDirectory":
    """A model directory as it would be with adapters merged into it.

    Args:
      directory: the model, in any format.
      uses: which adapters, and how much of each.
      dequantized: merge into what quantized weights stand for, as plain numbers.

    Raises:
      UsageError: an adapter does not fit, is bound to a slot, or the weights are quantized.
      JaxchatError: a file is malformed.
    """
    found = ModelDirectory.at(directory)
    if not found.is_plain:
        raise UsageError(
            f"{found}: is stored with a layer plan or a recipe's layers, and adapters count the layers of "
            "the model itself; convert it with --to_hf first"
        )
    for use in uses:
        if use.slot is not None:
            raise UsageError(
                f"adapter {shown(str(use))}: the weights of a slot are its layer's, so it cannot be merged "
                "into one slot; leave @SLOT out, or use it while the model runs"
            )
    merged = tuple((read_adapter(use.name, found.config), use.strength) for use in uses)
    return MergedDirectory(found.path, found, merged, dequantized)


@dataclasses.dataclass(frozen=True)
class MergedDirectory(ModelDirectory):
    """See `merged_directory`. The small files are those of the model."""

    inner: ModelDirectory = dataclasses.field(compare=False)
    merged: tuple[Merged, ...] = dataclasses.field(compare=False)
    dequantized: bool = dataclasses.field(compare=False)

    @property
    def read_from(self) -> tuple[Path, ...]:
        """See `ModelDirectory`."""
        return (*self.inner.read_from, *(adapter.path for adapter, _ in self.merged))

    @functools.cached_property
    def config_values(self) -> Mapping[str, Any]:
        """`config.json` of the result."""
        before = self.inner.config_values
        own = self.inner.stated_config
        config = _config(self.inner.config, self.merged)
        if config.num_layers == own.num_layers and config.tied_embeddings == own.tied_embeddings:
            return before
        config = dataclasses.replace(config, layer_rows=())
        return relayered_config(before, config, source=self.config_place)

    @property
    def config_place(self) -> str:
        """See `ModelDirectory`."""
        return self.inner.config_place

    @property
    def config(self) -> ModelConfig:
        """See `ModelDirectory`."""
        return dataclasses.replace(_config(self.inner.config, self.merged), layer_rows=())

    @property
    def plan(self) -> LayerPlan:
        """See `ModelDirectory`."""
        return LayerPlan.identity(self.config.num_layers)

    def gguf_words(self, vocab_size: int) -> dict[str, Any]:
        """See `ModelDirectory`."""
        return self.inner.gguf_words(vocab_size)

    def write_config(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        if self.config_values == self.inner.config_values:
            self.inner.write_config(directory)
        else:
            write_json(directory / CONFIG, self.config_values)

    def write_words(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        self.inner.write_words(directory)

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """See `ModelDirectory`; the model is opened whole."""
        source = self.inner.source(keep="exact" if self.dequantized else keep)
        held = source.manifest.quantization
        if held is not None and not self.dequantized:
            raise UsageError(
                f"{self.inner}: holds {held.format} weights: merged into those, an adapter would be rounded "
                "to them once more; take the original model, "
                + told("or use the adapter while the model runs", "or ask for it with --quant FORMAT")
            )
        repeated = common_replication(adapter for adapter, _ in self.merged)
        if repeated is not None:
            slots = tuple(Slot(layer) for layer in repeated)
            source = BakedSource(source, LayerPlan(slots, source.config.num_layers))
        return MergedSource(source, self.merged)


class MergedSource:
    """A source with adapters merged into its tensors; quantized ones become the numbers they stand for."""

    def __init__(self, source: "Source", merged: Sequence[Merged]):
        self._source, self._merged = source, merged
        self._repeated = common_replication(adapter for adapter, _ in merged)
        tied = source.config.tied_embeddings and not _parts_head(merged)
        self.config = dataclasses.replace(source.config, tied_embeddings=tied)
        self.table = parameter_table(self.config)
        self._own = {param.name: param for param in source.table}
        self._check_biases()
        manifest: Manifest = source.manifest
        self.manifest = dataclasses.replace(
            manifest,
            dtypes={param.name: self.dtype(param).name for param in self.table},
            tied_head=manifest.tied_head if tied == source.config.tied_embeddings else "untied",
            parameters=count_parameters(self.config),
            quantization=None,
        )

    def _check_biases(self) -> None:
        for adapter, _ in self._merged:
            for name in adapter.added.keys() - {param.name for param in self.table}:
                raise UsageError(
                    f"{adapter.path}: lora_bias adds to {name}, which this model does not have, so it cannot "
                    "be merged; use the adapter while the model runs"
                )

    def _param(self, param: Param) -> Param:
        """What a parameter is made from: a head that was tied, from the embedding."""
        return self._own.get(param.name) or self._own[EMBED]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        return self._source.dtype(self._param(param))

    def mapped(self, param: Param) -> None:
        """See `Source`: no file holds what is merged."""

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`."""
        own = self._param(param)
        values = self._source.layer(own, index)
        label = f"{param.name}[{index}]" if param.per_layer else param.name
        changes = [found for merged in self._merged if (found := self._change(merged, param, index))]
        if isinstance(values, InParts):
            values = dequantize(values)
        if not changes and values.dtype == self.dtype(param):
            return np.asarray(values)
        base = np.asarray(values, np.float32)
        total = base.copy()
        for adapter, strength in changes:
            total += np.float32(strength) * (_changed(adapter, param.name, index, base) - base)
        out = np.empty(base.shape, self.dtype(param))
        convert_into(out, total, label)
        return out

    def _change(self, merged: Merged, param: Param, index: int) -> Merged | None:
        """What is merged of an adapter into a layer's tensor, its layers counted as the source's are."""
        adapter, strength = merged
        if param.name not in adapter.touched or strength == 0:
            return None
        if param.per_layer and self._repeated is not None and adapter.replicated is None:
            adapter = _one_layer(adapter, param.name, self._repeated[index], index)
        parts = (adapter.low_rank, adapter.added, adapter.replaced, {name: {0: 0} for name in adapter.rows})
        return (adapter, strength) if any(index in part.get(param.name, {}) for part in parts) else None


def _one_layer(adapter: Adapter, name: str, layer: int, index: int) -> Adapter:
    """An adapter's deltas of one layer under another number."""

    def moved(part: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
        return {name: {index: part[name][layer]}} if layer in part.get(name, {}) else {}

    return dataclasses.replace(
        adapter,
        low_rank=moved(adapter.low_rank),
        added=moved(adapter.added),
        replaced=moved(adapter.replaced),
    )


def _changed(adapter: Adapter, name: str, index: int, base: np.ndarray) -> np.ndarray:
    """A tensor as an adapter has it, float32."""
    values = adapter.replaced.get(name, {}).get(index)
    out = base if values is None else values.astype(np.float32)
    if name in adapter.rows:
        out = adapter.with_rows(name, out)
    if (added := adapter.added.get(name, {}).get(index)) is not None:
        out = out + added
    delta = adapter.low_rank.get(name, {}).get(index)
    if delta is None:
        return out
    product = delta.b @ delta.a
    out = out + (product.T if name == EMBED else product)
    if delta.magnitude is None:
        return out
    axis = 0 if name == EMBED else 1
    lengths = np.linalg.norm(out, axis=axis)
    if not (lengths > 0).all():
        raise JaxchatError(
            f"{adapter.path}: {name} of layer {index} has a row of zeros, which DoRA cannot lengthen; take "
            "the model that the adapter was made for"
        )
    return out * np.expand_dims(delta.magnitude / lengths, axis)


def _config(config: ModelConfig, merged: Sequence[Merged]) -> ModelConfig:
    repeated = common_replication(adapter for adapter, _ in merged)
    if repeated is not None:
        config = replicated_config(config, repeated)
    return dataclasses.replace(config, tied_embeddings=config.tied_embeddings and not _parts_head(merged))


def _parts_head(merged: Sequence[Merged]) -> bool:
    """Whether embedding and head are no longer the same, if they were."""
    both = (EMBED, HEAD)
    return any(
        any(name in part for part in (adapter.low_rank, adapter.replaced) for name in both)
        or adapter.rows.get(EMBED) is not adapter.rows.get(HEAD)
        for adapter, _ in merged
        if not adapter.keeps_tie
    )
