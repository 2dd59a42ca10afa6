"""The operations that move the weights and the cache, one folder each.

`reference.py` is the definition in plain XLA; a faster backend stands beside it. Every operation takes the
whole stack and an index, so that nothing is sliced, and hence copied, on the way in.
"""
