"""`python -m jaxchat.analyze`: measures what each layer of a model does; `jaxchat analyze`."""

import signal
from collections.abc import Sequence

if __name__ == "__main__":
    # Ctrl-C while modules load just ends the program: an exception there would surface as a failed import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxchat.cli.command_line import exit_process, run
from jaxchat.commands.analyze import COMMAND


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    return run(COMMAND, argv, program="python -m jaxchat.analyze")


if __name__ == "__main__":
    exit_process(main())
