"""GGUF models are the models that they were converted from, wherever a model directory may be given."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxchat
from jaxchat import quant
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.gguf_types import TYPES, dequantize
from jaxchat.checkpoints.load import load_assembly, load_params
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import JaxchatError
from jaxchat.families import read_config
from jaxchat.mixed import MixedTensor
from jaxchat.recipes.recipe import read_recipe
from tests.support.gguf_models import GGUF_CASES, write_gguf, write_gguf_file
from tests.support.parity_cases import Runner
from tests.support.tiny import random_hf_tensors, write_tiny_hf

Q = gguf.GGMLQuantizationType
TINY = GGUF_CASES["llama-plain"]


def write_both(folder: Path, case: str, **options: Any) -> tuple[Path, Path]:
    """A model as a Hugging Face directory and as a GGUF file."""
    values = GGUF_CASES[case]
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(values))
    tensors = random_hf_tensors(read_config(values), seed=3)
    save_file(tensors, folder / "hf/model.safetensors")
    write_gguf(folder / "model.gguf", values, tensors, **options)
    return folder / "hf", folder / "model.gguf"


def write_tiny(path: Path, values: Mapping[str, Any] = TINY, **options: Any) -> Path:
    write_gguf(path, values, random_hf_tensors(read_config(values), seed=3), **options)
    return path


def error_of(act: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(JaxchatError) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def open_source(path: Path) -> Any:
    return ModelDirectory.at(path).source()


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_allclose(
            np.asarray(found[name]), np.asarray(value), rtol=0, atol=atol, err_msg=name
        )


# --- every architecture


@pytest.mark.parametrize("case", GGUF_CASES)
def test_a_model_is_the_one_it_was_converted_from(case: str, tmp_path: Path):
    hf, path = write_both(tmp_path, case)
    expected_config, expected = load_params(hf)
    config, params = load_params(path)
    assert dataclasses.replace(config, **_left_open(expected_config)) == dataclasses.replace(
        expected_config, ropes=config.ropes
    )
    for found, wanted in zip(config.ropes, expected_config.ropes, strict=True):
        # Of phi3 the file has the factor in float32.
        assert dataclasses.replace(found, attention_factor=wanted.attention_factor) == wanted
        assert found.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6)
    # A norm that is stored with 1 added has lost its last bits.
    assert_same(params, expected, atol=1e-6 if config.norm_offset else 0)


def _left_open(config: Any) -> dict[str, Any]:
    """What a file without a vocabulary, or whose architecture is also another's, does not say."""
    return {name: getattr(config, name) for name in ("bos_id", "eos_ids", "model_type", "family")}


def logits(path: Path, ids: list[int]) -> np.ndarray:
    return np.stack(Runner(path, batch=1).feed([ids]))[0]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "mixed-Q4_K_M"])
def test_quantized_models_give_the_logits_of_their_reference(shared_data: Path, kind: str):
    ids = json.loads((shared_data / "gguf-quants/expected.json").read_text())["ids"]
    found = logits(shared_data / f"gguf-quants/llama-{kind}.gguf", ids)
    with np.load(shared_data / "gguf-quants/expected_logits.npz") as expected:
        np.testing.assert_allclose(found, expected[kind], atol=2e-5)


def test_stories260k_continues_greedily_like_llama2c(shared_data: Path):
    expected = json.loads((shared_data / "oracles/llama2.c/stories260K_greedy_ids.json").read_text())
    model = jaxchat.load(shared_data / "models/stories260K/stories260K.gguf")
    result = model.generate(token_ids=[expected[:1]], max_new_tokens=len(expected) - 1)[0]
    assert result.token_ids == expected[1:]
    if model.tokenizer is not None:
        text = (shared_data / "oracles/llama2.c/stories260K_expected_stdout_200steps.txt").read_text()
        assert result.text.strip().startswith(text.strip())


def test_a_model_of_random_numbers_with_a_full_vocabulary_loads(shared_data: Path):
    config, params = load_params(shared_data / "models/llama-2-tiny-random")  # the only one in its folder
    assert (config.vocab_size, config.bos_id, config.eos_ids) == (32000, 1, (2,))
    assert params["layers.q.weight"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("bloom-alibi", "general.architecture is 'bloom', which is not supported"),
        ("mixtral", "llama.expert_count is 4, which is not supported"),
        ("t5-v1.0-relu", "general.architecture is 't5', which is not supported"),
    ],
)
def test_models_of_other_architectures_are_refused_by_name(shared_data: Path, folder: str, says: str):
    assert says in error_of(open_source, shared_data / f"families/{folder}/model-f16.gguf")


