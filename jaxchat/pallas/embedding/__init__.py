"""Rows of the token embedding, which may be the output head too."""

from jaxchat.pallas.embedding.reference import embedding_rows

__all__ = ["embedding_rows"]
