"""Stacks whose layers are held in several ways: every layer is multiplied as the one it is."""

import jax
import jax.numpy as jnp
import pytest

from jaxchat.mixed import MixedTensor
from jaxchat.pallas import backends, native
from jaxchat.pallas.stacked_matmul import cases
from tests.pallas.test_stacked_matmul import COARSE

NAMES = ("reference", *(["native"] if native.available() else []))
MIXTURES = (("q4_k", "q6_k"), ("int8", "q5_k", "int4:affine"), ("q4_k", "float32"))


def stack_of(rng, formats, rows=40, columns=512):
    """A mixed stack of twice as many layers as formats, and what each layer stands for."""
    layers = list(rng.permutation(len(formats) * 2) % len(formats))
    stacks = [cases.stack(rng, form, (rows, columns)) for form in formats]
    row = [layers[:i].count(part) for i, part in enumerate(layers)]
    mixed = MixedTensor(
        parts=tuple(jax.tree.map(jnp.asarray, stack.w) for stack in stacks),
        part=tuple(int(part) for part in layers),
        row=tuple(row),
    )
    return mixed, [(stacks[part], at) for part, at in zip(layers, row, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("formats", MIXTURES, ids="+".join)
@pytest.mark.parametrize("tokens", [1, 40])
def test_products_are_those_of_each_layers_own_format(rng, name, formats, tokens):
    kernels = backends.select(name, "cpu")
    mixed, layers = stack_of(rng, formats)
    plain = cases.stack(rng, "int4", (24, 512))
    x = cases.normal(rng, (1, tokens, 512))

    @jax.jit
    def products(x, mixed, w, layer):
        return kernels.matmuls(x, [mixed, w], [layer, jnp.int32(1)])

    assert mixed.shape == (len(layers), 40, 512)
    for number, (stack, row) in enumerate(layers):
        first, second = products(x, mixed, jax.tree.map(jnp.asarray, plain.w), jnp.int32(number))
        assert cases.error(first, x, stack, row) <= COARSE, number
        assert cases.error(second, x, plain, 1) <= COARSE
