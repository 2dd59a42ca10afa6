"""Models that other programs have quantized are the numbers that these stand for, in as few bits."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxchat import model
from jaxchat.analysis import show
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.hf_quant import layers
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.config import ModelConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.mixed import MixedTensor
from jaxchat.pallas import backends
from jaxchat.quant import QuantFormat, QuantizedTensor, Reordered, dequantize, layer_slice
from jaxchat.sharding import shard_params
from tests.support.commands import Commands
from tests.support.hf_quantized import (
    CASES,
    E4M3,
    Case,
    awq,
    float8,
    gptq,
    packed,
    table4,
    write_quantized,
    write_tensors,
)
from tests.support.steps import step_of

SHARED = ("gptq-sym-g32", "awq-gemm-g32", "compressed-tensors-W4A16", "bnb-nf4")


def numbers_of(value: Any, layer: int) -> np.ndarray:
    """One layer of a loaded stack as float32 [out, in]."""
    if isinstance(value, MixedTensor):
        return numbers_of(value.parts[value.part[layer]], value.row[layer])
    if isinstance(value, QuantizedTensor | Reordered):
        return np.asarray(dequantize(layer_slice(jax.tree.map(np.asarray, value), layer)))
    return np.asarray(value)[layer]


def loaded(directory: Path, **options: Any) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, Any]]:
    """The configuration, the projections as Hugging Face names them, and all that was loaded."""
    config, params = load_params(directory, **options)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for param in parameter_table(config):
        if param.role == "weight":
            for layer in range(config.num_layers):
                part = (param.part, numbers_of(params[param.name], layer))
                found.setdefault(param.hf.format(layer), []).append(part)
    whole = {
        name: np.concatenate([part for _, part in sorted(p, key=lambda a: a[0])]) for name, p in found.items()
    }
    return config, whole, params


def logits_of(
    config: ModelConfig, params: Any, tokens: Any, kernels: backends.Kernels = backends.REFERENCE
) -> np.ndarray:
    """Of one sequence, [T, V], in float32."""
    slots, length = config.num_layers, np.array([len(tokens)], np.int32)
    cache = empty_cache(config, slots=slots, batch=1, capacity=32, dtype=jnp.float32)
    params, plan = jax.tree.map(jnp.asarray, params), LayerPlan.identity(slots).arrays(slots)
    step = step_of(config, params, plan, jnp.asarray([tokens]), 0 * length, length, length, kernels=kernels)
    return np.asarray(_logits(step, cache))[0]


@jax.jit
def _logits(step: Any, cache: Any) -> jax.Array:
    return model.logits(step, model.forward(step, cache)[0])


def format_of(directory: Path, name: str, keep: Any) -> str:
    manifest = ModelDirectory.at(directory).source(keep=keep).manifest
    found = manifest.quantization.parameters.get(name) if manifest.quantization else None
    return "float32" if found is None else str(found)


def error_of(act: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(JaxchatError) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a model."""
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: file.read(name) for name in file.entries}
    change(tensors)
    write_tensors(directory / "model.safetensors", tensors)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- every sub-format


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_numbers_that_its_codes_stand_for(name: str, tmp_path: Path):
    case = CASES[name]
    weights = write_quantized(tmp_path, case.section, case.make)
    _, exact, _ = loaded(tmp_path, keep="exact")
    assert exact.keys() == weights.keys()
    for key, expected in weights.items():
        atol = 2e-7 * np.abs(expected).max()
        np.testing.assert_allclose(exact[key], expected, rtol=0, atol=atol, err_msg=key)
    assert format_of(tmp_path, "layers.q.weight", "exact") == case.exact
    assert format_of(tmp_path, "layers.q.weight", "small") == case.small
    if case.small != case.exact:
        _, small, _ = loaded(tmp_path)
        for key, expected in weights.items():
            error = np.sqrt(np.mean((small[key] - expected) ** 2) / np.mean(expected**2))
            assert error <= case.error, key
            assert case.error == 0 or error > 0, key  # the bound is not of something else


