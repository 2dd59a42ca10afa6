"""Stacks assembled from layers of several models: what is read, shared and run, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxchat
from jaxchat import model
from jaxchat.analysis.show import describe_assembly
from jaxchat.checkpoints.assembled import AssembledSource, scaled
from jaxchat.checkpoints.assembly import Assembly, LayerSource, assembled_config, under, whole
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.hf import HfSource
from jaxchat.checkpoints.load import load_assembly, load_params
from jaxchat.checkpoints.write import convert
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.layers.cache import empty_cache
from jaxchat.quant import QuantFormat, QuantizedTensor, dequantize
from jaxchat.recipes.recipe import read_recipe
from tests.support.steps import step_of
from tests.support.tiny import TINY_CONFIGS
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).integers(3, 60, (2, 14))


@jax.jit(static_argnums=0)
def _forward(config, params, plan, tokens):
    capacity = len(plan.layer)
    cache = empty_cache(config, slots=capacity, batch=2, capacity=16, dtype=jnp.float32)
    count = jnp.full(2, tokens.shape[1], jnp.int32)
    step = step_of(config, params, plan, tokens, jnp.zeros(2, jnp.int32), count, count)
    return model.logits(step, model.forward(step, cache)[0])


def logits(config, params, plan: LayerPlan | None = None) -> np.ndarray:
    """Float32 logits [2, 14, V] under a plan."""
    plan = plan or LayerPlan.identity(config.num_layers)
    return np.asarray(_forward(config, params, plan.arrays(10), TOKENS))


def assembly_of(
    *models: Path, layers: list[LayerSource], slots: list[Slot] | None = None, **changes
) -> Assembly:
    plan = LayerPlan(tuple(slots or map(Slot, range(len(layers)))), len(layers))
    directories = tuple(map(ModelDirectory.at, models))
    result = Assembly(directories, tuple(layers), plan, (), base=0, tokenizer=0, dtype=None, notes=())
    return dataclasses.replace(result, **changes)


def write_recipe(path: Path, text: str) -> Path:
    path.write_text("merge_method: passthrough\nslices:\n" + text)
    return path


# One model.


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_every_layer_of_one_model_is_that_model(tiny_model, tiny_directory, model_type: str):
    config, params = tiny_model(model_type)
    found_config, found = load_assembly(whole(tiny_directory(model_type), LayerPlan.identity(3)))
    assert found_config == config
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2", "gpt2"])
def test_layers_taken_out_of_order_keep_their_windows_ropes_and_scales(tiny_directory, model_type: str):
    options = {"gpt2": {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}}.get(
        model_type, {"num_hidden_layers": 4}
    )
    if model_type == "qwen2":
        options |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    directory = tiny_directory(model_type, **options)
    plan = LayerPlan.parse("[3, [1, 0.5, 2.0], 3, 0]", 4)
    config, params = load_params(directory)
    assembly = under(whole(directory, plan), plan)
    assert [source.layer for source in assembly.layers] == [0, 1, 3]  # layer 2 is not needed
    found_config, found = load_assembly(assembly)
    order = (0, 1, 3)
    for name in ("layer_windows", "layer_attn_scales"):
        assert getattr(found_config, name) == tuple(getattr(config, name)[i] for i in order)
    np.testing.assert_array_equal(logits(found_config, found, assembly.plan), logits(config, params, plan))


def test_the_seeds_recipe_is_the_base_model_bit_for_bit(tmp_path: Path, tiny_directory):
    base = tiny_directory("mistral", num_hidden_layers=4, dtype="bfloat16")
    (tmp_path / "seed.yaml").write_text(expansion(base, last=3))
    assembly = read_recipe(tmp_path / "seed.yaml")
    assert (len(assembly.plan), len(assembly.plan.executed()), len(assembly.layers)) == (8, 4, 4)
    config, params = load_params(base, dtype="bfloat16")
    found_config, found = load_assembly(assembly)
    assert found_config == config
    expected = logits(config, params)
    np.testing.assert_array_equal(logits(found_config, found, assembly.plan), expected)
    kept = read_recipe(tmp_path / "seed.yaml", keep_identity=True)
    assert len(kept.plan.executed()) == 8
    kept_config, kept_params = load_assembly(kept)
    # The expanded layers' zeros are all that is stored twice.
    heights = {name: len(value) for name, value in kept_params.items() if name.startswith("layers.")}
    assert {name for name, height in heights.items() if height == 5} == {
        "layers.o.weight",
        "layers.down.weight",
    }
    assert set(heights.values()) == {4, 5}
    np.testing.assert_array_equal(logits(kept_config, kept_params, kept.plan), expected)


def test_the_seeds_recipe_on_a_real_model_is_that_model(tmp_path: Path, shared_data: Path):
    stories = shared_data / "models/stories260K-hf"
    (tmp_path / "seed.yaml").write_text(expansion(stories, last=4))
    assembly = read_recipe(tmp_path / "seed.yaml")
    expected = logits(*load_params(stories, dtype="bfloat16"))
    np.testing.assert_array_equal(logits(*load_assembly(assembly), assembly.plan), expected)


def expansion(base: Path, last: int) -> str:
    """Block expansion at the end: four copies of the last layer that change nothing."""
    scale = "{scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}"
    slices = f"- sources: [{{model: {base}, layer_range: [0, {last + 1}]}}]\n"
    copy = f"- sources: [{{model: {base}, layer_range: [{last}, {last + 1}], parameters: {scale}}}]\n"
    return f"slices:\n{slices}{copy * 4}merge_method: passthrough\ndtype: bfloat16\n"


# Several models.


def two(tiny_directory, model_type: str = "llama", **options) -> tuple[Path, Path]:
    return tiny_directory(model_type, **options), tiny_directory(model_type, seed=1, **options)


def test_layers_of_two_models_meet_in_one_stack(tiny_directory, tmp_path: Path):
    a, b = two(tiny_directory)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        f"- sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [1, 3]}}]\n",
    )
    assembly = read_recipe(recipe)
    config, params = load_assembly(assembly)
    (_, of_a), (_, of_b) = load_params(a), load_params(b)
    for name, value in params.items():
        if name.startswith("layers."):
            expected = np.concatenate([of_a[name][:2], of_b[name][1:]])
        else:
            expected = (of_a if name == "embed.weight" else of_b)[name]
        np.testing.assert_array_equal(value, expected)
    assert config.num_layers == len(assembly.plan) == 4


def test_every_tensor_is_read_once_and_no_other(tiny_directory, monkeypatch):
    a, b = two(tiny_directory)
    read: list[tuple[str, str, int]] = []
    original = HfSource.layer

    def counting(self, param, index):
        read.append((self.manifest.source, param.name, index))
        return original(self, param, index)

    monkeypatch.setattr(HfSource, "layer", counting)
    sources = [LayerSource(0, 2), LayerSource(1, 0), LayerSource(0, 2, (("q.weight", 0.5),))]
    slots = [Slot(0), Slot(1), Slot(0), Slot(2), Slot(1)]
    _, params = load_assembly(assembly_of(a, b, layers=sources, slots=slots))
    per_layer = [name for name in params if name.startswith("layers.")]
    layers = [(a.name, name, 2) for name in per_layer] + [(b.name, name, 0) for name in per_layer]
    globals_ = [(a.name, name, 0) for name in params if not name.startswith("layers.")]
    again = [(a.name, "layers.q.weight", 2)]  # for its scaled copy
    assert sorted(read) == sorted(layers + globals_ + again)


def test_files_that_hold_only_unused_layers_need_not_be_there(tiny_directory, tmp_path: Path):
    tensors = load_file(tiny_directory("llama") / "model.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_bytes((tiny_directory("llama") / "config.json").read_bytes())
    weight_map = {
        name: "layer1.safetensors" if ".layers.1." in name else "rest.safetensors" for name in tensors
    }
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({n: t for n, t in tensors.items() if ".layers.1." not in n}, tmp_path / "m/rest.safetensors")
    config, params = load_assembly(assembly_of(tmp_path / "m", layers=[LayerSource(0, 2), LayerSource(0, 0)]))
    np.testing.assert_array_equal(
        params["layers.o.weight"], [tensors[f"model.layers.{i}.self_attn.o_proj.weight"] for i in (2, 0)]
    )
    assert config.num_layers == 2
    with pytest.raises(JaxchatError, match=r"1 of 2 shards are missing: layer1\.safetensors"):
        load_assembly(assembly_of(tmp_path / "m", layers=[LayerSource(0, 1)]))


def test_models_with_other_windows_and_rotations_keep_them_side_by_side(tiny_directory):
    a = tiny_directory("mistral", sliding_window=None, rope_theta=10000.0)
    b = tiny_directory("mistral", sliding_window=5, rope_theta=500000.0)
    a_config = dataclasses.replace(ModelDirectory.at(a).config)
    config, params = load_assembly(assembly_of(a, b, layers=[LayerSource(0, 0), LayerSource(1, 1)]))
    assert config.layer_windows == (a_config.layer_windows[0], 5)
    assert config.layer_ropes == (0, 1)
    assert [rope.theta for rope in config.ropes] == [10000.0, 500000.0]
    # Alone, each layer computes what it does in its own model, whose embedding and head are made equal.
    for model_index, directory in enumerate((a, b)):
        own_config, own = load_params(directory)
        own = own | {name: params[name] for name in ("embed.weight", "norm.weight", "lm_head.weight")}
        expected = logits(own_config, own, LayerPlan((Slot(model_index),), 3))
        found = logits(config, params, LayerPlan((Slot(model_index),), 2))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [
        ("llama", {"vocab_size": 68}, "vocab_size is 67 in the one and 68 in the other"),
        ("llama", {"hidden_size": 32}, "hidden_size is 24 in the one and 32 in the other"),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads is 2 in the one and 4 in the other"),
        ("qwen2", {"tie_word_embeddings": False}, "family is 'llama' in the one and 'qwen2' in the other"),
        ("gpt2", {"n_positions": 48}, "family is 'llama' in the one and 'gpt2' in the other"),
    ],
)
def test_models_of_other_shapes_are_refused_by_the_first_field_that_differs(
    tiny_directory, model_type: str, change: dict, said: str
):
    a, b = tiny_directory("llama"), tiny_directory(model_type, **change)
    with pytest.raises(UsageError) as caught:
        load_assembly(assembly_of(a, b, layers=[LayerSource(0, 0), LayerSource(1, 0)]))
    assert str(caught.value) == (
        f"{a} and {b} cannot share a stack: {said}; layers stack only if architecture, shapes and vocabulary "
        "are equal"
    )


def test_learned_positions_are_a_shape(tiny_directory):
    a, b = tiny_directory("gpt2"), tiny_directory("gpt2", n_positions=48)
    with pytest.raises(UsageError, match="max_position_embeddings is 96 in the one and 48 in the other"):
        load_assembly(assembly_of(a, b, layers=[LayerSource(0, 0), LayerSource(1, 0)]))


def test_special_token_ids_are_those_of_the_tokenizers_model(tiny_directory):
    a, b = tiny_directory("llama"), tiny_directory("llama", bos_token_id=7, eos_token_id=[8, 9])
    config = load_assembly(assembly_of(a, b, layers=[LayerSource(0, 0)], tokenizer=1))[0]
    assert (config.bos_id, config.eos_ids) == (7, (8, 9))


# Scales of single tensors.


def test_layers_that_differ_in_one_tensor_share_the_others(tiny_directory):
    directory = tiny_directory("qwen2")
    half = LayerSource(0, 1, (("k.weight", 0.25), ("q.weight", 0.5)))
    config, params = load_assembly(
        assembly_of(directory, layers=[LayerSource(0, 0), LayerSource(0, 1), half])
    )
    _, plain = load_params(directory)
    assert params["layers.v.weight"].shape[0] == params["layers.q.bias"].shape[0] == 2
    assert dict(config.layer_rows)["layers.v.weight"] == (0, 1, 1)
    assert "layers.q.weight" not in dict(config.layer_rows)
    np.testing.assert_array_equal(params["layers.q.weight"][2], 0.5 * np.asarray(plain["layers.q.weight"])[1])
    np.testing.assert_array_equal(
        params["layers.k.weight"][2], 0.25 * np.asarray(plain["layers.k.weight"])[1]
    )


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gpt2"])
def test_shared_rows_run_like_full_copies(tiny_directory, model_type: str):
    directory = tiny_directory(model_type)
    scales = (("attn_norm.weight", 2.0), ("q.weight", 0.5), ("up.weight", 4.0))
    assembly = assembly_of(
        directory,
        layers=[LayerSource(0, 0), LayerSource(0, 2), LayerSource(0, 2, scales)],
        slots=[Slot(0), Slot(2, 0.5, 2.0), Slot(1), Slot(2)],
    )
    config, params = load_assembly(assembly)
    assert config.layer_rows
    rows = {name: np.array(config.rows_of(name)) for name in params if name.startswith("layers.")}
    copies = {n: np.asarray(v)[rows[n]] if n in rows else v for n, v in params.items()}
    unshared = dataclasses.replace(config, layer_rows=())
    np.testing.assert_array_equal(
        logits(config, params, assembly.plan), logits(unshared, copies, assembly.plan)
    )


def test_globals_are_scaled_while_they_are_read(tiny_directory):
    directory = tiny_directory("llama")
    globals_ = (("embed.weight", (0, 2.0)), ("lm_head.weight", (0, -0.5)), ("norm.weight", (0, 4.0)))
    _, params = load_assembly(assembly_of(directory, layers=[LayerSource(0, 0)], globals=globals_))
    _, plain = load_params(directory)
    for name, (_, factor) in globals_:
        np.testing.assert_array_equal(params[name], factor * np.asarray(plain[name]))


def test_a_tied_head_stays_tied_unless_it_is_scaled_otherwise(tiny_directory):
    directory = tiny_directory("gemma2")
    both = (("embed.weight", (0, 2.0)),)
    config, params = load_assembly(assembly_of(directory, layers=[LayerSource(0, 0)], globals=both))
    assert config.tied_embeddings
    assert "lm_head.weight" not in params
    other = (*both, ("lm_head.weight", (0, 1.0)))
    config, params = load_assembly(assembly_of(directory, layers=[LayerSource(0, 0)], globals=other))
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params["embed.weight"], 2.0 * np.asarray(params["lm_head.weight"]))


def test_scales_follow_the_conversion_and_round_once_more(tiny_directory):
    directory = tiny_directory("llama")
    source = LayerSource(0, 0, (("q.weight", 0.3),))
    _, params = load_assembly(assembly_of(directory, layers=[source], dtype="bfloat16"))
    stored = load_file(directory / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = (stored.astype(ml_dtypes.bfloat16).astype(np.float32) * np.float32(0.3)).astype(
        ml_dtypes.bfloat16
    )
    np.testing.assert_array_equal(params["layers.q.weight"][0], expected.view(np.uint16))
    assert params["embed.weight"].dtype == np.uint16  # bfloat16, as its bits
    _, wide = load_assembly(assembly_of(directory, layers=[source], dtype="bfloat16"), dtype="float32")
    np.testing.assert_array_equal(wide["layers.q.weight"][0], stored * np.float32(0.3))


def test_a_scale_that_overflows_is_one_line():
    with pytest.raises(
        JaxchatError, match=r"q\.weight\[1\]: times 3 is too large for float16; scale it less"
    ):
        scaled(np.full((2, 2), 40000, np.float16), 3.0, "q.weight[1]")
    assert scaled(np.array([np.inf, 0.0], np.float16), 0.5, "x").tolist() == [np.inf, 0.0]


def test_an_unknown_parameter_is_not_scaled_in_silence(tiny_directory):
    with pytest.raises(ValueError, match="scales experts"):
        load_assembly(assembly_of(tiny_directory("llama"), layers=[LayerSource(0, 0, (("experts", 2.0),))]))


# Native and quantized sources, quantizing, meshes.


def test_neighbouring_layers_of_a_native_checkpoint_are_mapped(tiny_directory, tmp_path: Path):
    convert(tiny_directory("llama"), tmp_path / "native")
    source = AssembledSource(assembly_of(tmp_path / "native", layers=[LayerSource(0, 1), LayerSource(0, 2)]))
    native = ModelDirectory.at(tmp_path / "native").source()
    for param in source.table:
        mapped = source.mapped(param)
        assert mapped is not None
        assert not mapped.flags.owndata
        whole_stack = native.mapped(param)
        np.testing.assert_array_equal(mapped, whole_stack[1:] if param.per_layer else whole_stack)
    gaps = AssembledSource(assembly_of(tmp_path / "native", layers=[LayerSource(0, 0), LayerSource(0, 2)]))
    assert gaps.mapped(gaps.table[1]) is None


@pytest.mark.parametrize("quant", ["int8", "int4:32:affine"])
def test_quantized_sources_are_gathered_as_they_are_and_scaled_by_their_scales(
    tiny_directory, tmp_path: Path, quant: str
):
    a, b = two(tiny_directory)
    for name, directory in (("a", a), ("b", b)):
        convert(directory, tmp_path / name, quant=QuantFormat.parse(quant))
    source = LayerSource(1, 2, (("q.weight", 0.5), ("up.weight", -2.0)))
    assembly = assembly_of(tmp_path / "a", tmp_path / "b", layers=[LayerSource(0, 1), source])
    _, params = load_assembly(assembly)
    params, of_a, of_b = jax.device_get((params, *(load_params(tmp_path / name)[1] for name in "ab")))
    for name, row, factor in (("q", 1, 0.5), ("up", 1, -2.0), ("v", 1, 1.0), ("q", 0, 1.0)):
        found, origin = params[f"layers.{name}.weight"], (of_b if row else of_a)[f"layers.{name}.weight"]
        assert isinstance(found, QuantizedTensor)
        layer = 2 if row else 1
        np.testing.assert_array_equal(found.codes[row], origin.codes[layer])
        np.testing.assert_array_equal(dequantize(found)[row], factor * dequantize(origin)[layer])
    with pytest.raises(UsageError, match=r"is quantized in another way than .*use the original models"):
        load_assembly(assembly_of(tmp_path / "a", a, layers=[LayerSource(0, 0), LayerSource(1, 0)]))


def test_quantizing_while_loading_equals_quantizing_the_baked_model(tiny_directory, tmp_path: Path):
    a, b = two(tiny_directory)
    layers = [LayerSource(0, 1), LayerSource(1, 2, (("q.weight", 0.5),)), LayerSource(0, 0)]
    assembly = assembly_of(a, b, layers=layers)
    convert(assembly, tmp_path / "baked", plan="bake")
    fmt = QuantFormat.parse("int4")
    _, params = load_assembly(assembly, quant=fmt)
    _, expected = load_params(tmp_path / "baked", quant=fmt)
    for name, value in params.items():
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), value, expected[name])), name


def test_onto_a_mesh_as_onto_one_device(tiny_directory):
    a, b = two(tiny_directory)
    layers = [LayerSource(0, 1), LayerSource(1, 2), LayerSource(1, 2, (("q.weight", 0.5),))]
    assembly = assembly_of(a, b, layers=layers)
    _, plain = load_assembly(assembly)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    _, meshed = load_assembly(assembly, mesh=mesh)
    for name, value in plain.items():
        np.testing.assert_array_equal(meshed[name], value)


def test_progress_counts_every_byte_once(tiny_directory):
    a, b = two(tiny_directory)
    seen: list[tuple[int, int]] = []
    _, params = load_assembly(
        assembly_of(a, b, layers=[LayerSource(0, 1), LayerSource(1, 2)]),
        progress=lambda done, total: seen.append((done, total)),
    )
    size = sum(value.nbytes for value in params.values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# As users load it.


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("a", "b")):
        write_tiny_chat(folder / name, seed=seed, num_hidden_layers=3)
    return write_recipe(
        folder / "r.yaml",
        "- sources: [{model: first, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: q_proj, value: 0.5}, "
        "{filter: nowhere, value: 3}, {value: 1}]}}]\n- sources: [{model: first, layer_range: [1, 2]}]\n",
    )


def test_load_takes_a_recipe_and_says_its_remarks(chat_models: Path, caplog):
    loaded = jaxchat.load(recipe=chat_models, model_paths={"first": chat_models.parent / "a"})
    assert "'nowhere' matches no tensor" in caplog.text
    assert [slot.layer for slot in loaded.plan] == [0, 1, 2, 3, 1]
    assert loaded.chat("hello", max_new_tokens=3).text is not None
    # In text the recipe's slots are counted: the last of them is the second layer of the first model.
    assert loaded.with_plan("-1").plan == LayerPlan((Slot(1),), 4)
    assert loaded.with_plan(loaded.plan).plan == loaded.plan
    again = jaxchat.load(recipe=chat_models, model_paths={"first": chat_models.parent / "a"}, plan="-1,0")
    assert [slot.layer for slot in again.plan] == [1, 0]


def test_a_recipe_runs_from_the_command_line(chat_models: Path, commands):
    recipe = "--recipe", chat_models, "--model_path", f"first={chat_models.parent / 'a'}"
    done = commands("generate", *recipe, "--layer_spec", "-1,0", "--json", "-p", "hi", "--max_new_tokens", 2)
    assert done.code == 0, done.err
    assert "filter 'nowhere' matches no tensor" in done.err
    assert json.loads(done.out)["layer_spec"] == "1,0"


def test_load_wants_a_directory_or_a_recipe(chat_models: Path):
    for arguments in ({}, {"path": chat_models.parent / "a", "recipe": chat_models}):
        with pytest.raises(UsageError, match="give a model directory or a recipe, one of them"):
            jaxchat.load(**arguments)


def test_sizes_shown_of_a_recipe_are_those_loaded(chat_models: Path):
    assembly = read_recipe(chat_models, {"first": chat_models.parent / "a"})
    config, params = load_assembly(assembly)
    assert config == assembled_config(assembly, [model.config for model in assembly.models])
    report = describe_assembly(assembly, name="r")
    assert report.stored_parameters == sum(value.size for value in params.values())
    layer = sum(value[0].size for name, value in params.items() if name.startswith("layers."))
    rest = sum(value.size for name, value in params.items() if not name.startswith("layers."))
    assert report.parameters == 5 * layer + rest
