"""A stack of several kinds of layers computes what its kinds compute one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model
from jaxchat.config import POST_NORMS, PRE_NORMS, Block
from jaxchat.families import read_config
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.training import forward
from jaxchat.training.initial import initial_params
from tests.support.steps import step_of
from tests.support.tiny import TINY_CONFIGS

KINDS = (
    Block(activation="silu"),
    Block(norms=PRE_NORMS + POST_NORMS, mlp="plain", activation="gelu", softcap=3.0),
    Block(norms=("mlp_norm", *POST_NORMS), qk_norm=True, activation="relu"),
)
LAYER_KINDS = (0, 1, 2, 1, 0)
SLOTS = 6


@pytest.fixture(scope="module")
def mixed():
    """A configuration with all of `KINDS`, and random parameters for whatever any of them has."""
    config = read_config({"model_type": "llama", **TINY_CONFIGS["llama"], "num_hidden_layers": 5})
    union = dataclasses.replace(config, blocks=(Block(norms=PRE_NORMS + POST_NORMS, qk_norm=True),))
    params = initial_params(union, jax.random.key(1))
    noise = jax.random.normal(jax.random.key(2), (64,))
    params = {
        name: 10 * value if value.ndim == 3 else value + 0.1 * noise[: value.shape[-1]]
        for name, value in params.items()
    }
    return dataclasses.replace(config, blocks=KINDS, layer_blocks=LAYER_KINDS), params


def run(config, params, plan, cache, x, lengths, *, start=0):
    new = jnp.full(len(lengths), x.shape[1], jnp.int32)
    step = step_of(config, params, plan, jnp.zeros(x.shape[:2], jnp.int32), lengths, new, lengths + new)
    return jax.jit(model.run_plan)(step, x, cache, start=start)


def slot_by_slot(config, params, plan, cache, x, lengths):
    """Each slot under a configuration that knows its own kind only."""
    for position in range(int(plan.length)):
        kind = config.layer_blocks[int(plan.layer[position])]
        alone = dataclasses.replace(config, blocks=(config.blocks[kind],), layer_blocks=())
        upto = plan._replace(length=np.array(position + 1, np.int32))
        x, cache = run(alone, params, upto, cache, x, lengths, start=position)
    return x, cache


@pytest.mark.parametrize("spec", ["all", "::-1", "1,1,2,0", "[[2, 0.5, 0], [1, 0, 2], 0]"])
def test_a_plan_over_a_mixed_stack_runs_each_slot_as_its_layers_kind(mixed, quick_compilation, spec):
    config, params = mixed
    plan = LayerPlan.parse(spec, 5).arrays(SLOTS)
    cache = empty_cache(config, slots=SLOTS, batch=2, capacity=8, dtype=jnp.dtype(jnp.float32))
    x = jax.random.normal(jax.random.key(0), (2, 4, config.hidden_size))
    lengths = jnp.zeros(2, jnp.int32)
    for tokens in (x, x[:, :1]):  # a prefill, and a token after it
        found, after = run(config, params, plan, cache, tokens, lengths)
        expected, cache = slot_by_slot(config, params, plan, cache, tokens, lengths)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
        for part, same in zip(after, cache, strict=True):
            np.testing.assert_allclose(part, same, rtol=2e-5, atol=2e-5)
        lengths = lengths + tokens.shape[1]


def test_one_executable_serves_all_plans_over_a_mixed_stack(mixed, quick_compilation):
    config, params = mixed
    runs = jax.jit(lambda step, x, cache: model.run_plan(step, x, cache)[0])
    cache = empty_cache(config, slots=SLOTS, batch=1, capacity=8, dtype=jnp.dtype(jnp.float32))
    x, one = jnp.ones((1, 1, config.hidden_size)), jnp.ones(1, jnp.int32)
    outs = []
    for spec in ("all", "::-1", "2", "0,1,1,1,1,1"):
        plan = LayerPlan.parse(spec, 5).arrays(SLOTS)
        outs.append(np.asarray(runs(step_of(config, params, plan, one[None], 0 * one, one, one), x, cache)))
    assert runs._cache_size() == 1
    assert len({out.tobytes() for out in outs}) == 4


def test_training_computes_what_serving_does_for_a_mixed_stack(mixed, quick_compilation):
    config, params = mixed
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 67, (2, 6)))
    cache = empty_cache(config, slots=5, batch=2, capacity=6, dtype=jnp.dtype(jnp.float32))
    none, all_new = jnp.zeros(2, jnp.int32), jnp.full(2, 6, jnp.int32)
    plan = jax.tree.map(jnp.asarray, LayerPlan.identity(5).arrays(5))
    served, _ = model.forward(step_of(config, params, plan, tokens, none, all_new, all_new), cache)
    whole = forward.whole_sequences(config, params, tokens, dtype=jnp.dtype(jnp.float32))
    np.testing.assert_allclose(forward.hidden_states(whole), served, rtol=2e-5, atol=2e-5)
