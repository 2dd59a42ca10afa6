"""Conversations whose history is token ids.

The template is the truth: what a turn adds is the difference between two renderings of the conversation. Text
and ids only; running a model on them is the engine's job. What the template writes is in `prompts`, the ids
are in `ledger`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.chat.ledger import Chunk, Ledger, decoded, encoded, shortened
from jaxchat.chat.message_text import MessageText, hidden_ids
from jaxchat.chat.opening import Opening
from jaxchat.chat.prompts import Message, Prompt, Prompts, check_message
from jaxchat.errors import UsageError
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.healing import join
from jaxchat.text.reasoning import Kind, ThoughtTags, thought_tags_of
from jaxchat.text.tokenizer import Tokenizer, alternation


@dataclass(frozen=True)
class _Reply:
    """A generated message as the model wrote it: `chunk` is all of it, `lead` and end-of-turn id included."""

    chunk: Chunk
    lead: str
    opened: str
    prefix: str
    prefix_in: Kind
    ended: bool


@dataclass
class _Entry:
    """A message of the history and where it is from: typed, generated (`reply`), or else given."""

    message: dict[str, str]
    typed: bool = False
    reply: _Reply | None = None


@dataclass(frozen=True)
class ConversationState:
    """All of a conversation but its template and tokenizer, as `session_file` stores it."""

    entries: tuple[_Entry, ...]
    chunks: tuple[Chunk, ...]
    opening: str | None
    reversed_role: bool
    thought_tags: ThoughtTags | None
    template_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        replies = [entry.reply.chunk for entry in self.entries if entry.reply is not None]
        if not all(chunk.is_consistent for chunk in (*self.chunks, *replies)):
            raise ValueError("the text of a message does not belong to its token ids")
        if not all(entry.message.keys() >= {"role", "content"} for entry in self.entries):
            raise ValueError("a message has no role or no content")


@dataclass(frozen=True)
class Snapshot:
    """A conversation's messages and ledger at one time."""

    entries: tuple[_Entry, ...]
    ledger: Ledger
    dropped: int


