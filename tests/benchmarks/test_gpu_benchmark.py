"""The one-call GPU benchmark, dry: a part that fails or hangs loses only itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]
DRY = (
    "--shape",
    "tiny",
    "--prompt",
    "8",
    "--new",
    "4",
    "--prefill",
    "32",
    "--copy_mib",
    "4",
    "--matmul",
    "64",
)


def test_parts_run_as_processes_and_end_with_one_json_line(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *DRY, "--only", "limits", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result.keys() == {"limits"}
    assert result["limits"]["copy_gb_s"] > 0
    assert result["limits"]["matmul_tflop_s"] > 0
    assert json.loads(out.read_text()) == result


@pytest.mark.usefixtures("quick_compilation")
def test_looped_and_unrolled_layers_draw_the_same_tokens():
    result = gpu.unrolled(gpu.parse_args(DRY))
    assert result["same_tokens"]
    assert result["ratio"] > 0


@pytest.mark.usefixtures("quick_compilation")
def test_kernels_are_checked_against_the_cases_of_their_tests():
    result = gpu.kernels(gpu.parse_args(DRY))
    assert len(result["errors"]) == 9
    assert not result["wrong"]


def test_a_part_that_fails_or_hangs_is_reported_as_such():
    crash = gpu.run_part([sys.executable, "-c", "import os; os.abort()"], "", 60)
    assert crash["error"].startswith("exit code")
    raised = gpu.run_part([sys.executable, "-c", "raise SystemExit('no such device')"], "", 60)
    assert "no such device" in raised["stderr"]
    hung = gpu.run_part([sys.executable, "-c", "import time; time.sleep(60)"], "", 1)
    assert hung == {"error": "not done after 1 s"}


def test_a_part_gets_its_xla_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a")
    show = "import json, os; print(json.dumps({'flags': os.environ['XLA_FLAGS']}))"
    assert gpu.run_part([sys.executable, "-c", show], "--b", 60)["flags"] == "--a --b"


def test_figures_are_given_as_shares_of_what_the_device_can_do():
    results = {
        "limits": {"copy_gb_s": 4000.0, "matmul_tflop_s": 800.0},
        "decode": {"weight_gb_s": 3000.0, "prefill_tflop_s": 400.0},
        "torch": {"error": "exit code 1"},
    }
    shares = gpu.with_fractions(results)
    assert shares["decode"]["share_of_copy_bandwidth"] == 0.75
    assert shares["decode"]["prefill_share_of_matmul"] == 0.5
    assert shares["torch"] == {"error": "exit code 1"}
