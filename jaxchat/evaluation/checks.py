"""What makes a reply right: exact answers, patterns and numbers. IFEval's instructions are `ifeval.py`'s.

A check is a frozen dataclass that takes a reply's text and gives its figures.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxchat.evaluation.items import Figure

Figures = Mapping[str, Figure]

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
"""lm-evaluation-harness 0.4.13, gsm8k.yaml, flexible-extract."""
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
"""The same, strict-match."""


@dataclass(frozen=True)
class Match:
    """A reply against answers, any of which is right; of a `pattern` its last group that is there counts.

    Without answers it is enough that the pattern is found.
    """

    answers: tuple[str, ...]
    pattern: str | None = None

    def __call__(self, reply: str) -> Figures:
        """See `Generation.check`."""
        found = reply if self.pattern is None else extracted(self.pattern, reply)
        figures = {} if self.pattern is None else {"found": _figure(found is not None)}
        if self.answers:
            figures["exact"] = _figure(found is not None and found.strip() in map(str.strip, self.answers))
            figures["normalized"] = _figure(
                found is not None and normalized(found) in map(normalized, self.answers)
            )
            numbers = [number for answer in self.answers if (number := last_number(answer)) is not None]
            if numbers:
                figures["number"] = _figure(found is not None and last_number(found) in numbers)
        return figures


def extracted(pattern: str, text: str) -> str | None:
    """The last match of a pattern, of groups in it the first that is there; None if there is no match."""
    match = None
    for match in re.finditer(pattern, text):  # noqa: B007
        pass
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match[0])


def normalized(text: str) -> str:
    """A text without what people do not mind: case, runs of blanks, a full stop at its end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def last_number(text: str) -> str | None:
    """The last number of a text, without `$` and thousands' commas; `18.0` is `18`."""
    found = _NUMBER.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """`$1,000.` -> `1000`, `2.50` -> `2.5`."""
    text = re.sub(r"[,$]", "", text).removesuffix(".")
    return re.sub(r"\.?0+$", "", text) if re.fullmatch(r"-?\d+\.\d+", text) else text


@dataclass(frozen=True)
class GradeSchoolMath:
    """GSM8K's answer: what stands after `####` (strict), or the last number (flexible).

    As lm-evaluation-harness 0.4.13 compares them: commas, `$` and a full stop at the end do not count.
    """

    answer: str

    def __call__(self, reply: str) -> Figures:
        """See `Generation.check`."""
        wanted = _stripped(self.answer)
        marked, numbers = _MARKED.search(reply), _NUMBER.findall(reply)
        return {
            "strict": _figure(marked is not None and _stripped(marked[1]) == wanted),
            "flexible": _figure(bool(numbers) and _stripped(numbers[-1]) == wanted),
        }


def _stripped(text: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text)))


@dataclass(frozen=True)
class NearNumber:
    """A whole number that is guessed: how many of its digits are near, from the left.

    RYS's partial credit: the shorter number is filled up with zeros; the relative difference of the two
    counts off, and so does the share of digits that had to be filled in.
    """

    answer: int

    def __call__(self, reply: str) -> Figures:
        """See `Generation.check`."""
        number = last_number(reply)
        guess = int(number) if number is not None and re.fullmatch(r"-?\d{1,400}", number) else None
        return {
            "exact": _figure(guess == self.answer),
            "partial": Figure(0.0 if guess is None else self._partial(guess)),
        }

    def _partial(self, guess: int) -> float:
        one, other = str(self.answer), str(guess)
        size = max(len(one), len(other))
        padded = int(one.ljust(size, "0")), int(other.ljust(size, "0"))
        if padded[1] < 0 or max(padded) == 0:
            return float(guess == self.answer)
        near = 1 - abs(padded[0] - padded[1]) / max(padded)
        return near * (1 - abs(len(one) - len(other)) / size)


@dataclass(frozen=True)
class Feelings:
    """EQ-Bench's score of four intensities, 0 to 10 each, as lm-evaluation-harness 0.4.13 computes it.

    Feelings and how intense they are; 100 is all right, 0 what guessing gives.
    """

    intensities: tuple[tuple[str, float], ...]

    def __call__(self, reply: str) -> Figures:
        """See `Generation.check`."""
        said = dict(re.findall(r"(\w+):\s+(\d{1,9})", reply))
        if said.keys() != {name for name, _ in self.intensities}:
            return {"eq_bench": Figure(0.0), "parseable": Figure(0.0)}
        off = sum(_scaled(abs(float(said[name]) - right)) for name, right in self.intensities)
        return {"eq_bench": Figure(10 * (10 - off * 0.7477)), "parseable": Figure(1.0)}


def _scaled(difference: float) -> float:
    """Small differences count less."""
    if difference == 0 or difference > 5:
        return difference
    return 6.5 / (1 + math.exp(-1.2 * (difference - 4)))


def _figure(right: bool) -> Figure:
    return Figure(float(right))