class Conversation:
    """Message history whose token ids are kept, never re-tokenized.

    The ledger alternates rendered chunks and generated ones. For the next prompt everything is rendered; as
    long as the rendered text starts with the ledger's chunks their ids stay, and only the rest is tokenized.
    Special tokens spelled out inside a message, a prefix or a suffix are text.

    Args:
        template: the model's chat template.
        tokenizer: the model's tokenizer.
        system: the system prompt.
        reversed_role: the model plays the user, and what is typed is the assistant's.
        opening: with `reversed_role`, the user's first message.
        thought_tags: what the model thinks between; default what the template says.
        template_kwargs: further template variables, such as `enable_thinking`.

    Attributes:
        template, tokenizer, thought_tags, reversed_role: as above; the last may be changed between turns.
        dropped: how many messages `drop_oldest` has forgotten.

    Raises:
        UsageError: a system prompt is given and the template has no place for one.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        reversed_role: bool = False,
        opening: str | None = None,
        thought_tags: ThoughtTags | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.reversed_role = reversed_role
        self.dropped = 0
        self.thought_tags = thought_tags or thought_tags_of(template.source)
        self._kwargs = dict(template_kwargs or {})
        self._prompts = Prompts(template, tokenizer, self.thought_tags, self._kwargs)
        self._opening = opening
        self._ledger = Ledger()
        self._entries: list[_Entry] = []
        self.set_system(system)
        if opening is not None:
            self._entries.append(_Entry({"role": "user", "content": opening}))

    # --- the history

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history: dicts with "role", "content" and, where the template reads it, "reasoning_content"."""
        return [dict(entry.message) for entry in self._entries]

    @property
    def token_ids(self) -> list[int]:
        """The ids of everything so far: the last prompt, and the reply to it if there is one."""
        return self._ledger.ids

    @property
    def role(self) -> str:
        """The role that the model plays."""
        return "user" if self.reversed_role else "assistant"

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self._entries[0].message if self._entries else {}
        return first["content"] if first.get("role") == "system" else None

    def rendered_text(self) -> str:
        """The text `token_ids` stand for, special tokens and generation prompt included."""
        return self._ledger.text

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt; None takes it away.

        Raises:
            UsageError: the template has no place for one.
        """
        if text is not None:
            self._prompts.require_system_support(text)
        if self.system is not None:
            del self._entries[0]
        if text is not None:
            self._entries.insert(0, _Entry({"role": "system", "content": text}))
        self._forget()

    def restart(self) -> None:
        """Forgets everything but the system prompt and the opening line."""
        self.dropped = 0
        system = self.system
        self._entries = [] if system is None else [self._entries[0]]
        if self._opening is not None:
            self._entries.append(_Entry({"role": "user", "content": self._opening}))
        self._forget()

    def extend(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Append messages as they are.

        Raises:
            UsageError: one is no message, or comes in parts to a template that takes texts only; names it.
        """
        checked = [check_message(f"messages[{number}]", message) for number, message in enumerate(messages)]
        for number, message in enumerate(checked):
            if not isinstance(message.get("content") or "", str) and not self._prompts.reads_parts:
                raise UsageError(
                    f"messages[{number}]['content'] is a list of parts, and this model's chat template takes "
                    "texts only; give the text itself"
                )
        self._entries += [_Entry(dict(message)) for message in checked]

    def add_typed(self, text: str) -> None:
        """Append what the person typed: the user's message or, in reversed role, the assistant's."""
        role = "assistant" if self.reversed_role else "user"
        self._entries.append(_Entry({"role": role, "content": text}, typed=True))

    def take_back(self) -> dict[str, Any]:
        """Removes the last message and returns it."""
        message = self._entries.pop().message
        self._forget()
        return message

    def snapshot(self) -> Snapshot:
        """The history as it is, for `restore`."""
        return Snapshot(tuple(self._entries), self._ledger, self.dropped)

    def restore(self, snapshot: Snapshot) -> None:
        """Takes back everything since the snapshot."""
        self._entries, self._ledger = list(snapshot.entries), snapshot.ledger
        self.dropped = snapshot.dropped

    def undo(self) -> str | None:
        """Forgets the last exchange.

        Returns:
            The message that was typed in it ("" if the model went first), None if there is no exchange.
        """
        if not self._entries:
            return None
        replied = self._entries[-1].reply is not None
        if replied:
            self._entries.pop()
        typed = ""
        if self._entries and self._entries[-1].typed:
            typed = str(self._entries.pop().message["content"])
        elif not replied:
            return None
        self._forget()
        return typed

    def drop_oldest(self) -> bool:
        """Forgets the oldest exchange, but not the system prompt or the last one; false if that is all."""
        first = 0 if self.system is None else 1
        last = 2 if self._entries and self._entries[-1].reply else 1
        if len(self._entries) <= first + last:
            return False
        before = len(self._entries)
        del self._entries[first : first + 2]
        self.dropped += before - len(self._entries)
        return True

    def _forget(self) -> None:
        """Takes out of the ledger what the history no longer holds: ids and text, not only messages."""
        if not self._ledger.chunks:
            return
        try:
            prompt = self._prompt(self._entries, self.role)
        except UsageError:  # the template does not render such a beginning, and there is little to keep
            self._ledger = Ledger()
        else:
            self._ledger = self._ledger.rendered(prompt, self.tokenizer)

    # --- the model's messages

    def prompt_ids(self) -> list[int]:
        """Ids of the whole conversation up to the model's next message; from here on these are `token_ids`.

        Ids of earlier turns are reused wherever the rendered text still starts with the text they stand for.
        Where the template rewrites history (drops reasoning, trims) the rest is tokenized anew.

        Raises:
            UsageError: the template refuses the conversation.
        """
        return list(self.open().prompt)

    def open(self, *, prefix: str = "", prefix_in: Kind = "content") -> Opening:
        """The next message of the model's role, opened with a prefix.

        Raises:
            UsageError: the template refuses the conversation or the role, or has no place for reasoning.
        """
        return self._open(self._entries, self.role, prefix, prefix_in)

    def reopen_anew(self) -> Opening:
        """The last message, generated before, to be generated again from its prefix.

        Raises:
            UsageError: the last message is not the model's.
        """
        reply = self.require_reply("retry")
        role = self._entries[-1].message["role"]
        opening = self._open(self._entries[:-1], role, reply.prefix, reply.prefix_in)
        self._ledger = self._ledger.replied(reply.chunk)
        return dataclasses.replace(opening, replaces=True)

    def _open(self, entries: Sequence[_Entry], role: str, prefix: str, prefix_in: Kind) -> Opening:
        prompt = self._prompt(entries, role)
        self._ledger = self._ledger.rendered(prompt, self.tokenizer)
        ids = self.token_ids
        lead, opened = prompt.lead, prompt.opened
        if prefix_in == "reasoning" and role == "user":
            raise UsageError("a user's message has no reasoning: put the prefix into the content")
        spelled_out = self.thought_tags is not None and prefix.lstrip().startswith(self.thought_tags[0])
        if prefix and role == "assistant" and not spelled_out:
            lead = self._prompts.lead(_messages(entries), prompt.text, prefix_in)
            opened = "" if prefix_in == "content" else opened or lead
        after = ids[-1] if ids else None
        message = encoded(self.tokenizer, lead, after=after) if lead else []
        lead = decoded(self.tokenizer, ids, message).text  # a space that the tokenizer adds is no text
        message = join(self.tokenizer, message, prefix, after=after)
        return Opening(
            role=role,
            prompt=tuple(ids),
            ids=tuple(message),
            lead=lead,
            given=self._added_text(ids, message, lead, prefix),
            opened=opened,
            prefix=prefix,
            prefix_in=prefix_in,
            stop_ids=prompt.stop_ids,
            stop_strings=prompt.stop_strings,
            tail=prompt.tail,
        )

    def reopen(self, suffix: str = "") -> Opening:
        """The last message, generated before, to go on after `suffix`; its end-of-turn token is taken back.

        Raises:
            UsageError: the last message is not the model's.
        """
        reply = self.require_reply("continue")
        role = self._entries[-1].message["role"]
        prompt = self._prompt(self._entries[:-1], role)
        rendered = self._ledger.rendered(prompt, self.tokenizer)
        self._ledger = rendered.replied(reply.chunk)
        prompt_ids = tuple(rendered.ids)
        kept = self._without_end(prompt_ids, reply.chunk, prompt.tail) if reply.ended else reply.chunk.ids
        after = prompt_ids[-1] if prompt_ids else None
        before = decoded(self.tokenizer, prompt_ids, kept).text
        message = join(self.tokenizer, kept, suffix, after=after)
        return Opening(
            role=role,
            prompt=prompt_ids,
            ids=tuple(message),
            lead=reply.lead,
            given=self._added_text(prompt_ids, message, before, suffix),
            opened=reply.opened,
            continued=self._said(prompt_ids, kept, reply.lead, cut=bool(suffix)),
            replaces=True,
            prefix=reply.prefix,
            prefix_in=reply.prefix_in,
            stop_ids=prompt.stop_ids,
            stop_strings=prompt.stop_strings,
            tail=prompt.tail,
            resumes_ended=reply.ended and not suffix,
        )

    def add_reply(
        self, ids: Sequence[int], opening: Opening | None = None, *, end_ids: Iterable[int] = ()
    ) -> str:
        """Stores ids as the model's message.

        Args:
            ids: the whole message, from `Opening.prompt` on, with or without an end-of-turn id.
            opening: what it was opened as; default as `prompt_ids` does.
            end_ids: ids that end a message, beside special tokens and its role's: such a one is no text.

        Returns:
            The message's text as it was generated, reasoning included, without special tokens.
        """
        if opening is None:
            if not self._ledger.chunks or self._ledger.ends_with_reply:
                self.prompt_ids()
            prompt = self._prompt(self._entries, self.role)
            opening = Opening(
                role=self.role,
                prompt=tuple(self.token_ids),
                opened=prompt.opened,
                stop_ids=prompt.stop_ids,
                stop_strings=prompt.stop_strings,
                tail=prompt.tail,
            )
        text = MessageText(self.tokenizer, opening, tags=self.thought_tags, end_ids=end_ids)
        text.begin()
        for token_id in ids:
            text.push(token_id)
        text.end()
        self.add_message(ids, opening, text)
        return text.whole

    def add_message(self, ids: Sequence[int], opening: Opening, text: MessageText) -> None:
        """Stores a message of the model's whose text was derived while its ids came.

        Args:
            ids: the whole message, from `Opening.prompt` on, with or without an end-of-turn id.
            opening: what it was opened as.
            text: of those ids, at its end.
        """
        ids = [int(i) for i in ids]
        if text.dropped:
            ids = shortened(self.tokenizer, opening.prompt, ids, text.dropped, text.hidden)
        chunk = decoded(self.tokenizer, opening.prompt, ids)
        reply = _Reply(
            chunk,
            opening.lead,
            opening.opened,
            opening.prefix,
            opening.prefix_in,
            text.ended and not text.dropped,
        )
        if opening.replaces:
            self._entries.pop()
        self._entries.append(_Entry(self._message(opening, text), reply=reply))
        self._ledger = self._ledger.replied(chunk, replaces=opening.replaces)

    def _message(self, opening: Opening, text: MessageText) -> dict[str, Any]:
        """A finished message in the keys that the template reads."""
        if opening.role == "user":
            return {"role": "user", "content": text.whole}
        if text.reasoning is None:
            return {"role": "assistant", "content": text.whole}
        if self._prompts.reads_reasoning:
            return {"role": "assistant", "content": text.content, "reasoning_content": text.reasoning}
        return {"role": "assistant", "content": opening.opened + text.whole}

    def require_reply(self, what: str) -> _Reply:
        """The last message, if it is the model's.

        Raises:
            UsageError: it is not, so one cannot do `what` to it.
        """
        reply = self._entries[-1].reply if self._entries else None
        if reply is None:
            raise UsageError(f"there is no reply to {what}; send a message first")
        return reply

    def _prompt(self, entries: Sequence[_Entry], role: str) -> Prompt:
        return self._prompts.before(_messages(entries), role)

    def _without_end(self, prompt: Sequence[int], chunk: Chunk, tail: str) -> Sequence[int]:
        """The ids of a message that had come to its end, without that and what the template puts before."""
        kept = chunk.ids[:-1]
        if not tail or not decoded(self.tokenizer, prompt, kept).text.endswith(tail):
            return kept
        return shortened(self.tokenizer, prompt, kept, len(tail), frozenset())

    def _added_text(self, prompt: Sequence[int], ids: Sequence[int], before: str, text: str) -> str:
        """`text` as the last of `ids` spell it: a tokenizer may compose characters."""
        whole = decoded(self.tokenizer, prompt, ids).text
        return whole[len(before) :] if whole.startswith(before) else text

    def _said(self, prompt: Sequence[int], ids: Sequence[int], lead: str, *, cut: bool) -> str:
        """The text of a message's ids after its lead, as `MessageText.whole` has it."""
        hidden = hidden_ids(self.tokenizer, self.thought_tags)
        special = alternation(t for t, i in self.tokenizer.special_tokens.items() if i in hidden)
        whole = decoded(self.tokenizer, prompt, ids, hidden=hidden, cut=cut).text
        return whole[len(special.sub("", lead)) :]

    # --- session files

    def state(self) -> ConversationState:
        """All of it but template and tokenizer; `from_state` reads it."""
        return ConversationState(
            entries=tuple(self._entries),
            chunks=self._ledger.chunks,
            opening=self._opening,
            reversed_role=self.reversed_role,
            thought_tags=self.thought_tags,
            template_kwargs=self._kwargs,
        )

    @classmethod
    def from_state(
        cls, template: ChatTemplate, tokenizer: Tokenizer, state: ConversationState
    ) -> Conversation:
        """The conversation whose `state` this was, over the same template and tokenizer."""
        conversation = cls(
            template,
            tokenizer,
            reversed_role=state.reversed_role,
            thought_tags=state.thought_tags,
            template_kwargs=state.template_kwargs,
        )
        conversation._opening = state.opening
        conversation._ledger = Ledger(state.chunks)
        conversation._entries = list(state.entries)
        return conversation


def _messages(entries: Sequence[_Entry]) -> list[Message]:
    return [Message(entry.message, generated=entry.reply is not None) for entry in entries]
