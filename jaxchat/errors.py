"""The errors a user may see: one line that names the culprit, what was expected and what to do."""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

from jaxchat.visible import message, shown


class JaxchatError(Exception):
    """A failure with a one-line message for the user. The command line exits with `exit_code`.

    What the message quotes can be printed: see `visible.message`.
    """

    exit_code = 1

    def __init__(self, text: object = ""):
        super().__init__(message(str(text)))


class UsageError(JaxchatError):
    """The request itself is wrong: a bad flag value, plan, prompt or combination of them."""

    exit_code = 2


class AdvisedError(UsageError):
    """What is wrong and what to do about it, apart: where there are other ways, the advice is another.

    Args:
      found, advice: the two, with `between` between them.
    """

    between = "; "

    def __init__(self, found: str, advice: str):
        super().__init__(f"{found}{self.between}{advice}")
        self.found, self.advice = found, advice

    def at(self, place: object) -> Self:
        """The same, with the place first."""
        return type(self)(f"{place}: {self.found}", self.advice)


# --- messages in the words of whoever reads them: of Python, or of a command line

_in_flags = False  # of the process, so that what fails in another thread is told alike


@contextlib.contextmanager
def in_flags(spoken: bool = True) -> Iterator[None]:
    """Within it messages speak to somebody at a command line; with False, to one who names parameters."""
    global _in_flags
    before, _in_flags = _in_flags, spoken
    try:
        yield
    finally:
        _in_flags = before


def told(python: str, flags: str) -> str:
    """The one of two wordings that the reader can follow."""
    return flags if _in_flags else python


def option(name: str, value: Any = None, *, flag: str | None = None) -> str:
    """How the reader gives an option: `overflow='error'` in Python, `--overflow error` on a command line.

    Args:
      name: of the parameter.
      value: what it is to be; None names the option alone.
      flag: what it is called on a command line, if not the same.

    >>> option("max_length")
    'max_length'
    """
    if value is None:
        return told(name, f"--{flag or name}")
    return told(f"{name}={shown(value)}", f"--{flag or name} {value}")
