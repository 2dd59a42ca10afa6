"""The parameters inside a checkpoint directory, layer by layer: Hugging Face safetensors and native files.

A `Source` is verified by name, shape and dtype, and every mismatch reported, before any tensor data is read.
Turning sources into arrays is in `load.py`, writing them in `write.py`.
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxchat.checkpoints.manifest import (
    MANIFEST,
    NATIVE_FILE,
    WEIGHT_DTYPES,
    Manifest,
    check_directory,
    config_of,
    stated_config,
)
from jaxchat.checkpoints.quantized import Storage, TensorSpec, from_arrays, stored_format_of, tensor_specs
from jaxchat.checkpoints.safetensors_file import DTYPES, NAMES, SafetensorsFile
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families import Family, count_parameters, family_of, parameter_table
from jaxchat.files import read_json
from jaxchat.quant import QuantizedTensor, layer_slice

_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPARE_BYTES = 1 << 24
_CHUNK = 1 << 22  # elements converted at a time, so that a conversion needs no second copy of a big tensor

logger = logging.getLogger(__name__)


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

    def layer(self, param: Param, index: int) -> np.ndarray | QuantizedTensor:
        """One row of a stacked parameter, or the whole of another (index 0), as a view where possible."""
        ...

    def mapped(self, param: Param) -> np.ndarray | QuantizedTensor | None:
        """The whole parameter, [L, ...] or [...], as a view of the file that maps it; None if none does."""
        ...

    def release(self, param: Param, index: int) -> None:
        """Says that `layer(param, index)` is not needed any more."""
        ...


Wanted = Mapping[str, Collection[int]]
"""What is to be read of a model: parameter -> its layers ({0} of what is not per layer)."""


class HfSource:
    """A Hugging Face directory: `model.safetensors`, or shards with `model.safetensors.index.json`."""

    def __init__(self, directory: Path, config: ModelConfig, wanted: Wanted | None = None):
        """Opens and verifies every file that holds something `wanted`; None is everything.

        Raises:
          JaxchatError: a file is missing or malformed, or names, shapes or dtypes are not the model's; the
            message has all mismatches.
        """
        self._where, weight_map = _weight_map(directory)
        family = family_of(config)
        rename = _find_rename(family, config, weight_map)
        self._wanted = wanted
        if wanted is not None:
            names = _wanted_names(family, config, rename, wanted)
            weight_map = {name: path for name, path in weight_map.items() if name in names}
        self._files = {
            name: file
            for file in _open_files(self._where, weight_map)
            for name in file.entries
            if wanted is None or name in weight_map
        }
        self._names: dict[str, str] = {}
        self.config, tied_head = self._settle_head(family, config, rename)
        self.table = parameter_table(self.config)
        self._names |= {p.hf: family.rename(p.hf, rename) for p in self.table if p.hf not in self._names}
        self._verify(family, extra={family.rename(HEAD, rename)} if tied_head == "copy" else set())
        self.manifest = Manifest(
            format="native",
            dtypes={p.name: self.dtype(p).name for p in self.table if self._layers(p)},
            rename=rename,
            tied_head=tied_head,
            source=directory.resolve().name,
            parameters=count_parameters(self.config),
        )

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
        if head not in self._files:
            return config, "absent"
        if embed not in self._files:
            self._names[hf] = head
            return config, "only"
        if _same(self._files[embed].view(embed), self._files[head].view(head)):
            return config, "copy"
        logger.warning(
            "%s: the configuration ties the output head to the embedding, but %s and %s differ; "
            "the stored head is used. Set tie_word_embeddings to false in config.json to silence this.",
            self._where,
            embed,
            head,
        )
        return dataclasses.replace(config, tied_embeddings=False), "untied"

    def _verify(self, family: Family, extra: set[str]) -> None:
        expected = {
            self._names[p.hf].format(i): p.hf_shape(self.config) for p in self.table for i in self._layers(p)
        }
        entries = {
            name: file.entries[name]
            for name, file in self._files.items()
            if name in expected or not (name in extra or any(part in name for part in family.ignored))
        }
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        verify(self._where, expected, found)

    def _layers(self, param: Param) -> Collection[int]:
        return range(param.rows(self.config)) if self._wanted is None else self._wanted.get(param.name, ())

    def _name(self, param: Param, index: int) -> str:
        return self._names[param.hf].format(index)

    def _entry(self, param: Param, index: int) -> Any:
        name = self._name(param, index)
        return self._files[name].entries[name]

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`. Layers of one stack stored in different dtypes share the widest."""
        found = {DTYPES[self._entry(param, i).dtype] for i in self._layers(param)}
        return found.pop() if len(found) == 1 else WEIGHT_DTYPES["float32"]

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`: [out, in] of one layer, cut out of a fused tensor and turned where need be."""
        name = self._name(param, index)
        value = self._files[name].view(name)
        if param.transposed:
            value = value.T
        return value[slice(*param.fused_range(self.config))] if param.fused else value

    def mapped(self, param: Param) -> None:
        """See `Source`: layers are tensors of their own."""

    def release(self, param: Param, index: int) -> None:
        """See `Source`."""
        name = self._name(param, index)
        self._files[name].release(name)


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
        storage: Storage = self._formats[param.name] or self.dtype(param)
        return from_arrays(param.name, param.layer_shape(self.config)[-1], storage, self.file.view)

    def layer(self, param: Param, index: int) -> np.ndarray | QuantizedTensor:
        """See `Source`."""
        stack = self.mapped(param)
        if not param.per_layer:
            return stack
        return layer_slice(stack, index) if isinstance(stack, QuantizedTensor) else stack[index]

    def release(self, param: Param, index: int) -> None:
        """See `Source`."""
        for name in self._specs(param):
            self.file.release(name)


def open_source(
    directory: str | Path, *, config: ModelConfig | None = None, wanted: Wanted | None = None
) -> Source:
    """Opens and verifies a model directory of any format; no tensor data is read.

    Args:
      directory: the model.
      config: instead of the directory's `config.json`.
      wanted: all that will be read; of a Hugging Face directory nothing else needs to be there.
    """
    directory = check_directory(directory)
    config = config or stated_config(directory)
    if not (directory / MANIFEST).exists():
        return HfSource(directory, config, wanted)
    manifest = Manifest.read(directory)
    if manifest.format == "native":
        return NativeSource(directory, config, manifest)
    from jaxchat.checkpoints.orbax import OrbaxSource  # half a second of imports no other format needs

    return OrbaxSource(directory, config, manifest)


def verify(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Compares names, shapes and dtypes (safetensors names) and reports every mismatch in one error.

    Args:
      where: the file, for the message.
      expected: name -> shape.
      found: name -> (dtype, shape).
      dtypes: of the tensors that must have a certain one; the others may have any readable one.
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
        f"{title} {'; '.join(fold_layers(names))}"
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
        raise JaxchatError(f"{where}: does not fit its config.json: {' | '.join(problems)}")


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


def _find_rename(family: Family, config: ModelConfig, names: Iterable[str]) -> tuple[str, str]:
    present = set(names)
    hf_names = [param.hf.format(0) for param in parameter_table(config)]

    def matches(rename: tuple[str, str]) -> int:
        return sum(family.rename(name, rename) in present for name in hf_names)

    return max(family.renames, key=matches)  # the first of the best


def _wanted_names(family: Family, config: ModelConfig, rename: tuple[str, str], wanted: Wanted) -> set[str]:
    names = {
        family.rename(p.hf, rename).format(i) for p in parameter_table(config) for i in wanted.get(p.name, ())
    }
    return names | {family.rename(HEAD, rename)} if HEAD in wanted else names


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices are equal bit by bit, compared in pieces so that no mask of their size is made."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = max(1, _COMPARE_BYTES // max(1, a[:1].nbytes))
    pieces = (slice(start, start + rows) for start in range(0, len(a), rows))
    return all(np.array_equal(a[piece].view(np.uint8), b[piece].view(np.uint8)) for piece in pieces)


def _weight_map(directory: Path) -> tuple[str, dict[str, Path]]:
    """Where a Hugging Face directory keeps its tensors: the file that says so, and tensor -> file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return str(single), dict.fromkeys(SafetensorsFile(single).entries, single)
    if index.exists():
        return str(index), _indexed(index)
    hint = "download the model's *.safetensors files"
    if (directory / "pytorch_model.bin").exists() or (directory / "pytorch_model.bin.index.json").exists():
        hint = "pytorch_model.bin is not read; convert it to safetensors with transformers' save_pretrained"
    raise JaxchatError(
        f"{directory}: neither model.safetensors nor model.safetensors.index.json is there; {hint}"
    )


def _indexed(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise JaxchatError(f"{index}: expected a weight_map of tensor names to file names")
    outside = sorted(name for name in set(weight_map.values()) if Path(name).name != name)
    if outside:
        raise JaxchatError(f"{index}: shard {outside[0]!r} is not a plain file name")
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def _open_files(where: str, weight_map: Mapping[str, Path]) -> list[SafetensorsFile]:
    paths = sorted(set(weight_map.values()))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise JaxchatError(
            f"{where}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}"
        )
    files = {path: SafetensorsFile(path) for path in paths}
    lost = [
        f"{tensor} (in {path.name})"
        for tensor, path in weight_map.items()
        if tensor not in files[path].entries
    ]
    if lost:
        raise JaxchatError(f"{where}: tensors not in the shard it names: {'; '.join(fold_layers(lost))}")
    return list(files.values())
