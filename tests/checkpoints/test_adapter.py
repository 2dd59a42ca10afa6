"""Adapters are read as PEFT means them, and what cannot be is refused in one line that names it."""

import json
import logging
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxchat
from jaxchat.checkpoints import patterns
from jaxchat.checkpoints.adapter import AdapterFile, modules_of, parsed, read_adapter
from jaxchat.checkpoints.adapter_config import LoraConfig, pattern_values, read_lora_config, targeted
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.errors import JaxchatError, UsageError
from tests.support.adapters import PREFIX, logits_of, lora_tensors, projections, write_adapter
from tests.support.torch_files import write_torch

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(tiny_directory):
    return ModelDirectory.at(tiny_directory("llama")).config


def q_and_v(config):
    return {n: shape for n, shape in projections(config).items() if n.endswith(("q_proj", "v_proj"))}


# --- real and reference files


@pytest.mark.parametrize("name", ["plain-r8-qv", "rslora-r4-all", "layer-replication"])
def test_logits_equal_those_that_peft_wrote(name, shared_data):
    directory = shared_data / "peft" / name
    expected = np.load(directory / "expected_logits.npy")
    ids = json.loads((directory / "expected.json").read_text())["ids"]
    model = jaxchat.load(shared_data / "models/stories260K-hf", adapter=str(directory))
    found = logits_of(model, [ids])[0]
    assert np.abs(found - expected).max() <= 2e-5 * np.ptp(expected)
    assert len(model.plan) == (7 if name == "layer-replication" else 5)


def test_a_real_adapter_of_bloom_is_parsed_but_its_model_is_not_this(config, shared_data):
    directory = shared_data / "models/bloom-lora"
    lora, file = read_lora_config(directory), AdapterFile(directory)
    assert lora.enable_lora == [True, False, True]
    assert len(file.modules) == 24
    names = file.modules["transformer.h.5.self_attention.query_key_value"]
    assert [file.shape(names[kind, "weight"]) for kind in "ab"] == [(16, 1024), (2048, 8, 1)]
    with pytest.raises(
        UsageError, match=r"h.\{0-23\}.self_attention.query_key_value is in the adapter.*bloom"
    ):
        read_adapter(directory, config)


def test_a_real_adapter_with_rows_of_added_tokens_says_what_is_missing(shared_data):
    model = ModelDirectory.at(shared_data / "models/stories260K-hf").config
    with pytest.raises(JaxchatError, match=r"has no delta of .*v_proj.*target_modules"):
        read_adapter(shared_data / "models/fms-added-tokens-adapter", model)


# --- layouts


