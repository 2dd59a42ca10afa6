"""The errors a user may see: one line that names the culprit, what was expected and what to do."""


class JaxchatError(Exception):
    """A failure with a one-line message for the user. The command line exits with `exit_code`."""

    exit_code = 1


class UsageError(JaxchatError):
    """The request itself is wrong: a bad flag value, plan, prompt or combination of them."""

    exit_code = 2
