"""Writing checkpoints: any readable model -> native or Orbax (`convert`), Hugging Face's (`to_hf`), GGUF.

All take a layer plan or a recipe along. A checkpoint appears under its name complete or not at all: it is
written beside it and renamed at the end.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxchat.checkpoints.assembled import AssembledSource, BakedSource
from jaxchat.checkpoints.assembly import Assembly, under, whole
from jaxchat.checkpoints.directory import CONFIG, GENERATION_CONFIG, ModelDirectory, write_json
from jaxchat.checkpoints.load import Meter, Progress, layers_of, storages
from jaxchat.checkpoints.manifest import (
    MANIFEST,
    NATIVE_FILE,
    ORBAX_FOLDER,
    Keep,
    Manifest,
    Stack,
    recorded_plan,
    weight_dtype,
)
from jaxchat.checkpoints.quantized import (
    Quant,
    Storage,
    TensorSpec,
    choose_format,
    named_arrays,
    place,
    quantization_entry,
    tensor_specs,
)
from jaxchat.checkpoints.safetensors_file import ALIGNMENT, SafetensorsWriter
from jaxchat.checkpoints.source import Source, convert_into
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import Family, family_of, relayered_config
from jaxchat.files import locked, try_to_replace
from jaxchat.layer_plan import LayerPlan
from jaxchat.quant import Quantized, row_slice
from jaxchat.quant import dequantize as dequantize_tensor
from jaxchat.text.tokenizer_files import text_files

FORMATS = ("native", "orbax")
KEEP = ("record", "bake")
_LOCK = ".lock"
_DEQUANTIZED = 1 << 22  # weights dequantized at a time


@dataclasses.dataclass(frozen=True)
class _HfTensor:
    """A tensor of the Hugging Face layout: the (parameters, layer) it is made of."""

    name: str
    parts: tuple[Param, ...]
    layer: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Model(NamedTuple):
    """What is to be written.

    Attributes:
      source: the parameters.
      plan: over the source's stack; None is an ordinary model, every layer once.
      directories: every directory that is read.
      base: of these, the one with the `config.json`.
      words: the one with the tokenizer.
      dtype: what a recipe converts the weights to, if it does.
    """

    source: Source
    plan: LayerPlan | None
    directories: tuple[ModelDirectory, ...]
    base: ModelDirectory
    words: ModelDirectory
    dtype: str | None


def convert(
    src: str | Path | ModelDirectory | Assembly,
    dst: str | Path,
    *,
    layer_spec: str | None = None,
    plan: Literal["record", "bake"] = "record",
    dtype: str | None = None,
    quant: Quant = "auto",
    keep: Keep = "small",
    format: str = "native",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Converts a model directory of any readable format into a native or Orbax checkpoint, layer by layer.

    Args:
      src: a Hugging Face, native or Orbax directory, or what a recipe assembles.
      dst: the directory to create.
      layer_spec: a layer plan over the slots of a recipe or of the plan that `src` records, else its layers.
      plan: what becomes of the layer plan. `record` writes every layer that a slot uses once, and the plan,
        which is the model when it is loaded; `bake` writes every slot as a layer, with its scales multiplied
        in: an ordinary model that needs no plan.
      dtype: `float32`, `bfloat16` or `float16`, of what is not quantized; None keeps what is stored.
      quant: the format to quantize to, None for plain numbers, or `auto` for what `src` has.
      keep: see `ModelDirectory.source`.
      format: `native` or, of plain numbers, `orbax`.
      overwrite: replace an existing checkpoint.
      progress: called after every layer.

    Returns:
      The description that was written to `jaxchat.json`.

    Raises:
      UsageError: a wrong argument, no such source, or an existing destination.
      JaxchatError: the source is malformed, a value does not fit the dtype, or the disk is full.
    """
    for name, value, known in (("format", format, FORMATS), ("plan", plan, KEEP)):
        if value not in known:
            raise UsageError(f"{name} {value!r} is not one of {', '.join(known)}")
    target = None if dtype is None else weight_dtype(dtype)
    model = _open(src, layer_spec, target, keep)
    if plan == "bake" and model.plan is None:
        raise UsageError(f"{model.base}: there is no layer plan to bake; give --layer_spec or --recipe")
    source = model.source if plan == "record" or model.plan is None else BakedSource(model.source, model.plan)
    values = None if source is model.source else _unrolled_config(model, source.config)
    fmt = choose_format(model.base, source.manifest, quant)
    quantization = source.manifest.quantization or quantization_entry(fmt, source.table)
    if quantization is not None and format == "orbax":
        raise UsageError(
            f"--format orbax holds no quantized weights ({quantization.format}); use --format native, or "
            "leave --quant out here and give it when the model is loaded"
        )
    if format == "orbax":
        from jaxchat.checkpoints.orbax import replace_native_file  # half a second of imports
    stored_as = storages(source, target, fmt)
    manifest = dataclasses.replace(
        _recorded(model) if source is model.source else source.manifest,
        format=format,
        dtypes={p.name: (target or source.dtype(p)).name for p in source.table},
        quantization=quantization,
    )
    with _new_directory(model.directories, Path(dst), overwrite) as directory:
        _write_native(source, directory / NATIVE_FILE, stored_as, progress)
        manifest.write(directory)
        _write_files(model, directory, values, dtype or model.dtype)
        if format == "orbax":
            replace_native_file(directory, source.config, manifest)
    return manifest


