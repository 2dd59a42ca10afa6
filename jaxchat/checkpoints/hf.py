"""Hugging Face directories as a `Source`: files of safetensors or PyTorch with one tensor a layer."""

import dataclasses
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.checkpoints.foreign import fail_unstated, found_in, quantization_of
from jaxchat.checkpoints.hf_quant.layers import WEIGHT, QuantizedLayers, find_layers
from jaxchat.checkpoints.hf_quant.methods import METHODS, Stated
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Keep, Manifest, Quantization
from jaxchat.checkpoints.quantized import Held, of_row, stored_format_of
from jaxchat.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from jaxchat.checkpoints.source import Wanted, fold_layers, listed, verify
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families import Family, count_parameters, family_of, parameter_table
from jaxchat.files import read_json
from jaxchat.quant import Quantized
from jaxchat.visible import shown

FILES = ("model.safetensors", "pytorch_model.bin")
"""The weights, in the order of preference; shards are named in a file that ends in `.index.json`."""
_COMPARE_BYTES = 1 << 24

TensorFile = SafetensorsFile | TorchFile


class HfSource:
    """A Hugging Face directory: `model.safetensors` or `pytorch_model.bin`, or shards that an index names.

    Attributes:
      remarks: what the user should know of it, a line each.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        wanted: Wanted | None = None,
        *,
        stated: Stated | None = None,
        keep: Keep = "small",
    ):
        """Opens and verifies every file that holds something `wanted`; None is everything.

        Args:
          directory: of the model.
          config: what it says of itself.
          wanted: see above.
          stated: how another program has quantized it, if one has.
          keep: what becomes of quantized weights that cannot be held as they are.

        Raises:
          JaxchatError: a file is missing or malformed, or names, shapes or dtypes are not the model's; the
            message has all mismatches.
        """
        self._where, weight_map = _weight_map(directory)
        if stated is None and (method := quantization_of(weight_map)) is not None:
            fail_unstated(self._where, method, known=method in METHODS)
        self.remarks: list[str] = []
        family = family_of(config)
        weight_map = {name: path for name, path in weight_map.items() if not family.ignores(name)}
        rename = _find_rename(family, config, weight_map)
        self._wanted = wanted
        weights = _weight_names(family, config, rename)
        self._quantized = find_layers(self._where, stated, keep, weights, weight_map)
        if wanted is not None:
            names = _wanted_names(family, config, rename, wanted, self._quantized)
            weight_map = {name: path for name, path in weight_map.items() if name in names}
        self._files = {
            name: file
            for file in _open_files(self._where, weight_map)
            for name in file.entries
            if (wanted is None and not family.ignores(name)) or name in weight_map
            if not self._quantized.ignores(name)
        }
        self._names: dict[str, str] = {}
        self.config, tied_head = self._settle_head(family, config, rename)
        self.table = parameter_table(self.config)
        self._names |= {p.hf: family.rename(p.hf, rename) for p in self.table if p.hf not in self._names}
        self._open_quantized()
        self._verify(family.rename(HEAD, rename), tied_head)
        quantization = self._describe(stated)
        self.manifest = Manifest(
            format="native",
            dtypes={p.name: self.dtype(p).name for p in self.table if self._layers(p)},
            rename=rename,
            tied_head=tied_head,
            source=directory.resolve().name,
            parameters=count_parameters(self.config),
            quantization=quantization,
        )
        self._storage = {p.name: stored_format_of(self.manifest, p) for p in self.table}

    def _open_quantized(self) -> None:
        shapes = {}
        for param in self.table:
            shape = param.hf_shape(self.config)
            for index in self._layers(param):
                if len(shape) == 2:  # others are no matrices
                    shapes[self._name(param, index)] = shape[::-1] if param.transposed else shape
        entries = {name: file.entries[name] for name, file in self._files.items()}
        self._quantized.open(
            shapes,
            {name: (entry.dtype, entry.shape) for name, entry in entries.items()},
            lambda name, rows: self._files[name].read(name, rows),
        )

    def _describe(self, stated: Stated | None) -> Quantization | None:
        """How the parameters are held that are quantized, and what the user should know of that."""
        parameters, holdings = {}, []
        for param in self.table:
            held: dict[int, str] = {}
            for index in self._layers(param):
                name = self._name(param, index)
                if name in self._quantized.weights:
                    found = self._quantized.holding(name, reordering=param.role != "embedding")
                    holdings.append(found)
                    held[index] = found.format
                else:
                    held[index] = self._plain_type(self._entry(param, index).dtype)
            if not held or all(row in WEIGHT_DTYPES for row in held.values()):
                continue
            some = next(iter(held.values()))  # stands for layers that nobody will ask for
            rows = [held.get(index, some) for index in range(param.rows(self.config))]
            parameters[param.name] = some if len(set(rows)) == 1 else rows
        self.remarks += self._quantized.remarks(holdings)
        return None if stated is None or not parameters else Quantization(stated.label, parameters)

    @staticmethod
    def _plain_type(stored: str) -> str:
        """In which dtype numbers are held that are stored so."""
        return DTYPES[stored].name if DTYPES[stored].name in WEIGHT_DTYPES else "float32"

    def _settle_head(
        self, family: Family, config: ModelConfig, rename: tuple[str, str]
    ) -> tuple[ModelConfig, str]:
        """Whether the output head is tied, decided as transformers 5 does (`PreTrainedModel.tie_weights`)."""
        if not config.tied_embeddings:
            return config, "untied"
        if self._wanted is not None and not self._wanted.keys() & {EMBED, HEAD}:
            return config, "absent"
        hf = next(p.hf for p in parameter_table(config) if p.name == EMBED)
        embed, head = family.rename(hf, rename), family.rename(HEAD, rename)
        if not self._is_there(head):
            return config, "absent"
        if not self._is_there(embed):
            self._names[hf] = head
            return config, "only"
        if self._same(embed, head):
            return config, "copy"
        self.remarks.append(
            f"{self._where}: the configuration ties the output head to the embedding, but {embed} and {head} "
            "differ; the stored head is used. Set tie_word_embeddings to false in config.json to silence "
            "this."
        )
        return dataclasses.replace(config, tied_embeddings=False), "untied"

    def _is_there(self, name: str) -> bool:
        return name in self._files or name in self._quantized.suffixes

    def _same(self, a: str, b: str) -> bool:
        """Whether two matrices are equal bit by bit, read in pieces."""
        if {a, b} & self._quantized.suffixes.keys():
            return False
        one, other = self._files[a], self._files[b]
        shape = one.entries[a].shape
        if (shape, one.entries[a].dtype) != (other.entries[b].shape, other.entries[b].dtype):
            return False
        rows = max(1, _COMPARE_BYTES // max(1, math.prod(shape[1:]) * 4))
        pieces = [slice(start, start + rows) for start in range(0, shape[0], rows)] if shape else []
        return all(
            np.array_equal(one.read(a, piece).view(np.uint8), other.read(b, piece).view(np.uint8))
            for piece in pieces
        )

    def _verify(self, head: str, tied_head: str) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for param in self.table:
            for index in self._layers(param):
                name = self._name(param, index)
                if name in self._quantized.weights:
                    parts = self._quantized.expected(name)
                    expected |= {part: shape for part, (_, shape) in parts.items()}
                    dtypes |= {part: dtype for part, (dtype, _) in parts.items()}
                else:
                    expected[name] = param.hf_shape(self.config)
        # A value or score head stands beside the model; what is inside of it, a bias say, would change it.
        own = {name.split(".")[0] for name in (*expected, head)}
        whole = expected.keys() <= self._files.keys()  # else what is there is told too
        others = {name: None for name in self._files if whole and name.split(".")[0] not in own}
        found = {
            name: (file.entries[name].dtype, file.entries[name].shape)
            for name, file in self._files.items()
            if name not in others and not (name == head and tied_head == "copy")
            if name in expected or not self._is_empty_bias(name)
        }
        verify(self._where, expected, found, dtypes)
        if others:
            names = listed(fold_layers(others))
            self.remarks.append(f"{self._where}: ignored, as no part of the model: {names}")

    def _is_empty_bias(self, name: str) -> bool:
        """Whether it is what AutoGPTQ has stored of layers that have no bias."""
        module, _, last = name.rpartition(".")
        return (
            last == "bias"
            and module + WEIGHT in self._quantized.weights
            and not self._files[name].read(name).any()
        )

    def _layers(self, param: Param) -> Collection[int]:
        return range(param.rows(self.config)) if self._wanted is None else self._wanted.get(param.name, ())

    def _name(self, param: Param, index: int) -> str:
        return self._names[param.hf].format(index)

    def _entry(self, param: Param, index: int) -> Any:
        name = self._name(param, index)
        return self._files[name].entries[name]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`. Layers of one stack stored in different dtypes share the widest."""
        names = [self._name(param, index) for index in self._layers(param)]
        if any(name in self._quantized.weights for name in names):
            return WEIGHT_DTYPES["float32"]
        found = {DTYPES[self._files[name].entries[name].dtype] for name in names}
        return found.pop() if len(found) == 1 else WEIGHT_DTYPES["float32"]

    def layer(self, param: Param, index: int) -> np.ndarray | Quantized:
        """See `Source`: [out, in] of one layer, cut out of a fused tensor and turned where need be."""
        name = self._name(param, index)
        rows = slice(*param.fused_range(self.config)) if param.fused else slice(None)
        if name in self._quantized.weights:
            return self._quantized.read(name, rows, self._held(param, index))
        if param.transposed:
            return self._files[name].read(name).T[rows]
        return self._files[name].read(name, rows)

    def _held(self, param: Param, index: int) -> Held:
        storage = self._storage[param.name]
        return self.dtype(param) if storage is None else of_row(storage, index)

    def mapped(self, param: Param) -> None:
        """See `Source`: layers are tensors of their own."""


