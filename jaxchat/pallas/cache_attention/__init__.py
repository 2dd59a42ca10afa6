"""Attention of new tokens over the slot-stacked KV cache, and the write of their keys and values."""

from jaxchat.pallas.cache_attention import cpu, dense, reference
from jaxchat.pallas.cache_attention.reference import QuantizedRows, Rows, attend, write_rows

__all__ = ["QuantizedRows", "Rows", "attend", "cpu", "dense", "reference", "write_rows"]
