"""Real models say the same with the native kernels as with the reference ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model
from jaxchat.checkpoints.load import load_params
from jaxchat.engine.session import prepared
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.pallas import native, select
from jaxchat.quant import QuantFormat
from tests.support.products import diagonal
from tests.support.steps import step_of

MODELS = {  # directory, a prompt of its vocabulary
    "stories260K": ("stories260K-hf", [1, 403, 407, 261, 378]),
    "TinyStories-656K": ("TinyStories-656K/fp32", [1, 80, 147, 201, 90]),
    "CraftGPT": ("CraftGPT-hf", [5, 300, 17]),
}
NEW = 100
FLOAT32 = jnp.dtype("float32")
FORCED = 50

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run"),
]


@pytest.fixture(scope="module")
def load(shared_data):
    @functools.cache
    def loaded(name, fmt):
        directory, prompt = MODELS[name]
        quant = None if fmt == "float32" else QuantFormat.parse(fmt)
        config, params = load_params(shared_data / "models" / directory, dtype="float32", quant=quant)
        return config, jax.tree.map(jnp.asarray, params), prompt

    return loaded


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def run(config, kernels, params, cache, plan, tokens, lengths):
    """Logits [T, V] of the next tokens [T] of one sequence, and the cache."""
    new = jnp.full(1, len(tokens), jnp.int32)
    step = step_of(config, params, plan, tokens[None], lengths, new, lengths + new, kernels=kernels)
    hidden, cache = model.forward(step, cache)
    return model.logits(step, hidden)[0], cache


class Text:
    """One sequence, its cache and the logits after each token so far."""

    def __init__(self, config, params, kernels):
        self.kernels = select(kernels, "cpu")
        self.config, self.params = config, prepared(self.kernels, config, params)
        slots = config.num_layers
        self.cache = empty_cache(config, slots=slots, batch=1, capacity=256, dtype=FLOAT32)
        self.plan = LayerPlan.identity(slots).arrays(slots)
        self.length, self.logits = 0, []

    def feed(self, ids):
        length = np.array([self.length], np.int32)
        tokens = np.array(ids, np.int32)
        logits, self.cache = run(
            self.config, self.kernels, self.params, self.cache, self.plan, tokens, length
        )
        self.length += len(ids)
        self.logits.extend(np.asarray(logits))

    def greedy(self, prompt):
        """The most likely tokens, until there are `NEW` or the context is full."""
        self.feed(prompt)
        out = [int(self.logits[-1].argmax())]
        while len(out) < NEW and self.length < self.config.max_position_embeddings:
            self.feed(out[-1:])
            out.append(int(self.logits[-1].argmax()))
        return out

    def forced(self, prompt, continuation):
        """Logits of a prompt, given at once, and of each token of its continuation, given singly."""
        self.feed(prompt)
        for token in continuation:
            self.feed([token])
        return np.stack(self.logits)


@pytest.fixture(scope="module")
def references(load):
    """`references(name, fmt)`: the reference kernels' text of a model and its tokens."""

    @functools.cache
    def run(name, fmt):
        config, params, prompt = load(name, fmt)
        text = Text(config, params, "reference")
        return text, text.greedy(prompt)

    return run


@pytest.mark.parametrize(("name", "fmt"), diagonal(MODELS, ["float32", "int8"]))
def test_greedy_tokens_are_those_of_the_reference(load, references, name, fmt):
    config, params, prompt = load(name, fmt)
    _, expected = references(name, fmt)
    assert len(expected) == min(NEW, config.max_position_embeddings - len(prompt) + 1)
    assert Text(config, params, "native").greedy(prompt) == expected


@pytest.mark.parametrize("name", MODELS)
def test_4_bit_logits_move_less_than_by_the_quantization(load, references, name):
    exact, continuation = references(name, "float32")
    forced = continuation[:FORCED]
    config, params, prompt = load(name, "int4")
    reference, natively = (
        Text(config, params, kernels).forced(prompt, forced) for kernels in ("reference", "native")
    )
    quantization = np.abs(reference - exact.logits[: len(reference)]).max()
    assert np.abs(natively - reference).max() < quantization
