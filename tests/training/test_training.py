"""The differentiable forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.training import forward
from tests.support.steps import step_of

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 67, (2, 13)))


def trained(config, params):
    return forward.hidden_states(
        forward.whole_sequences(config, params, TOKENS, dtype=jnp.dtype(jnp.float32))
    )


def served(config, params, tokens):
    """The same through the path that serves requests: the plan's loop over a cache."""
    batch, length = tokens.shape
    cache = empty_cache(config, slots=config.num_layers, batch=batch, capacity=16, dtype=jnp.float32)
    plan = jax.tree.map(jnp.asarray, LayerPlan.identity(config.num_layers).arrays(config.num_layers))
    none, all_new = jnp.zeros(batch, jnp.int32), jnp.full(batch, length)
    return model.forward(step_of(config, params, plan, tokens, none, all_new, all_new), cache)[0]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_hidden_states_are_those_of_the_serving_path(tiny_model, model_type, quick_compilation):
    """Windows, RoPE bases, soft-caps, norms and biases of every layer included."""
    config, params = tiny_model(model_type)
    found = jax.jit(lambda p: trained(config, p))(params)
    np.testing.assert_allclose(found, served(config, params, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradients_reach_every_parameter_and_match_finite_differences(
    tiny_model, model_type, quick_compilation
):
    config, params = tiny_model(model_type)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 13, config.hidden_size)), jnp.float32)

    @jax.jit
    def scalar(p):
        return jnp.sum(trained(config, p) * weights)

    gradients = jax.grad(scalar)(params)
    rng = np.random.default_rng(2)
    for name, gradient in gradients.items():
        if name == "lm_head.weight":
            continue  # `logits` reads it
        assert bool(jnp.isfinite(gradient).all()), name
        if name != "layers.k.bias":  # adds the same to all scores of a query: softmax does not see it
            assert bool((jnp.abs(gradient) > 1e-6).any()), name
        direction = jnp.asarray(rng.standard_normal(gradient.shape), jnp.float32)
        step = 1e-2 / float(jnp.linalg.norm(direction))
        up = scalar(params | {name: params[name] + step * direction})
        down = scalar(params | {name: params[name] - step * direction})
        expected = float(jnp.vdot(gradient, direction))
        scale = float(jnp.linalg.norm(gradient) * jnp.linalg.norm(direction))
        assert abs(float(up - down) / (2 * step) - expected) < 2e-2 * scale + 2e-2 / step * 1e-3, name
