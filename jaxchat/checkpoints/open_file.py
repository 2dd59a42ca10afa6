"""A file that stays open while tensors are read from it, and that nobody is to change meanwhile."""

import functools
import io
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np

from jaxchat.errors import JaxchatError


class OpenFile:
    """A regular file, to be read in any order.

    `read` notices if the file changes. Of a `map` whose file is cut short the operating system ends the
    process (SIGBUS).

    Args:
      path: the file.
      advice: what to do where it is none.

    Attributes:
      size: in bytes, when it was opened.
      file: for who reads its header.

    Raises:
      JaxchatError: it is no file, but a pipe, say.
      OSError: it cannot be opened.
    """

    def __init__(self, path: Path, advice: str):
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise JaxchatError(f"{path}: not a file; {advice}")
        self.file = io.FileIO(path)
        weakref.finalize(self, self.file.close)
        self._state = self._now()
        self.size = self._state[0]

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fills a contiguous array with what is at a byte of the file.

        Raises:
          JaxchatError: the file has changed since it was opened, or cannot be read.
        """
        buffer = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            self.file.seek(offset)
            while done < len(buffer) and (count := self.file.readinto(buffer[done:])):
                done += count
            state = self._now()
        except OSError as error:
            raise JaxchatError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if done < len(buffer) or state != self._state:
            raise JaxchatError(
                f"{self.path}: was changed while it was read ({self.size} bytes, now {state[0]}); wait until "
                "it is complete, and run this again"
            )

    @functools.cached_property
    def map(self) -> mmap.mmap:
        """All of it, mapped."""
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def _now(self) -> tuple[int, int]:
        """Size and time of the last change."""
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns
