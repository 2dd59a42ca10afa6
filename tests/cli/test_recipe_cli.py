"""`jaxchat.generate --recipe`: block expansion changes no text, and errors say what is wrong."""

import json

import pytest

from jaxchat.layer_plan import LayerPlan
from jaxchat.recipes.recipe import to_mergekit
from tests.support.tiny_chat import write_tiny_chat


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # A length of its own: what is compiled quickly for it serves no test that compares with other processes.
    return write_tiny_chat(tmp_path_factory.mktemp("recipes") / "tiny-chat", max_position_embeddings=97)


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a model called org/tiny, of whose last layer there are two copies that change nothing."""
    plan = LayerPlan.parse("[0, 1, 2, [2, 0, 0], [2, 0, 0]]", 3)
    (tmp_path / "expanded.yml").write_text(to_mergekit(plan, "org/tiny"))
    return tmp_path / "expanded.yml"


@pytest.fixture
def answer(commands, quick_compilation):
    """`answer(arguments)`: the JSON object that a run prints."""

    def run(*arguments):
        options = ("-p", "hello", "--max_new_tokens", "8", "--ignore_eos", "--json")
        return json.loads(commands.output("generate", *options, *arguments))

    return run


def test_block_expansion_generates_what_the_base_model_does(model, recipe, answer):
    expected = answer("-m", model)
    arguments = ("--recipe", recipe, "--model_path", f"org/tiny={model}")
    skipped = answer(*arguments)
    assert (skipped["token_ids"], skipped["model"]) == (expected["token_ids"], "expanded")
    kept = answer(*arguments, "--keep_identity")
    assert kept["token_ids"] == expected["token_ids"]


def test_the_remarks_on_a_recipe_go_to_standard_error(model, recipe, commands):
    done = commands("plan", "--recipe", recipe, "--to", "spec", "--model_path", f"org/tiny={model}")
    assert (done.code, done.out) == (0, "[0, 1, 2, [2, 0.0, 0.0], [2, 0.0, 0.0]]\n")
    assert "2 slots with both scales 0: counted and exported, but not executed" in done.err


def test_show_needs_no_weights(model, recipe, commands):
    arguments = ("--recipe", recipe, "--model_path", f"org/tiny={model}", "--json")
    for more, executed in (([], 3), (["--keep_identity"], 5), (["--layer_spec", "2:"], 1)):
        assert json.loads(commands.output("show", *arguments, *more))["executed_slots"] == executed


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
def test_wrong_usage(model, recipe, commands, arguments, problem):
    filled = [argument.format(recipe=recipe, model=model) for argument in arguments]
    done = commands("generate", "-p", "hello", *filled)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err
