"""Loading model directories: what is read, what is refused and with which words, and what it costs."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_assembly, load_params
from jaxchat.checkpoints.safetensors_file import PAD_PREFIX, SafetensorsFile, SafetensorsWriter
from jaxchat.checkpoints.source import fold_layers
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.recipes.recipe import read_recipe
from jaxchat.sharding import param_sharding, shard_params
from tests.support.commands import Commands
from tests.support.memory import added, is_mapped, needs_counters, needs_mappings
from tests.support.tiny import TINY_CONFIGS, write_tiny_hf

ROOT = Path(__file__).resolve().parents[2]
bfloat16 = ml_dtypes.bfloat16


def edit_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def shard(directory: Path, count: int = 3) -> dict[str, str]:
    """Splits the model into shards with an index; returns the index's weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def error_of(directory: Path, **arguments: str) -> str:
    with pytest.raises(JaxchatError) as caught:
        load_params(directory, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


# What is read.


def test_layers_are_stacked_in_order(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    hf = load_file(tmp_path / "model.safetensors")
    config, params = load_params(tmp_path)
    assert config.num_layers == 3
    expected = np.stack([hf[f"model.layers.{i}.self_attn.k_proj.weight"] for i in range(3)])
    np.testing.assert_array_equal(params["layers.k.weight"], expected)
    np.testing.assert_array_equal(params["embed.weight"], hf["model.embed_tokens.weight"])


def test_phi3_fused_tensors_are_cut(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "phi3")  # 4 heads and 2 key/value heads of 6, feed-forward 44
    hf = load_file(tmp_path / "model.safetensors")
    _, params = load_params(tmp_path)
    qkv, gate_up = (
        hf["model.layers.1.self_attn.qkv_proj.weight"],
        hf["model.layers.1.mlp.gate_up_proj.weight"],
    )
    for name, part in {
        "q": qkv[:24],
        "k": qkv[24:36],
        "v": qkv[36:],
        "gate": gate_up[:44],
        "up": gate_up[44:],
    }.items():
        np.testing.assert_array_equal(params[f"layers.{name}.weight"][1], part)


def test_gpt2_conv1d_is_cut_and_turned(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "gpt2")
    hf = load_file(tmp_path / "model.safetensors")
    _, params = load_params(tmp_path)
    np.testing.assert_array_equal(
        params["layers.v.weight"][2], hf["transformer.h.2.attn.c_attn.weight"][:, 48:].T
    )
    np.testing.assert_array_equal(params["layers.k.bias"][2], hf["transformer.h.2.attn.c_attn.bias"][24:48])


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_native_loads_what_hugging_face_loads(tmp_path: Path, model_type: str) -> None:
    write_tiny_hf(tmp_path / "hf", model_type, dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "native")
    config, params = load_params(tmp_path / "hf")
    native_config, native = load_params(tmp_path / "native")
    assert native_config == config
    assert_equal(native, params)


def test_bfloat16_is_bits_on_the_cpu(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama", dtype="bfloat16")
    hf = load_file(tmp_path / "model.safetensors")
    _, params = load_params(tmp_path)
    assert params["norm.weight"].dtype == np.uint16
    assert np.asarray(params["norm.weight"]).view(bfloat16).tobytes() == hf["model.norm.weight"].tobytes()


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "qwen3")
    _, whole = load_params(tmp_path)
    shard(tmp_path)
    assert_equal(load_params(tmp_path)[1], whole)


@pytest.mark.parametrize(
    ("model_type", "start", "replacement"),
    [
        ("gpt2", "transformer.", ""),
        ("gemma3_text", "", "language_model."),
        ("gemma3_text", "model.", "model.language_model."),
    ],
)
def test_other_prefixes_are_recognised(tmp_path: Path, model_type: str, start: str, replacement: str) -> None:
    write_tiny_hf(tmp_path, model_type)
    _, params = load_params(tmp_path)

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[replacement + name.removeprefix(start)] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    assert_equal(load_params(tmp_path)[1], params)
    assert ModelDirectory.at(tmp_path).source().manifest.rename == (start, replacement)


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_a_checkpoint_of_the_bare_model_is_read_and_written_back(model_type: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_tiny_hf(src, model_type)
    expected = load_params(src)[1]

    def bare(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[re.sub(r"^(model|transformer)\.", "", name)] = tensors.pop(name)

    edit_tensors(src, bare)
    assert_equal(load_params(src)[1], expected)
    convert(src, tmp_path / "native")
    assert_equal(load_params(tmp_path / "native")[1], expected)
    to_hf(tmp_path / "native", tmp_path / "back")
    stored, back = (load_file(path / "model.safetensors") for path in (src, tmp_path / "back"))
    assert stored.keys() == back.keys()
    convert(src, tmp_path / "part", layer_spec="1,0")
    recipe = tmp_path / "recipe.yaml"
    sources = (
        "[{sources: [{model: src, layer_range: [0, 1]}]}, {sources: [{model: src, layer_range: [0, 2]}]}]"
    )
    recipe.write_text(f"merge_method: passthrough\nslices: {sources}\n")
    loaded = load_assembly(read_recipe(recipe))[1]
    np.testing.assert_array_equal(loaded["embed.weight"], expected["embed.weight"])


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.original_inv_freq"),
        ("qwen2", "model.layers.2.self_attn.rotary_emb.cos_cached"),
        ("gemma2", "model.layers.1.self_attn.rotary_emb.sin_cached"),
        ("phi3", "model.causal_mask"),
        ("mistral", "model.embed_positions.position_ids"),
        ("gemma3_text", "model.rotary_emb_local.inv_freq"),
    ],
)
def test_buffers_are_ignored(
    model_type: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_hf(tmp_path, model_type)
    edit_tensors(tmp_path, lambda t: t.update({name: np.ones((1, 1, 4, 4), np.bool_)}))
    load_params(tmp_path)
    weight_map = shard(tmp_path)
    load_params(tmp_path)
    # An index may name what no shard has, if nobody needs it.
    write_index(tmp_path, weight_map | {"model.rotary_emb.inv_freq": "model-00001-of-00003.safetensors"})
    load_params(tmp_path)
    assert not caplog.messages
    write_index(tmp_path, weight_map | {"model.layers.0.lost": "model-00001-of-00003.safetensors"})
    assert "tensors not in the shard it names: model.layers.0.lost" in error_of(tmp_path)


HEADS = ["score.weight", "v_head.summary.weight", "v_head.summary.bias", "classifier.dense.weight"]


@pytest.mark.parametrize("bare", [False, True])
def test_heads_beside_the_model_are_ignored_with_a_word(
    bare: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_hf(tmp_path, "llama")
    expected = load_params(tmp_path)[1]

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors) if bare else ():
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors.update({name: np.ones(3, np.float32) for name in HEADS})

    edit_tensors(tmp_path, edit)
    assert_equal(load_params(tmp_path)[1], expected)
    [warning] = caplog.messages
    assert warning.startswith(f"{tmp_path}/model.safetensors: ignored, as no part of the model: ")
    assert all(name in warning for name in HEADS)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.3.input_layernorm.weight",
        "model.norm.bias",
        "model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_what_is_inside_of_the_model_and_unexpected_is_an_error(name: str, tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    edit_tensors(tmp_path, lambda t: t.update({name: np.ones(24, np.float32)}))
    assert f"unexpected tensors: {name}" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../x.safetensors", "a\0b", "s" * 300, "/etc/hosts"])
def test_a_shard_is_a_file_beside_the_index(name: str, tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    weight_map = shard(tmp_path)
    write_index(tmp_path, {**weight_map, "model.norm.weight": name})
    assert "index.json: shard " in error_of(tmp_path)
    assert len(error_of(tmp_path)) < 400


def test_weights_in_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "model.safetensors: not a file" in error_of(tmp_path)


@pytest.mark.parametrize("header", [b"9" * 5000, b"[" * 100_000, b'{"a": ' * 5000, b"\xff{}", b""])
def test_a_header_that_cannot_be_read_is_told(header: bytes, tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert re.search(r"model\.safetensors: .*; download the file again$", error_of(tmp_path))


def test_a_message_of_very_many_names_has_some_of_them(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    names = {f"model.extra{'x' * n}.weight": np.ones(2, np.float32) for n in range(300)}
    edit_tensors(tmp_path, lambda t: t.update(names))
    message = error_of(tmp_path)
    assert message.endswith("; and 280 more; take both from one model")
    assert len(message) < 4000


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quantization_config": {"quant_method": "aqlm", "nbits_per_codebook": 16}}, "aqlm"),
        ({"quantization_config": {"quant_method": "quark"}}, "quark"),
        ({"quantization_config": {"quant_type": "int4wo"}}, "int4wo"),
        ({"quantization_config": "gptq"}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"x": 1}}, "an unnamed method"),
    ],
)
def test_a_checkpoint_quantized_elsewhere_names_the_method(
    entry: dict[str, Any], method: str, tmp_path: Path, commands: Commands
) -> None:
    config = write_tiny_hf(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({**config, **entry}))
    says = f"{tmp_path}/config.json: quantized with {method} (key '{next(iter(entry))}'), which is not read; "
    for command in (
        ("show", "-m"),
        ("plan", "-m"),
        ("generate", "-p", "x", "-m"),
        ("generate", "--show", "-m"),
    ):
        assert commands.error(*command, tmp_path, code=1).startswith(says)
    convert_to = ("convert", "--dst", tmp_path / "out", "--src")
    assert commands.error(*convert_to, tmp_path, code=1).startswith(says)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    load_params(tmp_path)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("gptq", ["qweight", "qzeros", "scales", "g_idx"]),
        ("awq", ["qweight", "qzeros", "scales"]),
        (
            "bitsandbytes",
            ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
        ),
        ("bitsandbytes", ["weight", "SCB"]),
        ("compressed-tensors", ["weight_packed", "weight_scale", "weight_shape"]),
        ("fp8", ["weight", "weight_scale_inv"]),
        ("fp8", ["weight", "weight_scale", "input_scale"]),
        ("mxfp4", ["weight_blocks", "weight_scales"]),
        ("MLX", ["weight", "scales", "biases"]),
    ],
)
def test_the_names_of_tensors_tell_the_method_too(method: str, names: list[str], tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    projection = "model.layers.0.self_attn.k_proj."

    def edit(tensors: dict[str, np.ndarray]) -> None:
        value = tensors.pop(f"{projection}weight")
        tensors.update({projection + name: value for name in names})

    edit_tensors(tmp_path, edit)
    says = f"holds tensors quantized with {method}, but config.json has no quantization_config"
    if method == "MLX":
        says = f"quantized with {method}, which is not read; take the original"
    assert f"model.safetensors: {says}" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ggml-model.ggml", "of the format GGML, not read"),
        ("decoder.onnx", "of the format ONNX, not read"),
        (
            "consolidated.00.pth",
            "a file of PyTorch's, without Meta's params.json beside it not read; convert",
        ),
        ("model.bin", "a file of PyTorch's, not read; convert it to safetensors with"),
        (
            "weights.pt",
            "a file of PyTorch's, if it is llama2.c's give the file itself; any other is not read",
        ),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_a_file_of_another_format_says_so(name: str, says: str, configured: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    broken = "not a file of PyTorch's tensors"  # as Meta and llama2.c have them
    own = broken if name.endswith((".pth", ".pt")) else says
    assert f"{tmp_path / name}: {own}" in error_of(tmp_path / name)
    if configured:
        write_tiny_hf(tmp_path, "llama")
        (tmp_path / "model.safetensors").unlink()
    assert f"{name} is there, {says}" in error_of(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9f\nsize 9\n"


@pytest.mark.parametrize("content", [POINTER, b"\n<html><body>404</body></html>"])
@pytest.mark.parametrize("format", ["hf", "sharded", "native", "orbax", "config"])
def test_what_was_not_downloaded_is_told(format: str, content: bytes, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_tiny_hf(src, "llama")
    if format in ("native", "orbax"):
        convert(src, dst, format=format)
        src = dst
    elif format == "sharded":
        shard(src)
    names = {
        "hf": "model.safetensors",
        "sharded": "model-00002-of-00003.safetensors",
        "native": "model.safetensors",
        "orbax": "orbax/manifest.ocdbt",
        "config": "config.json",
    }
    path = src / names[format]
    path.write_bytes(content)
    says = "a Git LFS pointer, .*run `git lfs pull` in" if content == POINTER else "a web page, not"
    assert re.match(rf"{path}: {says}", error_of(src))


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "phi3")
    calls: list[tuple[int, int]] = []
    load_params(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    )


# Tied heads, as transformers 5 decides.


def test_tied_head_stored_as_a_copy_is_accepted(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "qwen2")
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    config, params = load_params(tmp_path)
    assert config.tied_embeddings
    assert "lm_head.weight" not in params


def test_tied_model_that_stores_only_the_head_is_read(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "qwen2")
    _, params = load_params(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_equal(load_params(tmp_path)[1], params)


def test_tied_head_that_differs_is_not_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_hf(tmp_path / "hf", "qwen2")
    edit_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}))
    config, params = load_params(tmp_path / "hf")
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params["lm_head.weight"], -params["embed.weight"])
    assert "tie_word_embeddings" in caplog.text
    convert(tmp_path / "hf", tmp_path / "native")
    assert load_params(tmp_path / "native")[0] == config


