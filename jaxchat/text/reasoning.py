"""Reasoning apart from content: which tags a model thinks between, and the splitting of text at them.

Text only: no model, no tokenizer. A tag may be a special token; who decodes ids keeps those two in the text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxchat.errors import UsageError

Kind = Literal["content", "reasoning"]
ThoughtTags = tuple[str, str]
"""What opens the reasoning and what closes it, e.g. ("<think>", "</think>")."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a message: never empty, without the tags."""

    text: str
    kind: Kind


class ReasoningSplitter:
    """Splits a message into reasoning and content while it grows.

    The rules, which give the same text for every way the message is cut into pushes:

    - An open tag counts until the message has content; later it is text, as in an answer that explains tags.
      A second block of reasoning right after the first is reasoning too.
    - A close tag counts inside reasoning, and before any content: some models close what they never opened.
      After content it is text, since what was streamed cannot be taken back.
    - With `opened` the prompt has opened the reasoning; an open tag that the model repeats is dropped.
    - Reasoning that is never closed is reasoning.
    - White space on the inner side of a tag belongs to it. So do the blank lines between a close tag and the
      answer (without a line break: the spaces), but not the indentation of the answer's first line. Nothing
      else is lost: the pieces joined are the message.

    Only what may still become a tag, or the white space of one, is held back.

    Args:
      tags: None is a model that does not think: everything is content.
      opened: the message begins inside the reasoning.
    """

    def __init__(self, tags: ThoughtTags | None, *, opened: bool = False) -> None:
        self._open, self._close = tags or ("", "")
        self._held = ""  # text not yet given out
        self._state = "content" if tags is None else "opened" if opened else "start"

    @property
    def kind(self) -> Kind:
        """What further text would be."""
        return "reasoning" if self._state in ("opened", "reasoning") else "content"

    def push(self, text: str) -> list[Piece]:
        """Adds text; returns what is now certain."""
        self._held += text
        pieces = []
        before = None
        while self._held and (self._state, self._held) != before:
            before = (self._state, self._held)
            if piece := _STEPS[self._state](self):
                pieces.append(piece)
        return pieces

    def flush(self) -> list[Piece]:
        """Ends the message; returns what was held back."""
        text, self._held = self._held, ""
        if self._state == "after":
            text = _after_close(text)
        elif self._state == "opened":
            text = text.lstrip()
        return [Piece(text, self.kind)] if text else []

    def _before_content(self) -> Piece | None:
        text = self._held.lstrip()
        if text.startswith(self._open):
            self._go("opened", text[len(self._open) :])
        elif self._open.startswith(text):
            pass  # may become an open tag
        elif text.startswith(self._close):
            self._go("after", text[len(self._close) :])
        elif not self._close.startswith(text):
            text = _after_close(self._held) if self._state == "after" else self._held
            self._go("content", "")
            return Piece(text, "content")
        return None

    def _before_reasoning(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._open):
            self._go("opened", text[len(self._open) :])
        elif not self._open.startswith(text):
            self._go("reasoning", text)

    def _in_reasoning(self) -> Piece | None:
        at = self._held.find(self._close)
        if at >= 0:
            text = self._held[:at].rstrip()
            self._go("after", self._held[at + len(self._close) :])
        else:
            certain = len(self._held) - overlap(self._held, self._close)
            text = self._held[:certain].rstrip()
            self._held = self._held[len(text) :]
        return Piece(text, "reasoning") if text else None

    def _in_content(self) -> Piece:
        text, self._held = self._held, ""
        return Piece(text, "content")

    def _go(self, state: str, held: str) -> None:
        self._state, self._held = state, held


_STEPS: dict[str, Callable[[ReasoningSplitter], Piece | None]] = {
    "start": ReasoningSplitter._before_content,
    "after": ReasoningSplitter._before_content,
    "opened": ReasoningSplitter._before_reasoning,
    "reasoning": ReasoningSplitter._in_reasoning,
    "content": ReasoningSplitter._in_content,
}


def overlap(text: str, tag: str) -> int:
    """Length of the longest proper prefix of `tag` that `text` ends with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _after_close(text: str) -> str:
    """`text` without the blank lines, or else the spaces, that separate it from the close tag."""
    stripped = text.lstrip()
    blank = text[: len(text) - len(stripped)]
    return blank[blank.rfind("\n") + 1 :] + stripped if stripped and "\n" in blank else stripped


def parse_thought_tags(text: str) -> ThoughtTags:
    """Reads `--thought_tags "OPEN CLOSE"`.

    Raises:
      UsageError: there are not two tags, or one begins with the other.
    """
    tags = text.split()
    if len(tags) != 2 or tags[0].startswith(tags[1]) or tags[1].startswith(tags[0]):
        raise UsageError(f"--thought_tags is {text!r}; give two different tags, as in '<think> </think>'")
    return tags[0], tags[1]


def opens_reasoning(prompt: str, tags: ThoughtTags | None) -> bool:
    """Whether a rendered prompt ends by opening the reasoning, as DeepSeek-R1's does."""
    return tags is not None and prompt.rstrip().endswith(tags[0])


_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CLOSE = re.compile(r"(?:</|\[/)(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)[>\]]", re.IGNORECASE)
_OTHERS = (
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command-R7B
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel 1.6
)


def thought_tags_of(template_source: str) -> ThoughtTags | None:
    """The tags that a chat template says the model thinks between.

    An XML-like or bracketed tag is known by its close tag, which templates name where they take old reasoning
    out of the history (`content.split('</think>')`), be the open tag there or not. None where the template
    names no tags, though the model may think (Phi-4-mini-reasoning), and where reasoning is not a stretch
    between two tags but a message of its own on a channel (gpt-oss, Solar Open).
    """
    source = _COMMENT.sub("", template_source)
    for tags in _OTHERS:
        if all(tag in source for tag in tags):
            return tags
    close = _CLOSE.search(source)
    return (close[0].replace("/", "", 1), close[0]) if close else None
