"""The errors a user may see: one line that names the culprit, what was expected and what to do."""

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
