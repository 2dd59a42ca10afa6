"""Chimera's files: a directory with `chimera_config.json` and `chimera.safetensors`, read and written.

Weights as the authors published them are read, too: tensors `trimlp.*`, `fast_layer1.*` and `chimera_head.*`,
whatever stands before these names, in a safetensors or a PyTorch file and without our configuration.
The network is in `layers/chimera.py`.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from jaxchat.checkpoints.directory import write_json
from jaxchat.checkpoints.fingerprint import bytes_of
from jaxchat.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.config import ModelConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.files import read_json, replaced
from jaxchat.layers.chimera import ChimeraConfig, layer_config, shapes
from jaxchat.layers.chimera_heads import HEADS
from jaxchat.layers.step import Params
from jaxchat.pallas.storage import widen
from jaxchat.typed import Count, checked
from jaxchat.visible import shown

CONFIG, TENSORS = "chimera_config.json", "chimera.safetensors"

MAX_HEADS = 32
MAX_RANK = 1 << 14
_VERSION = 1
_DTYPES = ("F32", "F16", "BF16")
_ADVICE = "copy the directory again, or train the heads anew"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Base:
    """The model that heads were trained for.

    Attributes:
      fingerprint: see `base_fingerprint`.
    """

    model_type: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """What `chimera_config.json` says."""

    version: Count
    kind: str
    heads: Annotated[int, msgspec.Meta(ge=1, le=MAX_HEADS)]
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    base: _Base


class ChimeraFiles(NamedTuple):
    """A Chimera as it was read."""

    config: ChimeraConfig
    params: dict[str, np.ndarray]  # as `layers.chimera.shapes` says; float32, or bfloat16


def base_fingerprint(config: ModelConfig, params: Params) -> str:
    """What tells a base from others: a digest of its norms, as bfloat16.

    They are the same however the base is quantized, and whatever float type it is held in.
    """
    digest = hashlib.blake2b(digest_size=8)
    for param in parameter_table(config):
        if param.role == "norm":
            values = np.asarray(widen(params[param.name])).astype(np.float32)
            digest.update(f"{param.name}{values.shape}".encode())
            digest.update(bytes_of(values.astype(ml_dtypes.bfloat16)))
    return digest.hexdigest()


def _described(config: ModelConfig, fingerprint: str) -> _Base:
    names = [field.name for field in dataclasses.fields(_Base) if field.name != "fingerprint"]
    return _Base(**{name: getattr(config, name) for name in names}, fingerprint=fingerprint)


def write_chimera(
    directory: str | Path,
    chimera: ChimeraConfig,
    params: Params,
    base_config: ModelConfig,
    base_params: Params,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes the two files, each whole or not at all; the directory is made if need be.

    Args:
      directory: where.
      chimera: what it is.
      params: its parameters: float32, or bfloat16.
      base_config, base_params: of the model that it was trained for, as they were loaded.
      training: how it was trained, kept for people: any JSON.

    Raises:
      JaxchatError: a parameter is not finite; nothing is written.
      OSError: a file cannot be written.
    """
    directory = Path(directory)
    arrays = {name: np.asarray(params[name]) for name in shapes(chimera, base_config)}
    for name, values in arrays.items():
        _check_finite(values, f"{directory}: not written: {name}", "train with a lower learning rate")
    directory.mkdir(parents=True, exist_ok=True)
    specs = {name: (values.dtype, values.shape) for name, values in arrays.items()}
    with replaced(directory / TENSORS) as temporary, SafetensorsWriter(temporary, specs) as writer:
        for name, values in arrays.items():
            writer.write(name, values)
    said = {
        "version": _VERSION,
        **dataclasses.asdict(chimera),
        "base": dataclasses.asdict(_described(base_config, base_fingerprint(base_config, base_params))),
        "training": dict(training or {}),
    }
    with replaced(directory / CONFIG) as temporary:
        write_json(temporary, said)


def read_chimera(directory: str | Path, base_config: ModelConfig, base_params: Params) -> ChimeraFiles:
    """Reads a Chimera for a base.

    Args:
      directory: with the two files, or with published weights.
      base_config, base_params: of the model that it is to draft for, as they were loaded.

    Raises:
      UsageError: there is no such directory, or it is for another base; the message says what differs.
      JaxchatError: a file is malformed, a tensor is missing or unknown, of another shape or dtype, or holds
        NaN.
    """
    path = Path(directory)
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such directory"
        raise UsageError(f"{path}: {what}; expected the directory of a Chimera, with {CONFIG} and {TENSORS}")
    if not (path / CONFIG).exists():
        return _read_published(path, base_config)
    said = checked(read_json(path / CONFIG), _File, where=str(path / CONFIG), advice=_ADVICE)
    _check_file(path / CONFIG, said)
    _check_base(path / CONFIG, said.base, _described(base_config, base_fingerprint(base_config, base_params)))
    config = ChimeraConfig(kind=said.kind, heads=said.heads, rank=said.rank)
    return ChimeraFiles(config, _read_tensors(path / TENSORS, shapes(config, base_config)))


def _check_file(path: Path, said: _File) -> None:
    if said.version != _VERSION:
        raise JaxchatError(
            f"{path}: version is {said.version}; expected {_VERSION}: use the jaxchat that wrote it"
        )
    if said.kind not in HEADS:
        raise JaxchatError(f"{path}: kind is {shown(said.kind)}; expected one of {', '.join(HEADS)}")