# Dtypes.


def test_conversion_to_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    # 8 bits of significand: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    values = {0: 1 + 2**-8, 1: 1 + 3 * 2**-8, 2: 1 + 2**-8 + 2**-20, 3: np.inf, 4: -np.inf, 5: 1e-40}
    expected = {0: 1.0, 1: 1 + 2**-6, 2: 1 + 2**-7, 3: np.inf, 4: -np.inf, 5: float(bfloat16(1e-40))}

    def put(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][list(values)] = list(values.values())
        tensors["model.norm.weight"][6] = np.nan

    write_tiny_hf(tmp_path, "llama")
    edit_tensors(tmp_path, put)
    norm = np.asarray(load_params(tmp_path, dtype="bfloat16")[1]["norm.weight"]).view(bfloat16)
    assert [float(norm[i]) for i in expected] == list(expected.values())
    assert np.isnan(norm[6])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_conversion_equals_numpys(tmp_path: Path, stored: str, wanted: str) -> None:
    write_tiny_hf(tmp_path, "gpt2", dtype=stored)
    target = np.dtype(bfloat16 if wanted == "bfloat16" else wanted)
    hf = load_file(tmp_path / "model.safetensors")["transformer.h.1.mlp.c_fc.weight"].T.astype(target)
    found = np.asarray(load_params(tmp_path, dtype=wanted)[1]["layers.up.weight"][1])
    assert found.tobytes() == hf.tobytes()


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")

    def put(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.inf

    edit_tensors(tmp_path, put)
    assert error_of(tmp_path, dtype="float16") == (
        "layers.up.weight[1]: 70000 is too large for float16 (largest 65504); use bfloat16"
    )


def test_layers_of_unlike_dtypes_share_the_widest(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama", dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: t[name].astype(np.float32)}))
    assert load_params(tmp_path)[1]["layers.up.weight"].dtype == np.float32


def test_unknown_dtype_flag() -> None:
    with pytest.raises(UsageError, match="dtype 'int7' is not one of float32, bfloat16, float16"):
        load_params("anywhere", dtype="int7")


# What is refused.


def test_all_mismatches_are_reported_at_once(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for i in range(3):
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
        tensors["model.layers.3.extra.weight"] = np.ones(3, np.float32)
        tensors["model.norm.weight"] = np.ones(25, np.float32)
        tensors["lm_head.weight"] = np.ones((67, 24), np.int8)

    write_tiny_hf(tmp_path, "llama")
    edit_tensors(tmp_path, spoil)
    assert error_of(tmp_path) == (
        f"{tmp_path}/model.safetensors: does not fit its config.json: "
        "missing tensors: model.layers.{0-2}.mlp.up_proj.weight [44, 24] | "
        "unexpected tensors: model.layers.3.extra.weight | "
        "wrong shapes: model.norm.weight: expected [24], found [25] | "
        "unreadable dtypes (readable: F32, F16, BF16): lm_head.weight: I8; take both from one model"
    )


def test_native_mismatches_are_reported_too(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())
    (tmp_path / "native/config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "layers.q.weight: expected [4, 24, 24], found [3, 24, 24]" in error_of(tmp_path / "native")


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], ["h.{0-2}.w"]),
        (["h.0.w", "h.2.w", "h.3.w"], ["h.{0,2-3}.w"]),
        (["h.7.w", "h.7.v"], ["h.7.w", "h.7.v"]),
        (["norm", "h.1.w"], ["norm", "h.1.w"]),
    ],
)
def test_names_of_layers_are_folded(names: list[str], folded: list[str]) -> None:
    assert fold_layers(names) == folded


