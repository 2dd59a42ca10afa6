"""The notebook, as a file and as it runs on two CPU devices, so that its mesh is one of several."""

import base64
import importlib.metadata
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jaxchat import demo
from jaxchat.analysis import show

PATH = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
ALL = sorted(PATH.parent.glob("*.ipynb"))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", params=ALL, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    return execute(PATH, tmp_path_factory.mktemp("notebook"))


def execute(path: Path, directory: Path) -> dict:
    """A notebook's cells after all have run; one that fails fails the test with its traceback."""
    ran = nbformat.read(path, as_version=4)
    client = NotebookClient(
        ran, kernel_name="python3", timeout=300, resources={"metadata": {"path": directory}}
    )
    client.execute(
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all time goes into compiling
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "IPYTHONDIR": str(directory / "ipython"),
        }
    )
    return {cell.id: cell for cell in ran.cells}


def text(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def images(cell) -> list[bytes]:
    return [base64.b64decode(output.data["image/png"]) for output in cell.outputs if "data" in output]


# --- the file


def test_is_valid_and_made_for_colab(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.accelerator == "TPU"


def test_is_committed_without_results(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_names_no_place_on_the_machine_it_was_written_on(path):
    found = re.findall(r"/(?:work|home|root|tmp|Users|mnt|opt)\b\S*", path.read_text(encoding="utf-8"))
    assert found == []


# --- what its cells do


def test_nothing_is_installed_where_jaxchat_is(executed):
    assert text(executed["install"]) == ""
    assert "2 x cpu" in text(executed["devices"])


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ((), r"^Fill in SOURCE in this cell"),
        (("jaxchat-0.1.0-py3-none-any.whl",), r"^pip could not install \./jaxchat-0\.1\.0.*: .+"),
    ],
)
def test_the_first_cell_says_in_a_line_what_it_lacks(notebook, there, says, tmp_path, monkeypatch):
    (cell,) = [cell for cell in notebook.cells if cell.id == "install"]
    for name in there:
        (tmp_path / name).write_bytes(b"no wheel")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path if there else tmp_path / "here")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(SystemExit, match=says) as stopped:
        exec(compile(cell.source, "install", "exec"), {})
    assert "\n" not in str(stopped.value)


def test_no_cell_warns(executed):
    assert [
        (id_, output.text)
        for id_, cell in executed.items()
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ] == []


def test_the_model_replies(executed):
    said = text(executed["chat"])
    assert re.search(r"You: Hello!\n[A-Z].+", said)
    assert re.search(r"You: Tell me a story .*\n.{40}", said)
    assert re.search(r"\d+ tokens/s", said)


def test_plans_have_the_parameters_that_show_counts(executed):
    rows = re.findall(r"^.+?: (.+)\n  (\d+) slots, ([\d,]+) parameters, perplexity ([\d,.]+)\n  (.+)",
                      text(executed["plans"]), flags=re.M)  # fmt: skip
    assert len(rows) == 7
    plain = show.describe_directory(demo.path())
    a_layer = show.describe_directory(demo.path(), f"0:{plain.source_layers},0").parameters - plain.parameters
    for spec, slots, parameters, perplexity, _ in rows:
        assert int(slots) == show.describe_directory(demo.path(), spec).slots
        extra = int(slots) - plain.source_layers
        assert int(parameters.replace(",", "")) == plain.parameters + extra * a_layer
        assert float(perplexity.replace(",", "")) > 1
    best, reversed_ = (float(rows[row][3].replace(",", "")) for row in (0, -1))
    assert reversed_ > 5 * best
    assert len(rows[0][4]) > 40
    assert rows[-1][4] != rows[0][4]


def test_plans_switch_within_a_conversation(executed):
    said = text(executed["switching"])
    assert len(re.findall(r"switched to \S+ in [\d.]+ ms\]\n.+", said)) == 4


def test_a_reply_is_prefixed_continued_and_tried_again(executed):
    said = text(executed["steering"])
    prefix = "Once upon a time, a purple bear"
    assert said.startswith(prefix)
    assert "[continued]\n Suddenly, it began to snow." in said
    assert f"[tried again]\n{prefix}" in said
    assert f"assistant: {prefix}" in said


def test_the_model_plays_the_user_and_talks_to_itself(executed):
    assert len(re.findall(r"^Model: \S.+", text(executed["reversed"]), flags=re.M)) == 2
    assert re.search(r"^Child: Hello!\nStory-teller: .+", text(executed["talk"]), flags=re.M)
    assert re.search(r"^\(ends: \w+\)$", text(executed["talk"]), flags=re.M)


def test_a_draft_gives_several_tokens_a_step_and_the_same_text(executed):
    said = text(executed["drafts"])
    heads = re.findall(r"^head (\d): ([\d.]+), among its first five ([\d.]+)$", said, flags=re.M)
    assert [number for number, _, _ in heads] == ["1", "2", "3", "4"]
    assert all(0.3 < float(one) < float(five) <= 1 for _, one, five in heads)
    assert float(heads[0][1]) > 0.5
    given, same = re.search(r"([\d.]+) tokens a step; the same text: (\w+)", said).groups()
    assert float(given) > 1.5
    assert same == "True"


def test_plots_are_images(executed):
    for cell in ("analysis", "repeats"):
        shown = images(executed[cell])
        assert len(shown) == 2
        assert all(image.startswith(PNG) and len(image) > 5000 for image in shown)


def test_what_was_measured_names_plans_to_try(executed):
    rows = re.findall(r"^(\S.*\S) +perplexity ([\d.]+)$", text(executed["best"]), flags=re.M)
    assert [re.sub(r"\d+", "N", name) for name, _ in rows][::2] == ["as trained", "without layer N"]
    trained, repeated, pruned = (float(perplexity) for _, perplexity in rows)
    assert f"perplexity {trained:.2f}" in text(executed["plans"])
    assert repeated < 1.5 * trained
    assert pruned < 3 * trained


def test_fewer_bits_are_fewer_bytes_at_nearly_the_same_loss(executed):
    rows = re.findall(r"^(.+?) +([\d,]+) bytes +([\d.]+) nats", text(executed["quantize"]), flags=re.M)
    assert [name for name, _, _ in rows] == ["as it is", "int8", "int4"]
    sizes = [int(size.replace(",", "")) for _, size, _ in rows]
    assert sizes[0] > 3 * sizes[1] > 3 * sizes[2]
    losses = [float(loss) for _, _, loss in rows]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[2] == pytest.approx(losses[0], rel=0.15)


def test_a_rebuilt_checkpoint_scores_as_its_plan(executed):
    plan, rebuilt = (float(nats) for nats in re.findall(r"(-[\d.]+) nats", text(executed["export"])))
    assert rebuilt == pytest.approx(plan, rel=1e-4)


def test_a_mesh_holds_half_the_model_on_each_of_two_devices(executed):
    whole, part = re.search(r"\((.+?)\) in all, \((.+?)\) on each", text(executed["mesh"])).groups()
    shape, share = ([int(size) for size in sizes.split(",")] for sizes in (whole, part))
    assert share == [*shape[:-1], shape[-1] // 2]
