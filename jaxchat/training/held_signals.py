"""Ctrl-C and its kin, held back until it is safe to stop: between two steps, not amidst a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """While it is entered, the first signal waits for `release`; a second one has its way at once.

    In another thread than the main one, which signals never interrupt, it does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._pending: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hold) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def release(self) -> None:
        """Lets the signal that waits, if one does, do what it did before."""
        if self._pending is not None:
            self._restore()
            signal.raise_signal(self._pending)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        first, self._pending = self._pending is None, number
        if not first:
            self.release()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
