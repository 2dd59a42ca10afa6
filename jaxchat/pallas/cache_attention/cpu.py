"""The native CPU kernel of `cpu.cc`: attention that reads one slot of the cache where it lies."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.pallas.cache_attention import reference

TARGET = "jaxchat_cache_attention"


def attend(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slot: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array,
    window: jax.Array,
    softcap: float,
) -> jax.Array:
    """See `reference.attend`."""
    if k_cache.dtype not in (jnp.float32, jnp.bfloat16):
        return reference.attend(
            q, k_cache, v_cache, slot, lengths, scale=scale, window=window, softcap=softcap
        )
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32))(
        q.astype(jnp.float32),
        k_cache,
        v_cache,
        jnp.asarray(slot, jnp.int32).reshape(1),
        lengths.astype(jnp.int32),
        jnp.asarray(scale, jnp.float32).reshape(1),
        jnp.asarray(window, jnp.int32).reshape(1),
        softcap=np.float32(softcap),
    )
