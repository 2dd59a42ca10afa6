"""What variables, locales and closed or full streams do to the programs, as processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat import demo
from jaxchat.engine import compile_cache
from tests.support.commands import environment

ROOT = Path(__file__).resolve().parents[2]
MODEL = demo.path()


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of Bash, in which `$PY` is Python and `$MODEL` the model in the box."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=ROOT,
        env={**environment(), "PY": sys.executable, "MODEL": str(MODEL), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("platforms", "message"),
    [
        ("cuda", "but JAX finds no such device here; install its software with pip install 'jaxchat[cuda]'"),
        ("nope", "JAX_PLATFORMS is 'nope'; expected cpu, cuda or tpu"),
    ],
)
def test_a_platform_that_is_not_there_is_named(platforms, message):
    done = shell("$PY -m jaxchat generate -p hi", JAX_PLATFORMS=platforms)
    if done.returncode == 0:
        pytest.skip(f"there is {platforms} here")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"jaxchat: error: JAX_PLATFORMS is '{platforms}'")
    assert message in done.stderr


def test_a_text_is_understood_under_64_bits_in_the_locale_c_without_a_home():
    plain = shell("$PY -m jaxchat generate -p 'Größe 🙂' --seed 1 --max_new_tokens 4 --quiet")
    odd = {"JAX_ENABLE_X64": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    odd |= {"HOME": "/dev/null", "XDG_CACHE_HOME": "/proc/none"}
    done = shell("$PY -m jaxchat generate -p 'Größe 🙂' --seed 1 --max_new_tokens 4 --quiet", **odd)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == plain.stdout


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless(*args, **options):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(compile_cache.platformdirs, "user_cache_path", homeless)
    assert compile_cache.default_directory() is None
    compile_cache.enable_compilation_cache()


PLAN = "$PY -m jaxchat plan --num_layers 8 --layer_spec 0:3"
CONVERT = "$PY tools/convert.py --src $MODEL --dst $OUT"


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        (f"{PLAN} | true", (0, 141)),
        (f"{PLAN} >/dev/full", (1,)),
        (f"{PLAN} >&-", (0,)),
        (f"{PLAN} <&- 2>&-", (0,)),
        (f"{CONVERT} >/dev/full", (1,)),
        (f"{CONVERT} | true", (0, 141)),
        ("$PY examples/crosstask.py --help >/dev/full", (1,)),
        ("$PY examples/crosstask.py --help | head -1", (0, 141)),
        ("$PY -m jaxchat plan --num_layers 8 --layer_spec @<(printf '0:3') --to spec", (0,)),
    ],
)
def test_streams_that_are_closed_or_full(line, codes, tmp_path):
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = shell(line, OUT=str(tmp_path / "out"))
    assert done.returncode in codes
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if codes == (1,):
        assert done.stderr == "jaxchat: error: input or output: No space left on device\n"


def test_a_pipe_of_windows_is_read_as_one_of_linux(commands):
    flags = ("chat", "--seed", "1", "--max_new_tokens", "4", "--quiet")
    windows = "\ufeffhello there\r\n/help\r\nagain\r\n"
    assert commands.output(*flags, stdin=windows) == commands.output(
        *flags, stdin=windows.removeprefix("\ufeff").replace("\r\n", "\n")
    )
