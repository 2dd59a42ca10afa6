"""The notebook on layer surgery, as it runs on two CPU devices: from a model to a validated plan."""

import json
import re
from pathlib import Path

import pytest

from tests.test_notebook import PNG, execute, images, text

PATH = Path(__file__).parents[1] / "notebooks" / "surgery.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    return execute(PATH, tmp_path_factory.mktemp("surgery"))


def test_screening_and_sweeping_are_seen(executed):
    assert re.search(r"^\d+ windows, \d{3,} tokens to predict$", text(executed["text"]), flags=re.M)
    for cell, count in (("screen", 2), ("sweep", 1), ("pictures", 2)):
        shown = images(executed[cell])
        assert len(shown) == count
        assert all(image.startswith(PNG) and len(image) > 5000 for image in shown)
    assert re.search(
        r"^36 plans in [\d.]+ s; perplexity as trained [\d.]+$", text(executed["sweep"]), flags=re.M
    )


def test_the_search_goes_through_its_stages(executed):
    stages = dict(re.findall(r"^(\S[\w ]*\S) +(\d+)$", text(executed["search"]), flags=re.M))
    assert {"base", "repeat", "drop", "best blocks", "validation"} <= stages.keys()
    assert sum(map(int, stages.values())) >= 60


def test_the_verdict_is_by_the_validation(executed):
    said = text(executed["validate"])
    gains = re.findall(
        r"believed ([+-][\d.]+), validated ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\): (.*wins?)$",
        said, flags=re.M,
    )  # fmt: skip
    assert len(gains) == 4
    for _, gain, low, high, verdict in gains:
        assert float(low) <= float(gain) <= float(high)
        assert (verdict == "wins") == (float(low) > 0)
    assert any(verdict == "wins" for *_, verdict in gains) != said.startswith("No plan beats the base")


def test_both_plans_chat_and_the_checkpoint_scores_as_the_plan(executed):
    assert len(re.findall(r"^\[.+\]\n\w.{20}", text(executed["chat"]), flags=re.M)) == 2
    said = text(executed["export"])
    plan, rebuilt = map(float, re.findall(r"(-[\d.]+) nats", said))
    assert rebuilt == pytest.approx(plan, rel=1e-3)
    assert "merge_method: passthrough" in said


def test_no_cell_warns(executed):
    warnings = [
        output.text
        for cell in executed.values()
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
    assert warnings == []


def test_the_install_cell_is_that_of_the_first_notebook_with_what_a_search_needs():
    def install(name):
        cells = json.loads(PATH.with_name(name).read_text(encoding="utf-8"))["cells"]
        return "".join(next(cell for cell in cells if cell["id"] == "install")["source"])

    assert install("surgery.ipynb").replace(",search", "") == install("quickstart.ipynb")
