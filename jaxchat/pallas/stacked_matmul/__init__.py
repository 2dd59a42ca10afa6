"""x @ w[layer].T with the whole layer stack as operand."""

from jaxchat.pallas.stacked_matmul import cpu, reference
from jaxchat.pallas.stacked_matmul.reference import embedding_rows, stacked_matmul, widen

__all__ = ["cpu", "embedding_rows", "reference", "stacked_matmul", "widen"]
