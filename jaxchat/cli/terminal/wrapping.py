"""Text on a screen, wrapped between words as it streams. No sequences: it works in every terminal."""

import os
import re
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len

_ROOM = 24
"""Columns in which nearly every word ends: one that begins with as much room is written as it comes."""
_PARTS = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_JOINER = "\u200d"
_MODIFIERS = range(0x1F3FB, 0x1F400)  # skin tones


class Screen:
    """Where the cursor is in its line, for all that write to one screen.

    Args:
      stream: a terminal.
      column: where the cursor is.
    """

    def __init__(self, stream: Any, column: int = 0):
        self._stream = stream
        self.column = column

    def write(self, text: str) -> None:
        """Writes at once; `column` is up to those who know what is in the text."""
        if text:
            self._stream.write(text)
            self._stream.flush()

    @property
    def columns(self) -> int:
        """How wide it is now; 0 if it does not say."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            return 0


class Wrapping:
    """Makes of text the same with line breaks between words, where a word would cross the screen's edge.

    A word near the edge is held back until it is known to fit. Wide characters may part anywhere.

    Args:
      screen: where it goes.
      margin: what every line but the first begins with.
    """

    def __init__(self, screen: Screen, margin: str = ""):
        self._screen, self._margin = screen, margin
        self._space = ""  # before the next word, if that stays on the line
        self._held = ""  # a word that may have to go to the next line
        self._in_word = False  # a word has been begun and goes on as it comes
        self._last = ""  # character that was added

    def add(self, text: str) -> str:
        """What is certain to be on the screen after more text."""
        out = ""
        for part in (part for whole in _PARTS.findall(text) for part in _breakable(whole)):
            out += self._added(part)
            self._last = part[-1]
        return out

    def end(self) -> str:
        """What was held back."""
        return self._word_ends()

    def _added(self, part: str) -> str:
        if part == "\n":
            return self._word_ends() + self._new_line()
        if part[0] in " \t":
            ended = self._word_ends()
            self._space += part
            return ended
        if not self._held and (self._last == _JOINER or _is_attached(part[0])):
            return self._on_line(part)  # the rest of an emoji, whose beginning is there already
        if _is_wide(part[0]):
            return self._word_ends() + self._word_goes_on(part) + self._word_ends()
        return self._on_line(part) if self._in_word else self._word_goes_on(part)

    def _word_goes_on(self, part: str) -> str:
        """Of a word of which nothing is on the screen yet."""
        self._held += part
        width, room = cell_len(self._held), self._room()
        if width > room and self._screen.column > cell_len(self._margin):
            return self._new_line() + self._begun()
        return self._begun() if room >= max(width, _ROOM) else ""

    def _begun(self) -> str:
        """The held word, which from now on is written as it comes."""
        word, self._held = self._space + self._held, ""
        self._space, self._in_word = "", True
        return self._on_line(word)

    def _word_ends(self) -> str:
        word = self._begun() if self._held else ""
        self._in_word = False
        return word

    def _new_line(self) -> str:
        self._space = ""
        self._screen.column = cell_len(self._margin)
        return "\n" + self._margin

    def _on_line(self, text: str) -> str:
        columns = self._screen.columns
        self._screen.column += cell_len(text.expandtabs())
        if columns and self._screen.column > columns:  # a word longer than a line
            self._screen.column = (self._screen.column - 1) % columns + 1
        return text

    def _room(self) -> int:
        columns = self._screen.columns
        if not columns:
            return 1 << 30
        return columns - self._screen.column - cell_len(self._space.expandtabs())


def _breakable(part: str) -> Iterator[str]:
    """A word cut before and after its wide characters, each of which is one; no emoji is cut."""
    start = 0
    for at in range(1, len(part)):
        joined = part[at - 1] == _JOINER or _is_attached(part[at])
        if not joined and (_is_wide(part[at]) or _is_wide(part[at - 1])):
            yield part[start:at]
            start = at
    yield part[start:]


def _is_attached(character: str) -> bool:
    return ord(character) in _MODIFIERS or cell_len(character) == 0


def _is_wide(character: str) -> bool:
    return cell_len(character) == 2