OLD = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "bias": "none"}
LAYOUTS = {
    "today's": lambda name: name,
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "wrapped twice": lambda name: PREFIX + name,
    "of a distributed run": lambda name: f"module.{name}",
    "of the bare module": lambda name: name.removeprefix(PREFIX),
    "of the model without its head": lambda name: name.replace("model.model.layers", "model.layers"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_all_versions_are_the_same_adapter(layout, config, tmp_path):
    tensors, targets = lora_tensors(q_and_v(config)), ["q_proj", "v_proj"]
    expected = read_adapter(write_adapter(tmp_path / "a", tensors, target_modules=targets), config)
    named = {LAYOUTS[layout](name): values for name, values in tensors.items()}
    found = read_adapter(write_adapter(tmp_path / "b", named, target_modules=targets, **OLD), config)
    assert found.low_rank.keys() == expected.low_rank.keys() == {"layers.q.weight", "layers.v.weight"}
    for name, layers in expected.low_rank.items():
        for layer, delta in layers.items():
            for one, other in zip(delta[:2], found.low_rank[name][layer][:2], strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("source", ["alpaca-lora", "gpt4all-lora"])
def test_a_torch_file_is_read_like_the_other(source, config, tmp_path):
    """As of 2023: `adapter_model.bin` in half precision (alpaca-lora) or float32 (gpt4all-lora)."""
    dtype = np.float16 if source == "alpaca-lora" else np.float32
    tensors = {name: values.astype(dtype) for name, values in lora_tensors(q_and_v(config)).items()}
    settings = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, "r": 4, **OLD}
    one = read_adapter(write_adapter(tmp_path / "a", tensors, **settings), config)
    directory = write_adapter(tmp_path / "b", {"x": np.zeros(1, np.float32)}, **settings)
    (directory / "adapter_model.safetensors").unlink()
    write_torch(directory / "adapter_model.bin", tensors)
    other = read_adapter(directory, config)
    for layer, delta in one.low_rank["layers.v.weight"].items():
        np.testing.assert_array_equal(delta.b, other.low_rank["layers.v.weight"][layer].b)


def test_grouped_deltas_of_old_versions_are_of_the_parts_that_are_enabled(tiny_directory, tmp_path):
    """PEFT 0.2's MergedLinear over GPT-2's fused q, k and v: here q and v, each with factors of its own."""
    config = ModelDirectory.at(tiny_directory("gpt2")).config
    rng, names = np.random.default_rng(0), [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    tensors = {}
    for name in names:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.standard_normal((8, 24), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.standard_normal((48, 4, 1), np.float32)
    directory = write_adapter(
        tmp_path, tensors, target_modules=["c_attn"], enable_lora=[True, False, True], fan_in_fan_out=True
    )
    found = read_adapter(directory, config).low_rank
    a, b = (tensors[f"{PREFIX}{names[1]}.lora_{factor}.weight"] for factor in "AB")
    for parameter, group in (("q", 0), ("v", 1)):
        delta = found[f"layers.{parameter}.weight"][1]
        expected = 2 * b[24 * group : 24 * (group + 1), :, 0] @ a[4 * group : 4 * (group + 1)]
        np.testing.assert_allclose(delta.b @ delta.a, expected, rtol=1e-5, atol=1e-5)
    k = found["layers.k.weight"][1]
    assert not (k.b @ k.a).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.lm_head.weight", ("lm_head", "saved", "weight")),
        ("base_model.model.lm_head.modules_to_save.default.weight", ("lm_head", "saved", "weight")),
        ("base_model.model.x.norm.modules_to_save.bias", ("x.norm", "saved", "bias")),
        ("base_model.model.e.base_layer.weight", ("e", "base", "weight")),
        ("base_model.model.e.lora_embedding_A", ("e", "a of embedding", "weight")),
        ("base_model.model.e.lora_embedding_B.default", ("e", "b of embedding", "weight")),
        ("base_model.model.q.lora_magnitude_vector", ("q", "magnitude", "weight")),
        ("base_model.model.q.lora_magnitude_vector.default.weight", ("q", "magnitude", "weight")),
        ("base_model.model.q.lora_B.bias", ("q", "b", "bias")),
        ("base_model.model.q.lora_A.weight", ("q", "a", "weight")),
        ("base_model.model.q.lora_C.scale", None),
    ],
)
def test_names_say_what_a_tensor_is(name, expected):
    assert parsed(name) == expected


# --- which modules an adapter is for


NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up")
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj"]}, NAMES[::3]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": "all-linear"}, NAMES),
        ({"target_modules": r".*\.1\..*_proj"}, NAMES[3:5]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, [NAMES[0], NAMES[6]]),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "layers"}, [NAMES[5]]),
        ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "up"]}, NAMES[::3]),
        ({"target_modules": "all-linear", "modules_to_save": ["mlp", "q_proj"]}, NAMES[1::3]),
    ],
)
def test_modules_are_matched_as_in_peft(settings, expected):
    names = [*NAMES, "lm_head"]
    assert targeted(LoraConfig(**settings), names, NAMES, where="") == set(expected)


def test_the_first_pattern_that_fits_gives_the_rank():
    pattern = {r".*\.1\..*": 3, "q_proj": 5, "layers.2.mlp.up": 7}
    found = pattern_values(pattern, NAMES, 4, where="")
    assert [found[name] for name in NAMES] == [5, 4, 4, 3, 3, 3, 5, 4, 7]


def test_a_pattern_that_runs_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    with pytest.raises(JaxchatError, match=r"target_modules.*takes more than"):
        patterns.matches(["(a+)+b"], ["a" * 60], where="adapter_config.json: target_modules")


# --- what is refused


def spoiled(change):
    """An adapter of q and v whose tensors and settings are changed, in place."""

    def write(config, directory):
        tensors, settings = lora_tensors(q_and_v(config)), {"target_modules": ["q_proj", "v_proj"]}
        change(tensors, settings)
        return write_adapter(directory, tensors, **settings)

    return write


FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


def _put(name, values):
    return spoiled(lambda tensors, settings: tensors.__setitem__(name, values))


def _say(**values):
    return spoiled(lambda tensors, settings: settings.update(values))


