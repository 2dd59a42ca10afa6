"""The keyboard while nothing is read from it: what is typed ahead is kept as it was typed. POSIX."""

import contextlib
import os
import select
import sys
import termios
from collections.abc import Iterator

PASTES_MARKED, PASTES_PLAIN = "\x1b[?2004h", "\x1b[?2004l"
"""What makes a terminal put marks around pasted text, so that its line breaks are none that Enter made."""


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[str]:
    """Within, keys are not echoed and wait for the next prompt; gives what was typed before, as it reads.

    Ctrl-C still interrupts. Line breaks are left as the keys send them: the prompt tells Enter from Ctrl-J.
    """
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = list(before)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    mark_pastes()
    try:
        typed = _typed_already(keyboard)
        if typed and not typed.endswith("\n"):  # it stands on the screen
            sys.stdout.write("\n")
            sys.stdout.flush()
        yield typed
    finally:
        sys.stdout.write(PASTES_PLAIN)
        sys.stdout.flush()
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def mark_pastes() -> None:
    """Has pasted text marked, which a prompt that ends takes back."""
    sys.stdout.write(PASTES_MARKED)
    sys.stdout.flush()


def _typed_already(keyboard: int) -> str:
    """What the terminal holds of before: its Enter has become a line break."""
    data = b""
    while select.select([keyboard], [], [], 0)[0] and (more := os.read(keyboard, 65536)):
        data += more
    return data.decode(errors="replace")
