"""x @ w[layer].T with the whole layer stack as operand."""

from jaxchat.pallas.stacked_matmul import cpu, reference
from jaxchat.pallas.stacked_matmul.reference import embedding_rows, matmul, stacked_matmul, widen

__all__ = ["cpu", "embedding_rows", "matmul", "reference", "stacked_matmul", "widen"]