# --- how tensors are stored


@pytest.mark.parametrize(("kind", "dtype"), [(Q.F16, np.float16), (Q.BF16, ml_dtypes.bfloat16)])
def test_plain_sixteen_bits_stay_as_they_are(kind: Q, dtype: Any, tmp_path: Path):
    source = open_source(write_tiny(tmp_path / "m.gguf", kind=kind))
    params = {param.name: param for param in source.table}
    assert source.dtype(params["layers.q.weight"]) == dtype
    assert source.dtype(params["layers.attn_norm.weight"]) == np.float32
    assert source.layer(params["layers.q.weight"], 1).dtype == dtype
    assert ModelDirectory.at(tmp_path / "m.gguf").stored_dtype == np.dtype(dtype).name


MIXED = {"blk.0.ffn_down.weight": Q.F16, "blk.2.ffn_down.weight": Q.BF16, "blk.3.ffn_down.weight": Q.Q4_0}


def numbers_of(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32) if isinstance(values, np.ndarray) else quant.dequantize(values)


def test_layers_of_several_types_keep_them(tmp_path: Path):
    values = {**TINY, "hidden_size": 96, "intermediate_size": 64}
    path = write_tiny(tmp_path / "m.gguf", values, kind=Q.Q8_0, kinds=MIXED)
    source, file = open_source(path), GgufFile(path)
    param = next(p for p in source.table if p.name == "layers.down.weight")
    raw = [file.raw(f"blk.{layer}.ffn_down.weight") for layer in range(4)]
    expected = [dequantize(TYPES[k], found) for k, found in zip((1, 8, 30, 2), raw, strict=True)]
    for layer, numbers in enumerate(expected):
        np.testing.assert_array_equal(numbers_of(source.layer(param, layer)), numbers)
    stack = load_params(path)[1]["layers.down.weight"]
    assert isinstance(stack, MixedTensor)
    assert ModelDirectory.at(path).manifest.quantization.parameters["layers.down.weight"] == [
        "float16", "q8_0", "bfloat16", "q4_0",
    ]  # fmt: skip


