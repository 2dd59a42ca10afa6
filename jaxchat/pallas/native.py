"""Loads `_native.so`, the C++ kernels for CPUs, and registers its functions with XLA.

The library is an optional part of an install: without it, or where it does not fit, `why_not` says why and
the plain XLA path serves. What the functions compute is in `jaxchat/pallas/*/cpu.py`.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

TARGETS = {
    "jaxchat_stacked_matmuls": "JaxchatStackedMatmuls",
    "jaxchat_cache_attention": "JaxchatCacheAttention",
    "jaxchat_low_rank": "JaxchatLowRank",
}
"""XLA target name -> the library's symbol."""


def function(symbol: str, arguments: Sequence[Any]) -> Callable[..., None] | None:
    """A function of the library that is none of XLA's; None without the library, or in an older one."""
    path = _find()
    try:
        found = None if path is None else getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError):
        return None
    if found is not None:
        found.argtypes, found.restype = list(arguments), None
    return found


class _Native(NamedTuple):
    """What loading the library came to: an instruction set, or the reason why there is none."""

    instruction_set: str = ""  # the default
    instruction_sets: tuple[str, ...] = ()  # all that run here, the best first
    why_not: str = ""
    multiplies_bfloat16: bool = False


def available() -> bool:
    """Whether the native kernels can run here. The first call loads and registers them."""
    return not _native().why_not


def instruction_set() -> str:
    """The instruction set the kernels use by default; empty when unavailable.

    The best the processor has, unless the environment variable JAXCHAT_CPU_ISA names another.
    """
    return _native().instruction_set


def instruction_sets() -> tuple[str, ...]:
    """All that run here, the best first: what the kernels take as `isa`; none when unavailable.

    Of `avx512` (with VNNI), `avx2`, `i8mm`, `dotprod` (both ARM) and `portable`.
    """
    return _native().instruction_sets


def multiplies_bfloat16(isa: str = "") -> bool:
    """Whether kernels for an instruction set (empty: the default) multiply bfloat16: AVX-512's, with BF16."""
    return _native().multiplies_bfloat16 and (isa or instruction_set()) == "avx512"


def why_not() -> str:
    """One line on why the native kernels are unavailable; empty when they are available."""
    return _native().why_not


@functools.cache
def _native() -> _Native:
    path = _find()
    if path is None:
        where = " or ".join(_folders())
        return _Native(
            why_not=f"no native kernels: no _native.so in {where}: jaxchat was installed without a C++ "
            "compiler, or these sources are not what was installed"
        )
    return load(path)


def _folders() -> list[str]:
    """The package's: an editable install has two, the sources' and the one the library was installed to."""
    package = importlib.util.find_spec(__name__.partition(".")[0])
    return list(package.submodule_search_locations or ()) if package is not None else []


def _find() -> Path | None:
    candidates = (Path(folder) / "_native.so" for folder in _folders())
    return next((path for path in candidates if path.exists()), None)


def load(path: Path) -> _Native:
    """Loads one library and registers its functions; never raises."""
    try:
        library = ctypes.CDLL(str(path))
        name, names = library.JaxchatInstructionSet, library.JaxchatInstructionSets
        multiplies_bfloat16 = library.JaxchatMultipliesBfloat16
        functions = {target: getattr(library, symbol) for target, symbol in TARGETS.items()}
    except (OSError, AttributeError) as error:
        return _Native(why_not=f"no native kernels: {_one_line(error)}; reinstall jaxchat")
    name.restype = names.restype = ctypes.c_char_p
    isa = name().decode()
    if not isa:
        wanted = os.environ.get("JAXCHAT_CPU_ISA")
        return _Native(why_not=f"no native kernels: JAXCHAT_CPU_ISA={wanted} names none that runs here")
    try:
        # XLA refuses functions built against another API: here if its CPU backend is up, otherwise when that
        # starts, which then fails.
        jax.devices("cpu")
        for target, function in functions.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    except Exception as error:  # its type is not documented
        return _Native(why_not=f"no native kernels: {_one_line(error)}; reinstall jaxchat")
    return _Native(isa, tuple(names().decode().split()), multiplies_bfloat16=bool(multiplies_bfloat16()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
