"""Where a message of the model's begins: what `conversation` decides and a reply goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from jaxchat.text.reasoning import Kind


@dataclass(frozen=True)
class Opening:
    """Where a message of the model's begins, and what it begins with.

    Attributes:
        role: whose message it is; "" is nobody's, a text that just goes on.
        prompt: ids of the conversation up to the message.
        ids: the message's ids so far: the given text, and what the template puts before it.
        lead: text of `ids` that is the template's, not the message's.
        given: the text that the message opens with or, if it is continued, the text added to it.
        opened: the template's text, in `prompt` or `lead`, that opened the reasoning; "" if none did.
        continued: text of the message before `given`; None if it starts anew.
        replaces: it takes the place of the last message.
        prefix, prefix_in: what the message was opened with, to retry it.
        stop_ids, stop_strings: what ends the role's message, beside the model's own end tokens.
        tail: white space that the template puts between the message and that.
        resumes_ended: a message that had come to its end goes on with nothing given.
    """

    role: str
    prompt: tuple[int, ...]
    ids: tuple[int, ...] = ()
    lead: str = ""
    given: str = ""
    opened: str = ""
    continued: str | None = None
    replaces: bool = False
    prefix: str = ""
    prefix_in: Kind = "content"
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    tail: str = ""
    resumes_ended: bool = False

    @property
    def length(self) -> int:
        """Tokens up to where the model goes on."""
        return len(self.prompt) + len(self.ids)
