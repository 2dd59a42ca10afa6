"""Plain XLA definition of the lookup."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import quant
from jaxchat.pallas.storage import widen
from jaxchat.quant import QuantizedTensor


def embedding_rows(w: Any, ids: jax.Array) -> jax.Array:
    """Rows `ids` [...] of an embedding [V, D], in any form it is kept in, float32 [..., D]."""
    if isinstance(w, QuantizedTensor):
        return quant.rows(w, ids)
    return widen(w[ids]).astype(jnp.float32)
