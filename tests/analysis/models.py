"""Tiny models and slow, independent computations for the tests of this room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import model
from jaxchat.layers.cache import empty_cache
from tests.support.steps import step_of

SCALED = "[0, 2, [1, 0.5, 1.0], [2, 0.0, 0.0], [1, 1.0, 0.0], 0]"  # a slot without effect, halves, repeats


def random_ids(count, vocabulary=67, seed=3):
    return np.random.default_rng(seed).integers(3, vocabulary, count).tolist()


def hidden_states(loaded, plan, row, room=0):
    """float64 [P + 1, T, D]: the residual stream of a window, by running every prefix of a plan.

    Plans up to `room` slots share what is compiled.
    """
    engine, slots = loaded.engine, len(plan.executed())
    tokens, count = np.array([row], np.int32), np.array([len(row)], np.int32)
    states = []
    for stop in range(slots + 1):
        prefix = plan.arrays(max(slots, room))._replace(length=np.array(stop, np.int32))
        states.append(run_prefix(engine.config, engine.params, prefix, tokens, count)[0])
    return np.array(states, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def run_prefix(config, params, prefix, tokens, count):
    slots, length = len(prefix.layer), tokens.shape[1]
    cache = empty_cache(config, slots=slots, batch=1, capacity=length, dtype=jnp.float32)
    step = step_of(config, params, prefix, tokens, jnp.zeros(1, jnp.int32), count, count)
    return model.run_plan(step, model.embed(step), cache)[0]


def logits_of(loaded, plan, row):
    """float64 [T, V], of a window by itself."""
    states = hidden_states(loaded, plan, row)[-1]
    engine = loaded.engine
    step = step_of(engine.config, engine.params, *[None] * 5)
    return np.asarray(model.logits(step, model.final_norm(step, jnp.float32(states))), np.float64)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