def _check_base(path: Path, trained: _Base, here: _Base) -> None:
    for name, expected in dataclasses.asdict(here).items():
        found = getattr(trained, name)
        if found == expected:
            continue
        if name == "fingerprint":
            raise UsageError(
                f"{path}: the heads were trained for another {trained.model_type} of the same sizes "
                f"(fingerprint {shown(found)}, here {shown(expected)}); load that model, or "
                "train heads for this one"
            )
        raise UsageError(
            f"{path}: the heads were trained for a model with {name} {shown(found)}; this one has "
            f"{shown(expected)}: load that model, or train heads for this one"
        )


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path, advice=_ADVICE)
    for name in file.entries:
        if name not in expected:
            raise JaxchatError(f"{path}: unknown tensor {shown(name)}; expected {', '.join(expected)}")
    return {name: _tensor(file, name, shape) for name, shape in expected.items()}


def _tensor(file: SafetensorsFile | TorchFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, checked before it is read; without the stack's axis it is fine, too."""
    if name not in file.entries:
        raise JaxchatError(f"{file.path}: tensor {name} is missing; {_ADVICE}")
    entry = file.entries[name]
    if entry.shape not in (shape, shape[1:] if shape[0] == 1 else shape):
        raise JaxchatError(
            f"{file.path}: tensor {shown(name)} has shape {list(entry.shape)}; expected {list(shape)}: it is "
            "for a model of other sizes"
        )
    if entry.dtype not in _DTYPES:
        raise JaxchatError(
            f"{file.path}: tensor {shown(name)} has dtype {entry.dtype}; expected {', '.join(_DTYPES)}"
        )
    values = file.read(name).reshape(shape)
    values = values.astype(np.float32) if entry.dtype == "F16" else values
    _check_finite(values, f"{file.path}: tensor {shown(name)}", _ADVICE)
    return values


def _check_finite(values: np.ndarray, what: str, advice: str) -> None:
    # A row at a time: numpy would make a float32 copy of all.
    rows = values.reshape(-1, values.shape[-1])
    for start in range(0, len(rows), 4096):
        if not np.isfinite(rows[start : start + 4096].astype(np.float32)).all():
            raise JaxchatError(f"{what} holds NaN or infinity; {advice}")


# --- as the authors published them

_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_AUTHORS_NAMES = "tensors trimlp.*, fast_layer1.* and chimera_head.*"
_HEAD = re.compile(r"chimera_head\.(\d{1,3})(?:\.\d{1,3})?\.weight")
_LAYER = re.compile(r"fast_layer1\.(?:0\.)?(.+)")


def _read_published(path: Path, base: ModelConfig) -> ChimeraFiles:
    """Tensors under the authors' names, of a directory without our configuration: all heads are `full`."""
    files = [found for pattern in _FILES for found in sorted(path.glob(pattern))]
    if len(files) != 1:
        raise UsageError(
            f"{path}: no {CONFIG} is there, and {len(files) or 'no'} files that could be published weights; "
            f"expected {CONFIG} and {TENSORS}, or one file with {_AUTHORS_NAMES}"
        )
    file: SafetensorsFile | TorchFile = (
        SafetensorsFile(files[0]) if files[0].suffix == ".safetensors" else TorchFile(files[0])
    )
    found = _published_names(file, base)
    count = sum(isinstance(key, int) for key in found)
    if not 1 <= count <= MAX_HEADS or any(k not in found for k in range(count)):
        raise JaxchatError(
            f"{file.path}: expected the tensors chimera_head.0.* to at most chimera_head.{MAX_HEADS - 1}.*, "
            f"found {count}; download the file again"
        )
    config = ChimeraConfig(kind="full", heads=count)
    expected = shapes(config, base)
    one_head = (1, *expected["heads.weight"][1:])
    heads = [_tensor(file, found[k], one_head) for k in range(count)]
    params: dict[str, np.ndarray] = {"heads.weight": np.concatenate(heads)}
    for name, shape in expected.items():
        if name != "heads.weight":
            params[name] = _tensor(file, found.get(name, _AUTHORS.get(name, name)), shape)
    return ChimeraFiles(config, params)


_AUTHORS = {
    "trigram.w1.weight": "trimlp.* of [3D, 3D]",
    "trigram.w1.bias": "trimlp.* of [3D]",
    "trigram.w2.weight": "trimlp.* of [D, 3D]",
}


def _published_names(file: SafetensorsFile | TorchFile, base: ModelConfig) -> dict[str | int, str]:
    """Our parameter, or the number of a head, -> the tensor that is it."""
    d = base.hidden_size
    trigram = {
        (3 * d, 3 * d): "trigram.w1.weight",
        (3 * d,): "trigram.w1.bias",
        (d, 3 * d): "trigram.w2.weight",
    }
    layer = {
        param.hf_layer_name: param.name for param in parameter_table(layer_config(base)) if param.per_layer
    }
    found: dict[str | int, str] = {}
    for name, entry in file.entries.items():
        key: str | int | None = None
        if match := _HEAD.search(name):
            key = int(match[1])
        elif match := _LAYER.search(name):
            key = layer.get(match[1])
        elif "trimlp." in name:
            key = trigram.get(entry.shape)
        if key is None:
            if "rotary_emb" in name:  # constants that old versions of transformers saved
                continue
            raise JaxchatError(
                f"{file.path}: unknown tensor {shown(name)} {list(entry.shape)}; expected "
                f"{_AUTHORS_NAMES}, for a base with a hidden size of {d}"
            )
        if key in found:
            raise JaxchatError(
                f"{file.path}: tensors {shown(found[key])} and {shown(name)} are the same part"
            )
        found[key] = name
    return found
