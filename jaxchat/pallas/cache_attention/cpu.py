"""The native CPU kernel of `cpu.cc`: attention that reads one slot of the cache where it lies."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.pallas.cache_attention import reference
from jaxchat.pallas.cache_attention.reference import QuantizedRows, Rows
from jaxchat.pallas.cache_attention.tree import Tree

TARGET = "jaxchat_cache_attention"


def attend(
    q: jax.Array,
    k_cache: Rows,
    v_cache: Rows,
    slot: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array,
    window: jax.Array,
    softcap: float,
    tree: Tree | None = None,
    isa: str = "",
) -> jax.Array:
    """See `reference.attend`; `isa` is one of `native.instruction_sets()`, empty: the default."""
    if isinstance(k_cache, QuantizedRows) and isinstance(v_cache, QuantizedRows):
        operands = k_cache.codes, v_cache.codes, k_cache.scale, v_cache.scale
    elif jax.tree.leaves(k_cache)[0].dtype in (jnp.float32, jnp.bfloat16, jnp.uint16):
        none = jnp.zeros(0, jnp.float32)
        operands = *jax.tree.leaves((k_cache, v_cache)), none, none
    else:
        return reference.attend(
            q, k_cache, v_cache, slot, lengths, scale=scale, window=window, softcap=softcap, tree=tree
        )
    window = jnp.asarray(window, jnp.int32)
    nothing = jnp.zeros((0, 0), jnp.int32)
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32))(
        q.astype(jnp.float32),
        *operands,
        jnp.asarray(slot, jnp.int32).reshape(1),
        lengths.astype(jnp.int32),
        jnp.asarray(scale, jnp.float32).reshape(1),
        window.reshape(1),
        *(tree.within(window) if tree is not None else (nothing, nothing)),
        softcap=np.float32(softcap),
        isa=isa,
    )
