"""A delta and its base are the model whose difference the delta is."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxchat
import tools.convert
from jaxchat.__main__ import main
from jaxchat.checkpoints.delta import DeltaDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.errors import UsageError
from jaxchat.families import read_config
from jaxchat.quant import QuantFormat
from tests.support.parity_cases import CASES
from tests.support.tiny import random_hf_tensors
from tests.support.torch_files import write_torch

VALUES = CASES["llama-plain"]
LONGER = {**VALUES, "vocab_size": VALUES["vocab_size"] + 1}


def write(folder: Path, values, tensors, *, torch: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    if torch:
        write_torch(folder / "pytorch_model.bin", tensors)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def tensors_of(values, seed: int, dtype=np.float16):
    return {name: t.astype(dtype) for name, t in random_hf_tensors(read_config(values), seed=seed).items()}


@pytest.fixture
def models(tmp_path):
    """Delta, base, and the tensors of their sum."""
    delta, base = tensors_of(LONGER, 1), tensors_of(VALUES, 2)
    whole = {}
    for name, values in delta.items():
        whole[name] = values.copy()
        whole[name][: len(base[name])] += base[name]  # in float16, as torch adds
    return write(tmp_path / "delta", LONGER, delta), write(tmp_path / "base", VALUES, base), whole


def test_the_sum_is_the_model_in_the_deltas_dtype(models, tmp_path):
    delta, base, whole = models
    expected = load_params(write(tmp_path / "whole", LONGER, whole))[1]
    found = load_params(DeltaDirectory.of(delta, base))[1]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, name)
    assert found["embed.weight"].shape[0] == LONGER["vocab_size"]


def test_the_sum_is_converted_quantized_and_reshaped_like_any_model(models, tmp_path):
    delta, base, whole = models
    write(tmp_path / "whole", LONGER, whole)
    both = DeltaDirectory.of(delta, base)
    for options in ({}, {"quant": QuantFormat.parse("int8")}, {"layer_spec": "2,0"}):
        for number, source in enumerate((both, tmp_path / "whole")):
            convert(source, tmp_path / f"out{number}", overwrite=True, **options)
        first, second = (load_params(tmp_path / f"out{number}")[1] for number in (0, 1))
        for name, values in second.items():
            np.testing.assert_array_equal(
                getattr(first[name], "codes", first[name]), getattr(values, "codes", values)
            )
    to_hf(both, tmp_path / "hf")
    assert (tmp_path / "hf/config.json").exists()


def test_a_base_that_does_not_fit_is_named(models, tmp_path):
    delta, base, _ = models
    with pytest.raises(UsageError, match=r"is not what the delta was made from: embed.weight has the shape"):
        load_params(DeltaDirectory.of(base, delta))
    fewer = {**VALUES, "num_hidden_layers": 2}
    other = write(tmp_path / "other", fewer, tensors_of(fewer, 3))
    with pytest.raises(UsageError, match=r"and here is one of shape \[2, "):
        load_params(DeltaDirectory.of(delta, other))


def test_converted_models_are_no_deltas(models, tmp_path):
    delta, base, _ = models
    convert(base, tmp_path / "native")
    with pytest.raises(UsageError, match="both models are directories in Hugging Face's layout"):
        DeltaDirectory.of(delta, tmp_path / "native")


def test_flags_and_the_library_take_a_base(models, tmp_path, capsys):
    delta, base, whole = map(str, (*models[:2], write(tmp_path / "whole", LONGER, models[2])))
    expected = jaxchat.load(whole).score(token_ids=[[1, 2, 3]])
    assert jaxchat.load(delta, base=base).score(token_ids=[[1, 2, 3]]) == expected
    assert (
        tools.convert.main(["convert", "--src", delta, "--base", base, "--dst", str(tmp_path / "sum")]) == 0
    )
    assert jaxchat.load(tmp_path / "sum").score(token_ids=[[1, 2, 3]]) == expected
    outputs = []
    for flags in (("-m", whole), ("-m", delta, "--base", base)):
        capsys.readouterr()
        assert main(["jaxchat", "show", *flags, "--layer_spec", "0:2,1:"]) == 0
        outputs.append(capsys.readouterr().out.splitlines()[1:])  # all but the name
    assert outputs[0] == outputs[1]


def test_a_base_without_a_model_is_refused(models, tmp_path, capsys):
    base = str(models[1])
    assert main(["jaxchat", "show", "--base", str(tmp_path / "none"), "-m", str(models[0])]) == 2
    assert "no such model directory" in capsys.readouterr().err
    assert main(["jaxchat", "generate", "--base", base, "--recipe", "r.yaml", "-p", "a"]) == 2
    assert "--base" in capsys.readouterr().err
    with pytest.raises(UsageError, match="base is given with a recipe"):
        jaxchat.load(recipe=tmp_path / "r.yaml", base=base)


def test_neither_delta_nor_base_is_written_over(models):
    both = DeltaDirectory.of(*models[:2])
    for path in models[:2]:
        before = sorted(path.rglob("*"))
        for write_it in (convert, to_hf):
            with pytest.raises(UsageError, match="must be separate directories"):
                write_it(both, path, overwrite=True)
        assert sorted(path.rglob("*")) == before
