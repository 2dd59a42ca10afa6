"""What a token costs under a plan, in units of what it costs under another: the bytes of weights it reads."""

import functools
from collections.abc import Callable

import jax

from jaxchat.analysis.cost import weight_bytes_read
from jaxchat.engine.session import Engine
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan


def relative_cost(engine: Engine, base: LayerPlan) -> Callable[[LayerPlan], float]:
    """A decode step's weights as they lie in memory, those of the base plan being 1."""
    config = engine.config
    sizes = {
        param.name: sum(part.nbytes for part in jax.tree.leaves(engine.params[param.name]))
        // param.rows(config)
        for param in parameter_table(config)
    }
    whole = weight_bytes_read(config, base, sizes)

    @functools.cache
    def cost(plan: LayerPlan) -> float:
        return weight_bytes_read(config, plan, sizes) / whole

    return cost