@pytest.mark.parametrize("keep", ["small", "exact"])
@pytest.mark.parametrize("folder", SHARED)
def test_real_files_give_the_logits_of_their_reference(shared_data: Path, folder: str, keep: str):
    ids = json.loads((shared_data / "quant/expected.json").read_text())["ids"]
    with np.load(shared_data / "quant/expected_logits.npz") as expected:
        wanted = expected[folder]
    config, params = load_params(shared_data / "quant" / folder, keep=keep)
    found = logits_of(config, params, ids)
    again = keep == "small" and folder == "bnb-nf4"  # which has no format of ours
    np.testing.assert_allclose(found, wanted, atol=2.0 if again else 3e-5)


TOKENS = [5, 17, 3, 80, 41, 9, 66, 2]


def plain_copy(directory: Path, weights: dict[str, np.ndarray], to: Path) -> Path:
    """The same model with its projections as float32 numbers."""
    file = SafetensorsFile(directory / "model.safetensors")
    modules = tuple(name.removesuffix("weight") for name in weights)
    tensors = {name: file.read(name) for name in file.entries if not name.startswith(modules)}
    values = json.loads((directory / "config.json").read_text())
    del values["quantization_config"]
    to.mkdir()
    (to / "config.json").write_text(json.dumps(values))
    tensors |= {name: value.astype(np.float32) for name, value in weights.items()}
    write_tensors(to / "model.safetensors", tensors)
    return to


