"""What code in a process of its own adds to the peak of its memory, and where mapped files lie."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_counters = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's memory counters"
)
needs_mappings = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings"
)

_BEFORE = """
import sys
import jax, numpy as np
from tests.support.memory import peak
{imports}
jax.device_put(np.ones(4)).block_until_ready()
before = peak()
"""


def peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def added(imports: str, code: str, *arguments: object) -> float:
    """By how many MiB `code` raises the peak of a process that has done the imports; it sees `sys.argv`."""
    program = _BEFORE.format(imports=imports) + code + "\nprint(peak() - before)"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def is_mapped(address: int, path: Path) -> bool:
    """Whether an address lies in this process's mapping of a file."""
    ranges = [
        tuple(int(number, 16) for number in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    return any(start <= address < stop for start, stop in ranges)
