"""LoRA adapters in GGUF do what the PEFT adapters do that they were made from."""

import numpy as np
import pytest

import jaxchat
from jaxchat.checkpoints.adapter import read_adapter
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.errors import JaxchatError, UsageError
from tests.support.adapters import PREFIX, logits_of, lora_tensors, projections, write_adapter
from tests.support.gguf_models import write_gguf_adapter, write_gguf_file
from tests.support.tiny import write_tiny_hf

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def embedding_delta(config, seed=5):
    rng = np.random.default_rng(seed)
    shapes = {"A": (4, config.vocab_size), "B": (config.hidden_size, 4)}
    name = "transformer.wte" if config.model_type == "gpt2" else "model.embed_tokens"
    return {
        f"{PREFIX}{name}.lora_embedding_{letter}": 0.2 * rng.standard_normal(shape, np.float32)
        for letter, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]
)
def test_an_adapter_in_gguf_is_the_one_that_it_was_made_from(family, tmp_path):
    values = write_tiny_hf(tmp_path / "m", family)
    config = ModelDirectory.at(tmp_path / "m").config
    modules = projections(config)
    head = {"lm_head": (config.vocab_size, config.hidden_size)}
    if family.startswith("gemma"):
        head = {}  # of which llama.cpp knows none
    tensors = {**lora_tensors(modules | head), **embedding_delta(config)}
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    peft = write_adapter(
        tmp_path / "peft",
        tensors,
        target_modules=sorted({name.rpartition(".")[2] for name in modules} | {embedding, *head}),
        fan_in_fan_out=family == "gpt2",
    )
    gguf = write_gguf_adapter(tmp_path / "a.gguf", values, tensors)
    plain, expected, found = (
        logits_of(jaxchat.load(tmp_path / "m", adapter=adapter), IDS)
        for adapter in (None, str(peft), str(gguf))
    )
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - plain).max() > 0.05 * np.abs(plain).max()


def test_some_modules_at_a_slot_and_half_the_strength(tmp_path):
    values = write_tiny_hf(tmp_path / "m", "llama")
    modules = {
        n: s for n, s in projections(ModelDirectory.at(tmp_path / "m").config).items() if "up_proj" in n
    }
    tensors = lora_tensors(modules)
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["up_proj"])
    gguf = write_gguf_adapter(tmp_path / "a.gguf", values, tensors)
    for use in ("{}=0.5", "{}@1=0.5"):
        found, expected = (
            logits_of(jaxchat.load(tmp_path / "m", "0,1,1", adapter=use.format(path)), IDS)
            for path in (gguf, peft)
        )
        np.testing.assert_array_equal(found, expected)


def test_no_alpha_is_no_factor_as_in_llama_cpp(tmp_path):
    values = write_tiny_hf(tmp_path / "m", "llama")
    config = ModelDirectory.at(tmp_path / "m").config
    tensors = lora_tensors(projections(config))
    none, rank = (
        read_adapter(write_gguf_adapter(tmp_path / f"{alpha}.gguf", values, tensors, alpha=alpha), config)
        for alpha in (0.0, 4.0)
    )
    for name, layers in none.low_rank.items():
        for layer, delta in layers.items():
            np.testing.assert_array_equal(delta.b, rank.low_rank[name][layer].b)


def without_last(tensors):
    tensors.popitem()


def narrowed(tensors):
    name = next(iter(tensors))
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])


def renamed(tensors):
    for old in list(tensors):
        tensors[old.replace("blk.0", "blk.7")] = tensors.pop(old)


def broken(tensors):
    next(iter(tensors.values()))[0, 0] = np.nan


def huge(tensors):
    for values in tensors.values():
        values[0, 0] = 3e38


def whole(tensors):
    tensors["output_norm.weight"] = np.ones(4, np.float32)


def none(tensors):
    tensors.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"general.type": "model"}}, "expected 'adapter' and 'lora'"),
        ({"metadata": {"adapter.type": "lokr"}}, "adapter.type 'lokr'"),
        ({"metadata": {"adapter.lora.alpha": None}}, "adapter.lora.alpha is None; expected a number"),
        ({"metadata": {"adapter.lora.alpha": "much"}}, "adapter.lora.alpha is 'much'; expected a number"),
        ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({"edit": huge}, "is too large for float32"),
        ({"metadata": {"adapter.alora.invocation_tokens": [1, 2]}}, r"\(aLoRA\), which is not supported"),
        ({"edit": without_last}, "lora_b is missing; copy the adapter's file again"),
        ({"edit": narrowed}, r"expected \[rank, \d+\] and"),
        ({"edit": renamed}, "has deltas of .*blk.7.*, which the model has not"),
        ({"edit": broken}, "holds NaN or infinity"),
        ({"edit": whole}, "'output_norm.weight' is no factor of a LoRA adapter"),
        ({"edit": none}, "holds no tensor"),
    ],
)
def test_what_does_not_fit_is_named(options, message, tmp_path):
    values = write_tiny_hf(tmp_path / "m", "llama")
    config = ModelDirectory.at(tmp_path / "m").config
    path = write_gguf_adapter(tmp_path / "a.gguf", values, lora_tensors(projections(config)), **options)
    with pytest.raises(JaxchatError, match=message) as raised:
        read_adapter(path, config)
    assert "a.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    write_tiny_hf(tmp_path / "m", "qwen2")
    config = ModelDirectory.at(tmp_path / "m").config
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
    write_gguf_file(
        tmp_path / "a.gguf", "llama", keys, {"blk.0.attn_q.weight.lora_a": np.ones((2, 4), np.float32)}
    )
    with pytest.raises(UsageError, match=r"general.architecture is 'llama', and the model is a qwen2"):
        read_adapter(tmp_path / "a.gguf", config)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(JaxchatError, match=r"b.gguf: "):
        read_adapter(tmp_path / "b.gguf", config)
