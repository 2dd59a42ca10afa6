from .measure import (
    HALVES,
    PARTS,
    Analysis,
    Lens,
    Questions,
    analyze,
    perplexity,
    repeated,
    repeats,
    skipped,
)
from .sweep import Sweep, Windows, cut_windows, windows_at_once

__all__ = [
    "HALVES",
    "PARTS",
    "Analysis",
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
