"""`python -m jaxchat.plan`: conversions, costs, recipes, and what wrong usage says."""

import functools
import json

import pytest

from jaxchat.layer_plan import LayerPlan
from jaxchat.recipes.recipe import read_recipe, source_plan
from tests.analysis.test_show import LLAMA3_8B
from tests.support.commands import run_process

SELF_MERGE = "0:8,4:12,8:16,12:20,16:24,20:28,24:32"


@pytest.fixture
def llama(tmp_path):
    """Llama-3-8B's `config.json`, in a directory that holds nothing else."""
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b" / "config.json").write_text(json.dumps(LLAMA3_8B))
    return tmp_path / "llama-3-8b"


@pytest.fixture
def run(commands):
    """`run(arguments)`: exit code, standard output, standard error."""
    return functools.partial(commands, "plan")


@pytest.fixture
def output(run):
    """`output(arguments)`: standard output of a run that succeeds in silence."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return out.removesuffix("\n")

    return call


# --- conversion


@pytest.mark.parametrize(
    ("given", "kind", "printed"),
    [
        ("0:8,4:", "rys", "(4,8)"),
        ("(4,8)", "exllama", "[(0,8),(4,12)]"),
        ("[(0,8),(4,12)]", "spec", "0:8,4:12"),
        ("blocks:1,2;4,5", "spec", "0,1,1:5,4:12"),
        ("0:2", "json", "[0, 1]"),
        ("[[1, 0.5, 1]]", "spec", "[[1, 0.5, 1.0]]"),
    ],
)
def test_any_notation_becomes_any_other(output, given, kind, printed):
    assert output("--num_layers", 12, "--layer_spec", given, "--to", kind) == printed


def test_a_recipe_that_is_printed_is_read_as_the_plan(run, output, llama, tmp_path):
    spec = "[0, 1, [1, 0.5, 0.25], 31, [31, 0.0, 0.0]]"
    text = output("-m", llama, "--layer_spec", spec, "--to", "mergekit", "--model_name", "meta/llama-3")
    (tmp_path / "recipe.yml").write_text(text)
    plan = LayerPlan.parse(spec, 32)
    assert source_plan(read_recipe(tmp_path / "recipe.yml", {"meta/llama-3": llama}), 32) == plan
    arguments = ("--recipe", tmp_path / "recipe.yml", "--model_path", f"meta/llama-3={llama}")
    code, out, err = run(*arguments, "--to", "spec")
    assert (code, out.strip()) == (0, spec)
    assert "note: 1 slot with both scales 0: counted and exported, but not executed" in err


def test_the_name_in_a_recipe_is_that_of_the_directory_unless_given(output, llama):
    assert f"model: {llama}\n" in output("-m", llama, "--to", "mergekit")
    assert "model: x/y\n" in output("--num_layers", 3, "--to", "mergekit", "--model_name", "x/y")


def test_a_table_has_a_line_a_slot(output):
    lines = output("--num_layers", 3, "--layer_spec", "[2, [0, 0.5, 1], [1, 0, 0]]", "--to", "table").split(
        "\n"
    )
    assert [line.split() for line in lines[1:]] == [
        ["0", "2", "-", "-", "1", "1"],
        ["1", "0", "-", "-", "0.5", "1"],
        ["2", "1", "skipped", "-", "0", "0"],
    ]


def test_a_plan_may_come_from_a_file(output, tmp_path):
    (tmp_path / "plan.txt").write_text("0:8,\n4:  # a repeat\n")
    assert output("--num_layers", 12, "--layer_spec", f"@{tmp_path / 'plan.txt'}", "--to", "rys") == "(4,8)"


def test_what_a_notation_cannot_say_is_an_error(run):
    code, out, err = run("--num_layers", 12, "--layer_spec", "0:8,9:", "--to", "rys")
    assert (code, out) == (2, "")
    assert "not a RYS repeat: the plan goes from layer 7 to 9" in err


# --- cost


def test_the_cost_of_a_self_merge_on_an_h200(run, llama):
    code, out, _ = run("-m", llama, "--layer_spec", SELF_MERGE, "--device", "h200", "-l", 8192)
    assert code == 0
    for line in (
        "parameters  13,264,949,248 (13.3B) as run",
        "layers      56 slots over 32 source layers",
        "a token     reads 23.7 GiB of bfloat16 weights",
        "            and 1.8 GiB of bfloat16 KV at 8,192 tokens",
        "            takes 25.5 GFLOP with an empty context, 33 at 8,192 tokens",
        "h200        at most 188.4 tokens/s with an empty context, 175.4 at 8,192 tokens",
        "rys         blocks:4,8;8,12;12,16;16,20;20,24;24,28",
    ):
        assert line in out.split("\n")


def cost_of(output, *arguments):
    return json.loads(output(*arguments, "--json"))["cost"]


def test_the_cost_as_json_is_what_arithmetic_says(output, llama):
    found = cost_of(
        output, "-m", llama, "--layer_spec", "[0, [1, 0, 0], [2, 0, 1]]", "--device", "1 GB/s", "-l", 10
    )
    attention, mlp, head = 2 * 4096 * 4096 + 2 * 1024 * 4096, 3 * 14336 * 4096, 128256 * 4096
    weights = 2 * (attention + 2 * mlp + head + 4 * 4096)
    kv = 10 * 2 * 8 * 128 * 2
    assert (found["weight_format"], found["kv_dtype"], found["context"]) == ("bfloat16", "bfloat16", 10)
    assert (found["weight_bytes"], found["kv_bytes"]) == (weights, [0, kv])
    products = 2 * (attention + 2 * mlp + head)
    assert found["flops"] == [products, products + 4 * 32 * 128 * 10]
    assert found["tokens_per_second"]["1 GB/s"] == pytest.approx([1e9 / weights, 1e9 / (weights + kv)])


def test_the_cost_follows_dtype_and_quantization(output, llama):
    plain = cost_of(output, "-m", llama)
    wide = cost_of(output, "-m", llama, "--dtype", "float32")
    assert wide["weight_bytes"] == 2 * plain["weight_bytes"]
    assert wide["kv_dtype"] == "float32"
    small = cost_of(output, "-m", llama, "--quant", "int8")
    assert 0.5 < small["weight_bytes"] / plain["weight_bytes"] < 0.54  # a scale a group beside the codes
    assert small["kv_dtype"] == "bfloat16"
    packed = cost_of(output, "-m", llama, "--kv_dtype", "int8")
    assert packed["kv_bytes"][1] / plain["kv_bytes"][1] == (128 + 4) / (2 * 128)


def test_json_has_the_plan_in_every_notation_that_can_say_it(output, llama):
    found = json.loads(output("-m", llama, "--layer_spec", "(4,8)", "--json", "--model_name", "x"))
    assert found["notations"]["spec"] == "0:8,4:32"
    assert found["notations"]["rys"] == "(4,8)"
    assert found["notations"]["mergekit"].startswith("slices:\n- sources:\n  - model: x\n")
    assert (found["slots"], len(found["layers"])) == (36, 36)
    found = json.loads(output("--num_layers", 3, "--layer_spec", "[[1, 0, 0]]", "--json"))
    assert (found["slots"], found["executed_slots"]) == (1, 0)
    assert [found["notations"][kind] for kind in ("rys", "exllama", "mergekit")] == [None, None, None]


def test_a_recipe_of_two_models_shows_where_each_slot_comes_from(output, llama, tmp_path):
    (tmp_path / "recipe.yml").write_text(
        "merge_method: passthrough\nslices:\n- sources: [{model: llama-3-8b, layer_range: [3, 5]}]\n"
        "- sources: [{model: other, layer_range: [7, 8]}]\n"
        "  parameters: {scale: [{filter: q_proj, value: 0.5}]}\n"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(LLAMA3_8B))
    out = output("--recipe", tmp_path / "recipe.yml")
    assert "note        1 slot with scaled copies of self_attn.q_proj.weight" in out
    rows = [line.split("  ")[-1] for line in out.split("\n")[-3:]]
    assert rows == ["llama-3-8b 3", "llama-3-8b 4", "other 7, q.weight x 0.5"]


def test_a_layer_spec_of_a_recipe_counts_the_slots_of_the_recipe(output, llama, tmp_path):
    (tmp_path / "recipe.yml").write_text(output("-m", llama, "--layer_spec", "5:9,5:9", "--to", "mergekit"))
    arguments = ("--recipe", tmp_path / "recipe.yml", "--layer_spec", "2:6", "--json")
    found = json.loads(output(*arguments))
    assert found["notations"]["spec"] == "7,8,5,6"
    assert [row["source"] for row in found["layers"]] == ["7", "8", "5", "6"]


def test_keep_identity_counts_the_slots_as_executed(output, llama, tmp_path):
    (tmp_path / "recipe.yml").write_text(
        output("-m", llama, "--layer_spec", "[0, [0, 0, 0]]", "--to", "mergekit")
    )
    arguments = ("--recipe", tmp_path / "recipe.yml", "--json")
    skipped, kept = (json.loads(output(*arguments, *more)) for more in ((), ("--keep_identity",)))
    assert [r["executed_slots"] for r in (skipped, kept)] == [1, 2]
    assert [r["slots"] for r in (skipped, kept)] == [2, 2]
    assert skipped["cost"]["weight_bytes"] < kept["cost"]["weight_bytes"]


# --- wrong usage


def test_a_wrong_plan_is_pointed_at_and_the_exit_code_is_2():
    done = run_process("jaxchat.plan", "--num-layers", 12, "--layer-spec", "(8,4)")
    assert (done.code, done.out) == (2, "")
    assert done.err == "jaxchat: error: '(8,4)' is reversed: expected 0 <= i < j <= 12\n(8,4)\n^~~~~\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--to", "rys"], "--to needs to know how many layers there are: give a model with -m"),
        (["-m", "x", "--num_layers", "3"], "--model and --num_layers are given; give one"),
        (["-m", "nowhere"], "nowhere: no such model directory"),
        (["--recipe", "nowhere.yml"], "nowhere.yml: No such file or directory"),
        (["--num_layers", "0"], "num_layers"),
        (["-m", "x", "--device", "h300"], "no device is called 'h300'; choose one of a100,"),
        (["--num_layers", "3", "--device", "h200"], "--device needs a model: give its directory with -m"),
        (["--num_layers", "3", "--quant", "int4"], "--quant needs a model"),
        (
            ["--num_layers", "3", "--to", "mergekit"],
            "--to mergekit needs the model's name: give -m or --model_name",
        ),
        (["--num_layers", "3", "--to", "yaml"], "--to"),
        (["--num_layers", "3", "--to", "spec", "--json"], "it cannot be combined with --json"),
        (["-m", "x", "--to", "spec", "--device", "h200"], "it cannot be combined with --device"),
        (["--num_layers", "3", "--model_name", "x"], "--model_name needs --to mergekit"),
        (["--num_layers", "3", "--keep_identity"], "--keep_identity needs --recipe"),
        (["--num_layers", "3", "--model_path", "a=b"], "--model_path needs --recipe"),
        (["--recipe", "x", "--model_path", "a"], "--model_path a: expected NAME=DIR"),
        (["--recipe", "x", "--model_path", "a=b", "--model_path", "a=c"], "--model_path a is given twice"),
        (["-m", "x", "--dtype", "float32", "--quant", "int4"], "--dtype and --quant are given; give one"),
        (["--num_layers", "3", "(0,1)"], "unexpected argument '(0,1)'; quote a plan: --layer_spec '(4,8)'"),
        (["--num_layers", "3", "--layer_specs", "x"], "did you mean --layer_spec?"),
    ],
)
def test_wrong_usage(run, arguments, problem):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("jaxchat: error: ")
    assert problem in err


def test_a_format_that_does_not_exist(run, llama):
    code, _, err = run("-m", llama, "--quant", "int7")
    assert code == 2
    assert "int7" in err
