"""GGUF files that are written: read back they are the model, bit for bit where nothing is rounded."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxchat
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.gguf_write import MIXTURES
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.write import convert, to_gguf
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config
from jaxchat.families.gguf_export import described
from jaxchat.quant import QuantFormat, dequantize
from tests.support.gguf_models import GGUF_CASES, write_gguf
from tests.support.parity_cases import CASES
from tests.support.tiny import random_hf_tensors
from tests.support.tiny_chat import write_tiny_chat

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
WIDE = {**CASES["llama-plain"], "hidden_size": 256, "intermediate_size": 512, **HEADS}
UNSAID = {"model_type", "family", "bos_id", "eos_ids"}


def write_hf(folder: Path, values: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(random_hf_tensors(read_config(values), seed=0), folder / "model.safetensors")
    return folder


def same(found: Any, expected: Any, atol: float = 0.0) -> None:
    def compare(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)

    jax.tree.map(compare, found, expected)


@pytest.mark.parametrize("case", GGUF_CASES)
def test_a_model_comes_back_as_it_was(case, tmp_path):
    directory = write_hf(tmp_path / "hf", GGUF_CASES[case])
    to_gguf(directory, tmp_path / "m.gguf", quant="f32")
    config, params = load_params(directory, dtype="float32")
    again, found = load_params(tmp_path / "m.gguf")
    same(found, params, atol=1.2e-7 if config.norm_offset else 0.0)  # one is added to norms, and taken off
    assert (again.num_layers, again.layer_windows, again.tied_embeddings) == (
        config.num_layers, config.layer_windows, config.tied_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("case", GGUF_CASES)
def test_tensors_are_those_that_llama_cpps_converter_writes(case, tmp_path):
    values = GGUF_CASES[case]
    directory = write_hf(tmp_path / "hf", values)
    to_gguf(directory, tmp_path / "ours.gguf", quant="f32")
    tensors = random_hf_tensors(read_config(values), seed=0)
    write_gguf(tmp_path / "theirs.gguf", values, tensors)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    fused = {name for name in ours.entries if "attn_qkv" in name}
    split = {name for name in theirs.entries if any(f".attn_{part}." in name for part in "qkv")}
    if fused and split:  # theirs come from files that have them apart
        return
    assert {n: e.shape for n, e in ours.entries.items()} == {n: e.shape for n, e in theirs.entries.items()}
    said = {key for key in theirs.metadata if not key.startswith(("general.", "tokenizer."))}
    for key in said & ours.metadata.keys():
        assert ours.metadata[key] == theirs.metadata[key], key


REFUSED = {
    "llama-rope-dynamic": "ropes would be",
    "llama-everything": "blocks would be",
    "mistral-mixed-layers": "layer_windows would be (7, 7, 7, 7), not (0, 7, 0, 0)",
    "qwen2-windows": "layer_windows would be",
    "gemma2-everything": "have a sliding window, all but each 2th",
    "gemma3_text-two-rope-bases": "have a sliding window, all but each 6th",
    "gpt2-relu": "blocks would be",
    "gpt2-unscaled": "layer_attn_scales would be",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_an_error_and_not_another_model(case):
    config = read_config(CASES[case])
    with pytest.raises(UsageError, match=re.escape(REFUSED[case])) as caught:
        described(config, parameter_table(config), name="m", where="m")
    assert "give --to_hf instead" in str(caught.value)


@pytest.mark.parametrize("quant", MIXTURES)
def test_mixtures_are_llama_quantizes(quant, tmp_path):
    values = {**WIDE, "num_hidden_layers": 8, "tie_word_embeddings": False}
    directory = write_hf(tmp_path / "hf", values)
    to_gguf(directory, tmp_path / "m.gguf", quant=quant)
    file = GgufFile(tmp_path / "m.gguf")
    kinds = {name: entry.type.name for name, entry in file.entries.items()}
    assert {kinds[f"blk.{i}.attn_norm.weight"] for i in range(8)} == {"F32"}
    down = [kinds[f"blk.{i}.ffn_down.weight"] for i in range(8)]
    base = quant.upper().removesuffix("_M").removesuffix("_S")
    if quant == "q4_k_m":  # the first and last eighth, and each third between
        assert down == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
        assert [kinds[f"blk.{i}.attn_v.weight"] for i in range(8)] == down
    assert kinds["blk.1.ffn_gate.weight"] == base
    assert kinds["output.weight"] == ("Q6_K" if base[0] == "Q" and base != "Q8_0" else base)
    known = {"f32": 0, "f16": 1, "bf16": 32, "q4_k_m": 15, "q8_0": 7}
    assert file.metadata["general.file_type"] == known.get(quant, file.metadata["general.file_type"])
    assert load_params(tmp_path / "m.gguf")[0].num_layers == 8


@pytest.mark.parametrize(
    ("quant", "kind"),
    [("int8", "Q8_0"), ("int4", "Q4_0"), ("int4:affine", "Q4_1"), ("int5", "Q5_0"), ("int4:128", "Q4_0"),
     ("int5:64:affine", "Q5_1"), ("q4_k", "Q4_K"), ("q5_k", "Q5_K"), ("q6_k", "Q6_K")],
)  # fmt: skip
def test_quantized_weights_are_written_bit_for_bit(quant, kind, tmp_path):
    convert(write_hf(tmp_path / "hf", WIDE), tmp_path / "native", quant=QuantFormat.parse(quant))
    to_gguf(tmp_path / "native", tmp_path / "m.gguf")
    assert GgufFile(tmp_path / "m.gguf").entries["blk.0.attn_q.weight"].type.name == kind
    _, params = load_params(tmp_path / "native")
    _, found = load_params(tmp_path / "m.gguf")
    for name in ("layers.q.weight", "layers.down.weight", "embed.weight"):
        np.testing.assert_array_equal(dequantize(found[name]), dequantize(params[name]))


@pytest.mark.parametrize("quant", ["int8:affine", "int4:f32"])
def test_what_no_type_holds_is_named(quant, tmp_path):
    convert(write_hf(tmp_path / "hf", WIDE), tmp_path / "native", quant=QuantFormat.parse(quant))
    with pytest.raises(UsageError, match="GGUF has no type for weights that are quantized as int"):
        to_gguf(tmp_path / "native", tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="what was rounded off is gone; add --dequantize"):
        to_gguf(tmp_path / "native", tmp_path / "m.gguf", quant="q8_0")
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []
    to_gguf(tmp_path / "native", tmp_path / "m.gguf", quant="q8_0", dequantize=True)


def test_gguf_to_gguf_keeps_every_byte_of_the_weights(tmp_path):
    pytest.importorskip("libgguf")
    kinds = {"blk.1.ffn_down.weight": gguf.GGMLQuantizationType.Q6_K}
    tensors = random_hf_tensors(read_config(WIDE), seed=3)
    write_gguf(tmp_path / "a.gguf", WIDE, tensors, kind=gguf.GGMLQuantizationType.Q4_K, kinds=kinds)
    to_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf")
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert a.entries.keys() == b.entries.keys()
    for name in a.entries:
        np.testing.assert_array_equal(b.raw(name), a.raw(name), name)


def test_rows_that_no_block_divides_get_other_types(tmp_path):
    values = {**CASES["llama-plain"], "hidden_size": 64, "intermediate_size": 72}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    to_gguf(write_hf(tmp_path / "hf", values), tmp_path / "m.gguf", quant="q4_k_m")
    kinds = {n: e.type.name for n, e in GgufFile(tmp_path / "m.gguf").entries.items()}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("Q5_0", "F16")


def test_a_plan_is_baked_in(tmp_path):
    directory = write_hf(tmp_path / "hf", CASES["llama-plain"])
    to_gguf(directory, tmp_path / "m.gguf", layer_spec="[2, [0, 0.5, 1.0], 0, 3]", quant="f32")
    ids = [[3, 14, 15, 9, 2]]
    found = jaxchat.load(tmp_path / "m.gguf").score(token_ids=ids)[0].logprobs
    expected = jaxchat.load(directory, plan="[2, [0, 0.5, 1.0], 0, 3]").score(token_ids=ids)[0].logprobs
    np.testing.assert_allclose(found, expected, atol=1e-5)


def chat_model(folder: Path) -> Path:
    """A model that chats, whose tokenizer cuts text as GPT-2's, and merges something: GGUF wants both."""
    directory = write_tiny_chat(folder)
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    *_, rare = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"]["el"] = spec["model"]["vocab"].pop(rare)
    spec["model"]["merges"] = [["e", "l"]]
    path.write_text(json.dumps({**spec, "pre_tokenizer": level}))
    return directory


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path):
    with pytest.raises(JaxchatError, match="GGUF knows no BPE that merges nothing"):
        to_gguf(write_tiny_chat(tmp_path / "chat"), tmp_path / "m.gguf")


