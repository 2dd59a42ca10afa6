"""Two models, or two plans over one set of weights, that talk to each other."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from jaxchat.chat.batch import Message
from jaxchat.chat.conversation import Conversation
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.runtime import Model

GOODBYE = ("goodbye", "bye", "farewell", "see you", "take care")
"""Words and phrases that end a conversation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
    """Who takes part in a conversation.

    Attributes:
      name: as transcripts show it.
      model: who speaks, under its plan.
      system: the system prompt.
      reversed_role: plays the user: asks and leads where an assistant offers its help.
      options: how it speaks.
    """

    name: str
    model: Model
    system: str | None = None
    reversed_role: bool = False
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Something said.

    Attributes:
      conversation: which of the conversations, from 0.
      number: which turn of it, from 0, the opening line.
      speaker: the name.
      text: what was said.
      finish_reason: `opening`, or as in `Result`.
      ends: why this is the last turn: `goodbye`, `turns`, `silence` (nothing was said), or "" if it is not.
    """

    conversation: int
    number: int
    speaker: str
    text: str
    finish_reason: str
    ends: str


def crosstalk(
    a: Speaker,
    b: Speaker,
    opening: str,
    *,
    turns: int = 10,
    conversations: int = 1,
    goodbye: Sequence[str] = GOODBYE,
) -> Iterator[Turn]:
    """Lets two speakers talk, A beginning with the opening line.

    What one says is, word for word, the next message of the other. Several conversations differ in their
    seeds, and are decoded as one batch.

    Args:
      a: says the opening line; it is part of A's history wherever A's chat template allows a conversation to
        begin with A's role (any template does if A plays the user).
      b: the other.
      opening: A's first line.
      turns: ends after so many turns, the opening line not counted.
      conversations: how many.
      goodbye: words and phrases; a turn that says one of them is the last.
    """
    if turns < 1 or conversations < 1:
        raise UsageError(f"{turns} turns of {conversations} conversations: expected at least 1 of each")
    if a.name == b.name:
        raise UsageError(f"both speakers are called {a.name}: give them different names")
    talks = {
        a.name: a.model.chat_batch([begin(a, opening) for _ in range(conversations)]),
        b.name: b.model.chat_batch([b.model.conversation(system=b.system, reversed_role=b.reversed_role)
                                    for _ in range(conversations)]),
    }  # fmt: skip
    for conversation in range(conversations):
        yield Turn(conversation, 0, a.name, opening, "opening", "")
    said: list[str | None] = [opening] * conversations
    for number in range(1, turns + 1):
        speaker = b if number % 2 else a
        replies = talks[speaker.name].send(said, speaker.options)
        for conversation, reply in enumerate(replies):
            if reply is None:
                continue
            ends = _ends(reply, number == turns, goodbye)
            said[conversation] = None if ends else reply.text
            yield Turn(conversation, number, speaker.name, reply.text, reply.finish_reason, ends)
        if not any(text is not None for text in said):
            return


def says_goodbye(text: str, goodbye: Sequence[str] = GOODBYE) -> bool:
    """Whether a text says one of the words, as a whole word."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in goodbye)


def _ends(reply: Message, last: bool, goodbye: Sequence[str]) -> str:
    if not reply.text.strip():
        return "silence"
    if says_goodbye(reply.text, goodbye):
        return "goodbye"
    return "turns" if last else ""


def begin(speaker: Speaker, opening: str) -> Conversation:
    """A conversation that the speaker has opened."""
    if speaker.reversed_role:
        return speaker.model.conversation(system=speaker.system, reversed_role=True, opening=opening)
    talk = speaker.model.conversation(system=speaker.system)
    talk.extend([{"role": "assistant", "content": opening}])
    try:
        talk.add_typed("Hello")
        allowed = opening.strip() in _text_of(talk)
        talk.take_back()
    except UsageError:  # many templates insist that the user begins
        allowed = False
    return talk if allowed else speaker.model.conversation(system=speaker.system)


def _text_of(talk: Conversation) -> str:
    talk.prompt_ids()
    return talk.rendered_text()
