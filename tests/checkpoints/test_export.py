"""Layer plans and recipes written down: as Hugging Face models, and baked into or recorded in native ones."""

import functools
import io
import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import jaxchat
from jaxchat.analysis.show import describe_directory
from jaxchat.checkpoints.assembly import LayerSource
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.manifest import MANIFEST, Manifest
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.quant import QuantFormat
from jaxchat.recipes.recipe import read_recipe
from tests.checkpoints.test_assembly import assembly_of, logits
from tests.support import parity_cases
from tests.support.tiny import TINY_CONFIGS, write_tiny_hf
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOUR = {"gpt2": {"n_layer": 4}} | {
    name: {"num_hidden_layers": 4} for name in TINY_CONFIGS if name not in ("gpt2", "qwen2")
}
FOUR["qwen2"] = {
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 2,
}
SPEC = "[3, [0, 0.5, 2.0], [1, 0, 0], 1, [3, 1, 0.25], 0]"
"""Out of order, repeated, scaled by powers of two (so exactly), with an identity slot, without layer 2."""


def planned(directory: Path, spec: str | None = None) -> np.ndarray:
    """The logits of a directory under a plan, by default its own."""
    plan = ModelDirectory.at(directory).plan
    return logits(*load_params(directory), plan if spec is None else plan.select(spec))


@pytest.fixture
def source(tiny_directory):
    return lambda model_type: tiny_directory(model_type, **FOUR[model_type])


@pytest.mark.parametrize("write", [convert, to_hf, functools.partial(convert, format="orbax")])
def test_all_files_of_the_words_go_along(write, tmp_path):
    words = (
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates/tool_use.jinja",
        "vocab.json",
    )
    src = write_tiny_chat(tmp_path / "src")
    (src / "additional_chat_templates").mkdir()
    for name in words[2:]:
        (src / name).write_text(name)
    write(src, tmp_path / "dst")
    for name in words:
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()


@pytest.mark.parametrize("write", [convert, to_hf])
def test_a_tokenizer_of_any_name_goes_along(write, tmp_path):
    src, model = tmp_path / "src", io.BytesIO()
    write_tiny_hf(src, "llama", vocab_size=64)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a tale of two cities"] * 9), model_writer=model, vocab_size=16, minloglevel=2
    )
    (src / "cities.model.v2").write_bytes(model.getvalue())
    write(src, tmp_path / "dst")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n- sources:\n  - {model: src, layer_range: [0, 2]}\n"
    )
    write(read_recipe(recipe), tmp_path / "merged")
    for directory in ("dst", "merged"):
        tokenizer = ModelDirectory.at(tmp_path / directory).tokenizer
        assert tokenizer.decode(tokenizer.encode("two tales", add_special_tokens=False)) == "two tales"


# A Hugging Face model.


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_an_exported_plan_is_an_ordinary_model_with_the_same_logits(source, tmp_path: Path, model_type: str):
    directory = source(model_type)
    to_hf(directory, tmp_path / "out", layer_spec=SPEC)
    config = ModelDirectory.at(tmp_path / "out").config
    before = ModelDirectory.at(directory).config
    layers = [3, 0, 1, 1, 3, 0]
    assert config.num_layers == 6
    for name in ("layer_windows", "layer_ropes", "layer_attn_scales"):
        kept = getattr(before, name)
        assert getattr(config, name) == tuple(kept[i] for i in layers if kept)
    np.testing.assert_array_equal(planned(tmp_path / "out"), planned(directory, SPEC))
    assert not (tmp_path / "out" / MANIFEST).exists()


@settings(max_examples=4)
@given(data=st.data())
def test_exporting_and_loading_a_plan_is_the_identity(data):
    scale = st.sampled_from([0.0, 0.5, 1.0, -2.0])
    slot = st.tuples(st.integers(0, 3), scale, scale).map(list)
    spec = json.dumps(data.draw(st.lists(slot, min_size=1, max_size=6)))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "m"
        write_tiny_hf(directory, "gemma2", **FOUR["gemma2"])
        to_hf(directory, Path(folder) / "out", layer_spec=spec)
        np.testing.assert_array_equal(planned(Path(folder) / "out"), planned(directory, spec))


