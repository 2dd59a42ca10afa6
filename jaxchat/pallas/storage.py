"""How bfloat16 lies in memory: on CPU as its bits in uint16, elsewhere as itself.

XLA on CPU would otherwise convert a whole stack of weights to float32 outside the layer loop, on every call,
and a whole cache for every update of a row. The bits are the upper half of the float32.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxchat import quant
from jaxchat.quant import Quantized, QuantizedTensor, Reordered


def stored_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The type in which a platform (`cpu`, `gpu`, `tpu`) keeps arrays of a type."""
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def as_bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 values as their bits in uint16, anything else as it is; a view."""
    return values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values


def stored(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float rows as an array of a float dtype, or of uint16, keeps them."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    return rows.astype(dtype)


def widen(w: jax.Array | Quantized) -> jax.Array:
    """Weights as a float type; uint16 holds the bits of a bfloat16, quantized ones become float32."""
    if isinstance(w, QuantizedTensor | Reordered):
        return quant.dequantize(w)
    if w.dtype == jnp.uint16:
        return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w
