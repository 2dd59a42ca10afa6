"""Chimera's network: both of its forms are the same function, its masks hide what they are to hide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model
from jaxchat.families import read_config
from jaxchat.layers import chimera
from jaxchat.layers.chimera import ChimeraConfig
from jaxchat.layers.chimera_heads import HEADS
from jaxchat.pallas.backends import REFERENCE
from jaxchat.training import forward
from jaxchat.training.initial import initial_params as base_params_of
from tests.support.tiny import TINY_CONFIGS

TINY = ChimeraConfig(heads=3, rank=5)
QUICK = ("llama", "gemma3_text", "gpt2")


def base_of(model_type="llama", **changes):
    """A base, its parameters, and a step of it."""
    config = read_config({"model_type": model_type, **TINY_CONFIGS[model_type], **changes})
    params = jax.tree.map(lambda x: x * 6, base_params_of(config, jax.random.key(3)))
    return config, params


def step_over(config, params, tokens):
    return forward.whole_sequences(config, params, tokens, dtype=jnp.dtype(jnp.float32))


def trained_params(config, base, own=TINY, seed=0):
    """As far from where training begins as anything."""
    params = chimera.initial_params(own, config, base, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(value + 0.2 * rng.standard_normal(value.shape, np.float32))
        for name, value in params.items()
    }


def drawn(config, b=2, t=9, seed=0, more=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (b, t + more)), jnp.int32)
    return tokens, jnp.asarray(rng.standard_normal((b, t, config.hidden_size), np.float32))


@jax.jit
def rolled_out(params, step, known, follow):
    """The nodes of each depth along one path, each of them twice: nodes do not see each other."""
    guesses = [chimera.first(params, step, known)]
    for depth in range(2, TINY.heads + 1):
        parents = [0, 0] if depth == 2 else [1, 0]
        twice = jnp.stack([follow[:, depth - 2]] * 2, 1)
        guesses.append(chimera.deeper(params, step, known, guesses[-1], parents, twice, depth))
    return [
        (guess.hidden, chimera.head_logits(TINY, params, step, k, known.hidden, guess.hidden[:, 0]))
        for k, guess in enumerate(guesses)
    ]


@pytest.mark.parametrize(
    "model_type",
    [t if t in QUICK else pytest.param(t, marks=pytest.mark.full) for t in TINY_CONFIGS],
)
def test_drafting_from_the_cache_says_what_training_says(model_type, quick_compilation):
    """At several rows, along the text itself, with a cache that is filled in pieces."""
    config, base = base_of(model_type)
    params = trained_params(config, base)
    tokens, hidden = drawn(config)
    step = step_over(config, base, tokens)
    taught = jax.jit(chimera.teacher_forced, static_argnums=0)(TINY, params, step, tokens, hidden)
    serving = dataclasses.replace(step, kernels=REFERENCE)
    cache = chimera.empty(config, batch=2, capacity=300, dtype=jnp.dtype(jnp.float32))
    padded, states = jnp.pad(tokens, ((0, 0), (2, 4))), jnp.pad(hidden, ((0, 0), (0, 4), (0, 0)))
    remember, at = jax.jit(chimera.remember), 0
    for count in (1, 1, 4):
        piece = padded[:, at : at + 2], padded[:, at + 2 : at + 6], states[:, at : at + 4]
        cache = remember(params, serving, cache, *piece, jnp.full(2, at), jnp.full(2, count))
        at += count
        known = chimera.Known(
            cache, jnp.zeros(2, jnp.int32), jnp.full(2, at), padded[:, at : at + 3], hidden[:, at - 1]
        )
        found = rolled_out(params, serving, known, tokens[:, at + 1 : at + 3])
        for (f, logits), (same, said) in zip(found, taught, strict=True):
            np.testing.assert_allclose(f[:, -1], f[:, 0], rtol=1e-5, atol=1e-5)
            for ours, theirs in ((f[:, 0], same), (logits, said)):
                scale = np.abs(theirs).max()
                np.testing.assert_allclose(ours, theirs[:, at - 1], rtol=1e-4, atol=1e-5 * scale)


def test_what_is_not_known_is_not_looked_at(quick_compilation):
    config, base = base_of()
    params, (tokens, hidden) = trained_params(config, base), drawn(config)
    step = dataclasses.replace(step_over(config, base, tokens), kernels=REFERENCE)
    cache = chimera.empty(config, batch=2, capacity=20, dtype=jnp.dtype(jnp.float32))
    lengths = jnp.zeros(2, jnp.int32)
    arguments = tokens[:, :2], tokens, hidden, lengths, jnp.full(2, 9)
    cache = jax.jit(chimera.remember)(params, step, cache, *arguments)
    begin, end = jnp.array([2, 5]), jnp.array([7, 6])
    outside = (np.arange(20) < begin[:, None]) | (np.arange(20) >= end[:, None])
    spoiled = jax.tree.map(lambda part: jnp.where(outside[None, :, None, :, None], 1e30, part), cache)
    first = jax.jit(chimera.first)
    guesses = [
        first(params, step, chimera.Known(each, begin, end, tokens[:, :3], hidden[:, 0]))
        for each in (cache, spoiled)
    ]
    np.testing.assert_array_equal(guesses[0].hidden, guesses[1].hidden)


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "low_rank"])
def test_a_head_begins_with_what_the_base_says_of_both_states(kind):
    config, base = base_of()
    own = ChimeraConfig(kind=kind, heads=2)
    params = chimera.initial_params(own, config, base, jax.random.key(0))
    step = step_over(config, base, jnp.zeros((2, 9), jnp.int32))
    h, f = (drawn(config, seed=seed)[1] for seed in (1, 2))
    for k in range(2):
        found = chimera.head_logits(own, params, step, k, h, f)
        np.testing.assert_allclose(found, model.logits(step, h) + model.logits(step, f), rtol=1e-4, atol=1e-4)


def test_a_head_of_low_rank_begins_with_the_nearest_of_its_rank():
    config, base = base_of()
    step = step_over(config, base, jnp.zeros((2, 9), jnp.int32))
    h, f = (drawn(config, seed=seed)[1] for seed in (1, 2))
    expected = model.logits(step, h) + model.logits(step, f)
    errors = []
    for rank in (4, 12, config.hidden_size):
        own = ChimeraConfig(kind="low_rank", heads=1, rank=rank)
        params = chimera.initial_params(own, config, base, jax.random.key(0))
        errors.append(float(jnp.abs(chimera.head_logits(own, params, step, 0, h, f) - expected).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("kind", HEADS)
def test_the_parameters_are_those_that_are_announced(kind):
    config, base = base_of()
    own = ChimeraConfig(kind=kind, heads=2, rank=5)
    params = chimera.initial_params(own, config, base, jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == chimera.shapes(own, config)


def test_rows_see_nothing_of_what_comes_after(quick_compilation):
    config, base = base_of()
    params, (tokens, hidden) = trained_params(config, base), drawn(config)
    teach = jax.jit(lambda t, h: chimera.teacher_forced(TINY, params, step_over(config, base, t), t, h))
    before = teach(tokens, hidden)
    after = teach(tokens.at[:, 6].add(1), hidden.at[:, 5].add(1))
    for k in range(TINY.heads):
        same = 5 - k  # rows of text up to x_5, and of h up to h_4
        np.testing.assert_array_equal(before[k].logits[:, :same], after[k].logits[:, :same])
        assert np.abs(before[k].logits[:, same] - after[k].logits[:, same]).max() > 1e-3


def test_texts_that_share_a_row_teach_what_they_teach_alone(quick_compilation):
    config, base = base_of()
    params, (tokens, hidden) = trained_params(config, base), drawn(config, b=1)
    teach = jax.jit(
        lambda t, h, s=None: chimera.drafted_states(TINY, params, step_over(config, base, t), t, h, starts=s)
    )
    together = teach(tokens, hidden, jnp.array([[0, 0, 0, 0, 4, 4, 4, 4, 4]]))
    for start, stop in ((0, 4), (4, 9)):
        alone = teach(tokens[:, start:stop], hidden[:, start:stop])
        for k in range(TINY.heads):
            rows = stop - start - k - 1  # those whose trigrams are of their own text
            np.testing.assert_allclose(
                together[k][:, start : start + rows], alone[k][:, :rows], rtol=1e-4, atol=1e-5
            )


def test_gradients_pass_no_drafted_state_and_reach_all_parameters(quick_compilation):
    config, base = base_of()
    params, (tokens, hidden) = trained_params(config, base), drawn(config)

    def loss(params, depths):
        taught = chimera.teacher_forced(TINY, params, step_over(config, base, tokens), tokens, hidden)
        return sum(jnp.square(taught[k].logits).mean() for k in depths)

    gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, (0, 1, 2))
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name
    later = jax.jit(jax.grad(loss), static_argnums=1)(params, (1, 2))
    assert not any(np.abs(later[name]).max() for name in later if name.startswith("trigram."))
    assert not np.abs(later["heads.map.weight"][0]).max()


# --- against PyTorch: what is below is written from the description of the method, not from the code above


def torch_rope(torch, x, positions, theta):
    """x [B, T, heads, H]."""
    h = x.shape[-1]
    inverse = 1 / theta ** (torch.arange(0, h, 2, dtype=x.dtype) / h)
    angle = positions.to(x.dtype)[:, None] * inverse
    angle = torch.cat([angle, angle], -1)[None, :, None]
    turned = torch.cat([-x[..., h // 2 :], x[..., : h // 2]], -1)
    return x * angle.cos() + turned * angle.sin()


def torch_layer(torch, config, w, x, positions, mask):
    """A Llama decoder layer over the rows x [B, R, D], which see each other by mask [R, R]."""

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

    b, r, _ = x.shape
    h = norm(x, w["attn_norm"])
    q, k, v = (
        (h @ w[name].T).view(b, r, heads, config.head_dim)
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads))
    )
    theta = config.ropes[0].theta
    q, k = torch_rope(torch, q, positions, theta), torch_rope(torch, k, positions, theta)
    repeats = config.num_heads // config.num_kv_heads
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / config.head_dim**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    x = x + torch.einsum("bnqk,bknh->bqnh", weights, v).reshape(b, r, -1) @ w["o"].T
    h = norm(x, w["mlp_norm"])
    return x + (torch.nn.functional.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T


def torch_chimera(torch, config, own, params, embedding, tokens, hidden):
    """The whole sequences of rows concat(h, f^1, ..., g), with masks [C, D, ..., D, C] in every block row."""
    w = {name.split(".")[1]: value[0] for name, value in params.items() if name.startswith("layers.")}
    b, t, _ = hidden.shape
    e = embedding[tokens]
    e0, e1 = e[:, :1], e[:, 1:2]
    trigrams = [torch.cat([e0, e0, e0], -1), torch.cat([e0, e1, e1], -1)]
    trigrams += [
        torch.cat([e[:, p - 2 : p - 1], e[:, p - 1 : p], e[:, p : p + 1]], -1) for p in range(2, t + 1)
    ]
    tri = torch.cat(trigrams, 1)
    inner = tri @ params["trigram.w1.weight"][0].T + params["trigram.w1.bias"]
    g = (tri + torch.nn.functional.silu(inner)) @ params["trigram.w2.weight"][0].T
    g = g[:, 1:]  # those of positions 1 .. T
    causal, own_index = torch.tril(torch.ones(t, t)).bool(), torch.eye(t).bool()
    states, out = [], []
    for k in range(own.heads):
        shifted = torch.cat([g[:, k:], g[:, -1:].expand(b, k, -1)], 1)
        x = torch.cat([hidden, *states, shifted], 1)
        positions = torch.cat([torch.arange(t) + block for block in range(k + 2)])
        row = torch.cat([causal, *[own_index] * k, causal], 1)
        mask = torch.cat([row] * (k + 2), 0)
        states.append(torch_layer(torch, config, w, x, positions, mask)[:, -t:])
        out.append(torch.cat([hidden, states[-1]], -1) @ params["heads.weight"][k].T)
    return states, out


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("sizes", "heads", "batch", "length"),
    [
        ({}, 4, 2, 9),
        ({"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8}, 2, 3, 5),
        ({"num_key_value_heads": 1, "intermediate_size": 10, "rope_theta": 500.0}, 5, 1, 17),
        ({}, 1, 1, 3),
    ],
    ids=str,
)
def test_the_network_is_that_of_pytorch(dtype, sizes, heads, batch, length, quick_compilation):
    torch = pytest.importorskip("torch")
    config, base = base_of(**sizes)
    own = ChimeraConfig(kind="full", heads=heads)
    params = trained_params(config, base, own)
    tokens, hidden = drawn(config, batch, length, more=1)
    found = chimera.teacher_forced(own, params, step_over(config, base, tokens), tokens, hidden)
    wide = getattr(torch, dtype)
    in_torch = {name: torch.tensor(np.asarray(value)).to(wide) for name, value in params.items()}
    expected = torch_chimera(
        torch, config, own, in_torch, torch.tensor(np.asarray(base["embed.weight"])).to(wide),
        torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(hidden)).to(wide),
    )  # fmt: skip
    for k in range(heads):
        for ours, theirs in zip(found[k], (expected[0][k], expected[1][k]), strict=True):
            theirs = theirs.numpy()
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5 * np.abs(theirs).max())
