"""A recipe as a layer plan gives the logits of the model that mergekit itself writes for it.

mergekit 0.1.5, of the `parity` extra. Where layers differ in kind mergekit mis-types them, or fails; those
tests say how, and that ours is the model with every layer as it was trained.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.support.tiny import write_tiny_hf
from tests.support.tiny_chat import write_tiny_chat

pytest.importorskip("torch")
pytest.importorskip("mergekit")

from huggingface_hub.errors import StrictDataclassClassValidationError
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_assembly, load_params
from jaxchat.recipes.recipe import read_recipe
from tests.checkpoints.test_assembly import expansion, logits

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 1e-5
HALF = "[{filter: o_proj, value: 0.7}, {filter: down_proj, value: -0.4}, {value: 1}]"

RECIPES: dict[str, str] = {
    "self-merge": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 4]}]
        - sources: [{model: MODEL, layer_range: [2, 5]}]
    """,
    "pruning": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 1]}]
        - sources: [{model: MODEL, layer_range: [3, 5]}]
    """,
    "scales": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 3]}]
        - sources:
            - model: MODEL
              layer_range: [1, 5]
              parameters:
                scale: [{filter: q_proj, value: 0.5}, {filter: o_proj, value: 0.7},
                        {filter: norm, value: 1.2}, {filter: down_proj, value: -0.4}, {value: 1}]
    """,
    "gradients": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 5]}]
          parameters:
            scale: [{filter: o_proj, value: [1, 0.2, 0.6]}, {filter: up_proj, value: [0.5, 2]}, {value: 1}]
        - sources: [{model: MODEL, layer_range: [4, 5]}]
          parameters: {scale: [{filter: down_proj, value: [0.1, 0.9]}, {value: 1}]}
    """,
    "precedence": """
      slices:
        - sources:
            - {model: MODEL, layer_range: [0, 2], parameters: {scale: [{filter: layers.1, value: 0.8}]}}
          parameters: {scale: [{filter: v_proj, value: 1.5}]}
        - sources: [{model: MODEL, layer_range: [2, 5]}]
      parameters: {scale: [{filter: "*", value: 0.9}]}
    """,
    "everything-scaled": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 2], parameters: {scale: 0.5}}]
        - sources: [{model: MODEL, layer_range: [2, 5]}]
    """,
    "two-models": """
      slices:
        - sources: [{model: OTHER, layer_range: [0, 2]}]
        - sources: [{model: MODEL, layer_range: [1, 4]}]
        - sources: [{model: OTHER, layer_range: [3, 5], parameters: {scale: HALF}}]
        - sources: [{model: MODEL, layer_range: [3, 5]}]
      base_model: MODEL
    """,
    "bfloat16": """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 3], parameters: {scale: [{filter: k_proj, value: 0.3}]}}]
        - sources: [{model: MODEL, layer_range: [2, 5]}]
      dtype: bfloat16
    """,
}


PAIRS = {
    "llama": list(RECIPES),
    "qwen2": ["scales", "precedence", "everything-scaled", "bfloat16"],
    "gemma2": ["self-merge", "scales", "gradients", "everything-scaled", "two-models"],
    "stories": ["self-merge", "pruning", "gradients", "two-models"],
}


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real model, and a second one of its shape."""
    model, other = shared_data / "models/stories260K-hf", tmp_path_factory.mktemp("stories")
    shutil.copyfile(model / "config.json", other / "config.json")
    tensors = load_file(model / "model.safetensors")
    save_file({name: np.flip(t, 0).copy() for name, t in tensors.items()}, other / "model.safetensors")
    return {"stories": model, "stories-other": other}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five layers each; `NAME` and `NAME-other` share a shape."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2", "gemma2"):
        # A sliding window of the whole context leaves Gemma's layers equal in kind.
        options = {"sliding_window": 96} if name == "gemma2" else {}
        for seed, suffix in enumerate(("", "-other")):
            write_tiny_chat(
                folder / (name + suffix), model_type=name, seed=seed, num_hidden_layers=5, **options
            )
    return {path.name: path for path in folder.iterdir()}


def run_mergekit(recipe: Path, out: Path) -> Path:
    """Runs mergekit, and writes the `config.json` that is missing where it fails on `layer_types`."""
    try:
        merge(recipe, out)
    except StrictDataclassClassValidationError:
        slices = yaml.safe_load(recipe.read_text())["slices"]
        ranges = [part["sources"][0]["layer_range"] for part in slices]
        base = json.loads((Path(slices[0]["sources"][0]["model"]) / "config.json").read_text())
        config = {**base, "num_hidden_layers": sum(stop - first for first, stop in ranges)}
        (out / "config.json").write_text(json.dumps(config))
    return out


def merge(recipe: Path, out: Path) -> None:
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, clone_tensors=True, quiet=True))


def largest_difference(recipe: Path, merged: Path) -> float:
    """Of the logits of our plan and of mergekit's model, as a fraction of their range."""
    assembly = read_recipe(recipe)
    found = logits(*load_assembly(assembly, dtype=None), assembly.plan)
    expected = logits(*load_params(merged))
    return float(np.abs(found - expected).max() / np.ptp(expected))