def test_words_and_template_come_along(tmp_path):
    directory = chat_model(tmp_path / "chat")
    to_gguf(directory, tmp_path / "m.gguf")
    before, after = ModelDirectory.at(directory), ModelDirectory.at(tmp_path / "m.gguf")
    assert after.template.source == before.template.source
    for text in ("Hello, world! 12345", "<|user|>hi</s>", ""):
        for parse in (False, True):
            assert after.tokenizer.encode(text, parse_special=parse) == before.tokenizer.encode(
                text, parse_special=parse
            )
    assert (after.tokenizer.bos_id, after.config.eos_ids) == (before.tokenizer.bos_id, before.config.eos_ids)


def test_the_command_writes_and_refuses(tmp_path, commands):
    directory = chat_model(tmp_path / "chat")
    dst = tmp_path / "m.gguf"
    done = commands("convert", "--src", directory, "--dst", dst, "--to_gguf", "--quant", "bf16")
    assert (done.code, dst.exists()) == (0, True)
    again = commands.error("convert", "--src", directory, "--dst", dst, "--to_gguf", code=2)
    assert "exists already" in again
    wrong = commands.error(
        "convert", "--src", directory, "--dst", dst, "--to_gguf", "--quant", "int4", code=2
    )
    assert "--quant is 'int4'; with --to_gguf it is one of f32, f16, bf16" in wrong
    both = commands.error("convert", "--src", directory, "--dst", dst, "--to_gguf", "--to_hf", code=2)
    assert "--to_gguf cannot be combined with --to_hf" in both
    itself = commands.error("convert", "--src", dst, "--dst", dst, "--to_gguf", "--overwrite", code=2)
    assert "is what is read" in itself
    folder = commands.error("convert", "--src", dst, "--dst", tmp_path, "--to_gguf", "--overwrite", code=2)
    assert "is a directory" in folder


def test_other_architectures_are_refused_by_name(tmp_path):
    with pytest.raises(JaxchatError, match="models of the type ministral have no form in GGUF here"):
        to_gguf(write_hf(tmp_path / "hf", CASES["ministral-everything"]), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "ministral"
