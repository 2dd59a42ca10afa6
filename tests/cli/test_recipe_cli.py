"""`jaxchat.generate --recipe`: block expansion changes no text, and errors say what is wrong."""

import json
import subprocess
import sys

import pytest

from jaxchat import generate
from jaxchat.layer_plan import LayerPlan
from jaxchat.recipes.recipe import to_mergekit
from tests.support.tiny_chat import write_tiny_chat


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("recipes") / "tiny-chat")


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a model called org/tiny, of whose last layer there are two copies that change nothing."""
    plan = LayerPlan.parse("[0, 1, 2, [2, 0, 0], [2, 0, 0]]", 3)
    (tmp_path / "expanded.yml").write_text(to_mergekit(plan, "org/tiny"))
    return tmp_path / "expanded.yml"


@pytest.fixture
def answer(capsys, quick_compilation):
    """`answer(arguments)`: the JSON object that a run prints, and its standard error."""

    def run(*arguments):
        options = ("-p", "hello", "--max_new_tokens", "8", "--ignore_eos", "--json")
        code = generate.main(["", *options, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out), err

    return run


def test_block_expansion_generates_what_the_base_model_does(model, recipe, answer):
    expected, _ = answer("-m", model)
    arguments = ("--recipe", recipe, "--model_path", f"org/tiny={model}")
    skipped, _ = answer(*arguments)
    assert (skipped["token_ids"], skipped["model"]) == (expected["token_ids"], "expanded")
    kept, _ = answer(*arguments, "--keep_identity")
    assert kept["token_ids"] == expected["token_ids"]


def test_the_remarks_on_a_recipe_go_to_standard_error(model, recipe):
    command = [sys.executable, "-m", "jaxchat.plan", "--recipe", recipe, "--to", "spec"]
    done = subprocess.run(
        [*command, "--model_path", f"org/tiny={model}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2, [2, 0.0, 0.0], [2, 0.0, 0.0]]\n")
    assert "2 slots with both scales 0: counted and exported, but not executed" in done.stderr


def test_show_needs_no_weights(model, recipe, capsys):
    arguments = ["--recipe", recipe, "--model_path", f"org/tiny={model}", "--show", "--json"]
    for more, executed in (([], 3), (["--keep_identity"], 5), (["--layer_spec", "2:"], 1)):
        assert generate.main(["", *map(str, arguments), *more]) == 0
        assert json.loads(capsys.readouterr().out)["executed_slots"] == executed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--recipe", "{recipe}"],
            "expanded.yml:3:12: slices[0].sources[0].model: no model 'org/tiny'",
        ),
        (["--recipe", "{recipe}", "--model_path", "org/tiny"], "--model_path org/tiny: expected NAME=DIR"),
        (
            ["--recipe", "{recipe}", "--model_path", "org/tiny=/nowhere"],
            "org/tiny=/nowhere: no such",
        ),
        (["--recipe", "{recipe}", "-m", "{model}"], "--model and --recipe are given; a recipe names its own"),
        (["--recipe", "nowhere.yml"], "nowhere.yml: No such file or directory"),
        (["-m", "{model}", "--keep_identity"], "--keep_identity needs --recipe"),
        (["-m", "{model}", "--layer_spec", "@nowhere"], "@nowhere: No such file or directory"),
        (["-m", "{model}", "--layer_spec", "(3,1)"], "'(3,1)' is reversed"),
    ],
)
def test_wrong_usage(model, recipe, capsys, arguments, problem):
    filled = [argument.format(recipe=recipe, model=model) for argument in arguments]
    assert generate.main(["", "-p", "hello", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err
