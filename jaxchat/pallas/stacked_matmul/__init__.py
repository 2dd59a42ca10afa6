"""x @ w[layer].T with the whole layer stack as operand."""

from jaxchat.pallas.stacked_matmul.reference import embedding_rows, matmul, stacked_matmul, widen

__all__ = ["embedding_rows", "matmul", "stacked_matmul", "widen"]
