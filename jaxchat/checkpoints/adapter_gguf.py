"""LoRA adapters in GGUF, as llama.cpp's convert_lora_to_gguf.py writes them and llama-adapter.cpp reads them.

A tensor of the model, `X`, has the factors `X.lora_a` [R, I] and `X.lora_b` [O, R], and the delta is
`alpha / R * b @ a`; those of the embedding are [V, R] and [D, R]. Rows of b are in the order of X's in GGUF.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxchat.checkpoints.fingerprint import bytes_of
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.low_rank import Adapter, LowRank
from jaxchat.checkpoints.source import listed
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.families.gguf import ARCHITECTURES, Architecture
from jaxchat.families.gguf_export import EXPORTS, names_of
from jaxchat.families.gguf_tensors import Place, place_of, rotated_heads, unpermuted
from jaxchat.families.tables import OUTPUT_HEAD
from jaxchat.visible import shown

_FACTORS = (".lora_a", ".lora_b")


class _Target(NamedTuple):
    """A parameter of one layer, and where a GGUF model has it."""

    param: Param
    layer: int
    place: Place


def read_gguf_adapter(path: Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a model.

    Args:
      path: of the file.
      config: of the model, which need not be in GGUF.

    Raises:
      UsageError: it is of another kind, or for a model that does not fit; the message has key or tensor.
      JaxchatError: the file is malformed, a tensor is missing, of another shape, or holds NaN.
    """
    file = GgufFile(path)
    _check_kind(file)
    permuted, alpha = _architecture(file, config).permuted, _alpha(file)
    digest = hashlib.blake2b(str(alpha).encode(), digest_size=8)
    low_rank: dict[str, dict[int, LowRank]] = {}
    targets = _targets(config)
    for base in _bases(file, targets):
        a, b = (_values(file, f"{base}{factor}") for factor in _FACTORS)
        for values in (a, b):
            digest.update(f"{base}{values.shape}".encode())
            digest.update(bytes_of(values))
        is_embedding = targets[base][0].param.role == "embedding"
        a = np.ascontiguousarray(a.T) if is_embedding else a
        _check_shapes(file, base, a, b, targets[base][0])
        with np.errstate(over="ignore"):
            b = b * np.float32(alpha / len(a) if alpha else 1.0)
        if not np.isfinite(b).all():
            raise JaxchatError(f"{path}: {base}.lora_b times adapter.lora.alpha is too large for float32")
        for param, layer, place in targets[base]:
            own = b if place.rows is None else b[slice(*place.rows)]
            if permuted and (heads := rotated_heads(param, config)):
                own = unpermuted(own, heads)
            low_rank.setdefault(param.name, {})[layer] = LowRank(a, np.ascontiguousarray(own), None)
    return Adapter(
        name=path.stem,
        path=path,
        replicated=None,
        low_rank=low_rank,
        added={},
        replaced={},
        rows={},
        digest=digest.hexdigest(),
    )


def _check_kind(file: GgufFile) -> None:
    """Raises UsageError if it is no plain LoRA adapter."""
    kinds = [file.metadata.get(key) for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"]:
        raise UsageError(
            f"{file.path}: general.type is {shown(kinds[0])} and adapter.type {shown(kinds[1])}; expected "
            "'adapter' and 'lora': give the file of a LoRA adapter"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise UsageError(
            f"{file.path}: is an activated LoRA (aLoRA), which is not supported; take a plain one"
        )


def _architecture(file: GgufFile, config: ModelConfig) -> Architecture:
    """The adapter's, which is that of the model."""
    name = file.metadata.get("general.architecture")
    row, export = ARCHITECTURES.get(name) if isinstance(name, str) else None, EXPORTS.get(config.model_type)
    fits = export is not None and (
        export.architecture == name or (row is not None and row.model_type == config.model_type)
    )
    if row is None or not fits:
        raise UsageError(
            f"{file.path}: general.architecture is {shown(name)}, and the model is a {config.model_type}; "
            "take the model that the adapter was made for"
        )
    return row


def _alpha(file: GgufFile) -> float:
    """`adapter.lora.alpha`; 0 is no factor at all."""
    alpha = file.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise JaxchatError(f"{file.path}: adapter.lora.alpha is {shown(alpha)}; expected a number")
    return float(alpha)


def _targets(config: ModelConfig) -> dict[str, list[_Target]]:
    """The tensors that a GGUF file of the model has -> the parameters that are (in) each."""
    table = parameter_table(config)
    if config.tied_embeddings:
        table = (*table, OUTPUT_HEAD)
    names = names_of(config, table)
    found: dict[str, list[_Target]] = {}
    for param in table:
        if param.role in ("weight", "embedding", "head"):
            for layer in range(config.num_layers if param.per_layer else 1):
                place = place_of(param, layer, config, names)
                found.setdefault(place.tensor, []).append(_Target(param, layer, place))
    return found


def _bases(file: GgufFile, targets: Mapping[str, list[_Target]]) -> Iterator[str]:
    """The tensors of the model that the file has both factors of."""
    bases: dict[str, None] = {}
    for name in file.entries:
        base, dot, factor = name.rpartition(".")
        if dot + factor not in _FACTORS:
            raise UsageError(
                f"{file.path}: {shown(name)} is no factor of a LoRA adapter; expected names such as "
                f"{next(iter(targets))}.lora_a"
            )
        bases[base] = None
    if not bases:
        raise JaxchatError(f"{file.path}: holds no tensor; copy the adapter's file again")
    if unknown := [base for base in bases if base not in targets]:
        raise UsageError(
            f"{file.path}: has deltas of {shown(listed(unknown))}, which the model has not; take the "
            "model that the adapter was made for"
        )
    for base in bases:
        if missing := [base + factor for factor in _FACTORS if base + factor not in file.entries]:
            raise JaxchatError(f"{file.path}: {missing[0]} is missing; copy the adapter's file again")
    yield from bases


def _values(file: GgufFile, name: str) -> np.ndarray:
    values = np.ascontiguousarray(file.values(name), np.float32)
    if not np.isfinite(values).all():
        raise JaxchatError(
            f"{file.path}: {name} holds NaN or infinity; the training failed, or the file is damaged"
        )
    return values


def _check_shapes(file: GgufFile, base: str, a: np.ndarray, b: np.ndarray, target: _Target) -> None:
    """Raises if the factors' product is not of the tensor's shape."""
    shape = target.place.shape
    out, inp = shape[::-1] if target.param.role == "embedding" else shape
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[1] != inp
        or b.shape[0] != out
        or len(a) != b.shape[1]
        or not len(a)
    ):
        raise UsageError(
            f"{file.path}: the factors of {base} are {list(a.shape)} and {list(b.shape)}; expected "
            f"[rank, {inp}] and [{out}, rank]: take the model that the adapter was made for"
        )
