"""What the layers of a model do: influence, angular distance, skips, repeats and the logit lens, on a text.

    windows = cut_windows(model.encode(text), 256)
    result = analyze(model.engine, model.plan, windows)
    result.influence, result.skip["both"], result.rys[3, 7]

`Sweep` evaluates any plans of one's own the same way; `python -m jaxchat.analyze` is the command line.
"""

from jaxchat.analysis.measure import (
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
from jaxchat.analysis.sweep import Sweep, Windows, cut_windows, windows_at_once

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
