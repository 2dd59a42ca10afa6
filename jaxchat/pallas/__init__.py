"""The operations that move the weights and the cache, one folder each.

`reference.py` is the definition in plain XLA; faster backends stand beside it. Every operation takes the
whole stack and an index, so that nothing is sliced, and hence copied, on the way in. `select` picks the set
of implementations an engine runs with.
"""

from jaxchat.pallas.backends import NAMES, Kernels, select

__all__ = ["NAMES", "Kernels", "select"]
