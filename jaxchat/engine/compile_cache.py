"""The persistent compilation cache: a second run of the same model and shapes compiles nothing."""

import os
from pathlib import Path

import jax
import platformdirs


def default_directory() -> Path | None:
    """`xla` in the user's cache directory: `$XDG_CACHE_HOME/jaxchat`, on Linux `~/.cache/jaxchat`.

    None where the user has no home directory, as in some containers.
    """
    try:
        return platformdirs.user_cache_path("jaxchat", appauthor=False) / "xla"
    except RuntimeError:
        return None


def enable_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled executables on disk, where that is possible: it only saves time.

    Args:
      directory: where; None is `default_directory` unless JAX is configured already, "" turns it off.
    """
    if directory == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if directory is None and jax.config.values.get("jax_compilation_cache_dir"):
        return
    path = Path(directory) if directory else default_directory()
    if path is None or not _is_writable(path):
        return
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError):
        return False
    return os.access(path, os.W_OK | os.X_OK)
