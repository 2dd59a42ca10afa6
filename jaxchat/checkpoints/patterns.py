"""Matching names against regular expressions out of somebody's file, which may be made to run for ever.

They are matched in a process of their own that is given some seconds. Plain names never start one.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from jaxchat.errors import JaxchatError
from jaxchat.visible import shown

SECONDS = 5.0
PLAIN = re.compile(r"[\w.\-]*")
"""Patterns that are names."""
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    found = [[bool(re.fullmatch(pattern, name)) for name in names] for pattern in patterns]
except (re.error, RecursionError, OverflowError) as error:
    found = str(error)
json.dump(found, sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str], *, where: str) -> list[list[bool]]:
    """Whether each name fits each pattern whole: a list a pattern.

    A dot of a pattern without other special characters is taken for any character, as in every pattern.

    Args:
      patterns: as for `re.fullmatch`.
      names: what may fit.
      where: the file and the key that has the patterns, for errors.

    Raises:
      JaxchatError: one is no regular expression, or takes too long.
    """
    if all(PLAIN.fullmatch(pattern) for pattern in patterns):
        return [[_fits(pattern, name) for name in names] for pattern in patterns]
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise JaxchatError(
            f"{where}: matching {shown(list(patterns))} takes more than {SECONDS:g} s; expected a regular "
            "expression of module names, write the names out"
        ) from None
    except (subprocess.CalledProcessError, OSError) as error:
        raise JaxchatError(f"{where}: {shown(list(patterns))} cannot be matched ({error})") from None
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise JaxchatError(
            f"{where}: {shown(list(patterns))}: expected regular expressions of module names, but {found}; "
            "put it right in the file"
        )
    return [[bool(fits) for fits in row] for row in found]


def _fits(pattern: str, name: str) -> bool:
    """`re.fullmatch` of a pattern whose only special character is the dot."""
    return len(pattern) == len(name) and all(a in (".", b) for a, b in zip(pattern, name, strict=True))
