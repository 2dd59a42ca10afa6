"""Logits and greedy continuations equal stored ones of transformers, for every parity case, without torch.

The files come from `make_goldens.py`. Here the directories hold `config.json` in the old and new spellings
that are found in the wild; `test_parity.py` reads what transformers itself saves.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.support.parity_cases import (
    CASES,
    GREEDY,
    PROMPTS,
    ROWS,
    TOLERANCE,
    Runner,
    error,
    tokens,
    write_hf,
)
from tests.support.products import some

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = Path(__file__).parent / "goldens"


STEPWISE = [case for case in CASES if case.endswith(("-everything", "-beyond", "-crossing", "mixed-layers"))]
"""Cases that are decoded token by token as well, by another executable; `make test-full` does so with all."""


def stored(case: str, name: str) -> np.ndarray:
    with np.load(GOLDENS / f"{CASES[case]['model_type']}.npz") as golden:
        return golden[f"{case}/{name}"]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_stored_reference(case: str, tmp_path: Path):
    write_hf(tmp_path, case)
    logits = np.stack(Runner(tmp_path).feed(tokens(case)))
    assert error(logits[:, ROWS], stored(case, "logits")) <= TOLERANCE


@pytest.mark.parametrize("case", some(CASES, STEPWISE))
def test_greedy_continuations_equal_the_stored_reference(case: str, tmp_path: Path):
    write_hf(tmp_path, case)
    prompts = [row[:n] for row, n in zip(tokens(case), PROMPTS, strict=True)]
    assert Runner(tmp_path).greedy(prompts, GREEDY) == stored(case, "greedy").tolist()


def test_every_stored_reference_has_its_case_and_the_files_are_small():
    stored = {key.split("/")[0] for path in GOLDENS.glob("*.npz") for key in np.load(path)}
    assert stored == set(CASES)
    assert sum(path.stat().st_size for path in GOLDENS.glob("*.npz")) < 300_000
