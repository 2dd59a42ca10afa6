"""LoRA (Hu et al. 2022) while it is trained: factors beside frozen weights, as PEFT defines and begins them.

How a trained one runs is in `layers/adapters.py`, how it is written in `checkpoints/adapter_write.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.config import ModelConfig, Param
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layers.adapters import Factors
from jaxchat.layers.step import Step
from jaxchat.pallas.backends import Kernels

Trained = dict[str, Factors]
"""Weight -> a float32 [L, R, I] and b [L, R, O]."""


def targets_of(config: ModelConfig, words: str) -> tuple[str, ...]:
    """The weights that some words name: `all`, `attention`, `mlp`, or projections such as `q,v`.

    Raises:
      UsageError: one that is none of them, with those that there are.
    """
    weights = [param for param in parameter_table(config) if param.role == "weight"]
    names = {param.layer_name.removesuffix(".weight"): [param] for param in weights}
    groups: dict[str, list[Param]] = {
        "all": weights,
        "attention": [param for param in weights if param.half == "attention"],
        "mlp": [param for param in weights if param.half == "mlp"],
        **names,
    }
    found: dict[str, None] = {}
    for word in words.split(","):
        if word.strip() not in groups:
            raise UsageError(
                f"--lora_targets {words}: {word.strip()!r} is none of {', '.join(groups)}; expected some of "
                "these, with commas between"
            )
        found |= {param.name: None for param in groups[word.strip()]}
    return tuple(found)


def initial(config: ModelConfig, targets: tuple[str, ...], rank: int, key: jax.Array) -> Trained:
    """What PEFT begins with: a uniform within 1 / sqrt(I) of 0 (its `kaiming_uniform_`), b of zeros."""
    table = {param.name: param for param in parameter_table(config)}
    found = {}
    for name, own in zip(targets, jax.random.split(key, len(targets)), strict=True):
        out, inp = table[name].layer_shape(config)
        bound = 1 / np.sqrt(inp)
        a = jax.random.uniform(own, (config.num_layers, rank, inp), jnp.float32, -bound, bound)
        found[name] = Factors(a, jnp.zeros((config.num_layers, rank, out), jnp.float32))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InLayer:
    """One layer's factors, in the place of `Adapters` in a step.

    Attributes:
      low_rank: weight -> a [R, I] and b [R, O].
      key: of the random numbers for dropout, or None.
      scale: what products with the factors are multiplied with, static.
      dropout: the rate at which elements of what a delta reads are zeroed, static.
    """

    low_rank: Mapping[str, Factors]
    key: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    def at(self, position: jax.Array) -> "InLayer":
        """See `Adapters`: the same in every slot."""
        return self

    def changed(self, name: str, layer: jax.Array, y: jax.Array, product: Callable[..., Any]) -> jax.Array:
        """See `Adapters`: nothing is replaced."""
        return y

    def added(self, name: str, layer: jax.Array, dimensions: int) -> None:
        """See `Adapters`: no bias is changed."""
        return None

    def with_deltas(
        self, kernels: Kernels, x: jax.Array, ys: Mapping[str, jax.Array], layer: jax.Array
    ) -> dict[str, jax.Array]:
        """See `Adapters`."""
        return {name: y + self._delta(name, x) for name, y in ys.items() if name in self.low_rank}

    def _delta(self, name: str, x: jax.Array) -> jax.Array:
        a, b = (part.astype(x.dtype) for part in self.low_rank[name])
        if self.key is not None and self.dropout:
            own = jax.random.fold_in(self.key, sorted(self.low_rank).index(name))
            kept = jax.random.bernoulli(own, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        dot = functools.partial(
            jnp.matmul,
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return self.scale * dot(dot(x, a.T).astype(x.dtype), b)


def attach(step: Step, own: Trained, layer: jax.Array, *, scale: float, dropout: float, key: Any) -> Step:
    """A step within one layer, with its factors: what `forward.hidden_states` takes for `attach`."""
    key = None if key is None else jax.random.fold_in(key, layer)
    return dataclasses.replace(step, adapters=InLayer(low_rank=own, key=key, scale=scale, dropout=dropout))
