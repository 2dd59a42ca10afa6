"""Markdown of a reply, rendered block by block while it streams."""

import itertools
import re
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from jaxchat.visible import visible

_SPARE_LINES = 2
"""Lines of the screen that a preview leaves free, so that it never scrolls."""


class MarkdownSink:
    """Renders finished blocks (paragraphs, lists, code) for good, and on a terminal the growing one for now.

    What is rendered for good is never touched again, so it scrolls and resizes as text does.
    """

    def __init__(self, stream: Any):
        self._console = Console(file=stream, highlight=False)
        self._parser = MarkdownIt().enable("strikethrough").enable("table")  # as rich does
        self._text = ""
        self._live: Live | None = None
        self._started = False

    def write(self, text: str) -> None:
        """See `writing.Sink`."""
        self._text += visible(text)
        *finished, self._text = self._blocks()
        for block in finished:
            self._print(block)
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._text.strip():
            self._preview()

    def end(self) -> None:
        """See `writing.Sink`."""
        if self._live is not None:
            self._live.stop()
        if self._text.strip():
            self._print(self._text)
        elif not self._started:
            self._console.print()

    def _blocks(self) -> list[str]:
        """The text at the starts of its blocks: whatever comes, all but the last stay as they are."""
        lines = re.split(r"(?<=\n)", self._text)  # `splitlines` knows line ends that Markdown does not
        starts = [token.map[0] for token in self._parser.parse(self._text) if token.map and not token.level]
        return ["".join(lines[a:b]) for a, b in itertools.pairwise([0, *starts[1:], len(lines)])]

    def _print(self, block: str) -> None:
        # The first block leaves the line of the label, each further one a blank line.
        if self._started or self._console.is_terminal:
            self._console.print()
        self._started = True
        self._console.print(_render(block))

    def _preview(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(_Tail(self._text), refresh=True)


class _Tail:
    """The last lines of a rendering, as many as there is room for."""

    def __init__(self, text: str):
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(options.size.height - _SPARE_LINES, 1)
        lines = console.render_lines(_render(self._text), options.update(height=None), pad=False)
        for line in lines[-room:]:
            yield from line
            yield Segment.line()


def _render(text: str) -> Markdown:
    return Markdown(text, hyperlinks=False)  # a link shows where it leads, and is no sequence
