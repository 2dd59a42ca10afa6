"""`python tools/convert.py`: converts model directories. The same as `jaxchat convert`."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started as a file: the packages are beside this folder, and Ctrl-C while they load just ends it.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxchat.cli.command_line import exit_process, run
from jaxchat.commands.convert import COMMAND


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code: 0, 1 failure, 2 wrong usage, 130 interrupted."""
    return run(COMMAND, argv, program="python tools/convert.py")


if __name__ == "__main__":
    exit_process(main())
