"""Chimera's files come back as they were written, and are refused in one line where they do not fit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxchat.checkpoints.chimera import CONFIG, TENSORS, base_fingerprint, read_chimera, write_chimera
from jaxchat.checkpoints.load import load_params
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table
from jaxchat.layers.chimera import ChimeraConfig, initial_params, layer_config
from jaxchat.layers.chimera_heads import HEADS
from jaxchat.quant import QuantFormat
from tests.support.torch_files import write_torch

OWN = ChimeraConfig(heads=2, rank=4)


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def written(tmp_path, base):
    """A directory, and what is in it."""
    params = initial_params(OWN, *base, jax.random.key(0))
    write_chimera(tmp_path / "c", OWN, params, *base, training={"steps": 7})
    return tmp_path / "c", params


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_written_is_read(tmp_path, base, kind):
    own = ChimeraConfig(kind=kind, heads=3, rank=5)
    params = initial_params(own, *base, jax.random.key(0))
    write_chimera(tmp_path, own, params, *base)
    found = read_chimera(tmp_path, *base)
    assert found.config == own
    assert found.params.keys() == params.keys()
    for name, values in params.items():
        np.testing.assert_array_equal(found.params[name], values)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG, TENSORS])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_tensors_are_read(written, base, dtype):
    directory, params = written
    narrow = {name: np.asarray(value).astype(dtype) for name, value in params.items()}
    save_file(narrow, directory / TENSORS)
    for name, values in read_chimera(directory, *base).params.items():
        np.testing.assert_array_equal(values.astype(np.float32), narrow[name].astype(np.float32))


def test_the_base_is_the_same_however_it_is_held(tiny_directory):
    directory = tiny_directory("llama", dtype="bfloat16")
    forms = [{}, {"dtype": "float32"}, {"quant": QuantFormat.parse("int4")}]
    prints = {base_fingerprint(*load_params(directory, **form)) for form in forms}
    assert len(prints) == 1
    assert base_fingerprint(*load_params(tiny_directory("llama", dtype="bfloat16", seed=1))) not in prints


def changed_config(**changes):
    def change(directory):
        said = json.loads((directory / CONFIG).read_text())
        said |= changes
        (directory / CONFIG).write_text(json.dumps(said))

    return change


def changed_base(**changes):
    def change(directory):
        said = json.loads((directory / CONFIG).read_text())
        said["base"] |= changes
        (directory / CONFIG).write_text(json.dumps(said))

    return change


def changed_tensors(change_them):
    def change(directory):
        tensors = load_file(directory / TENSORS)
        change_them(tensors)
        save_file(tensors, directory / TENSORS)

    return change


def nan(tensors):
    tensors["layers.k.weight"][0, 3, 2] = np.nan


WRONG = {
    "no file": (lambda d: (d / TENSORS).unlink(), r"chimera.safetensors: cannot be read"),
    "cut short": (
        lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-8]),
        "truncated: expected .* bytes, found",
    ),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), "not readable as JSON"),
    "version": (changed_config(version=9), "version is 9; expected 1"),
    "kind": (changed_config(kind="\x1b[2J"), "kind is '.*'; expected one of full, shared"),
    "heads": (changed_config(heads=10**9), "heads is 1000000000; expected"),
    "fewer heads": (
        changed_config(heads=1),
        r"heads.map.weight' has shape \[2, 24, 48\]; expected \[1, 24, 48\]",
    ),
    "missing key": (changed_config(base={}), "base: 'model_type' is missing"),
    "other sizes": (changed_base(hidden_size=32), "trained for a model with hidden_size 32; this one has 24"),
    "other base": (changed_base(fingerprint="0" * 16), "trained for another llama of the same sizes"),
    "missing": (changed_tensors(lambda t: t.pop("layers.q.weight")), "tensor layers.q.weight is missing"),
    "extra": (changed_tensors(lambda t: t.update(x=np.ones(3))), "unknown tensor 'x'"),
    "NaN": (changed_tensors(nan), "tensor 'layers.k.weight' holds NaN or infinity"),
    "dtype": (
        changed_tensors(lambda t: t.update({"trigram.w1.bias": np.ones(72, np.int32)})),
        "tensor 'trigram.w1.bias' has dtype I32; expected F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(written, base, case):
    directory, _ = written
    change, message = WRONG[case]
    change(directory)
    with pytest.raises(JaxchatError, match=message) as caught:
        read_chimera(directory, *base)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_no_directory_is_refused(tmp_path, base):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="expected"):
            read_chimera(path, *base)


def test_parameters_that_are_not_finite_are_not_written(tmp_path, base):
    params = initial_params(OWN, *base, jax.random.key(0))
    params["trigram.w1.bias"] = params["trigram.w1.bias"].at[0].set(np.inf)
    with pytest.raises(JaxchatError, match=r"trigram.w1.bias holds NaN or infinity"):
        write_chimera(tmp_path / "c", OWN, params, *base)
    assert not (tmp_path / "c").exists()


def published(base, params, prefix):
    """Under the authors' names."""
    config, _ = base
    table = {p.name: p.hf_layer_name for p in parameter_table(layer_config(config)) if p.per_layer}
    found = {
        f"{prefix}trimlp.linear1.weight": params["trigram.w1.weight"][0],
        f"{prefix}trimlp.linear1.bias": params["trigram.w1.bias"],
        f"{prefix}trimlp.linear2.weight": params["trigram.w2.weight"][0],
        f"{prefix}fast_layer1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    found |= {f"{prefix}fast_layer1.{hf}": params[name][0] for name, hf in table.items()}
    found |= {f"{prefix}chimera_head.{k}.0.weight": head for k, head in enumerate(params["heads.weight"])}
    return {name: np.array(value) for name, value in found.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "chimera_model."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_published_weights_are_read(tmp_path, base, prefix, name):
    own = ChimeraConfig(kind="full", heads=2)
    params = initial_params(own, *base, jax.random.key(0))
    tensors = published(base, params, prefix)
    if name.endswith(".bin"):
        write_torch(tmp_path / name, tensors)
    else:
        save_file(tensors, tmp_path / name)
    found = read_chimera(tmp_path, *base)
    assert (found.config.kind, found.config.heads) == ("full", 2)
    for key, values in params.items():
        np.testing.assert_array_equal(found.params[key], values)


def test_published_weights_that_do_not_fit_are_refused(tmp_path, base):
    own = ChimeraConfig(kind="full", heads=2)
    tensors = published(base, initial_params(own, *base, jax.random.key(0)), "")
    for drop, message in (
        ("chimera_head.0.0.weight", "expected the tensors chimera_head.0"),
        ("trimlp.linear1.bias", r"tensor trimlp.\* of \[3D\] is missing"),
        ("fast_layer1.mlp.up_proj.weight", r"tensor layers.up.weight is missing"),
    ):
        save_file({n: v for n, v in tensors.items() if n != drop}, tmp_path / "model.safetensors")
        with pytest.raises(JaxchatError, match=message):
            read_chimera(tmp_path, *base)
    save_file(tensors | {"other": np.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(JaxchatError, match="unknown tensor 'other'"):
        read_chimera(tmp_path, *base)
