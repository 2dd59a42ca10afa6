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

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_continuations_equal_the_stored_reference(case: str, tmp_path: Path):
    with np.load(GOLDENS / f"{CASES[case]['model_type']}.npz") as golden:
        logits, greedy = golden[f"{case}/logits"], golden[f"{case}/greedy"]
    write_hf(tmp_path, case)
    runner = Runner(tmp_path)
    assert error(np.stack(runner.feed(tokens(case)))[:, ROWS], logits) <= TOLERANCE
    prompts = [row[:n] for row, n in zip(tokens(case), PROMPTS, strict=True)]
    assert runner.greedy(prompts, GREEDY) == greedy.tolist()


def test_every_stored_reference_has_its_case_and_the_files_are_small():
    stored = {key.split("/")[0] for path in GOLDENS.glob("*.npz") for key in np.load(path)}
    assert stored == set(CASES)
    assert sum(path.stat().st_size for path in GOLDENS.glob("*.npz")) < 300_000
