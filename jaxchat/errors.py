"""The errors a user may see: one line that names the culprit, what was expected and what to do."""

from typing import Self

from jaxchat.visible import message


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
