"""Models with adapters merged into them: rounded once, ordinary afterwards, refused where that is wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxchat
from jaxchat.adapter_use import AdapterUse
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import Manifest
from jaxchat.checkpoints.merged import merged_directory
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import UsageError
from jaxchat.quant import QuantFormat
from tests.support.adapters import PREFIX, logits_of, lora_tensors, projections, write_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = [[1, 7, 33, 5, 60, 2, 9]]


@pytest.fixture
def base(tiny_directory):
    return tiny_directory("llama", dtype="bfloat16")


@pytest.fixture
def adapter(base, tmp_path):
    modules = projections(ModelDirectory.at(base).config)
    return write_adapter(tmp_path / "poet", lora_tensors(modules), target_modules="all-linear")


def test_weights_are_merged_in_float32_and_rounded_once(base, adapter, tmp_path):
    to_hf(merged_directory(base, [AdapterUse(str(adapter), 0.3)]), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, values in after.items():
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in tensors:
            np.testing.assert_array_equal(values.view(np.uint16), before[name].view(np.uint16))
            continue
        a, b = (tensors[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        exact = before[name].astype(np.float64) + 0.3 * 2 * b @ a
        wrong = values != exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert wrong.mean() < 1e-3  # where float32 is on a rounding's edge
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_merged_model_can_be_planned_and_quantized_at_once(base, adapter, tmp_path):
    use = AdapterUse(str(adapter))
    manifest = convert(
        merged_directory(base, [use]), tmp_path / "small", quant=QuantFormat.parse("int8"), layer_spec="2,0"
    )
    assert manifest.quantization.format.startswith("int8")
    to_hf(merged_directory(base, [use]), tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "after", quant=QuantFormat.parse("int8"), layer_spec="2,0")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "after"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name].view(np.uint8), other[name].view(np.uint8)) for name in one)


def test_quantized_weights_are_merged_into_only_if_they_are_rounded_anew(base, adapter, tmp_path):
    convert(base, tmp_path / "small", quant=QuantFormat.parse("int8"))
    use = AdapterUse(str(adapter))
    with pytest.raises(UsageError, match=r"small: holds int8.* weights.*take the original model"):
        convert(merged_directory(tmp_path / "small", [use]), tmp_path / "no")
    again = merged_directory(tmp_path / "small", [use], dequantized=True)
    assert convert(again, tmp_path / "four", quant=QuantFormat.parse("int4")).quantization.format.startswith(
        "int4"
    )
    assert Manifest.read(tmp_path / "four").quantization.format.startswith("int4")


def test_repeated_layers_become_layers_of_their_own(base, tmp_path):
    """PEFT merges all of them into the one whose weights they share."""
    config = ModelDirectory.at(base).config
    tensors = {}
    for name, values in lora_tensors(projections(config)).items():
        tensors[name] = values
        if ".layers.2." in name:
            tensors[name.replace(".2.", ".3.")] = -values if "lora_B" in name else values
    adapter = write_adapter(
        tmp_path / "poet", tensors, target_modules="all-linear", layer_replication=[[0, 3], [2, 3]]
    )
    to_hf(merged_directory(base, [AdapterUse(str(adapter))]), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    up = [after[f"model.layers.{i}.mlp.up_proj.weight"].astype(np.float32) for i in (2, 3)]
    own = before["model.layers.2.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_allclose(up[0] - own, own - up[1], atol=0.02)
    assert np.abs(up[0] - own).max() > 0.1
    with pytest.raises(UsageError, match=r"slot 1.*|a slot"):
        merged_directory(base, [AdapterUse(str(adapter), slot=1)])


def test_a_tied_model_whose_embedding_changes_is_no_longer_tied(tiny_directory, tmp_path):
    base, rng = tiny_directory("gemma"), np.random.default_rng(0)
    factors = {"A": (4, 67), "B": (24, 4)}
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_{name}": rng.standard_normal(shape, np.float32) * 0.2
        for name, shape in factors.items()
    }
    adapter = write_adapter(tmp_path / "poet", tensors, target_modules=["embed_tokens"])
    to_hf(merged_directory(base, [AdapterUse(str(adapter))]), tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["tie_word_embeddings"] is False
    merged = jaxchat.load(tmp_path / "out")
    loaded = jaxchat.load(base, adapter=str(adapter))
    expected = logits_of(merged, IDS)
    assert np.abs(logits_of(loaded, IDS) - expected).max() <= 2e-5 * np.ptp(expected)
    np.testing.assert_array_equal(
        load_file(tmp_path / "out/model.safetensors")["lm_head.weight"],
        load_file(base / "model.safetensors")["model.embed_tokens.weight"],
    )


def test_a_bias_that_the_model_has_not_cannot_be_merged(base, tmp_path):
    config = ModelDirectory.at(base).config
    modules = {n: shape for n, shape in projections(config).items() if n.endswith("q_proj")}
    tensors = lora_tensors(modules)
    for name, (out, _) in modules.items():
        tensors[f"{PREFIX}{name}.lora_B.bias"] = np.ones(out, np.float32)
    adapter = write_adapter(tmp_path / "poet", tensors, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UsageError, match=r"lora_bias adds to layers.q.bias, which this model does not have"):
        to_hf(merged_directory(base, [AdapterUse(str(adapter))]), tmp_path / "out")
    with_bias = logits_of(jaxchat.load(base, adapter=str(adapter)), IDS)
    assert np.abs(with_bias - logits_of(jaxchat.load(base), IDS)).max() > 0.01  # it runs


def test_convert_takes_adapters(base, adapter, tmp_path, commands):
    flags = ("--adapter", f"{adapter}=0.5", "--dst", tmp_path / "out")
    assert "parameters" in commands.output("convert", "--src", base, *flags, "--to_hf")
    expected = tmp_path / "expected"
    to_hf(merged_directory(base, [AdapterUse(str(adapter), 0.5)]), expected)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()
    convert(base, tmp_path / "small", quant=QuantFormat.parse("int8"))
    flags = ("convert", "--src", tmp_path / "small", "--adapter", adapter, "--dst", tmp_path / "other")
    assert "ask for it with --quant FORMAT" in commands.error(*flags, code=2)
    assert not (tmp_path / "other").exists()
    commands.output(*flags, "--quant", "int8")
    recipe = ("convert", "--recipe", "x.yaml", "--adapter", adapter, "--dst", tmp_path / "third")
    assert "a recipe's layers are of several models" in commands.error(*recipe, code=2)
