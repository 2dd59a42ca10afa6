"""The native library: an install has it, and one that does not fit costs one line and nothing else."""

import ctypes.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from jaxchat.errors import UsageError
from jaxchat.pallas import native, select

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
ROOT = Path(__file__).parents[2]
LIBRARY = native._find()


def python(code: str, **environment: str) -> str:
    """What a fresh process prints: libraries are loaded once in a process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_line(why: str, *words: str) -> None:
    assert why.startswith("no native kernels: ")
    assert "\n" not in why
    for word in words:
        assert word in why


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_an_install_where_there_is_a_compiler_has_native_kernels():
    assert native.available(), f"{native.why_not()}; make setup builds them"
    assert native.why_not() == ""


def test_the_best_instruction_set_of_the_processor_is_used():
    if not native.available():
        pytest.skip(native.why_not())
    x86 = platform.machine() in ("x86_64", "AMD64")
    known = ("avx512", "avx2", "portable") if x86 else ("i8mm", "dotprod", "portable")
    here = native.instruction_sets()
    assert here == tuple(name for name in known if name in here)  # the best first
    assert here[-1] == "portable"
    assert native.instruction_set() == os.environ.get("JAXCHAT_CPU_ISA", here[0])
    show = "from jaxchat.pallas import native; print(native.instruction_set(), *native.instruction_sets())"
    assert python(show, JAXCHAT_CPU_ISA="portable").split() == ["portable", *here]


def test_an_unknown_instruction_set_is_named():
    if not native.available():
        pytest.skip(native.why_not())
    show = (
        "from jaxchat.pallas import native\n"
        "print(native.available(), native.instruction_set(), native.why_not())"
    )
    assert python(show, JAXCHAT_CPU_ISA="mmx") == (
        "False  no native kernels: JAXCHAT_CPU_ISA=mmx names none that runs here\n"
    )


def test_without_the_library_one_line_says_so(monkeypatch):
    monkeypatch.setattr(native, "_find", lambda: None)
    loaded = native._native.__wrapped__()
    assert_one_line(loaded.why_not, "no _native.so in", str(ROOT / "jaxchat"), "without a C++ compiler")
    assert loaded.instruction_set == ""


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_no_other_platform_loads_the_library(monkeypatch, platform):
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for"))
    assert select("auto", platform).name
    with pytest.raises(UsageError, match=f"not available on {platform}; available: reference, pallas"):
        select("native", platform)


def test_a_damaged_library_is_named(tmp_path):
    path = tmp_path / "_native.so"
    path.write_bytes(b"\x7fELF")
    assert_one_line(native.load(path).why_not, str(path), "reinstall jaxchat")


def test_a_library_without_the_functions_is_refused():
    other = ctypes.util.find_library("m")
    if other is None:
        pytest.skip("no shared library to try")
    assert_one_line(native.load(Path(other)).why_not, "JaxchatInstructionSet", "reinstall jaxchat")


OTHER_API = """
#include "xla/ffi/api/c_api.h"
#undef XLA_FFI_API_MAJOR
#define XLA_FFI_API_MAJOR 99
#include "xla/ffi/api/ffi.h"
extern "C" const char* JaxchatInstructionSet() { return "portable"; }
extern "C" const char* JaxchatInstructionSets() { return "portable "; }
extern "C" int JaxchatMultipliesBfloat16() { return 0; }
xla::ffi::Error Nothing() { return xla::ffi::Error::Success(); }
"""


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_library_built_for_another_jaxlib_leaves_xla_working(tmp_path):
    source, path = tmp_path / "other.cc", tmp_path / "other.so"
    handlers = [
        f"XLA_FFI_DEFINE_HANDLER_SYMBOL({s}, Nothing, xla::ffi::Ffi::Bind());"
        for s in native.TARGETS.values()
    ]
    source.write_text(OTHER_API + "\n".join(handlers))
    options = ["-std=c++17", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir(), "-o", path, source]
    subprocess.run([COMPILER, *options], check=True)
    shown = python(
        "from pathlib import Path\n"
        "from jaxchat.pallas import native\n"
        f"print(native.load(Path({str(path)!r})).why_not)\n"
        "import jax\n"
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    why, result = shown.splitlines()
    assert_one_line(why, "API version (99.", "reinstall jaxchat")
    assert result == "2"


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump") or not native.available(),
    reason="for x86-64 libraries, and needs objdump and nm",
)
def test_no_function_that_sources_share_needs_more_than_any_processor_has():
    """Of an inline function that several sources contain the linker keeps one: for all instruction sets."""

    def shown(*command):
        return subprocess.run([*command, LIBRARY], check=True, capture_output=True, text=True).stdout

    sizes = re.findall(r"^([0-9a-f]+) ([0-9a-f]+) [Wu] \S+$", shown("nm", "-D", "-S"), re.MULTILINE)
    shared = {at for start, size in sizes for at in range(int(start, 16), int(start, 16) + int(size, 16))}
    code = shown("objdump", "-d", "--no-show-raw-insn")
    wide = re.findall(r"^ *([0-9a-f]+):\t(v[a-z]+ .*|.*%[yz]mm.*)$", code, re.MULTILINE)
    assert any("%zmm" in instruction for _, instruction in wide)
    assert len(sizes) > 10
    assert not [instruction for at, instruction in wide if int(at, 16) in shared]


def test_a_failing_build_installs_plain_python():
    """The setting that does it; running a whole install takes a network."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert settings["overrides"] == [{"if": {"failed": True}, "wheel": {"cmake": False}}]
