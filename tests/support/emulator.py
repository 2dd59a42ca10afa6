"""A program in a real pseudo-terminal, seen through a terminal emulator: what a person would see and type."""

import os
import re
import select
import time

import ptyprocess
import pyte
import pytest

ENTER, ESCAPE, TAB, UP, CTRL_C, CTRL_D, CTRL_J = "\r", "\x1b", "\t", "\x1b[A", "\x03", "\x04", "\n"
_SETTINGS = 'trap : INT; stty -g; "$@"; code=$?; echo; echo exit code $code; stty -g'


class Emulator:
    """Runs a command under `sh`, which prints the terminal's settings before and after.

    Attributes:
      output: everything the program has written, sequences included.
    """

    def __init__(self, *command, columns=80, rows=24, **environment):
        variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self._child = ptyprocess.PtyProcess.spawn(
            ["sh", "-c", _SETTINGS, "sh", *map(str, command)],
            dimensions=(rows, columns),
            env={**variables, "TERM": "xterm-256color", **environment},
        )
        self._screen = pyte.HistoryScreen(columns, rows, history=2000, ratio=1)
        self._screen.write_process_input = self.send  # answers, such as where the cursor is
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        self._settings = self._read_for(rb"(\S+)\r\n")[1]
        self._screen.reset()

    @property
    def lines(self):
        """The screen's lines, those scrolled away first, without empty ones at the end."""
        above = [
            "".join(row[x].data for x in range(self._screen.columns)) for row in self._screen.history.top
        ]
        lines = [line.rstrip() for line in (*above, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self):
        return "\n".join(self.lines)

    def send(self, keys):
        self._child.write(keys.encode())

    def paste(self, text):
        """As a terminal pastes: line breaks as Enter sends them, between the marks of bracketed paste."""
        self.send(f"\x1b[200~{text}\x1b[201~".replace("\n", "\r"))

    def resize(self, columns, rows):
        lost = max(self._screen.lines - rows, 0)
        self._screen.resize(rows, columns)
        self._screen.cursor.y = max(self._screen.cursor.y - lost, 0)  # pyte leaves it where it was
        self._child.setwinsize(rows, columns)

    def wait(self, pattern, *, count=1, timeout=30):
        """Reads until the text on the screen has the pattern so many times; returns the last match."""
        deadline = time.monotonic() + timeout
        while True:
            found = list(re.finditer(pattern, self.text, re.M))
            if len(found) >= count:
                return found[-1]
            self._read(deadline, f"no {pattern!r}")

    def finish(self):
        """The exit code, once the program has ended and left the terminal as it was."""
        end = self._read_for(rb"exit code (\d+)\r\n(\S+)\r\n")
        assert end[2] == self._settings
        self._child.close()
        return int(end[1])

    def _read_for(self, pattern, timeout=30):
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.output)):
            self._read(deadline, f"no {pattern!r}")
        return found

    def _read(self, deadline, complaint):
        ready, _, _ = select.select([self._child.fd], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{complaint} in time:\n{self.text}"
        try:
            data = self._child.read(65536)
        except EOFError:
            pytest.fail(f"{complaint} before the end:\n{self.text}")
        self.output += data
        self._stream.feed(data)
