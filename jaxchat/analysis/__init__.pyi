from .compared import Compared
from .contributions import Contributions
from .measure import (
    HALVES,
    Analysis,
    KnownResultError,
    Lens,
    analyze,
    perplexity,
    repeated,
    repeats,
    skipped,
)
from .questions import PARTS, Questions
from .sweep import Sweep, Windows, cut_windows, windows_at_once

__all__ = [
    "HALVES",
    "PARTS",
    "Analysis",
    "Compared",
    "Contributions",
    "KnownResultError",
    "Lens",
    "Questions",
    "Sweep",
    "Windows",
    "analyze",
    "cut_windows",
    "perplexity",
    "repeated",
    "repeats",
    "skipped",
    "windows_at_once",
]
