"""What tells the weights of models apart: digests of samples, which take no time. Opens no file."""

import hashlib
from typing import Any

import jax
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.layers.step import Params

_SAMPLED_ROWS = 4
"""Rows of each matrix of each layer that go into the fingerprint: a changed layer changes all of its rows."""

_SAMPLED_ENTRIES = 128
"""The same for what is not a stack of matrices: embeddings, and the norms of all layers, which are few."""


def weights_fingerprint(params: Params) -> dict[str, dict[str, str]]:
    """Format, shape and a digest of a sample of the bytes of every parameter, by its name."""
    return {name: _weight(value) for name, value in sorted(params.items())}


def model_digest(config: ModelConfig, params: Params) -> str:
    """A word that tells a model from another: of its configuration and its weights as loaded."""
    text = repr((config, weights_fingerprint(params)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array."""
    # Through uint8: numpy has no buffer protocol for bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _weight(value: Any) -> dict[str, str]:
    """Format, shape and a digest of a sample of the bytes of one parameter."""
    digest = hashlib.blake2b(digest_size=8)
    for part in jax.tree.leaves(value):
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(bytes_of(_sample(part)))
    # bfloat16 is kept as its bits on the CPU.
    kind = getattr(value, "format_name", None) or str(value.dtype).replace("uint16", "bfloat16")
    return {"format": kind, "shape": str(list(value.shape)), "digest": digest.hexdigest()}


def _sample(part: jax.Array) -> np.ndarray:
    """Some rows [..., n, I] of an array, evenly spaced; taken where it is, so that little is transferred."""
    axis, count = (1, _SAMPLED_ROWS) if part.ndim > 2 else (0, _SAMPLED_ENTRIES)
    if part.ndim < 2:
        return np.asarray(part)
    rows = np.unique(np.linspace(0, part.shape[axis] - 1, count).astype(int))
    on_host = next(iter(part.devices())).platform == "cpu"
    return np.take(np.asarray(part), rows, axis) if on_host else np.asarray(part.take(rows, axis))
