"""Where a reply's text goes: programs get it as it is, a terminal so that it cannot be controlled."""

import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

from jaxchat.cli.terminal.markdown import MarkdownSink
from jaxchat.cli.terminal.wrapping import Screen, Wrapping
from jaxchat.text.reasoning import Kind, Piece
from jaxchat.visible import visible

_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def is_terminal(stream: Any) -> bool:
    """Whether a stream is open and leads to a terminal."""
    return stream is not None and stream.isatty()


def is_dumb() -> bool:
    """Whether the terminal understands no sequences at all (`TERM=dumb`, or none set)."""
    return os.environ.get("TERM", "") in ("", "dumb", "unknown")


def has_color(stream: Any) -> bool:
    """Whether a stream leads to a terminal that may be sent colours (https://no-color.org)."""
    return is_terminal(stream) and not is_dumb() and not os.environ.get("NO_COLOR")


def write(text: str) -> None:
    """Writes our own text to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str, codes: str = "") -> None:
    """A line on standard error, where everything goes that is not the text; `codes` as in `styled`."""
    shown = styled(visible(text), codes, sys.stderr) if is_terminal(sys.stderr) else text
    sys.stderr.write(f"{shown}\n")  # print writes the line break apart, and Ctrl-C could fall between
    sys.stderr.flush()


def styled(text: str, codes: str, stream: Any) -> str:
    """Our own text with SGR codes around it, where the stream may be sent colours."""
    return f"\x1b[{codes}m{text}{_RESET}" if codes and has_color(stream) else text


class Sink(Protocol):
    """What takes one part of a reply, its reasoning or its content."""

    def write(self, text: str) -> None:
        """Takes more text."""

    def end(self) -> None:
        """Ends the part: what was held back comes out, and the line ends."""


class PipeSink:
    """Text as it is, for programs."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        """See `Sink`."""
        self._stream.write(text)
        self._stream.flush()

    def end(self) -> None:
        """See `Sink`."""
        self.write("\n")


class TerminalSink:
    """Text for people: wrapped at words, control characters visible, line breaks at its ends left out.

    Every write is whole: neither a character nor a colour and its end is torn apart by what comes between.

    Args:
      screen: of a terminal.
      paint: what is done to each stretch of text.
      margin: what every line begins with.
      ending: what stands after the text.
    """

    def __init__(
        self, screen: Screen, paint: Callable[[str], str] = str, *, margin: str = "", ending: str = "\n"
    ):
        self._screen, self._paint = screen, paint
        self._margin, self._ending = margin, ending
        self._wrapping = Wrapping(screen, margin)
        self._breaks: str | None = None  # line breaks held back; None until there is text

    def write(self, text: str) -> None:
        """See `Sink`."""
        opening, before = "", self._breaks or ""
        if self._breaks is None:
            opening, text = self._margin, text.lstrip("\n")
        shown = text.rstrip("\n")
        if shown:
            self._screen.column += len(opening)
            self._put(opening + self._wrapping.add(before + visible(shown)))
            self._breaks = text[len(shown) :]
        elif self._breaks is not None:
            self._breaks += text

    def end(self) -> None:
        """See `Sink`."""
        self._put(self._wrapping.end())
        self._screen.write(self._ending)
        self._screen.column = 0

    def _put(self, text: str) -> None:
        if text:
            self._screen.write(self._paint(text))


class ReplyWriter:
    """Writes the pieces of one reply, its reasoning apart from its content."""

    def __init__(self, content: Sink, reasoning: Sink):
        self._sinks: dict[Kind, Sink] = {"content": content, "reasoning": reasoning}
        self._kind: Kind | None = None

    def write(self, piece: Piece) -> None:
        """Writes a piece."""
        if self._kind is not None and self._kind != piece.kind:
            self._sinks[self._kind].end()
        self._kind = piece.kind
        self._sinks[piece.kind].write(piece.text)

    def end(self) -> None:
        """Ends the reply and its line."""
        self._sinks[self._kind or "content"].end()


def reply_writer(*, markdown: bool, column: int = 0) -> ReplyWriter:
    """What writes one reply to standard output.

    On a terminal reasoning is dim (where colours may not be used, behind a bar), and a blank line ends it.
    Elsewhere standard output has the content alone, and standard error the reasoning.

    Args:
      markdown: renders the content.
      column: where the cursor is.
    """
    to_people = is_terminal(sys.stdout)
    screen = Screen(sys.stdout, column)
    content: Sink = TerminalSink(screen) if to_people else PipeSink(sys.stdout)
    if markdown:
        content = MarkdownSink(sys.stdout)
    if to_people:
        return ReplyWriter(content, _thought_sink(sys.stdout, screen))
    if is_terminal(sys.stderr):
        return ReplyWriter(content, _thought_sink(sys.stderr, Screen(sys.stderr)))
    return ReplyWriter(content, PipeSink(sys.stderr))


def _thought_sink(stream: Any, screen: Screen) -> Sink:
    """Reasoning on a terminal."""
    if has_color(stream):
        return TerminalSink(screen, lambda text: f"{_DIM}{text}{_RESET}", ending="\n\n")
    return TerminalSink(screen, margin="| ", ending="\n\n")