def _find_rename(family: Family, config: ModelConfig, names: Iterable[str]) -> tuple[str, str]:
    present = set(names)
    hf_names = [param.hf.format(0) for param in parameter_table(config)]

    def matches(rename: tuple[str, str]) -> int:
        return sum(family.rename(name, rename) in present for name in hf_names)

    return max(family.renames, key=matches)  # the first of the best


def _weight_names(family: Family, config: ModelConfig, rename: tuple[str, str]) -> set[str]:
    """The names of all weights that may be quantized, of the head too where it is tied."""
    names = {
        family.rename(p.hf, rename).format(i)
        for p in parameter_table(config)
        if p.quantizable
        for i in range(p.rows(config))
    }
    return {name for name in names | {family.rename(HEAD, rename)} if name.endswith(WEIGHT)}


def _wanted_names(
    family: Family, config: ModelConfig, rename: tuple[str, str], wanted: Wanted, layers: QuantizedLayers
) -> set[str]:
    names = {
        family.rename(p.hf, rename).format(i) for p in parameter_table(config) for i in wanted.get(p.name, ())
    }
    names |= {family.rename(HEAD, rename)} if HEAD in wanted else set()
    return {tensor for name in names for tensor in layers.tensors_of(name)}


def _weight_map(directory: Path) -> tuple[str, dict[str, Path]]:
    """Where a Hugging Face directory keeps its tensors: the file that says so, and tensor -> file."""
    for name in FILES:
        single, index = directory / name, directory / f"{name}.index.json"
        if os.path.lexists(single):
            return str(single), dict.fromkeys(_opened(single).entries, single)
        if os.path.lexists(index):
            return str(index), _indexed(index)
    hint = found_in(directory) or "download the model's *.safetensors files"
    raise JaxchatError(
        f"{directory}: neither model.safetensors nor model.safetensors.index.json is there; {hint}"
    )


def _indexed(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise JaxchatError(f"{index}: expected a weight_map of tensor names to file names")
    outside = sorted(name for name in set(weight_map.values()) if not _is_file_name(name))
    if outside:
        raise JaxchatError(
            f"{index}: shard {shown(outside[0])} is not a plain file name; download the file again"
        )
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and 0 < len(os.fsencode(name)) < 256 and name != ".." and "\0" not in name


def _opened(path: Path) -> TensorFile:
    return TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else SafetensorsFile(path)


def _open_files(where: str, weight_map: Mapping[str, Path]) -> list[TensorFile]:
    paths = sorted(set(weight_map.values()))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise JaxchatError(
            f"{where}: {len(missing)} of {len(paths)} shards are missing: {listed(missing)}; download them"
        )
    files = {path: _opened(path) for path in paths}
    lost = [
        f"{tensor} (in {path.name})"
        for tensor, path in weight_map.items()
        if tensor not in files[path].entries
    ]
    if lost:
        raise JaxchatError(
            f"{where}: tensors not in the shard it names: {listed(fold_layers(lost))}; download them again"
        )
    return list(files.values())
