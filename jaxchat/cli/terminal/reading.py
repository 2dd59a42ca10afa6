"""Messages from standard input: plain lines from a pipe or a dumb terminal. Keys and colours: `prompt.py`."""

import sys
from typing import NamedTuple, Protocol

from jaxchat.cli.terminal.writing import write


class Candidate(NamedTuple):
    """A way to complete what stands before the cursor.

    Attributes:
      text: what is put in place of the last `replaces` characters.
      replaces: how many characters it replaces.
      help: a few words beside it.
    """

    text: str
    replaces: int
    help: str = ""


class Reader(Protocol):
    """Where the user's messages come from."""

    shows_status: bool
    """Whether it shows the status line itself."""

    def read(self, label: str, draft: str = "") -> str | None:
        """The next message, of one line or several; None at the end of the input.

        Args:
          label: the prompt, such as `You  > `.
          draft: what the message is to begin with, where it can be edited.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed instead.
        """


class LineReader:
    """Reads lines; one that ends in a backslash goes on in the next.

    Args:
      prompts: write the labels: not from a pipe or into one, where they would end up among the text.
    """

    shows_status = False

    def __init__(self, *, prompts: bool):
        self._prompts = prompts
        self._ended = False

    def read(self, label: str, draft: str = "") -> str | None:
        """See `Reader`; a draft cannot be edited here."""
        lines: list[str] = []
        while not self._ended:
            if self._prompts:
                write("> ".rjust(len(label)) if lines else label)
            line = self._line()
            # The end of the input may come in the middle of a line, and a terminal would go on after it.
            self._ended = not line.endswith("\n")
            if self._ended and self._prompts:
                write("\n")
            lines.append(line.rstrip("\r\n"))
            if self._ended or not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        if self._ended and lines and not lines[-1]:
            lines.pop()
        return "\n".join(lines) if lines else None

    def _line(self) -> str:
        try:
            return sys.stdin.readline()
        except KeyboardInterrupt:
            if self._prompts:
                write("\n")  # after the ^C that the terminal shows
            raise
