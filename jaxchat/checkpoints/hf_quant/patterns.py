"""Regular expressions out of configuration files: only such that cannot keep a match busy."""

import re

from jaxchat.errors import JaxchatError
from jaxchat.visible import shown

_LONGEST, _MOST = 400, 6


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern; names of modules are short, so few repetitions are over soon, unless they are nested."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _LONGEST or repeats > _MOST or re.search(r"(?<!\\)\)\s*[*+{]", pattern):
        raise JaxchatError(
            f"{where}: the pattern {shown(pattern)} is too intricate; expected at most {_LONGEST} characters "
            f"and {_MOST} repetitions, of no groups; write it more simply"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise JaxchatError(
            f"{where}: {shown(pattern)} is no regular expression ({error}); download the file again"
        ) from None
