"""Where the files of a task are, in a directory of data. Opens none."""

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

from jaxchat.errors import UsageError, option

MAX_FILES = 200_000
"""Of a directory of data: more is a directory of something else."""


class DataDirectory:
    """The files below a directory.

    Raises:
      UsageError: there is no such directory, or it is too large.
    """

    def __init__(self, path: Path):
        self.path = path
        where = f"{option('data')} {path}"
        if not path.is_dir():
            raise UsageError(f"{where}: {'not a directory' if path.exists() else 'no such directory'}")
        self._root = path.resolve()
        self._names: list[str] = []
        for folder, folders, names in os.walk(self._root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self._names += [os.path.join(folder, name) for name in sorted(names)]
            if len(self._names) > MAX_FILES:
                raise UsageError(
                    f"{where}: more than {MAX_FILES:,} files; name a directory nearer to the data"
                )

    def matching(self, pattern: str) -> list[Path]:
        """Files by a pattern such as `*/piqa/valid.jsonl`, in which `*` is any text; case does not count."""
        start = len(str(self._root.parent).rstrip("/"))
        return [
            self.path / os.path.relpath(name, self._root)
            for name in self._names
            if fnmatch.fnmatchcase(name[start:].replace(os.sep, "/").lower(), pattern.lower())
        ]

    def first(self, patterns: Sequence[str]) -> list[Path]:
        """The files of the first pattern that has some."""
        return next((found for pattern in patterns if (found := self.matching(pattern))), [])
