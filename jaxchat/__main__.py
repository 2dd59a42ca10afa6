"""`jaxchat CMD` and `python -m jaxchat CMD`: finds the command in `commands/`, and runs it."""

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # Ctrl-C while modules load just ends the program: an exception there would surface as a failed import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxchat import __version__
from jaxchat.cli.command_line import exit_process, guarded, run
from jaxchat.commands import COMMANDS
from jaxchat.errors import UsageError

_USAGE = """\
usage: jaxchat COMMAND ...

Chats with open LLMs in JAX, and reshapes their layers on the fly.

{commands}

`jaxchat COMMAND --help` explains a command, `jaxchat --version` prints the version.
`python -m jaxchat` is the same program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    program, *words = sys.argv if argv is None else argv
    if not words or words[0].startswith("-") or words[0] not in COMMANDS:
        return guarded(lambda: _without_command(words))
    command = importlib.import_module(f"jaxchat.commands.{words[0]}").COMMAND
    return run(command, [program, *words[1:]], program=f"jaxchat {words[0]}")


def _without_command(words: Sequence[str]) -> int:
    if not words:
        raise UsageError(f"no command: give one of {', '.join(COMMANDS)}; jaxchat --help explains them")
    if words[0] == "--version":
        print(f"jaxchat {__version__}")
    elif words[0] in ("--help", "-h"):
        print(_USAGE.format(commands="\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())))
    elif words[0].startswith("-"):
        raise UsageError(f"{words[0]} stands before a command; jaxchat --help lists the commands")
    else:
        close = difflib.get_close_matches(words[0], COMMANDS, 1)
        advice = f"did you mean {close[0]}?" if close else "jaxchat --help lists them"
        raise UsageError(f"no command {words[0]!r}; {advice}")
    return 0


def program() -> None:
    """Runs as the program `jaxchat`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exit_process(main())


if __name__ == "__main__":
    program()