REFUSED = {
    "another kind": (_say(peft_type="LOHA"), r"adapter_config.json: peft_type is 'LOHA'; expected LORA"),
    "no kind": (_say(peft_type=None), "peft_type is None"),
    "aLoRA": (_say(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens is \[1, 2\]: an aLoRA"),
    "of experts": (_say(target_parameters=["experts.up"]), "target_parameters"),
    "QALoRA": (_say(use_qalora=True), "use_qalora"),
    "an unknown key": (_say(use_mystery=3), "unknown key 'use_mystery', which is 3"),
    "no number": (_say(r="4"), "r is '4'; expected a whole number"),
    "rank 0": (_say(r=0), "r is 0; expected"),
    "an endless alpha": (_say(lora_alpha=1e300), "lora_alpha is 1e"),
    "a delta that is too large": (
        spoiled(
            lambda tensors, settings: (
                tensors.update({f"{FIRST}.lora_B.weight": np.full((24, 4), 1e20, np.float32)}),
                settings.update(lora_alpha=1e30),
            )
        ),
        "q_proj.lora_B times 2.5e.29 .* is too large for float32",
    ),
    "another rank": (_say(r=8), r"q_proj.lora_A.weight is \[4, 24\], of rank 4, but r .* make it 8"),
    "a kind of bias": (_say(bias="some"), "bias is 'some'; expected none, all or lora_only"),
    "targets that are nowhere": (
        _say(target_modules=["query"]),
        r"target_modules is \['query'\], which is no module of this llama",
    ),
    "a module to save that is nowhere": (_say(modules_to_save=["score"]), "modules_to_save has 'score'"),
    "a target without tensors": (
        _say(target_modules=["q_proj", "v_proj", "k_proj"]),
        r"has no delta of model.layers.\{0-2\}.*k_proj",
    ),
    "tensors that are no target": (
        _say(target_modules=["q_proj"]),
        r"has a delta of model.*v_proj .*has not",
    ),
    "a broken expression": (_say(target_modules="(q_proj"), "target_modules.*expected regular expressions"),
    "DoRA without magnitudes": (
        _say(use_dora=True),
        "q_proj has no lora_magnitude_vector, but use_dora is true",
    ),
    "a bias that is missing": (_say(lora_bias=True), "q_proj has no bias of lora_B, but lora_bias is true"),
    "layers that are repeated backwards": (
        _say(layer_replication=[[2, 1]]),
        r"layer_replication has \[2, 1\]",
    ),
    "layers that are not there": (_say(layer_replication=[[0, 9]]), "has layer 8; expected 0 to 2"),
    "a billion layers": (_say(layer_replication=[[0, 2**31 - 1]]), "layer_replication has"),
    "another width": (
        _put(f"{FIRST}.lora_A.weight", np.ones((4, 9), np.float32)),
        r"is \[4, 9\]; expected \[4, 24\]",
    ),
    "NaN": (
        _put(f"{FIRST}.lora_B.weight", np.full((24, 4), np.nan, np.float32)),
        "q_proj.lora_B.weight holds NaN",
    ),
    "integers": (
        _put(f"{FIRST}.lora_B.weight", np.ones((24, 4), np.int8)),
        "lora_B.weight is I8; expected F32",
    ),
    "a strange tensor": (_put(f"{FIRST}.lora_C", np.ones(1, np.float32)), "lora_C' is no tensor of a LoRA"),
    "half a delta": (
        spoiled(lambda tensors, settings: tensors.pop(f"{FIRST}.lora_B.weight")),
        "q_proj.*but no lora_B",
    ),
    "the same twice": (
        _put(f"{FIRST}.lora_A.default.weight", np.ones((4, 24), np.float32)),
        "are the same tensor",
    ),
    "another model's layer": (
        _put(f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight", np.ones((4, 24), np.float32)),
        r"model.layers.7.mlp.up_proj is in the adapter, but no module of this llama of 3 layers",
    ),
    "a tensor nobody asked to save": (
        _put(f"{PREFIX}model.norm.weight", np.ones(24, np.float32)),
        "modules_to_save .* does not have model.norm",
    ),
    "added tokens": (
        _put(f"{PREFIX}lm_head.weight", np.ones((70, 24), np.float32)),
        r"lm_head.weight is \[70, 24\]; expected \[67, 24\]: tokens were added",
    ),
    "rows of tokens": (
        _put(
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", np.ones((2, 24), np.float32)
        ),
        "trainable_token_indices in adapter_config.json has no tokens of model.embed_tokens",
    ),
    "rows of added tokens": (
        spoiled(
            lambda tensors, settings: (
                tensors.update(
                    {f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": np.ones((1, 24), np.float32)}
                ),
                settings.update(trainable_token_indices={"lm_head": [67]}),
            )
        ),
        "has token 67; expected one below 67: tokens were added",
    ),
    "a bias the model has not": (
        _put(f"{FIRST}.bias", np.ones(24, np.float32)),
        "q_proj has no bias in this llama model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case, config, tmp_path):
    write, expected = REFUSED[case]
    directory = write(config, tmp_path / "poet")
    with pytest.raises(JaxchatError, match=expected) as caught:
        read_adapter(directory, config)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message


def test_files_that_are_missing_are_named(config, tmp_path):
    with pytest.raises(UsageError, match=r"no such adapter; give a folder with adapter_config.json"):
        read_adapter(tmp_path / "nowhere", config)
    with pytest.raises(UsageError, match=r"no adapter_config.json is there"):
        read_adapter(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        read_adapter(tmp_path, config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(JaxchatError, match=r"adapter_model.safetensors: "):
        read_adapter(tmp_path, config)


def test_a_base_that_training_altered_and_names_that_are_no_module_are_warnings(config, tmp_path, caplog):
    settings = {"target_modules": ["q_proj", "v_proj", "c_attn"], "init_lora_weights": "pissa_niter_4"}
    directory = write_adapter(tmp_path, lora_tensors(q_and_v(config)), **settings)
    with caplog.at_level(logging.WARNING):
        read_adapter(directory, config)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert re.search("init_lora_weights is 'pissa_niter_4'", told)
    assert "no module of the model is called c_attn" in told


def test_the_digest_is_of_the_numbers_and_of_what_they_are_multiplied_with(config, tmp_path):
    tensors, targets = lora_tensors(q_and_v(config)), {"target_modules": ["q_proj", "v_proj"]}
    other = {name: values + (1e-6 if "layers.2" in name else 0) for name, values in tensors.items()}
    written = [
        write_adapter(tmp_path / "a", tensors, **targets),
        write_adapter(tmp_path / "b", tensors, **targets, base_model_name_or_path="x"),
        write_adapter(tmp_path / "c", other, **targets),
        write_adapter(tmp_path / "d", tensors, **targets, lora_alpha=9),
        write_adapter(tmp_path / "e", tensors, **targets, use_rslora=True),
    ]
    digests = [read_adapter(directory, config).digest for directory in written]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


# --- the numbers, by formulas written out here


def merged_file(directory, tensors, factor, magnitudes=None):
    """The base's tensors with `W + factor * B A` in them, rows as long as the magnitudes if there are any."""
    found = load_file(directory / "model.safetensors")
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        key = name.removeprefix(PREFIX) + ".weight"
        delta = factor * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        turned = found[key].shape != delta.shape or ".c_" in key
        weight = (found[key].T if turned else found[key]) + delta
        if magnitudes is not None:
            weight *= (magnitudes[name] / np.linalg.norm(weight, axis=1))[:, None]
        found[key] = weight.T if turned else weight
    return found


IDS = [[1, 7, 33, 5, 60, 2, 9, 11, 40]]
MODELS = [
    pytest.param(name, marks=() if name in ("gpt2", "phi3") else pytest.mark.full)
    for name in ("gpt2", "phi3", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
]


@pytest.mark.parametrize("kind", ["plain", "dora"])
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_equal_those_of_a_model_with_the_deltas_in_its_weights(
    model_type, kind, tiny_directory, tmp_path
):
    base = tiny_directory(model_type)
    modules = projections(ModelDirectory.at(base).config)
    tensors, magnitudes = lora_tensors(modules), None
    if kind == "dora":
        rng = np.random.default_rng(1)
        magnitudes = {
            PREFIX + n: rng.uniform(0.5, 2, out).astype(np.float32) for n, (out, _) in modules.items()
        }
    saved = {f"{name}.lora_magnitude_vector": values for name, values in (magnitudes or {}).items()}
    adapter = write_adapter(
        tmp_path / "adapter", tensors | saved, target_modules="all-linear", use_dora=kind == "dora"
    )
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_bytes((base / "config.json").read_bytes())
    save_file(
        {n: np.ascontiguousarray(v) for n, v in merged_file(base, tensors, 2, magnitudes).items()},
        tmp_path / "merged/model.safetensors",
    )
    expected = logits_of(jaxchat.load(tmp_path / "merged"), IDS)
    model = jaxchat.load(base, adapter=str(adapter))
    assert np.abs(logits_of(model, IDS) - expected).max() <= 2e-5 * np.ptp(expected)
    # Halfway is half of the change in every weight, which is that of the deltas, too.
    plain = logits_of(jaxchat.load(base), IDS)
    np.testing.assert_array_equal(logits_of(model, IDS, [()]), plain)
    assert np.abs(plain - expected).max() > 0.01 * np.ptp(expected)


def test_tensors_of_all_float_types_are_read(config, tmp_path):
    for number, dtype in enumerate((np.float32, np.float16, ml_dtypes.bfloat16)):
        tensors = {name: values.astype(dtype) for name, values in lora_tensors(q_and_v(config)).items()}
        adapter = read_adapter(
            write_adapter(tmp_path / str(number), tensors, target_modules=["q_proj", "v_proj"]), config
        )
        name = f"{FIRST}.lora_A.weight"
        np.testing.assert_array_equal(
            adapter.low_rank["layers.q.weight"][0].a, tensors[name].astype(np.float32)
        )


def test_every_module_of_a_model_has_a_name(config):
    names = modules_of(config)
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.2.mlp.down_proj"} <= names.keys()
