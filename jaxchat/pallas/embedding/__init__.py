"""Rows of the token embedding, which may be the output head too."""

from typing import Any, Protocol

import jax

from jaxchat.pallas.embedding.reference import embedding_rows

__all__ = ["EmbeddingRows", "embedding_rows"]


class EmbeddingRows(Protocol):
    """An embedding [V, D] in the form that the backend reads, ids [...] -> float32 [..., D]."""

    def __call__(self, w: Any, ids: jax.Array, /) -> jax.Array:
        """Rows of it."""