def test_every_tensor_of_a_slot_is_its_layers_own_with_the_scales_multiplied_in(tmp_path: Path):
    write_tiny_hf(tmp_path / "m", "qwen3", attention_bias=True, dtype="bfloat16", **FOUR["qwen3"])
    to_hf(tmp_path / "m", tmp_path / "out", layer_spec="[2, [1, 0.3, -1.0], [3, 0, 0]]")
    before, after = load_file(tmp_path / "m/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name in after:
        number = name.split(".")[2] if ".layers." in name else None
        origin = name if number is None else name.replace(f".{number}.", f".{[2, 1, 3][int(number)]}.", 1)
        attn, mlp = {"1": (0.3, -1.0), "2": (0.0, 0.0)}.get(number or "", (1.0, 1.0))
        factor = attn if "o_proj" in name else mlp if "down_proj" in name else 1.0
        product = before[origin].astype(np.float32) * np.float32(factor)
        expected = before[origin] if factor == 1.0 else product.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    assert {n.split(".")[2] for n in after if "o_proj.bias" in n} == {"0", "1", "2"}


def test_configuration_says_the_layers_in_the_familys_words(source, tmp_path: Path):
    found = {}
    for model_type in ("qwen2", "gemma3_text", "llama", "gpt2"):
        to_hf(source(model_type), tmp_path / model_type, layer_spec="2:,0")
        found[model_type] = json.loads((tmp_path / model_type / "config.json").read_text())
    full, sliding = "full_attention", "sliding_attention"
    assert found["qwen2"]["layer_types"] == [sliding, sliding, full]
    assert found["qwen2"]["use_sliding_window"]
    assert found["gemma3_text"]["layer_types"] == [full, sliding, sliding]
    assert "layer_types" not in found["llama"]
    assert (found["llama"]["num_hidden_layers"], found["gpt2"]["n_layer"]) == (3, 3)


def test_the_text_half_of_a_multimodal_model_is_exported_as_a_text_model(tmp_path: Path):
    write_tiny_hf(tmp_path / "m", "gemma3_text", **FOUR["gemma3_text"])
    path = tmp_path / "m/config.json"
    text = json.loads(path.read_text())
    both = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    path.write_text(json.dumps({**both, "eos_token_id": [1, 106], "vision_config": {"hidden_size": 8}}))
    to_hf(tmp_path / "m", tmp_path / "out", layer_spec="1:3")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert "vision_config" not in config
    assert ModelDirectory.at(tmp_path / "out").source().config.num_layers == 2


def test_what_the_configuration_cannot_say_is_refused_before_anything_is_written(tmp_path: Path):
    write_tiny_hf(tmp_path / "m", "gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    said = r"gpt2 configuration cannot describe these layers: layer_attn_scales would be .* records the plan"
    for write in (to_hf, functools.partial(convert, plan="bake")):
        with pytest.raises(UsageError, match=said):
            write(tmp_path / "m", tmp_path / "out", layer_spec="1:3")
    to_hf(tmp_path / "m", tmp_path / "first", layer_spec="0:2")  # the first layers keep their numbers
    convert(tmp_path / "m", tmp_path / "recorded", layer_spec="1:3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "m", "recorded"]


def test_two_rotations_in_one_stack_are_refused(tiny_directory, tmp_path: Path):
    a, b = tiny_directory("llama"), tiny_directory("llama", rope_theta=500.0)
    assembly = assembly_of(a, b, layers=[LayerSource(0, 0), LayerSource(1, 1)])
    with pytest.raises(UsageError, match="llama configuration cannot describe these layers: ropes would be"):
        to_hf(assembly, tmp_path / "out")
    convert(assembly, tmp_path / "native")
    assert ModelDirectory.at(tmp_path / "native").config.layer_ropes == (0, 1)


@pytest.mark.parametrize(("factor", "tied"), [(2.0, True), (1.0, False)])
def test_a_tied_head_is_untied_only_where_it_is_scaled_otherwise(
    tiny_directory, tmp_path: Path, factor: float, tied: bool
):
    globals_ = (("embed.weight", (0, 2.0)), ("lm_head.weight", (0, factor)))
    assembly = assembly_of(tiny_directory("gemma2"), layers=[LayerSource(0, 0)], globals=globals_)
    to_hf(assembly, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is tied
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert ModelDirectory.at(tmp_path / "out").config.tied_embeddings is tied


def test_large_exports_are_written_in_shards_with_an_index(source, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    to_hf(
        source("phi3"), tmp_path / "out", layer_spec=SPEC, max_shard_bytes=20_000,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert seen[-1][0] == seen[-1][1] == index["metadata"]["total_size"]
    np.testing.assert_array_equal(planned(tmp_path / "out"), planned(source("phi3"), SPEC))


def test_quantized_models_are_exported_as_numbers_if_told(source, tmp_path: Path):
    convert(source("llama"), tmp_path / "native", quant=QuantFormat.parse("int8"))
    with pytest.raises(UsageError, match=r"holds int8 weights.*add --dequantize"):
        to_hf(tmp_path / "native", tmp_path / "out", layer_spec=SPEC)
    to_hf(tmp_path / "native", tmp_path / "out", layer_spec=SPEC, dequantize=True)
    np.testing.assert_allclose(
        planned(tmp_path / "out"), planned(tmp_path / "native", SPEC), rtol=0, atol=2e-5
    )


def test_a_recipe_of_two_models_is_exported(tiny_directory, tmp_path: Path):
    a, b = tiny_directory("llama"), tiny_directory("llama", seed=1, eos_token_id=[2, 9])
    layers = [LayerSource(0, 1), LayerSource(1, 2, (("q.weight", 0.5),))]
    assembly = assembly_of(a, b, layers=layers, dtype="bfloat16", tokenizer=1)
    manifest = to_hf(assembly, tmp_path / "out", layer_spec="1,0,1")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert manifest.parameters == sum(tensor.size for tensor in tensors.values())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["num_hidden_layers"]) == ("bfloat16", [2, 9], 3)
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.up_proj.weight"],
        load_file(a / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16),
    )


EXPORTED = (
    "llama-rope-llama3", "mistral-window", "ministral-mixed-layers", "qwen2-windows", "qwen3-everything",
    "gemma-plain", "gemma2-everything", "gemma3_text-two-rope-bases", "phi3-longrope-long", "gpt2-plain",
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("case", EXPORTED)
def test_transformers_gives_an_exported_plan_the_same_logits(tmp_path: Path, case: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.support.make_goldens import reference_logits

    parity_cases.write_hf(tmp_path / "m", case)
    num_layers = ModelDirectory.at(tmp_path / "m").config.num_layers
    spec = json.dumps([num_layers - 1, [0, 0.5, 2.0], [1, 0, 0], 1, [num_layers - 1, 1, 0.25], 0])
    to_hf(tmp_path / "m", tmp_path / "out", layer_spec=spec)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    runner = parity_cases.Runner(tmp_path / "m", slots=6)
    ids = parity_cases.tokens(case)
    found = np.stack(runner.reset(LayerPlan.parse(spec, num_layers)).feed(ids))
    assert parity_cases.error(found, reference_logits(reference, ids)) <= parity_cases.TOLERANCE


# Native: recorded or baked.


@pytest.mark.parametrize("format", ["native", "orbax"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2"])
def test_recorded_and_baked_plans_are_the_same_model(source, tmp_path: Path, model_type: str, format: str):
    directory = source(model_type)
    convert(directory, tmp_path / "recorded", layer_spec=SPEC, format=format)
    convert(directory, tmp_path / "baked", layer_spec=SPEC, plan="bake", format=format)
    assert (
        ModelDirectory.at(tmp_path / "recorded").config.num_layers,
        ModelDirectory.at(tmp_path / "baked").config.num_layers,
    ) == (
        3,
        6,
    )
    assert [Manifest.read(tmp_path / name).format_version for name in ("recorded", "baked")] == [2, 1]
    for spec in (None, "-1,0", "[[1, 0.5, 2], 1]"):  # text counts the slots of the plan
        expected = planned(directory, SPEC) if spec is None else logits(
            *load_params(directory), LayerPlan.parse(SPEC, 4).select(spec)
        )  # fmt: skip
        np.testing.assert_array_equal(planned(tmp_path / "recorded", spec), expected)
        np.testing.assert_array_equal(planned(tmp_path / "baked", spec), expected)


def test_a_recorded_plan_holds_each_used_layer_once(source, tmp_path: Path):
    written = convert(source("gemma2"), tmp_path / "native", layer_spec="[[3, 1, 0.5], 1, 3]")
    assert written.plan == "[[1, 1.0, 0.5], 0, 1]"
    assert written.stack is not None
    assert written.stack.layer_windows == (0, 0)
    config, params = load_params(tmp_path / "native")
    assert params["layers.q.weight"].shape[0] == config.num_layers == 2
    # `config.json` stays the base model's; the description knows better.
    assert json.loads((tmp_path / "native/config.json").read_text())["num_hidden_layers"] == 4
    report = describe_directory(tmp_path / "native")
    assert (report.slots, report.source_layers) == (3, 2)
    assert report.stored_parameters == written.parameters


def test_a_plan_that_keeps_every_layer_needs_no_other_stack(source, tmp_path: Path):
    written = convert(source("llama"), tmp_path / "native", layer_spec="0:3,1:")
    assert (written.plan, written.stack) == ("0:3,1:4", None)
    whole = convert(source("llama"), tmp_path / "whole", layer_spec="all")
    assert (whole.plan, whole.stack, whole.format_version) == (None, None, 1)


def test_recorded_plans_survive_conversion_and_are_baked_later(source, tmp_path: Path):
    directory = source("qwen2")
    convert(directory, tmp_path / "recorded", layer_spec=SPEC)
    convert(tmp_path / "recorded", tmp_path / "again", dtype="float32")
    assert ModelDirectory.at(tmp_path / "again").plan == ModelDirectory.at(tmp_path / "recorded").plan
    convert(tmp_path / "recorded", tmp_path / "fewer", layer_spec="0,4")
    convert(tmp_path / "recorded", tmp_path / "baked", plan="bake")
    to_hf(tmp_path / "recorded", tmp_path / "hf")
    for name in ("again", "baked", "hf"):
        np.testing.assert_array_equal(planned(tmp_path / name), planned(directory, SPEC))
    np.testing.assert_array_equal(planned(tmp_path / "fewer"), planned(directory, "[3, [3, 1, 0.25]]"))


def test_shared_tensors_stay_shared_in_a_native_checkpoint(tiny_directory, tmp_path: Path):
    directory = tiny_directory("llama")
    layers = [LayerSource(0, 1), LayerSource(0, 1, (("q.weight", 0.5),))]
    assembly = assembly_of(directory, layers=layers)
    written = convert(assembly, tmp_path / "native")
    config, params = load_params(tmp_path / "native")
    assert (params["layers.q.weight"].shape[0], params["layers.k.weight"].shape[0]) == (2, 1)
    assert dict(config.layer_rows)["layers.k.weight"] == (0, 0)
    assert written.parameters == sum(value.size for value in params.values())
    to_hf(tmp_path / "native", tmp_path / "hf")
    np.testing.assert_array_equal(planned(tmp_path / "hf"), planned(tmp_path / "native"))


def test_quantized_plans_are_baked_by_scaling_scales(source, tmp_path: Path):
    convert(source("llama"), tmp_path / "native", quant=QuantFormat.parse("int4"))
    convert(tmp_path / "native", tmp_path / "baked", layer_spec=SPEC, plan="bake")
    before, after = load_params(tmp_path / "native")[1], load_params(tmp_path / "baked")[1]
    np.testing.assert_array_equal(after["layers.down.weight"].codes[4], before["layers.down.weight"].codes[3])
    np.testing.assert_array_equal(
        after["layers.down.weight"].scales[4], 0.25 * np.asarray(before["layers.down.weight"].scales[3])
    )
    np.testing.assert_allclose(
        planned(tmp_path / "baked"), planned(tmp_path / "native", SPEC), rtol=0, atol=2e-5
    )


def test_load_runs_the_recorded_plan(tmp_path: Path):
    write_tiny_chat(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "recorded", layer_spec="0,2,2,1")
    model = jaxchat.load(tmp_path / "recorded")
    assert [slot.layer for slot in model.plan] == [0, 2, 2, 1]
    expected = jaxchat.load(tmp_path / "m", plan="0,2,2,1").generate("abc", max_new_tokens=4)[0]
    assert model.generate("abc", max_new_tokens=4)[0].token_ids == expected.token_ids
    assert [slot.layer for slot in model.with_plan("1:3").plan] == [2, 2]
    assert [slot.layer for slot in jaxchat.load(tmp_path / "recorded", plan="-1").plan] == [1]


def test_a_recipe_over_a_recorded_plan_is_refused(source, tmp_path: Path):
    convert(source("llama"), tmp_path / "recorded", layer_spec="0,2,2,1")
    text = "merge_method: passthrough\nslices:\n- sources: [{model: recorded, layer_range: [0, 2]}]\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"recorded records a layer plan.*--plan bake"):
        read_recipe(tmp_path / "r.yaml")
    convert(tmp_path / "recorded", tmp_path / "baked", plan="bake")
    (tmp_path / "r.yaml").write_text(text.replace("recorded", "baked"))
    assert len(read_recipe(tmp_path / "r.yaml").plan) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": "0:9,77"}, "jaxchat.json: the recorded layer plan is '0:9,77': layer 77 is out of range"),
        ({"plan": "@/etc/passwd"}, "the recorded layer plan is '@/etc/passwd': expected the plan itself"),
        ({"plan": 7}, "jaxchat.json: plan is 7; expected a text"),
        ({"stack": {"ropes": []}}, "jaxchat.json: stack: 'layer_ropes' is missing"),
        ({"stack": 3}, "jaxchat.json: stack is 3; expected an object"),
    ],
)
def test_damaged_descriptions_are_one_line(source, tmp_path: Path, change: dict, said: str):
    convert(source("llama"), tmp_path / "native", layer_spec="1:3")
    path = tmp_path / "native" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(JaxchatError) as caught:
        _ = ModelDirectory.at(tmp_path / "native").plan
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# From the command line.


def test_a_recipe_is_converted_with_its_remarks(tiny_directory, tmp_path: Path, commands):
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nslices:\n- sources: [{model: some/model, layer_range: [0, 2]}]\n"
        "- sources: [{model: some/model, layer_range: [1, 3]}]\n"
        "  parameters: {scale: [{filter: oproj, value: 0}]}\n"
    )
    done = commands(
        "convert", "--recipe", tmp_path / "r.yaml", "--model_path", f"some/model={tiny_directory('llama')}",
        "--dst", tmp_path / "out", "--to_hf",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "filter 'oproj' matches no tensor" in done.err
    assert ModelDirectory.at(tmp_path / "out").config.num_layers == 4
    assert done.out.startswith(f"{tmp_path}/out: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--src", "m", "--recipe", "r", "--dst", "d"], "both --src and --recipe are given"),
        (["--src", "m", "--dst", "d", "--model_path", "a=b"], "--model_path needs --recipe"),
        (
            ["--src", "MODEL", "--dst", "d", "--plan", "bake"],
            "no layer plan to bake; give --layer_spec or --recipe",
        ),
        (
            ["--src", "MODEL", "--dst", "d", "--to_hf", "--plan", "record"],
            "--plan cannot be combined with --to_hf",
        ),
        (["--src", "MODEL", "--dst", "d", "--layer_spec", "0:2,9"], "layer 9 is out of range"),
        (["--recipe", "none.yaml", "--dst", "d"], "none.yaml"),
    ],
)
def test_wrong_usage_is_said_and_leaves_nothing(
    tiny_directory, tmp_path: Path, monkeypatch, capsys, arguments: list[str], said: str
):
    from tools.convert import main

    monkeypatch.chdir(tmp_path)
    model = str(tiny_directory("llama"))
    assert main(["convert", *(model if text == "MODEL" else text for text in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