def to_hf(
    src: str | Path | ModelDirectory | Assembly,
    dst: str | Path,
    *,
    layer_spec: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dequantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a model in Hugging Face's layout: as it was stored there, or unrolled under a layer plan.

    Without a plan every tensor comes back byte for byte. With one (`layer_spec`, a recipe, or the one that
    `src` records) every slot is a layer, its scales multiplied into the output projections, identity slots
    included, and `config.json` describes those layers.

    Of quantized weights the layout knows nothing: they are written as the numbers they stand for, in the
    dtype they had, if `dequantize` says so.

    Args:
      src: a model directory of any readable format, or what a recipe assembles.
      dst: the directory to create.
      layer_spec: as in `convert`.
      max_shard_bytes: larger models are split into files of at most this size (a larger tensor has its own).
      dequantize: whether `src` may be quantized.
      overwrite: replace an existing checkpoint.
      progress: called after every layer.

    Raises:
      UsageError: as `convert`, or the family's `config.json` cannot describe the plan's layers.
      JaxchatError: as `convert`.
    """
    model = _open(src, layer_spec, None, "exact" if dequantize else "small")
    source = model.source if model.plan is None else BakedSource(model.source, model.plan)
    values = None if model.plan is None else _unrolled_config(model, source.config)
    if (held := source.manifest.quantization) is not None and not dequantize:
        raise UsageError(
            f"{model.base}: holds {held.format} weights, which Hugging Face's layout has no place for; "
            "add --dequantize to write the numbers they stand for (the original weights are not in there any "
            "more)"
        )
    tensors = _hf_tensors(source)
    shards = _split(tensors, max_shard_bytes)
    with _new_directory(model.directories, Path(dst), overwrite) as directory:
        meter = Meter(source, progress)
        meter.add(0)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        for name, shard in zip(names, shards, strict=True):
            _write_hf_file(source, directory / name, shard, meter)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {
                    t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
                },
            }
            write_json(directory / "model.safetensors.index.json", index)
        _write_files(model, directory, values, model.dtype)
    return source.manifest


def to_gguf(
    src: str | Path | ModelDirectory | Assembly,
    dst: str | Path,
    *,
    layer_spec: str | None = None,
    quant: str | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a model as one GGUF file, which llama.cpp and its kin load; a layer plan is unrolled.

    Args:
      src: a model of any readable format, or what a recipe assembles.
      dst: the file to create.
      layer_spec: as in `convert`.
      quant: a name in `gguf_write.MIXTURES`, such as `q4_k_m` or `bf16`; None keeps what is stored.
      dequantize: whether weights that are quantized already may be quantized again.
      overwrite: replace an existing file.
      progress: called after every tensor.

    Raises:
      UsageError: as `convert`, or GGUF cannot say something about the model.
      JaxchatError: as `convert`.
    """
    from jaxchat.checkpoints.gguf_write import mixture_of, write_gguf
    from jaxchat.families.gguf_export import described

    mixture_of(quant)
    dst = Path(dst)
    model = _open(src, layer_spec, None, "exact" if dequantize else "small")
    for path in _read_from(model.directories):
        if os.path.realpath(path) == os.path.realpath(dst):
            raise UsageError(f"{dst}: is what is read; give another --dst")
    if os.path.lexists(dst) and not overwrite:
        raise UsageError(f"{dst}: exists already; choose another --dst, or replace it with --overwrite")
    if dst.is_dir():
        raise UsageError(f"{dst}: is a directory; give the name of a file, as {dst}.gguf")
    source = model.source if model.plan is None else BakedSource(model.source, model.plan)
    held = source.manifest.quantization
    if held is not None and quant is not None and quant != held.format and not dequantize:
        raise UsageError(
            f"{model.base}: holds {held.format} weights, and what was rounded off is gone; add --dequantize "
            "to quantize them again all the same"
        )
    name = model.base.name if len(model.directories) == 1 else dst.stem
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        try_to_replace(dst)
        words = model.words.gguf_words(source.config.vocab_size)
        description = described(source.config, source.table, name=name, where=str(model.base))
        write_gguf(source, description, words, dst, quant=quant, progress=progress)
    except OSError as error:
        raise JaxchatError(
            f"{dst}: cannot be written ({error.strerror or error}); nothing was left behind"
        ) from None
    return source.manifest


def _open(
    src: str | Path | ModelDirectory | Assembly, layer_spec: str | None, dtype: np.dtype | None, keep: Keep
) -> _Model:
    """Opens a directory as it is, or else what is assembled, without the layers that the plan leaves out."""
    if isinstance(src, Assembly):
        assembly = src
    else:
        src = ModelDirectory.at(src)
        if layer_spec is None:
            source = src.source(keep=keep)
            plan = recorded_plan(source.manifest, source.config)
            if plan is None and source.manifest.stack is not None:  # no `config.json` describes its layers
                plan = LayerPlan.identity(source.config.num_layers)
            return _Model(source, plan, (src,), src, src, None)
        assembly = whole(src, src.plan)
    if layer_spec is not None:
        assembly = under(assembly, assembly.plan.select(layer_spec))
    base, words = assembly.models[assembly.base], assembly.models[assembly.tokenizer]
    source = AssembledSource(assembly, dtype, keep)
    return _Model(source, assembly.plan, assembly.models, base, words, assembly.dtype)


def _unrolled_config(model: _Model, config: ModelConfig) -> dict[str, Any]:
    return relayered_config(model.base.config_values, config, source=model.base.config_place)


def _recorded(model: _Model) -> Manifest:
    """The description of a stack and the plan over it, as far as `config.json` does not say them already."""
    manifest, config = model.source.manifest, model.source.config
    plan = None if model.plan in (None, LayerPlan.identity(config.num_layers)) else str(model.plan)
    stack = Stack.of(config)
    ordinary = Stack.of(model.base.stated_config)
    return dataclasses.replace(manifest, plan=plan, stack=None if stack == ordinary else stack)


def _write_native(
    source: Source, path: Path, stored_as: dict[str, Storage], progress: Progress | None
) -> None:
    specs: dict[str, TensorSpec] = {}
    for param in source.table:
        specs |= tensor_specs(param.name, param.stacked_shape(source.config), stored_as[param.name])
    meter = Meter(source, progress)
    meter.add(0)  # says how much there is, before the first layer is done
    with SafetensorsWriter(path, specs, metadata={"format": "jaxchat"}, alignment=ALIGNMENT) as writer:
        for param in source.table:
            for index, values in layers_of(source, param, stored_as[param.name], meter):
                part, row = place(param.name, stored_as[param.name], index)
                for name, array in named_arrays(part, values).items():
                    writer.write(name, array, row if param.per_layer else None)


def _hf_tensors(source: Source) -> list[_HfTensor]:
    """The tensors of the source's Hugging Face layout, in name order."""
    config, manifest, family = source.config, source.manifest, family_of(source.config)
    by_hf: dict[str, list[Param]] = {}
    for param in source.table:
        by_hf.setdefault(param.hf, []).append(param)
    tensors = []
    for hf, parts in by_hf.items():
        parts.sort(key=lambda param: param.part)
        for layer in range(parts[0].rows(config)):
            for name in _hf_names(family, parts[0], hf, manifest):
                dtype, shape = source.dtype(parts[0]), parts[0].hf_shape(config)
                tensors.append(_HfTensor(name.format(layer), tuple(parts), layer, dtype, shape))
    return sorted(tensors, key=lambda tensor: tensor.name)


def _hf_names(family: Family, param: Param, hf: str, manifest: Manifest) -> tuple[str, ...]:
    name, head = family.rename(hf, manifest.rename), family.rename(HEAD, manifest.rename)
    if param.name != EMBED:
        return (name,)
    return {"copy": (name, head), "only": (head,)}.get(manifest.tied_head, (name,))


def _split(tensors: list[_HfTensor], max_bytes: int) -> list[list[_HfTensor]]:
    shards: list[list[_HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_hf_file(source: Source, path: Path, tensors: list[_HfTensor], meter: Meter) -> None:
    # As the official writer does: wide types first, so that every tensor is aligned to its item.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in ordered}
    with SafetensorsWriter(path, specs, metadata={"format": "pt"}) as writer:
        for tensor in ordered:
            stored = [source.layer(param, tensor.layer) for param in tensor.parts]
            values = [_plain(value, tensor) for value in stored]
            fused = np.concatenate(values) if len(values) > 1 else values[0]
            writer.write(tensor.name, fused.T if tensor.parts[0].transposed else fused)
            meter.add(sum(value.nbytes for value in stored))


def _plain(values: np.ndarray | Quantized, tensor: _HfTensor) -> np.ndarray:
    """A parameter's numbers; quantized ones in the tensor's dtype, some rows at a time."""
    if isinstance(values, np.ndarray):
        return values
    out = np.empty(values.shape, tensor.dtype)
    step = max(1, _DEQUANTIZED // values.columns)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        convert_into(out[rows], dequantize_tensor(row_slice(values, rows)), tensor.name)
    return out


def _write_files(model: _Model, dst: Path, values: dict[str, Any] | None, dtype: str | None) -> None:
    """Copies configuration, tokenizer and chat template.

    `config.json` is the base model's, byte for byte if nothing is to be changed in it: `values` replaces its
    contents, a conversion's dtype is noted, and a tokenizer of another model brings its own special ids.
    """
    model.base.write_config(dst)
    model.words.write_words(dst)
    before = model.base.config_values
    config = before if values is None else values
    if dtype is not None:
        config = {**config, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}
    if model.words != model.base:
        other = model.words.config_values
        config = {**config, **{key: other[key] for key in ("bos_token_id", "eos_token_id") if key in other}}
    if config != before:
        write_json(dst / CONFIG, config)


@contextlib.contextmanager
def _new_directory(sources: tuple[ModelDirectory, ...], dst: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `dst` if the block ends well and disappears otherwise."""
    given, dst = dst, _destination(dst)
    for src in _read_from(sources):
        _check_destination(src, dst, given, overwrite)
    with contextlib.ExitStack() as held:
        try:
            dst.parent.mkdir(parents=True, exist_ok=True)
            try_to_replace(dst.with_name(f".{dst.name}{_LOCK}"))  # a lock waits where it cannot be made
            _remove_leftovers(dst)
            partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
            held.enter_context(_locked(partial))
            partial.mkdir()
        except FileExistsError:
            raise JaxchatError(
                f"{given}: cannot be created: there is a file where a folder would be; give another --dst"
            ) from None
        except OSError as error:
            raise JaxchatError(
                f"{given}: cannot be created ({error.strerror or error}); give another --dst"
            ) from None
        try:
            yield partial
            _publish(partial, dst)
        except OSError as error:
            raise JaxchatError(
                f"{given}: cannot be written ({error.strerror or error}); nothing was left behind"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _read_from(sources: tuple[ModelDirectory, ...]) -> list[Path]:
    return [path for source in sources for path in source.read_from]


def _destination(given: Path) -> Path:
    """Where the directory is to be: behind the links, so that those stay, and lead to the new one.

    Raises:
      UsageError: the links lead in a circle.
    """
    path = Path(os.path.realpath(given))
    if path.is_symlink():
        raise UsageError(f"{given}: a link that leads back to itself; give another --dst")
    return path


def _check_destination(src: Path, dst: Path, given: Path, overwrite: bool) -> None:
    source = Path(os.path.realpath(src))
    if source == dst or dst in source.parents or source in dst.parents:
        raise UsageError(f"{given}: source and destination must be separate directories (source: {src})")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise UsageError(f"{given}: exists already; choose another --dst, or replace it with --overwrite")
    names = sorted(path.name for path in dst.iterdir()) if dst.is_dir() else [""]
    if names and not {MANIFEST, CONFIG} & set(names):
        raise UsageError(
            f"{given}: is not a model directory, so --overwrite does not replace it; give another --dst"
        )
    if strange := _not_ours(dst):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UsageError(
            f"{given}: holds {strange[0]}{more}, which no conversion writes, so --overwrite does not replace "
            "it; move that away, or give another --dst"
        )


def _not_ours(directory: Path) -> list[str]:
    """What is in a directory that no conversion has written there, by its path within."""
    known = {path.relative_to(directory).as_posix() for path in text_files(directory)}
    known |= {MANIFEST, CONFIG, GENERATION_CONFIG}
    found: list[Path] = []
    for folder, folders, files in os.walk(directory):
        inside = [Path(folder, name) for name in folders]
        found += [path for path in inside if path.is_symlink() or not any(path.iterdir())]
        found += [Path(folder, name) for name in files]
    names = [path.relative_to(directory).as_posix() for path in found]
    return sorted(name for name in names if name not in known and not _WRITTEN.fullmatch(name))


_WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    rf"|{ORBAX_FOLDER}/((ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]+)|array_metadatas/process_\d+"
    r"|commit_success\.txt|_[A-Za-z_]+)"
)
"""The weights, as Hugging Face's layout, we and Orbax name them."""


def _remove_leftovers(dst: Path) -> None:
    """Removes what a killed conversion to `dst` left, and puts back what one was about to replace."""
    for path in list(dst.parent.iterdir()):
        if path.name.startswith(f".{dst.name}.old-"):
            with _locked(path.with_name(path.name.replace(".old-", ".partial-"))):
                _undo_replacement(path, dst)
        elif path.name.startswith(f".{dst.name}.partial-"):
            partial = path.with_name(path.name.removesuffix(_LOCK))
            with _locked(partial):
                if partial.exists():
                    shutil.rmtree(partial)


def _undo_replacement(old: Path, dst: Path) -> None:
    if old.is_symlink():
        old.unlink()
    elif dst.exists():
        shutil.rmtree(old)
    else:
        old.rename(dst)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock that marks a partial directory as being written; it dies with the process."""
    try:
        with locked(directory.with_name(directory.name + _LOCK)):
            yield
    except BlockingIOError:
        raise UsageError(f"{directory}: another conversion is writing it; wait for its end") from None


def _publish(partial: Path, dst: Path) -> None:
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    old = dst.with_name(f".{dst.name}.old-{os.getpid()}")
    if dst.exists():
        dst.rename(old)
    partial.rename(dst)
    _sync(dst.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