def test_missing_shard(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    shard(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert error_of(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: 1 of 3 shards are missing: "
        "model-00002-of-00003.safetensors; download them"
    )


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    weight_map = shard(tmp_path)
    write_index(tmp_path, {**weight_map, "model.norm.weight": weight_map["lm_head.weight"]})
    found = error_of(tmp_path)
    assert "not in the shard" in found
    assert "model.norm.weight" in found


def test_index_that_leaves_the_directory(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, {"a": "../secret.safetensors"})
    assert "'../secret.safetensors' is not a plain file name" in error_of(tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert "no such model directory" in error_of(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "not a directory" in error_of(tmp_path / "file")
    assert "config.json: no such file" in error_of(tmp_path)
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format_version": 9}, "format_version is 9, this jaxchat reads up to 3"),
        (
            {"format": "zip"},
            "jaxchat.json: format is 'zip'; expected a text matching",
        ),
        ({"rename": []}, "jaxchat.json: rename is []; expected a list of length 2"),
    ],
)
def test_damaged_description(tmp_path: Path, edit: dict[str, object], message: str) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "native")
    path = tmp_path / "native/jaxchat.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    assert message in error_of(tmp_path / "native")


# The file format.


def header_of(path: Path) -> tuple[dict[str, dict], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -4000, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    write_tiny_hf(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    found = error_of(tmp_path)
    assert found.startswith(f"{path}: truncated")
    assert re.search(rf"expected .*\d+ bytes, found {len(content[:keep])}", found)


def test_trailing_bytes(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    assert f"expected {size} bytes, found {size + 4}" in error_of(tmp_path)


def test_overlapping_tensors_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for start, what in ((4, "overlaps"), (12, "leaves a hole after")):
        entries = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]},
        }
        rewrite(path, entries, bytes(start + 8))
        with pytest.raises(JaxchatError, match=f"tensor b {what} a: expected to start at byte"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, "has 9 bytes; expected 8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "has -8 bytes; expected 8"),
        ({"dtype": "F32", "shape": [2]}, "expected dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "expected dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "expected dtype, shape and data_offsets"),
        (17, "expected dtype, shape and data_offsets"),
    ],
)
def test_corrupt_entries(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    rewrite(path, {"a": entry}, bytes(8))
    with pytest.raises(JaxchatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: corrupt header: tensor a")


def test_corrupt_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content, message in (
        (b"\xff" * 16, "not a safetensors file"),
        (b"\x03" + bytes(7) + b"{]}", "corrupt header: the 3 bytes at byte 8 are no JSON"),
        (b"\x02" + bytes(7) + b"[]", "expected a JSON object, found list"),
        (b"\x02" + bytes(7) + b"\xff\xfe", "are no JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(JaxchatError, match=message):
            SafetensorsFile(path)


def test_written_file_is_aligned_and_official(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.ones((2, 5), bfloat16),
        "c": np.zeros((0, 4), np.float32),
    }
    with SafetensorsWriter(path, {n: (v.dtype, v.shape) for n, v in values.items()}, alignment=64) as writer:
        writer.write("b", values["b"][1], 1)
        writer.write("b", values["b"][0], 0)
        writer.write("a", values["a"])
        with pytest.raises(ValueError, match="announced"):
            writer.write("a", values["a"].astype(np.float32))
    read = SafetensorsFile(path)
    assert all(entry.start % 64 == 0 for entry in read.entries.values())
    official = load_file(path)
    assert {name for name in official if not name.startswith(PAD_PREFIX)} == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(read.view(name), value)
        np.testing.assert_array_equal(official[name], value)


# What it costs.


@needs_mappings
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_arrays_are_the_mapped_file(tmp_path: Path, dtype: str) -> None:
    write_tiny_hf(tmp_path / "hf", "phi3", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "native")
    _, params = load_params(tmp_path / "native")
    for name, value in params.items():
        assert is_mapped(value.unsafe_buffer_pointer(), tmp_path / "native/model.safetensors"), name


IMPORTS = """
from jaxchat.checkpoints.assembly import under, whole
from jaxchat.checkpoints.load import load_assembly, load_params
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.layer_plan import LayerPlan
"""
MEASURED = """
if sys.argv[1] == "convert":
    convert(sys.argv[2], sys.argv[3], dtype="bfloat16")
elif sys.argv[1] == "export":
    to_hf(sys.argv[2], sys.argv[3], layer_spec="[[0, 0.5, 0.5], 9, 15, 9]")
elif sys.argv[1] == "assemble":
    plan = LayerPlan.parse("0,8:15,9", 16)
    params = load_assembly(under(whole(sys.argv[2], plan), plan))[1]
else:
    params = load_params(sys.argv[2])[1]
"""


@needs_counters
def test_peak_memory_is_the_stack_plus_a_layer(tmp_path: Path) -> None:
    # 16 layers of 6 MiB; a layer's largest tensor has 1.5 MiB.
    write_tiny_hf(
        tmp_path / "hf",
        "llama",
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    size = (tmp_path / "hf/model.safetensors").stat().st_size / 2**20
    assert size > 90
    assert added(IMPORTS, MEASURED, "convert", tmp_path / "hf", tmp_path / "native") < 12
    assert added(IMPORTS, MEASURED, "load", tmp_path / "hf") < size + 12
    assert added(IMPORTS, MEASURED, "load", tmp_path / "native") < 12
    assert added(IMPORTS, MEASURED, "export", tmp_path / "hf", tmp_path / "out") < 12
    assert added(IMPORTS, MEASURED, "assemble", tmp_path / "hf") < size / 2 + 12  # 8 of the layers


# Onto meshes.


def test_every_format_loads_straight_onto_a_mesh(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "qwen3", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "native")
    convert(tmp_path / "hf", tmp_path / "orbax", format="orbax")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    config, single = load_params(tmp_path / "hf")
    specs = {p.name: param_sharding(p, config, mesh) for p in parameter_table(config)}
    for dtype in (None, "float32"):
        want = load_params(tmp_path / "hf", dtype=dtype)[1]
        for source in ("hf", "native", "orbax"):
            config, params = load_params(tmp_path / source, mesh=mesh, dtype=dtype)
            for name, value in params.items():
                assert value.sharding == specs[name], (source, name)
                assert value.dtype == want[name].dtype, (source, name)
                np.testing.assert_array_equal(np.asarray(value), np.asarray(want[name]))
    moved = shard_params(single, config, mesh)
    assert all(moved[name].sharding == specs[name] for name in moved)
    # 4 heads divide by 4 devices; 2 key/value heads do not, though their 20 rows would; 67 words do not.
    assert specs["layers.q.weight"].spec == PartitionSpec(None, "model", None)
    assert specs["layers.k.weight"].spec == PartitionSpec(None, None, None)
    assert specs["layers.o.weight"].spec == PartitionSpec(None, None, "model")
    assert specs["layers.down.weight"].spec == PartitionSpec(None, None, "model")
    assert specs["embed.weight"].spec == PartitionSpec(None, None)
    assert params["layers.q.weight"].addressable_shards[0].data.shape == (3, 10, 24)
    plain = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert param_sharding(parameter_table(config)[0], config, plain).spec == PartitionSpec(None, None)