WIDE = {
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_weights_keep_their_bits_in_memory_and_in_conversions(kind: str, tmp_path: Path):
    pytest.importorskip("libgguf")
    path = write_tiny(tmp_path / "m.gguf", WIDE, kind=Q[kind])
    config, params = load_params(path)
    file = GgufFile(path)
    sizes = {name: entry.nbytes for name, entry in file.entries.items()}
    down = params["layers.down.weight"]
    stored = sum(size for name, size in sizes.items() if "ffn_down" in name)
    assert down.nbytes <= 1.1 * stored
    for place in ("layers.q.weight", "embed.weight"):
        assert isinstance(params[place], quant.QuantizedTensor), place
    convert(path, tmp_path / "native")
    again_config, again = load_params(tmp_path / "native")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_mixture_is_one_model_in_every_form(tmp_path: Path):
    pytest.importorskip("libgguf")
    kinds = {"blk.1.ffn_down.weight": Q.Q6_K, "blk.3.ffn_down.weight": Q.Q6_K, "token_embd.weight": Q.Q6_K}
    metadata = {"general.file_type": 15}
    path = write_tiny(tmp_path / "m.gguf", WIDE, kind=Q.Q4_K, kinds=kinds, metadata=metadata)
    ids = [[1, 5, 9, 2], [7, 3]]

    def answers(where: Any, **options: Any) -> list[list[int]]:
        model = jaxchat.load(where, **options)
        return [found.token_ids for found in model.generate(token_ids=ids, max_new_tokens=5)]

    assert ModelDirectory.at(path).stored_dtype == "q4_k_m"
    stack = load_params(path)[1]["layers.down.weight"]
    assert (stack.part, stack.row) == ((0, 1, 0, 1), (0, 0, 1, 1))
    convert(path, tmp_path / "native")
    assert ModelDirectory.at(tmp_path / "native").manifest.format_version == 3
    assert answers(tmp_path / "native") == answers(path)
    spec = "3,0:2,1"
    planned = answers(path, plan=spec)
    assert answers(tmp_path / "native", plan=spec) == planned
    for form in ("record", "bake"):
        convert(path, tmp_path / form, layer_spec=spec, plan=form)
        assert answers(tmp_path / form) == planned
    to_hf(path, tmp_path / "hf", dequantize=True)
    before, after = load_params(path)[1], load_params(tmp_path / "hf")[1]
    second = quant.dequantize(quant.layer_slice(before["layers.down.weight"].parts[1], 0))
    np.testing.assert_array_equal(after["layers.down.weight"][1], second)


@pytest.mark.parametrize(("kind", "small"), [("Q2_K", "q4_k"), ("IQ4_NL", "q5_k"), ("Q3_K", "q4_k")])
def test_what_no_format_holds_is_quantized_again_or_kept_exactly(
    kind: str, small: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("libgguf")
    path = write_tiny(tmp_path / "m.gguf", WIDE, kind=Q[kind])
    raw = GgufFile(path).raw("blk.2.ffn_down.weight")
    numbers = dequantize(next(t for t in TYPES.values() if t.name == kind), raw)
    exact = load_params(path, keep="exact")[1]["layers.down.weight"]
    np.testing.assert_array_equal(exact[2], numbers)
    assert not caplog.messages
    found = load_params(path)[1]["layers.down.weight"]
    assert found.format_name == small
    error = quant.dequantize(quant.layer_slice(found, 2)) - numbers
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(numbers)
    (message,) = caplog.messages
    assert f"{kind} to {small} (keep='exact' keeps the numbers, at 32 bits)" in message


def test_a_big_endian_model_is_the_same(tmp_path: Path):
    little, big = write_tiny(tmp_path / "l.gguf"), write_tiny(tmp_path / "b.gguf", big_endian=True)
    assert_same(load_params(big)[1], load_params(little)[1])


def fuse_qkv(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    for layer in range(4):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{name}.{kind}", None) for name in "qkv"]
            if parts[0] is not None:
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)


def fuse_gate_up(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    for layer in range(4):
        parts = [tensors.pop(f"blk.{layer}.ffn_{name}.weight") for name in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_up.weight"] = np.concatenate(parts)


def split_phi3(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    for layer in range(4):
        q, k, v = np.split(tensors.pop(f"blk.{layer}.attn_qkv.weight"), [36, 48])
        tensors |= {
            f"blk.{layer}.attn_{name}.weight": part for name, part in zip("qkv", (q, k, v), strict=True)
        }


@pytest.mark.parametrize(
    ("case", "edit"),
    [
        ("llama-plain", fuse_qkv),
        ("qwen2-plain", fuse_qkv),
        ("llama-plain", fuse_gate_up),
        ("phi3-plain", split_phi3),
    ],
)
def test_projections_may_be_fused_or_not(case: str, edit: Any, tmp_path: Path):
    hf, path = write_both(tmp_path, case, edit=edit)
    assert_same(load_params(path)[1], load_params(hf)[1])


def test_a_tensor_with_a_number_beside_it_is_multiplied_by_it(tmp_path: Path):
    def edit(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.attn_v.scale"] = np.asarray([0.5], np.float32)
        tensors["blk.1.attn_v.input_scale"] = np.asarray([3.0], np.float32)

    hf, path = write_both(tmp_path, "llama-plain", edit=edit)
    found, expected = load_params(path)[1], load_params(hf)[1]
    halved = np.asarray(expected["layers.v.weight"]).copy()
    halved[1] *= 0.5
    assert_same(found, {**expected, "layers.v.weight": halved})


@pytest.mark.parametrize("copied", [True, False])
def test_a_head_that_is_a_copy_of_the_embedding_is_tied(copied: bool, tmp_path: Path):
    def edit(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"] + (0 if copied else 1)

    directory = ModelDirectory.at(write_tiny(tmp_path / "m.gguf", GGUF_CASES["gpt2-plain"], edit=edit))
    assert directory.config.tied_embeddings is copied
    assert ("lm_head.weight" in load_params(directory)[1]) is not copied


def test_a_layer_is_dequantized_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = {**TINY, "vocab_size": 5000, "hidden_size": 192}
    path = write_tiny(tmp_path / "m.gguf", values, kinds={"token_embd.weight": Q.MXFP4})
    source = ModelDirectory.at(path).source(keep="exact")
    param = next(p for p in source.table if p.name == "embed.weight")
    whole = source.layer(param, 0)
    monkeypatch.setattr("jaxchat.checkpoints.gguf._CHUNK", 30_000)
    tracemalloc.start()
    found = source.layer(param, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, whole)
    assert peak < 1.5 * found.nbytes


# --- what does not fit


def without(name: str) -> Any:
    return lambda keys, tensors: tensors.pop(name)


def another(name: str, shape: tuple[int, ...]) -> Any:
    return lambda keys, tensors: tensors.__setitem__(name, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without("blk.2.ffn_up.weight"), "missing tensors: blk.2.ffn_up.weight [52, 36]"),
        (another("blk.1.strange.weight", (3,)), "unexpected tensors: blk.1.strange.weight"),
        (another("blk.3.attn_k.weight", (7, 36)), "blk.3.attn_k.weight: expected [12, 36], found [7, 36]"),
        (another("blk.0.attn_q.scale", (2,)), "blk.0.attn_q.scale: expected [1], found [2]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit: Any, says: str, tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", edit=edit)
    message = error_of(open_source, path)
    assert message.startswith(f"{path}: does not fit its metadata: ")
    assert says in message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"general.type": "adapter"}, "an adapter (LoRA) and not a model"),
        ({"general.type": "mmproj"}, "the part of a model that reads images or sound"),
        ({"general.type": "imatrix"}, "an importance matrix, which is for quantizing"),
    ],
)
def test_what_is_no_model_is_told(keys: dict[str, Any], says: str, tmp_path: Path):
    write_gguf_file(tmp_path / "m.gguf", "llama", keys, {"a.weight": np.zeros((2, 32), np.float32)})
    assert says in error_of(lambda: ModelDirectory.at(tmp_path / "m.gguf").config)


def test_a_vocabulary_is_shown_and_not_loaded(tmp_path: Path, commands: Any):
    path = write_tiny(
        tmp_path / "m.gguf", edit=lambda keys, tensors: tensors.clear() or keys.update(_VOCABULARY)
    )
    assert "vocabulary 3, width 36" in commands.output("show", "-m", path)
    assert "holds no tensors: a vocabulary, or a description; give the model's file" in error_of(
        open_source, path
    )


_VOCABULARY = {"tokenizer.ggml.tokens": ["a", "b", "c"], "llama.vocab_size": None}


# --- folders


def test_a_folder_with_one_model_is_that_model(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_tiny(folder / "m.gguf")
    write_gguf_file(folder / "mmproj-m.gguf", "clip", {}, {"a": np.zeros(3, np.float32)})
    found = ModelDirectory.at(folder)
    assert found == ModelDirectory.at(path)
    assert (found.path, found.name) == (path, "tiny")


def test_a_folder_with_several_lists_them(tmp_path: Path):
    for name in ("b.gguf", "a.gguf"):
        write_tiny(tmp_path / name)
    assert error_of(ModelDirectory.at, tmp_path) == (
        f"{tmp_path}: holds several models: a.gguf, b.gguf; give the file of one"
    )


def test_parts_are_one_model(tmp_path: Path):
    whole = write_tiny(tmp_path / "whole.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tiny(folder / "m.gguf", parts=3)
    assert sorted(path.name for path in folder.iterdir()) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert_same(load_params(folder)[1], load_params(whole)[1])
    assert "part 3 of 3; give the first part" in error_of(open_source, folder / "m-00003-of-00003.gguf")
    (folder / "m-00001-of-00003.gguf").unlink()
    assert "m-00002-of-00003.gguf: part 2 of 3; give the first part" in error_of(open_source, folder)


def test_beside_a_config_the_file_itself_must_be_given(tmp_path: Path):
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    path = write_tiny(tmp_path / "m.gguf")
    assert "m.gguf is there, of the format GGUF, which is read if you give the file itself" in error_of(
        open_source, tmp_path
    )
    assert ModelDirectory.at(path).source().config.num_layers == 4


def test_a_file_without_its_ending_is_known_by_its_beginning(tmp_path: Path):
    assert ModelDirectory.at(write_tiny(tmp_path / "model")).config.num_layers == 4


def test_files_of_ggml_are_told_whatever_they_are_called(tmp_path: Path):
    path = tmp_path / "ggml-model-q4_0.bin"
    path.write_bytes(b"tjgg" + bytes(100))
    says = f"{path}: of the format GGML, which GGUF has replaced; convert it with llama.cpp's"
    assert says in error_of(open_source, path)


# --- what else is known of a model


def test_names_sampling_and_templates_are_read(tmp_path: Path):
    keys = {
        "general.name": "A \x1b name\n of two lines",
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 40,
        "general.sampling.top_p": 0.9,
        "general.sampling.min_p": 0.05,
        "general.sampling.penalty_repeat": 1.1,
    }
    directory = ModelDirectory.at(write_tiny(tmp_path / "m.gguf", metadata=keys))
    assert directory.name == "A ␛ name of two lines"
    assert directory.recommended_sampling == {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    assert ModelDirectory.at(write_tiny(tmp_path / "n.gguf")).recommended_sampling == {}
    nameless = ModelDirectory.at(write_tiny(tmp_path / "some-model.gguf", metadata={"general.name": None}))
    assert nameless.name == "some-model"


class _Tokenizer:
    """Stands for any."""

    special_tokens: Mapping[str, int] = {"<s>": 0, "</s>": 1}
    bos_id, eos_ids = 0, (1,)


def test_templates_are_rendered_with_the_special_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxchat.text.tokenizer_gguf.tokenizer_of", lambda metadata, where: _Tokenizer())
    keys = {
        "tokenizer.ggml.tokens": ["<s>", "</s>", "x"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 4294967295,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
        "{{ unk_token }}{{ pad_token }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
    }
    template = ModelDirectory.at(write_tiny(tmp_path / "m.gguf", metadata=keys)).template
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "<s>hi</s>x"
    assert template.render(messages, tools=[{}, {}]) == "tools: 2"
    broken = write_tiny(tmp_path / "n.gguf", metadata={"tokenizer.chat_template": 7})
    assert "tokenizer.chat_template is 7; expected a text" in error_of(
        lambda: ModelDirectory.at(broken).template
    )


# --- wherever a model may be given


@pytest.mark.parametrize(
    "case", ["llama-biases", "gemma3_text-linear", "phi3-longrope-crossing", "gpt2-plain"]
)
def test_conversions_to_hugging_faces_layout_are_the_model(case: str, tmp_path: Path):
    hf, path = write_both(tmp_path, case)
    to_hf(path, tmp_path / "back")
    config, params = load_params(tmp_path / "back")
    assert config == ModelDirectory.at(path).config
    assert_same(params, load_params(hf)[1], atol=1e-6 if config.norm_offset else 0)


def test_conversions_to_native_are_the_model(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", metadata={"general.sampling.temp": 0.5})
    convert(path, tmp_path / "native", quant=None)
    found = ModelDirectory.at(tmp_path / "native")
    assert found.config == ModelDirectory.at(path).config
    assert found.recommended_sampling == {"temperature": 0.5}
    assert_same(load_params(found)[1], load_params(path)[1])
    to_hf(path, tmp_path / "longer", layer_spec="0:3,1:")
    assert ModelDirectory.at(tmp_path / "longer").config.num_layers == 6
    assert "source and destination must be separate" in error_of(convert, path, tmp_path)


RECIPE = """
slices:
  - sources: [{model: m.gguf, layer_range: [0, 3]}]
  - sources: [{model: other, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""


def test_recipes_take_files_by_name_and_by_path(tmp_path: Path):
    write_tiny(tmp_path / "m.gguf")
    other = write_tiny(tmp_path / "elsewhere.gguf")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assembly = read_recipe(tmp_path / "recipe.yaml", {"other": other})
    config, params = load_assembly(assembly)
    assert (config.num_layers, params["layers.q.weight"].shape[0], len(assembly.plan)) == (6, 6, 6)
    message = error_of(read_recipe, tmp_path / "recipe.yaml", {"other": tmp_path / "none.gguf"})
    assert "no such directory or GGUF file" in message


def test_commands_take_a_file(tmp_path: Path, commands: Any):
    path = write_tiny(tmp_path / "m.gguf")
    assert json.loads(commands.output("show", "-m", path, "--json"))["model"] == "tiny"
    assert "6 slots over 4 source layers" in commands.output("plan", "-m", path, "--layer_spec", "0:3,1:")
    done = commands("convert", "--src", path, "--dst", tmp_path / "dst", "--to_hf")
    assert (done.code, (tmp_path / "dst/config.json").exists()) == (0, True)
    message = commands.error("show", "-m", tmp_path / "none.gguf", code=2)
    assert (
        "none.gguf: no such model directory; give the folder that holds config.json, or a GGUF file"
        in message
    )


def test_quantizing_while_loading_works(tmp_path: Path):
    from jaxchat.quant import QuantFormat, QuantizedTensor

    _, params = load_params(write_tiny(tmp_path / "m.gguf"), quant=QuantFormat.parse("int8:channel"))
    assert isinstance(params["layers.q.weight"], QuantizedTensor)
    assert jax.tree.leaves(params)
