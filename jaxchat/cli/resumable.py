"""The output directory of commands that keep their results in it while they run, and go on from there."""

from pathlib import Path

from jaxchat.errors import UsageError
from jaxchat.files import try_to_replace

JOURNAL = "journal.jsonl"
"""The file of results so far, in the output directory."""


def output_directory(name: str) -> Path:
    """The directory that --out names, made if it is not there.

    Raises:
      UsageError: it cannot be written to.
    """
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try_to_replace(out / JOURNAL)
    except OSError as error:
        raise UsageError(f"--out {name}: {error.strerror}; give a directory to write to") from None
    return out
