"""Steps of the model for tests that call it as a function."""

import jax.numpy as jnp

from jaxchat.layers.step import Step
from jaxchat.pallas.backends import REFERENCE


def step_of(config, params, plan, tokens, lengths, new, context, *, dtype=jnp.float32, kernels=REFERENCE):
    """A `Step`, in float32 and by the reference's kernels unless said otherwise."""
    return Step(
        config=config,
        dtype=jnp.dtype(dtype),
        kernels=kernels,
        params=params,
        plan=plan,
        tokens=tokens,
        lengths=lengths,
        new=new,
        context=context,
    )
