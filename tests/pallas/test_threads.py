"""The native kernels say the same, to the bit, however many threads share the work."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxchat.pallas import native
from tests.pallas import test_cache_attention, test_stacked_matmul

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.why_not() or "they run"),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot limit threads on this system"),
]

ON_ONE_CORE = """
import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.pallas import test_threads
test_threads.save(sys.argv[1])
"""


def outputs():
    """From fixed inputs, of every instruction set."""
    return [
        y
        for isa in native.instruction_sets()
        for operation in (test_stacked_matmul, test_cache_attention)
        for y in operation.fixed_outputs(isa)
    ]


def save(path):
    np.savez(path, *outputs())


def test_the_number_of_threads_does_not_change_a_bit(tmp_path):
    """XLA's pool has a thread a core the process may use: one core is another process."""
    path = tmp_path / "out.npz"
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE, path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(path) as found:
        expected = outputs()
        assert len(found) == len(expected)
        for name, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(found[name], y)
