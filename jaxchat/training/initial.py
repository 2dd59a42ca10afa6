"""Random parameters, which training from nothing begins with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.families import parameter_table
from jaxchat.layers.step import Params


def initial_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, float32: normal with deviation 0.02, less for what adds to the residual stream.

    The latter as in GPT-2 (Radford et al. 2019, 2.3): divided by the square root of 2 L.
    """
    params = {}
    table = parameter_table(config)
    for param, own in zip(table, jax.random.split(key, len(table)), strict=True):
        shape = param.stacked_shape(config)
        if param.init == "normal":
            deviation = 0.02 / np.sqrt(2 * config.num_layers) if param.is_output else 0.02
            params[param.name] = deviation * jax.random.normal(own, shape, jnp.float32)
        else:
            params[param.name] = jnp.full(shape, float(param.init == "ones"), jnp.float32)
    return params