def assert_close(found: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
    """All projections, to float32's precision."""
    for key, expected in weights.items():
        atol = 3e-7 * np.abs(expected).max()
        np.testing.assert_allclose(found[key], expected, rtol=0, atol=atol, err_msg=key)


# --- columns in another order


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_activations_are_put_in_the_order_of_the_columns(kernels: str, head: bool, tmp_path: Path):
    make = gptq(order="regular")
    section = CASES["gptq-act-order"].section
    weights = write_quantized(tmp_path / "q", section, {"": make} if head else make)
    config, params = load_params(tmp_path / "q")
    assert isinstance(params["layers.down.weight"], Reordered)
    assert isinstance(params["lm_head.weight"], Reordered) == head
    own = load_params(plain_copy(tmp_path / "q", weights, tmp_path / "plain"))[1]
    found = logits_of(config, params, TOKENS, backends.select(kernels, "cpu"))
    expected = logits_of(config, own, TOKENS)
    # The native kernels round activations to 8 bits.
    atol = np.ptp(expected) * (1e-6 if kernels == "reference" else 0.03)
    np.testing.assert_allclose(found, expected, atol=atol)


def test_reordered_columns_are_split_over_devices(tmp_path: Path):
    case = CASES["gptq-act-order"]
    write_quantized(tmp_path, case.section, case.make)
    config, params = load_params(tmp_path)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    _, split = load_params(tmp_path, mesh=mesh)
    down = split["layers.down.weight"]
    assert down.weight.codes.sharding.spec[-1] == "model"
    assert down.order.sharding.is_fully_replicated
    expected = logits_of(config, params, TOKENS)
    for value in (split, shard_params(params, config, mesh)):
        np.testing.assert_allclose(logits_of(config, value, TOKENS), expected, atol=1e-4)


# --- fused, transposed, mixed and per-layer


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
@pytest.mark.parametrize(
    "name", ["gptq-sym", "gptq-act-order", "awq-gemm", "ct-pack", "ct-float-block", "bnb-nf4"]
)
def test_fused_layers_are_cut_by_rows_and_turned_ones_are_not_turned(
    name: str, model_type: str, tmp_path: Path
):
    case = CASES[name]
    changes: dict[str, Any] = {}
    if model_type == "gpt2":
        changes = {"n_embd": 64, "n_inner": 192, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    weights = write_quantized(tmp_path, case.section, case.make, model_type=model_type, **changes)
    _, found, params = loaded(tmp_path, keep="exact")
    assert_close(found, weights)
    assert params["layers.q.weight"].shape[-1] == 64


@pytest.mark.parametrize("storage", [np.uint8, np.float32])
def test_blocks_run_on_from_row_to_row(storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # 96 columns are a block and a half, and rows are read three at a time.
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}
    make = table4("nf4", nested=True, storage=storage)
    weights = write_quantized(tmp_path, CASES["bnb-nf4"].section, make, model_type="phi3", **sizes)
    monkeypatch.setattr(layers, "_CHUNK", 96 * 3)
    _, found, _ = loaded(tmp_path, keep="exact")
    assert_close(found, weights)


def test_layers_that_are_left_out_are_plain(tmp_path: Path):
    case = CASES["gptq-sym"]
    weights = write_quantized(
        tmp_path, case.section, case.make, plain=lambda name: ".1.mlp" in name or "o_proj" in name
    )
    config, found, params = loaded(tmp_path)
    assert isinstance(params["layers.up.weight"], MixedTensor)
    assert isinstance(params["layers.o.weight"], jax.Array)
    assert_close(found, weights)
    own = SafetensorsFile(tmp_path / "model.safetensors")
    for key in found.keys() - weights.keys():
        np.testing.assert_array_equal(found[key], own.read(key), err_msg=key)
    assert logits_of(config, params, TOKENS).shape == (8, 96)


def test_one_layer_of_several_kinds_is_read_alone(tmp_path: Path):
    case = CASES["gptq-sym"]
    weights = write_quantized(tmp_path / "q", case.section, case.make, plain=lambda name: ".0.mlp" in name)
    for layer in (0, 1):
        convert(tmp_path / "q", tmp_path / f"{layer}", layer_spec=str(layer), plan="bake")
        _, found, _ = loaded(tmp_path / f"{layer}")
        own = {name: w for name, w in weights.items() if f"layers.{layer}." in name}
        assert_close(found, {name.replace(f".{layer}.", ".0.", 1): w for name, w in own.items()})


def test_settings_of_single_layers_are_followed(tmp_path: Path):
    section = {
        **CASES["gptq-sym"].section,
        "dynamic": {
            r"-:.*\.1\..*o_proj": {},
            r"+:.*\.1\.mlp\.down.*": {"bits": 8, "group_size": 64},
            r".*k_proj": {"sym": False},
        },
    }
    makes = {".k_proj": gptq(sym=False), "1.mlp.down_proj": gptq(8, 64), "": gptq()}
    weights = write_quantized(
        tmp_path, section, makes, plain=lambda name: name.endswith(("1.self_attn.o_proj", "lm_head"))
    )
    _, found, params = loaded(tmp_path)
    assert_close(found, weights)
    assert params["layers.down.weight"].parts[1].format_name == "int8:64"
    assert format_of(tmp_path, "layers.k.weight", "small") == "int5"


def test_each_group_of_layers_has_its_own_scheme(tmp_path: Path):
    four = CASES["ct-pack"].section["config_groups"]["group_0"]
    eight = {
        "targets": ["re:.*down_proj", "model.layers.0.self_attn.q_proj"],
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    groups = {"a": {**four, "format": "pack-quantized"}, "b": eight}
    section = {**CASES["ct-pack"].section, "format": "mixed-precision", "config_groups": groups}
    wide = float8("weight_scale", "row")
    makes = {".down_proj": wide, "0.self_attn.q_proj": wide, "": packed()}
    weights = write_quantized(tmp_path, section, makes, plain=lambda name: name == "lm_head")
    _, found, _ = loaded(tmp_path, keep="exact")
    assert_close(found, weights)


def test_a_head_of_its_own_is_read_though_the_configuration_ties_it(tmp_path: Path, caplog: Any):
    weights = write_quantized(tmp_path, CASES["gptq-sym"].section, {"": gptq()})
    edit_config(tmp_path, lambda values: values.update(tie_word_embeddings=True))
    config, params = load_params(tmp_path)
    assert not config.tied_embeddings
    assert "the stored head is used" in caplog.text
    head = jax.tree.map(np.asarray, params["lm_head.weight"])
    np.testing.assert_allclose(dequantize(head), weights["lm_head.weight"], atol=1e-7)


def test_biases_of_zeros_are_nothing_and_others_are_told(tmp_path: Path):
    case = CASES["gptq-sym"]
    write_quantized(tmp_path, case.section, case.make)
    name = "model.layers.0.mlp.up_proj.bias"
    edit(tmp_path, lambda tensors: tensors.update({name: np.zeros(192, np.float16)}))
    load_params(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: np.ones(192, np.float16)}))
    assert f"unexpected tensors: {name}" in error_of(load_params, tmp_path)


@pytest.mark.parametrize(
    ("file", "name"), [("quantize_config.json", "gptq-sym"), ("quant_config.json", "awq-gemm")]
)
def test_older_repositories_say_it_in_a_file_of_its_own(file: str, name: str, tmp_path: Path):
    case = CASES[name]
    weights = write_quantized(tmp_path, case.section, case.make)
    section = {key: value for key, value in case.section.items() if key != "quant_method"}
    (tmp_path / file).write_text(json.dumps(section))
    edit_config(tmp_path, lambda values: values.pop("quantization_config"))
    _, found, _ = loaded(tmp_path)
    assert_close(found, weights)


# --- size


@pytest.mark.parametrize(
    ("name", "section", "make"),
    [
        ("gptq", {"group_size": 128, "sym": True}, gptq(group=128)),
        ("gptq", {"group_size": 128, "sym": False}, gptq(group=128, sym=False)),
        ("gptq", {"group_size": 128, "sym": True, "desc_act": True}, gptq(group=128, order="regular")),
        ("gptq", {"bits": 8, "group_size": 128, "sym": True}, gptq(8, 128)),
        ("gptq", {"group_size": 256, "sym": True}, gptq(group=256)),
        ("awq", {"group_size": 128}, awq("gemm", 128)),
        ("fp8", {}, float8("weight_scale_inv", "row")),
    ],
)
def test_weights_take_no_more_than_a_tenth_more_memory_than_in_the_file(
    name: str, section: dict[str, Any], make: Any, tmp_path: Path
):
    section = {"quant_method": name, "bits": 4, **section}
    write_quantized(tmp_path, section, make, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    in_file = sum(entry.stop - entry.start for key, entry in file.entries.items() if "_proj." in key)
    config, params = load_params(tmp_path)
    held = sum(params[p.name].nbytes for p in parameter_table(config) if p.role == "weight")
    assert held <= 1.1 * in_file


def test_a_layer_is_quantized_again_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 16384}
    write_quantized(
        tmp_path, CASES["fp8-rows"].section, float8("weight_scale_inv", "rows"), **sizes,
        plain=lambda name: "up_proj" not in name,
    )  # fmt: skip
    source = ModelDirectory.at(tmp_path).source()
    param = next(p for p in source.table if p.name == "layers.up.weight")
    monkeypatch.setattr(layers, "_CHUNK", 1 << 18)
    tracemalloc.start()
    held = source.layer(param, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < held.nbytes + 32 * (1 << 18)  # the numbers of all of it are twice as many bytes


# --- what else is done with one


@pytest.mark.parametrize(
    "name", ["gptq-sym", "gptq-act-order-asym", "awq-row", "fp8-block", "bnb-nf4", "ct-mxfp4"]
)
def test_a_conversion_keeps_what_is_held_and_dequantizes_to_the_same_numbers(name: str, tmp_path: Path):
    case = CASES[name]
    weights = write_quantized(tmp_path / "q", case.section, case.make)
    _, before = load_params(tmp_path / "q")
    convert(tmp_path / "q", tmp_path / "native")
    assert "quantization_config" not in json.loads((tmp_path / "native/config.json").read_text())
    _, after = load_params(tmp_path / "native")
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    with pytest.raises(UsageError, match="which Hugging Face's layout has no place for"):
        to_hf(tmp_path / "q", tmp_path / "hf")
    to_hf(tmp_path / "q", tmp_path / "hf", dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    _, found, _ = loaded(tmp_path / "hf")
    assert_close(found, weights)


@pytest.mark.parametrize("name", ["gptq-act-order", "fp8-block"])
def test_layers_are_repeated_and_scaled(name: str, tmp_path: Path):
    case = CASES[name]
    weights = write_quantized(tmp_path / "q", case.section, case.make)
    plan = "[[1, 0.5, 2.0], 0]"
    convert(tmp_path / "q", tmp_path / "baked", layer_spec=plan, plan="bake", keep="exact")
    _, found, _ = loaded(tmp_path / "baked")
    last = "model.layers.{}.mlp.down_proj.weight"
    expected = {last.format(0): 2 * weights[last.format(1)], last.format(1): weights[last.format(0)]}
    assert_close(found, expected)


def test_a_format_for_reordered_columns_cannot_be_asked_for(tmp_path: Path):
    write_quantized(tmp_path, CASES["gptq-sym"].section, {}, plain=lambda name: True)
    said = error_of(load_params, tmp_path, quant=QuantFormat.parse("int4:reordered"))
    assert "only weights that GPTQ has reordered are held so" in said


def test_show_says_what_the_files_hold(tmp_path: Path, commands: Commands):
    case = CASES["gptq-act-order"]
    write_quantized(tmp_path, case.section, case.make)
    said = commands("show", "-m", tmp_path).out
    assert "gptq 4-bit" in said
    assert "(as stored), scales included" in said
    plan = json.loads(commands("plan", "-m", tmp_path, "--json").out)
    report = show.describe_directory(tmp_path)
    _, params = load_params(tmp_path)
    assert report.quantized_bytes is not None
    assert report.quantized_bytes["total"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    read = sum(
        leaf.nbytes
        for name, value in params.items()
        if name != "embed.weight"
        for leaf in jax.tree.leaves(value)
    )
    assert plan["cost"]["weight_bytes"] == pytest.approx(read, rel=0.01)
    (tmp_path / "model.safetensors").unlink()
    assert "gptq" not in commands("show", "-m", tmp_path).out  # of config.json alone


def test_what_is_quantized_again_or_rounded_or_not_at_all_is_told_once(tmp_path: Path, caplog: Any):
    def told(name: str, **options: Any) -> list[str]:
        case = CASES[name]
        write_quantized(tmp_path / name, case.section, case.make)
        caplog.clear()
        load_params(tmp_path / name, **options)
        return [record.getMessage() for record in caplog.records]

    (again,) = told("bnb-nf4")
    assert "bitsandbytes nf4 is quantized again, to int5:affine, no format here being the same" in again
    (rounded,) = told("ct-mxfp4-tiny-scales")
    assert "scales or offsets are rounded to float16" in rounded
    assert not told("ct-mxfp4")
    assert not told("bnb-nf4", keep="exact")
    assert not told("ct-mxfp4-tiny-scales", keep="exact")
    assert not told("gptq-asym")
    write_quantized(tmp_path / "plain", CASES["gptq-sym"].section, {}, plain=lambda name: True)
    _, params = load_params(tmp_path / "plain")
    assert "config.json: quantization_config says gptq, but no tensor of" in caplog.text
    assert isinstance(params["layers.q.weight"], jax.Array)


# --- files that are not what they say


def _section(name: str, **changes: Any) -> Case:
    case = CASES[name]
    return dataclasses.replace(case, section={**case.section, **changes})


def _groups(weights: dict[str, Any]) -> dict[str, Any]:
    """config_groups of compressed-tensors."""
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (_section("gptq-sym", bits=5), "quantization_config.bits is 5; readable: 2, 3, 4, 8"),
        (_section("gptq-sym", bits="4"), "quantization_config.bits is '4'; expected a whole number"),
        (_section("gptq-sym", bits=8), "qweight: expected [16, 64], found [8, 64]"),
        (_section("gptq-sym", group_size=64), "g_idx holds groups 0 to 5; expected 0 to 2"),
        (_section("gptq-sym", group_size=10**12), "scales: expected [1, 64], found [6, 64]"),
        (_section("gptq-sym", group_size=10**30), "scales: expected [1, 64], found [6, 64]"),
        (_section("ct-pack", format=7), "quantization_config.format is 7; expected a text"),
        (_section("gptq-sym", group_size=0), "quantization_config.group_size is 0; expected -1 (a row)"),
        (_section("gptq-sym", checkpoint_format="marlin"), "is 'marlin'; readable: gptq, gptq_v2"),
        (_section("gptq-sym", dynamic={"(": {}}), "'(' is no regular expression"),
        (_section("gptq-sym", dynamic={"(a+)+b": {}}), "the pattern '(a+)+b' is too intricate"),
        (_section("gptq-sym", dynamic=[1]), "quantization_config.dynamic is [1]; expected an object"),
        (_section("gptq-asym", sym=True), "quantization_config.sym says that all are 8; set it to false"),
        (_section("awq-gemm", version="marlin"), "version is 'marlin'; readable: gemm, gemv, gemv_fast"),
        (_section("awq-gemm", bits=3), "quantization_config.bits is 3; AWQ has 4"),
        (_section("awq-gemm", version="gemv"), "qzeros: expected [64, 4], found [2, 8]"),
        (_section("ct-pack", format="marlin-24"), "format is 'marlin-24'; readable: pack-quantized"),
        (
            _section("ct-pack", transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
            "transform_config: such transforms of the weights are not read",
        ),
        (
            _section("ct-pack", sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: such transforms of the weights are not read",
        ),
        (_section("ct-pack", config_groups={}), "is quantized, but no group of"),
        (
            _section("ct-pack", config_groups=_groups({"num_bits": 40, "strategy": "channel"})),
            "weights.num_bits is 40; expected 1 to 8",
        ),
        (_section("fp8-block", weight_block_size=[0, 48]), "weight_block_size is no list of two sizes"),
        (_section("fp8-block", weight_block_size=[64, 64]), "expected [1, 1], found [3, 2]"),
        (_section("hqq", quant_config={"scale_quant_params": {"nbits": 8}}), "quantized scales and zero"),
        (_section("bnb-nf4", quant_method="spqr"), "quantized with spqr (key 'quantization_config')"),
        (_section("bnb-nf4", quant_method="gptq"), "quantization_config.bits is missing"),
    ],
)
def test_settings_that_are_wrong_are_told(case: Case, says: str, tmp_path: Path):
    write_quantized(tmp_path, case.section, case.make)
    assert says in error_of(load_params, tmp_path)


LAYER = "model.layers.1.mlp.up_proj"
Change = Callable[[dict[str, np.ndarray]], Any]


def _set(suffix: str, value: Any) -> Change:
    return lambda tensors: tensors.update({f"{LAYER}.{suffix}": value})


def _pop(suffix: str) -> Change:
    return lambda tensors: tensors.pop(f"{LAYER}.{suffix}")


def _state(**changes: Any) -> Change:
    name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"

    def change(tensors: dict[str, np.ndarray]) -> None:
        values = {**json.loads(tensors[name].tobytes()), **changes}
        tensors[name] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


def _words(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.int32)


_STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gptq-sym", _pop("scales"), f"missing tensors: {LAYER}.scales [2, 192]"),
        ("gptq-sym", _pop("qweight"), f"missing tensors: {LAYER}.qweight [8, 192]"),
        ("gptq-sym", _set("qweight", _words(8, 191)), "qweight: expected [8, 192], found [8, 191]"),
        ("gptq-sym", _set("scales", np.zeros((2, 192), np.int8)), "scales: expected F32, found I8"),
        ("gptq-sym", _set("scales", np.full((2, 192), np.inf, np.float16)), "scales that are no numbers"),
        ("gptq-sym", _set("extra", np.zeros(3, np.int32)), f"unexpected tensors: {LAYER}.extra"),
        ("gptq-sym", _set("g_idx", np.full(64, 2, np.int32)), "g_idx holds groups 2 to 2; expected 0 to 1"),
        ("gptq-sym", _set("g_idx", np.full(64, -1, np.int32)), "g_idx holds groups -1 to -1; expected 0"),
        ("gptq-sym", _set("g_idx", np.zeros(63, np.int32)), "g_idx: expected [64], found [63]"),
        ("gptq-act-order", _pop("g_idx"), f"{LAYER}.g_idx is missing, which desc_act needs"),
        ("ct-pack", _set("weight_shape", np.array([64, 192])), "weight_shape says [64, 192]; expected"),
        ("ct-pack", _pop("weight_scale"), f"missing tensors: {LAYER}.weight_scale [192, 2]"),
        ("ct-pack-asym", _pop("weight_zero_point"), f"missing tensors: {LAYER}.weight_zero_point [24, 2]"),
        ("ct-pack", _set("weight_zero_point", np.ones((192, 2), np.int8)), "weight_zero_point is not 0"),
        ("ct-nvfp4", _set("weight_global_scale", np.zeros(1, np.float32)), "weight_global_scale is 0.0"),
        ("ct-mxfp4", _set("weight_scale", np.full((192, 2), 255, np.uint8)), "that are not numbers"),
        ("fp8-block", _set("weight_scale_inv", np.ones((5, 2), np.float32)), "expected [8, 2], found [5, 2]"),
        ("fp8-block", _pop("weight_scale_inv"), f"{LAYER}.weight: F8_E4M3"),
        ("fp8-block", _set("weight", np.full((192, 64), np.nan, E4M3)), "holds NaN or infinite weights"),
        ("bnb-nf4", _set("weight.absmax", np.ones(191, np.float32)), "expected [192], found [191]"),
        ("bnb-nf4", _state(blocksize=0), "blocksize is 0; expected"),
        ("bnb-nf4", _state(blocksize=1 << 40), "blocksize is 1099511627776; expected"),
        ("bnb-nf4", _state(shape=[64, 192]), "says that shape is [64, 192], not [192, 64]"),
        ("bnb-nf4", _state(quant_type="fp4"), "says that quant_type is 'fp4', not nf4"),
        ("bnb-nf4", _state(shape="x" * 60000), "shape is "),
        ("bnb-nf4", _set(_STATE, np.frombuffer(b"[" * 5000, np.uint8)), f"{_STATE} is no JSON"),
        ("bnb-nf4", _pop(_STATE), "has none of weight.quant_state"),
        ("bnb-int8", _set("weight_format", np.array(2, np.uint8)), "weight_format is not 0"),
        ("hqq", _set("nbits", np.array(7, np.int32)), "has 7 bits along axis 1; readable"),
        ("hqq", _set("group_size", np.array(7, np.int32)), "expected a multiple of 7"),
        ("hqq", _set("shape", np.array([1, 2])), "shape says [1, 2]; expected [192, 64]"),
        ("hqq", _set("quant_zero", np.array(1, np.uint8)), "quant_zero is set, which is not read"),
        ("hqq", _set("axis", _words(3, 3)), "axis is I32 [3, 3]; expected one whole number"),
    ],
)
def test_tensors_that_are_wrong_are_told(name: str, change: Change, says: str, tmp_path: Path):
    case = CASES[name]
    write_quantized(tmp_path, case.section, case.make)
    edit(tmp_path, change)
    assert says in error_of(load_params, tmp_path)