def write(path: Path, text: str, model: Path, other: Path | None = None) -> Path:
    text = text.replace("HALF", HALF).replace("MODEL", str(model)).replace("OTHER", str(other))
    recipe = {**yaml.safe_load(text), "merge_method": "passthrough"}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(("model", "name"), [(m, name) for m, names in PAIRS.items() for name in names])
def test_the_plan_of_a_recipe_equals_the_model_that_mergekit_writes(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, name: str
):
    models = request.getfixturevalue("stories" if model == "stories" else "models")
    recipe = write(tmp_path / "recipe.yaml", RECIPES[name], models[model], models[f"{model}-other"])
    merged = run_mergekit(recipe, tmp_path / "merged")
    assert largest_difference(recipe, merged) <= TOLERANCE


def test_the_seeds_block_expansion_equals_the_model_that_mergekit_writes_and_the_base(
    stories: dict[str, Path], tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(expansion(stories["stories"], last=4))
    merged = run_mergekit(recipe, tmp_path / "merged")
    config, params = load_params(merged)
    assert config.num_layers == 9
    base = logits(*load_params(stories["stories"], dtype="bfloat16"))
    np.testing.assert_array_equal(logits(config, params), base)
    assembly = read_recipe(recipe)
    np.testing.assert_array_equal(logits(*load_assembly(assembly), assembly.plan), base)


def retyped(merged: Path, **changes: object) -> Path:
    """mergekit's output with a corrected `config.json`."""
    path = merged / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return merged


def types(directory: Path) -> tuple[int, ...]:
    return ModelDirectory.at(directory).config.layer_windows


def test_mergekit_fails_on_alternating_layers_and_we_do_not(tmp_path: Path):
    """Gemma 2 has a window in every other layer; mergekit keeps the list of the base model as it was.

    transformers 5 refuses to write it once the weights are there; before that it was taken for granted.
    """
    write_tiny_hf(tmp_path / "g", "gemma2", num_hidden_layers=4, sliding_window=4)
    text = "{slices: [{sources: [{model: MODEL, layer_range: [1, 4]}]}]}"
    recipe = write(tmp_path / "recipe.yaml", text, tmp_path / "g")
    with pytest.raises(StrictDataclassClassValidationError, match=r"\(3\) must be equal to the number of"):
        merge(recipe, tmp_path / "failed")
    merged = run_mergekit(recipe, tmp_path / "merged")
    kinds = ["sliding_attention", "full_attention"] * 2
    assert largest_difference(recipe, retyped(merged, layer_types=kinds[1:])) <= TOLERANCE
    assert largest_difference(recipe, retyped(merged, layer_types=kinds[:3])) > 1e-3


def test_mergekit_moves_the_windows_of_a_qwen_and_we_do_not(tmp_path: Path):
    """The windows of Qwen2 begin at `max_window_layers`, which mergekit leaves where it was."""
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    write_tiny_hf(tmp_path / "q", "qwen2", num_hidden_layers=4, **options)
    text = """
      slices:
        - sources: [{model: MODEL, layer_range: [2, 4]}]
        - sources: [{model: MODEL, layer_range: [0, 2]}]
    """
    recipe = write(tmp_path / "recipe.yaml", text, tmp_path / "q")
    merged = run_mergekit(recipe, tmp_path / "merged")
    assert types(merged) == types(tmp_path / "q") == (0, 0, 4, 4)
    assert largest_difference(recipe, merged) > 1e-3
    fixed = ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert largest_difference(recipe, retyped(merged, layer_types=fixed)) <= TOLERANCE


def test_mergekit_gives_all_layers_the_base_models_rotation_and_we_do_not(tmp_path: Path):
    write_tiny_hf(tmp_path / "a", "llama", num_hidden_layers=2)
    write_tiny_hf(tmp_path / "b", "llama", num_hidden_layers=2, seed=1, rope_theta=500.0)
    text = """
      slices:
        - sources: [{model: MODEL, layer_range: [0, 2]}]
        - sources: [{model: OTHER, layer_range: [0, 2]}]
      base_model: MODEL
    """
    recipe = write(tmp_path / "recipe.yaml", text, tmp_path / "a", tmp_path / "b")
    merged = run_mergekit(recipe, tmp_path / "merged")
    assert largest_difference(recipe, merged) > 1e-3
    config, _ = load_assembly(read_recipe(recipe))
    assert [config.ropes[rope].theta for rope in config.layer_ropes] == [10000.0, 10000.0, 500.0, 500.0]
