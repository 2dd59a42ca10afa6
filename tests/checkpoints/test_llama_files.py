"""Llama in its makers' own files is the model in Hugging Face's layout."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxchat
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.llama_files import NAMES
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import JaxchatError
from jaxchat.families import read_config
from tests.support.parity_cases import CASES
from tests.support.tiny import random_hf_tensors
from tests.support.torch_files import write_torch

FILES = ("stories260K.bin", "checkpoint_v1.bin", "stories260K.pt")
HF = "models/stories260K-hf"


@pytest.mark.parametrize("name", FILES)
def test_files_of_llama2c_are_the_model(shared_data, name):
    config, params = load_params(shared_data / "models/stories260K" / name)
    expected_config, expected = load_params(shared_data / HF)
    assert (config.num_layers, config.num_kv_heads, config.tied_embeddings) == (5, 4, True)
    assert config.vocab_size == expected_config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_bytes_of_llama2c_are_the_numbers_they_stand_for(shared_data):
    _, params = load_params(shared_data / "models/stories260K/stories260K-q8.bin")
    _, expected = load_params(shared_data / HF)
    for name, values in expected.items():
        error = np.linalg.norm(params[name] - values) / np.linalg.norm(values)
        assert error < (0.01 if values.ndim > 2 else 0.02), name


@pytest.mark.parametrize("name", [*FILES, "stories260K-q8.bin"])
def test_the_story_goes_on_as_in_llama2c(shared_data, name):
    expected = json.loads((shared_data / "oracles/llama2.c/stories260K_greedy_ids.json").read_text())
    model = jaxchat.load(shared_data / "models/stories260K" / name)
    count = 40 if "q8" in name else len(expected) - 1  # then the rounding of its bytes may tell
    (found,) = model.generate(token_ids=[expected[:1]], max_new_tokens=count)
    assert found.token_ids == expected[1 : 1 + count]
    assert model.tokenizer.encode("Once upon a time")[0] == 1


def test_conversions_are_ordinary_models(shared_data, tmp_path):
    source = shared_data / "models/stories260K/stories260K.bin"
    to_hf(source, tmp_path / "hf")
    convert(source, tmp_path / "native")
    expected = load_params(source)[1]
    for folder in ("hf", "native"):
        jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / folder)[1], expected)
        assert ModelDirectory.at(tmp_path / folder).tokenizer.encode("a") == ModelDirectory.at(
            source
        ).tokenizer.encode("a")


# --- Meta's


def metas(values, tensors):
    """Tensors as Meta has them: other names, and heads in pairs."""
    found = {}
    for name, array in tensors.items():
        parts = name.split(".")
        layer = parts[2] if name.startswith("model.layers.") else ""
        pattern = name.replace(f".{layer}.", ".{}.", 1) if layer else name
        if ".q_proj." in name or ".k_proj." in name:
            heads = values["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found[NAMES[pattern].format(layer)] = np.ascontiguousarray(array)
    return found


def split(tensors, count, *, embedding_axis):
    """As model parallelism cuts them."""
    out = [{} for _ in range(count)]
    for name, array in tensors.items():
        axis = 1 if name.endswith((".wo.weight", ".w2.weight")) else 0
        axis = embedding_axis if name == "tok_embeddings.weight" else axis
        parts = np.split(array, count, axis) if array.ndim > 1 else [array] * count
        for file, part in zip(out, parts, strict=True):
            file[name] = np.ascontiguousarray(part)
    return out


SIZES = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96}
VALUES = {**CASES["llama-plain"], **SIZES, "intermediate_size": 64}
PARAMS = {"dim": 48, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}


def write_meta(folder: Path, shards: int, *, embedding_axis: int = 1, **params) -> dict[str, np.ndarray]:
    folder.mkdir()
    tensors = random_hf_tensors(read_config({"tie_word_embeddings": False, **VALUES}), seed=1)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for number, part in enumerate(split(metas(VALUES, tensors), shards, embedding_axis=embedding_axis)):
        write_torch(folder / f"consolidated.{number:02}.pth", part)
    return tensors


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (4, 0)])
def test_metas_files_are_the_model(tmp_path, shards, axis):
    tensors = write_meta(tmp_path / "meta", shards, embedding_axis=axis, rope_theta=500000.0)
    config, params = load_params(tmp_path / "meta")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 6)
    assert config.ropes[0].theta == 500000.0
    assert not config.tied_embeddings
    for layer in range(config.num_layers):
        for ours, theirs in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            expected = tensors[f"model.layers.{layer}.{theirs}.weight"]
            np.testing.assert_array_equal(params[f"layers.{ours}.weight"][layer], expected)
    np.testing.assert_array_equal(params["embed.weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head.weight"], tensors["lm_head.weight"])


def test_scaled_rope_is_llama_3_1s(tmp_path):
    write_meta(tmp_path / "meta", 1, rope_theta=500000.0, use_scaled_rope=True)
    rope = ModelDirectory.at(tmp_path / "meta").config.ropes[0]
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", 8.0, 8192)


# --- what is wrong


def header(*fields: int, version: int = 1) -> bytes:
    return (b"24ka" + struct.pack("<i7i", version, *fields) + b"\1").ljust(256, b"\0")


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (header(64, 172, 5, 8, 4, 512, 512), "is 256 bytes long, and its header says"),
        (header(64, 172, 5, 8, 4, 512, 512, version=7), "is of llama2.c's version 7; expected 0, 1 or 2"),
        (header(64, 172, 1 << 30, 8, 4, 512, 512), "is 256 bytes long, and its header says -1"),
        (header(-1, 172, 5, 8, 4, 512, 512), "is 256 bytes long, and its header says -1"),
        (header(64, 172, 5, 8, 4, 512, 512, version=2), "groups of 0 weights do not divide its tensors"),
        (b"24ka", "bytes long, and its header says -1"),
    ],
)
def test_headers_are_checked(tmp_path, contents, says):
    (tmp_path / "m.bin").write_bytes(contents)
    with pytest.raises(JaxchatError, match=says) as caught:
        ModelDirectory.at(tmp_path / "m.bin").config  # noqa: B018 (it is read)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["n_heads", "norm_eps"])
@pytest.mark.parametrize("value", ["8", -1, None, True, [8]])
def test_params_are_checked(tmp_path, key, value):
    write_meta(tmp_path / "meta", 1, **{key: value})
    with pytest.raises(JaxchatError, match=f"params.json: {key} is .*; expected a number above 0"):
        ModelDirectory.at(tmp_path / "meta").config  # noqa: B018 (it is read)


def test_shards_of_several_models_are_refused(tmp_path):
    write_meta(tmp_path / "meta", 2)
    write_torch(tmp_path / "meta/consolidated.01.pth", {"x": np.zeros(3, np.float32)})
    with pytest.raises(JaxchatError, match=r"consolidated\.01\.pth: holds other tensors than"):
        load_params(tmp_path / "meta")
