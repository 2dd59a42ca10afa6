"""A model sharded over a mesh of eight devices computes what one device computes."""

import jax
import numpy as np
import pytest

from jaxchat.checkpoints.load import load_params
from jaxchat.engine import steps
from jaxchat.engine.generation import generate
from jaxchat.engine.session import Engine

# (data, model). Of tiny Gemma 3's 4 query and 2 key/value heads the former divide by 4, and neither by 8.
MESHES = {"2x4": (2, 4), "1x8": (1, 8), "8x1": (8, 1)}
MODELS = {
    "llama": (
        "llama",
        {
            "vocab_size": 72,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
    ),
    "gemma3": ("gemma3_text", {}),
}
CASES = [(model, mesh) for model in MODELS for mesh in MESHES]
PROMPTS = [np.random.default_rng(i).integers(0, 67, 3 + 2 * i).tolist() for i in range(8)]


def run(directory, mesh):
    config, params = load_params(directory, mesh=mesh)
    engine = Engine(config, params, max_length=64, mesh=mesh)
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    session = engine.session(batch=len(PROMPTS))
    for row, ids in enumerate(PROMPTS):
        session.set_ids(ids, row)
    tokens = list(generate(session, max_new_tokens=8))
    logits = session.prefill()
    after = steps.prefill._cache_size(), steps.decode._cache_size()
    return {
        "greedy": [[token.id for token in tokens if token.row == row] for row in range(len(PROMPTS))],
        "logits": np.asarray(logits),
        "shards": {name: shard_shape(array) for name, array in params.items()},
        "cache": shard_shape(session._cache.k),
        "grown cache": shard_shape(steps.grow(session._cache, session._cache.slots, 128).k),
        "compiled": [now - then for now, then in zip(after, before, strict=True)],
    }


def run_one_sequence(directory):
    mesh = make_mesh("2x4")
    config, params = load_params(directory, mesh=mesh)
    session = Engine(config, params, max_length=64, mesh=mesh).session()
    session.set_ids(PROMPTS[5])
    return {"logits": np.asarray(session.prefill()[0]), "cache": shard_shape(session._cache.k)}


def make_mesh(name):
    return jax.make_mesh(MESHES[name], ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def shard_shape(array):
    shapes = {shard.data.shape for shard in array.addressable_shards}
    assert len(shapes) == 1
    return list(shapes.pop())


@pytest.fixture(scope="module")
def computed(tiny_directory):
    """What each case computed, and how its arrays lie on the devices."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all time goes into compiling
    directories = {name: tiny_directory(kind, **options) for name, (kind, options) in MODELS.items()}
    result = {
        name: {
            "one device": run(directory, None),
            **{mesh: run(directory, make_mesh(mesh)) for mesh in MESHES},
        }
        for name, directory in directories.items()
    }
    result["single sequence"] = run_one_sequence(directories["llama"])
    jax.config.update("jax_disable_most_optimizations", before)
    return result


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_logits_and_greedy_tokens_are_those_of_one_device(computed, model, mesh):
    expected, actual = computed[model]["one device"], computed[model][mesh]
    reference = np.asarray(expected["logits"])
    assert np.abs(np.asarray(actual["logits"]) - reference).max() <= 1e-5 * np.ptp(reference)
    assert actual["greedy"] == expected["greedy"]


def test_one_sequence_runs_on_a_mesh_whose_data_axis_it_cannot_fill(computed, tiny_model):
    session = Engine(*tiny_model(MODELS["llama"][0], **MODELS["llama"][1])).session()
    session.set_ids(PROMPTS[5])
    expected = np.asarray(session.prefill()[0])
    actual = computed["single sequence"]
    assert np.abs(np.asarray(actual["logits"]) - expected).max() <= 1e-5 * np.ptp(expected)
    assert actual["cache"][1:3] == [1, 8 // 4]


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_a_generation_on_a_mesh_compiles_each_step_once(computed, model, mesh):
    assert max(computed[model][mesh]["compiled"]) <= 1


@pytest.mark.parametrize(
    ("model", "mesh", "name", "shape"),
    [
        ("llama", "2x4", "layers.q.weight", [3, 32 // 4, 32]),
        ("llama", "2x4", "layers.k.weight", [3, 32 // 4, 32]),
        ("llama", "2x4", "layers.o.weight", [3, 32, 32 // 4]),
        ("llama", "2x4", "layers.down.weight", [3, 32, 48 // 4]),
        ("llama", "1x8", "layers.gate.weight", [3, 48 // 8, 32]),
        ("llama", "1x8", "embed.weight", [72 // 8, 32]),
        ("llama", "1x8", "lm_head.weight", [72 // 8, 32]),
        ("llama", "1x8", "layers.attn_norm.weight", [3, 32]),
        ("llama", "8x1", "layers.q.weight", [3, 32, 32]),
        ("gemma3", "2x4", "layers.q.weight", [3, 40 // 4, 24]),
        ("gemma3", "2x4", "layers.k.weight", [3, 20, 24]),  # 20 rows divide by 4, its 2 heads do not
        ("gemma3", "2x4", "layers.up.weight", [3, 44 // 4, 24]),
        ("gemma3", "2x4", "embed.weight", [67, 24]),
        ("gemma3", "1x8", "layers.q.weight", [3, 40, 24]),
    ],
)
def test_weights_are_split_where_they_divide(computed, model, mesh, name, shape):
    assert computed[model][mesh]["shards"][name] == shape


@pytest.mark.parametrize(
    ("model", "mesh", "rows", "heads"),
    [
        ("llama", "2x4", 8 // 2, 8 // 4),
        ("llama", "1x8", 8, 8 // 8),
        ("llama", "8x1", 8 // 8, 8),
        ("gemma3", "2x4", 8 // 2, 2),
        ("gemma3", "1x8", 8, 2),
        ("gemma3", "8x1", 8 // 8, 2),
    ],
)
def test_caches_are_split_by_sequence_and_by_head_where_they_divide(computed, model, mesh, rows, heads):
    case = computed[model][mesh]
    assert case["cache"][1:3] == [rows, heads]
    assert case["grown cache"][1:4] == [rows, heads, 128]
