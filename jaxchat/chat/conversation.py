"""Conversations whose history is token ids.

The template is the truth: what a turn adds is the difference between two renderings of the conversation. Text
and ids only; running a model on them is the engine's job, rendering that of `chat_template`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.lengths import common_prefix
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.healing import join
from jaxchat.text.reasoning import Kind, ReasoningSplitter, ThoughtTags, opens_reasoning, thought_tags_of
from jaxchat.text.tokenizer import Detokenizer, TextTokenizer, Tokenizer, alternation, unused_marks


@dataclass(frozen=True)
class _Chunk:
    """A stretch of the ledger: rendered by the template, or generated.

    `ends[k]` is the length of the text of a reply's first k+1 ids, -1 where a cut splits a character; None
    for rendered text, which can be tokenized again with the same result.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int, ...] | None = None

    def head(self, length: int) -> _Chunk:
        """The longest prefix of whole ids of a reply whose text is within the first `length` characters."""
        assert self.ends is not None
        keep = max((k + 1 for k, end in enumerate(self.ends) if 0 <= end <= length), default=0)
        text = self.text[: self.ends[keep - 1]] if keep else ""
        return _Chunk(text, self.ids[:keep], self.ends[:keep])


@dataclass(frozen=True)
class Opening:
    """Where a message of the model's begins, and what it begins with.

    Attributes:
        role: whose message it is.
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


@dataclass(frozen=True)
class _Reply:
    """A generated message as the model wrote it: `chunk` is all of it, `lead` and end-of-turn id included."""

    chunk: _Chunk
    lead: str
    opened: str
    prefix: str
    prefix_in: Kind
    ended: bool


@dataclass
class _Entry:
    """A message of the history and where it is from: typed, generated (`reply`), or else given."""

    message: dict[str, Any]
    typed: bool = False
    reply: _Reply | None = None


@dataclass(frozen=True)
class Snapshot:
    """A conversation's messages and ledger at one time."""

    entries: tuple[_Entry, ...]
    chunks: tuple[_Chunk, ...]


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
        reversed_role: as above; may be changed between turns.
        token_ids: the ledger's ids: what a KV cache should hold.

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
        self._template, self._tokenizer = template, tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._opening = opening
        self._chunks: list[_Chunk] = []
        self._entries: list[_Entry] = []
        self.reversed_role = reversed_role
        self.thought_tags = thought_tags or thought_tags_of(template.source)
        self.set_system(system)
        if opening is not None:
            self._entries.append(_Entry({"role": "user", "content": opening}))

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return self._template

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    # --- the history

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history: dicts with "role", "content" and, where the template reads it, "reasoning_content"."""
        return [dict(entry.message) for entry in self._entries]

    @property
    def token_ids(self) -> list[int]:
        """The ids of everything so far: the last prompt, and the reply to it if there is one."""
        return [i for chunk in self._chunks for i in chunk.ids]

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
        return "".join(chunk.text for chunk in self._chunks)

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt; None takes it away.

        Raises:
            UsageError: the template has no place for one.
        """
        if text is not None:
            self._require_system_support(text)
        if self.system is not None:
            del self._entries[0]
        if text is not None:
            self._entries.insert(0, _Entry({"role": "system", "content": text}))

    def restart(self) -> None:
        """Forgets everything but the system prompt and the opening line."""
        system = self.system
        self._entries = [] if system is None else [self._entries[0]]
        if self._opening is not None:
            self._entries.append(_Entry({"role": "user", "content": self._opening}))

    def extend(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Append messages as they are."""
        self._entries += [_Entry(dict(message)) for message in messages]

    def add_user(self, text: str) -> None:
        """Append the user's message."""
        self._entries.append(_Entry({"role": "user", "content": text}, typed=True))

    def add_typed(self, text: str) -> None:
        """Append what the person typed: the user's message or, in reversed role, the assistant's."""
        role = "assistant" if self.reversed_role else "user"
        self._entries.append(_Entry({"role": role, "content": text}, typed=True))

    def take_back(self) -> dict[str, Any]:
        """Removes the last message and returns it."""
        return self._entries.pop().message

    def snapshot(self) -> Snapshot:
        """The history as it is, for `restore`."""
        return Snapshot(tuple(self._entries), tuple(self._chunks))

    def restore(self, snapshot: Snapshot) -> None:
        """Takes back everything since the snapshot."""
        self._entries, self._chunks = list(snapshot.entries), list(snapshot.chunks)

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
        if self._entries and self._entries[-1].typed:
            return str(self._entries.pop().message["content"])
        return "" if replied else None

    def drop_oldest(self) -> bool:
        """Forgets the oldest exchange, but not the system prompt or the last one; false if that is all."""
        first = 0 if self.system is None else 1
        last = 2 if self._entries and self._entries[-1].reply else 1
        if len(self._entries) <= first + last:
            return False
        del self._entries[first : first + 2]
        return True

    # --- prompts

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
        reply = self._require_reply("retry")
        role = self._entries[-1].message["role"]
        opening = self._open(self._entries[:-1], role, reply.prefix, reply.prefix_in)
        self._chunks.append(reply.chunk)
        return dataclasses.replace(opening, replaces=True)

    def _open(self, entries: Sequence[_Entry], role: str, prefix: str, prefix_in: Kind) -> Opening:
        prompt = self._prompt(entries, role)
        self._chunks = self._rendered_chunks(prompt)
        ids = self.token_ids
        lead, opened = prompt.lead, prompt.opened
        if prefix_in == "reasoning" and role == "user":
            raise UsageError("a user's message has no reasoning: put the prefix into the content")
        spelled_out = self.thought_tags is not None and prefix.lstrip().startswith(self.thought_tags[0])
        if prefix and role == "assistant" and not spelled_out:
            lead = self._lead(entries, prompt.text, prefix_in)
            opened = "" if prefix_in == "content" else opened or lead
        after = ids[-1] if ids else None
        message = self._encode(lead, after, "") if lead else []
        lead, _ = self._decode(ids, message)  # a space that the tokenizer adds by itself is no text
        message = join(self._tokenizer, message, prefix, after=after)
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
        reply = self._require_reply("continue")
        role = self._entries[-1].message["role"]
        prompt = self._prompt(self._entries[:-1], role)
        rendered = self._rendered_chunks(prompt)
        self._chunks = [*rendered, reply.chunk]
        prompt_ids = tuple(i for chunk in rendered for i in chunk.ids)
        kept = reply.chunk.ids[:-1] if reply.ended else reply.chunk.ids
        after = prompt_ids[-1] if prompt_ids else None
        before, _ = self._decode(prompt_ids, kept)
        message = join(self._tokenizer, kept, suffix, after=after)
        return Opening(
            role=role,
            prompt=prompt_ids,
            ids=tuple(message),
            lead=reply.lead,
            given=self._added_text(prompt_ids, message, before, suffix),
            opened=reply.opened,
            continued=before[len(reply.lead) :],
            replaces=True,
            prefix=reply.prefix,
            prefix_in=reply.prefix_in,
            stop_ids=prompt.stop_ids,
            stop_strings=prompt.stop_strings,
            tail=prompt.tail,
            resumes_ended=reply.ended and not suffix,
        )

    def add_reply(
        self,
        ids: Sequence[int],
        opening: Opening | None = None,
        *,
        end_ids: Iterable[int] = (),
        length: int | None = None,
    ) -> str:
        """Store generated ids as the model's message.

        Args:
            ids: the whole message, from `Opening.prompt` on, with or without an end-of-turn id.
            opening: what it was opened as; default as `prompt_ids` does.
            end_ids: ids that end a message: one at the end is no part of the text.
            length: of the message's text; what the ids say beyond it, a stop string, is cut off.

        Returns:
            The message's text as it was generated, reasoning included, without special tokens.
        """
        if opening is None:
            if not self._chunks or self._chunks[-1].ends is not None:
                self.prompt_ids()
            opening = Opening(role=self.role, prompt=tuple(self.token_ids), opened=self._opened_by_prompt())
        ids = [int(i) for i in ids]
        if length is not None:
            ids = self._cut(opening.prompt, ids, len(opening.lead) + length)
        special = frozenset(self._tokenizer.special_tokens.values()) - self._tag_ids
        ended = bool(ids) and ids[-1] in special.union(end_ids, opening.stop_ids)
        text, ends = self._decode(opening.prompt, ids)
        chunk = _Chunk(text, tuple(ids), ends)
        shown, _ = self._decode(opening.prompt, ids[:-1] if ended else ids, keep=self._tag_ids)
        if ended or length is not None:
            shown = shown.removesuffix(opening.tail)
        entry = _Entry(
            self._message(opening, shown),
            reply=_Reply(chunk, opening.lead, opening.opened, opening.prefix, opening.prefix_in, ended),
        )
        if opening.replaces:
            self._entries.pop()
        self._entries.append(entry)
        rendered = self._chunks[:-1] if opening.replaces else self._chunks
        self._chunks = [*rendered, chunk]
        return shown[len(opening.lead) :]

    # --- session files

    def state(self) -> dict[str, Any]:
        """All of it but template and tokenizer, as JSON can hold it; `from_state` reads it."""
        return {
            "entries": [dataclasses.asdict(entry) for entry in self._entries],
            "chunks": [dataclasses.asdict(chunk) for chunk in self._chunks],
            "opening": self._opening,
            "reversed_role": self.reversed_role,
            "thought_tags": self.thought_tags,
            "template_kwargs": self._kwargs,
        }

    @classmethod
    def from_state(
        cls, template: ChatTemplate, tokenizer: Tokenizer, state: Mapping[str, Any]
    ) -> Conversation:
        """The conversation whose `state` this was, over the same template and tokenizer."""
        conversation = cls(
            template,
            tokenizer,
            reversed_role=state["reversed_role"],
            template_kwargs=state["template_kwargs"],
        )
        conversation._opening = state["opening"]
        tags = state["thought_tags"]
        conversation.thought_tags = None if tags is None else (tags[0], tags[1])
        conversation._chunks = [_chunk_of(chunk) for chunk in state["chunks"]]
        conversation._entries = [_entry_of(entry) for entry in state["entries"]]
        return conversation

    # --- how it is done

    def _require_system_support(self, system: str) -> None:
        probe = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        advice = "leave the system prompt out, or put it into the first message"
        try:
            text = self._template.render(probe, add_generation_prompt=True, **self._kwargs)
        except UsageError as error:
            raise UsageError(
                f"this model's chat template takes no system prompt ({error}): {advice}"
            ) from error
        if system.strip() not in text:
            raise UsageError(f"this model's chat template ignores the system prompt: {advice}")

    def _require_reply(self, what: str) -> _Reply:
        reply = self._entries[-1].reply if self._entries else None
        if reply is None:
            raise UsageError(f"there is no reply to {what}; send a message first")
        return reply

    @property
    def _tag_ids(self) -> frozenset[int]:
        """The ids of thought tags that are special tokens."""
        special = self._tokenizer.special_tokens
        return frozenset(special[tag] for tag in self.thought_tags or () if tag in special)

    def _opened_by_prompt(self) -> str:
        return _opened(self.rendered_text(), self.thought_tags)

    def _prompt(self, entries: Sequence[_Entry], role: str) -> _Prompt:
        """The rendering of `entries` up to where a message of `role` begins."""
        if role == "assistant" and not entries:
            raise UsageError("there is nothing to reply to; send a message first")
        messages, breaker = self._broken(entries)
        if role == "assistant":
            marked = self._template.render(messages, add_generation_prompt=True, **self._kwargs)
            text = marked.replace(breaker, "")
            return _Prompt(marked, text, breaker, opened=_opened(text, self.thought_tags))
        return self._user_prompt(messages, breaker)

    def _user_prompt(self, messages: Sequence[Mapping[str, Any]], breaker: str) -> _Prompt:
        """What the template writes before and after a user's message: there a sentinel is put and cut at."""
        sentinel = unused_text(*_strings(messages))
        try:
            marked = self._template.render(
                [*messages, {"role": "user", "content": sentinel}], add_generation_prompt=True, **self._kwargs
            )
        except UsageError as error:
            raise UsageError(f"the model cannot play the user here: {error}") from error
        head, found, tail = marked.rpartition(sentinel)
        if not found:
            raise UsageError(
                "the model cannot play the user: its chat template does not write a user's message out"
            )
        # A space before the message is part of its first token, as in training: of "[INST] Hi" it is " Hi".
        stripped = head.rstrip(" ")
        prompt = _Prompt(stripped, stripped.replace(breaker, ""), breaker, head[len(stripped) :])
        return dataclasses.replace(prompt, **self._end_of_message(tail.replace(breaker, "")))

    def _end_of_message(self, after: str) -> dict[str, Any]:
        """`stop_ids` or `stop_strings`, and `tail`, of a message that is followed by this text."""
        tokens = self._tokenizer
        added = tokens.added_tokens if isinstance(tokens, TextTokenizer) else tokens.special_tokens
        match = alternation(added).search(after)
        plain = after[: match.start()] if match else after
        body = plain.lstrip()
        if not body:
            return {"stop_ids": (added[match[0]],) if match else (), "tail": plain}
        blank = plain[: len(plain) - len(body)]
        tail = blank if not blank.strip(" ") else ""
        return {"stop_strings": ((blank[len(tail) :] + body.split("\n", 1)[0]).rstrip(" "),), "tail": tail}

    def _lead(self, entries: Sequence[_Entry], prompt: str, prefix_in: Kind) -> str:
        """What the template writes between the generation prompt and a reply's answer, or its reasoning.

        Raises:
            UsageError: there is no place for reasoning.
        """
        tags = self.thought_tags
        opened = opens_reasoning(prompt, tags)
        if prefix_in == "content":
            closing = f"\n{tags[1]}\n\n" if tags and opened else ""
            return closing or self._rendered_lead(entries, prompt, "content") or ""
        if tags is None:
            raise UsageError(
                "this model's chat template knows no reasoning: put the prefix into the content, "
                "or name the tags (thought_tags)"
            )
        if prompt.rstrip().endswith(tags[1]):
            raise UsageError("the prompt has closed the reasoning: put the prefix into the content")
        return "" if opened else self._rendered_lead(entries, prompt, "reasoning_content") or f"{tags[0]}\n"

    def _rendered_lead(self, entries: Sequence[_Entry], prompt: str, key: str) -> str | None:
        """What the template writes between `prompt` and one part of the assistant's message, if it does."""
        sentinel = unused_text(prompt)
        message = {"role": "assistant", "content": "", key: sentinel}
        try:
            text = self._template.render([*(entry.message for entry in entries), message], **self._kwargs)
        except JaxchatError:
            return None
        head, found, _ = text.rpartition(sentinel)
        return head[len(prompt) :] if found and head.startswith(prompt) else None

    def _message(self, opening: Opening, text: str) -> dict[str, Any]:
        """The message of a finished reply, in the keys that the template reads."""
        inner = text[len(opening.lead) :]
        if opening.role == "user":
            return {"role": "user", "content": inner}
        content, reasoning = split_reasoning(inner, self.thought_tags, opened=bool(opening.opened))
        if reasoning is None:
            return {"role": "assistant", "content": inner}
        if "reasoning_content" in self._template.source:
            return {"role": "assistant", "content": content, "reasoning_content": reasoning}
        return {"role": "assistant", "content": opening.opened + inner}

    def _rendered_chunks(self, prompt: _Prompt) -> list[_Chunk]:
        """The ledger for a prompt: the chunks it starts with, and one with the rest."""
        kept = self._matching_chunks(prompt.text)
        start = sum(len(chunk.text) for chunk in kept)
        after = next((c.ids[-1] for c in reversed(kept) if c.ids), None)
        rest = prompt.marked[_marked_offset(prompt.marked, prompt.breaker, start) :]
        ids = self._encode(rest, after, prompt.breaker if prompt.breaker in rest else "")
        return [*kept, _Chunk(prompt.text[start:], tuple(ids))]

    def _decode(
        self, prompt: Sequence[int], ids: Sequence[int], *, keep: frozenset[int] | None = None
    ) -> tuple[str, tuple[int, ...]]:
        """The text of ids after `prompt`, and where in it each id ends (-1: inside a character).

        `keep`: special tokens other than these have no text; None is all have.
        """
        detokenizer = Detokenizer(self._tokenizer, prompt_ids=prompt, skip_special_tokens=False)
        hidden = (
            frozenset(self._tokenizer.special_tokens.values()) - keep if keep is not None else frozenset()
        )
        text, ends = "", []
        for token_id in ids:
            if token_id not in hidden:
                text += detokenizer.push(token_id)
            ends.append(-1 if detokenizer.pending else len(text))
        return text + detokenizer.flush(), tuple(ends)

    def _added_text(self, prompt: Sequence[int], ids: Sequence[int], before: str, text: str) -> str:
        """`text` as the last of `ids` spell it: a tokenizer may compose characters."""
        whole, _ = self._decode(prompt, ids)
        return whole[len(before) :] if whole.startswith(before) else text

    def _cut(self, prompt: Sequence[int], ids: Sequence[int], length: int) -> list[int]:
        """`ids` up to `length` characters of text, a token across it cut in two."""
        text, ends = self._decode(prompt, ids)
        head = _Chunk(text, tuple(ids), ends).head(length)
        return join(
            self._tokenizer, head.ids, text[len(head.text) : length], after=prompt[-1] if prompt else None
        )

    def _broken(self, entries: Sequence[_Entry]) -> tuple[list[dict[str, Any]], str]:
        """The messages with control tokens in them broken by a character, and that character."""
        messages = [entry.message for entry in entries]
        breaker = unused_marks(*_strings(messages))[0]
        regex = self._tokenizer.control_regex if isinstance(self._tokenizer, TextTokenizer) else None
        if regex is None:
            return messages, breaker
        tags = self.thought_tags or ()

        def break_up(text: str) -> str:
            return regex.sub(lambda m: m[0][0] + breaker + m[0][1:], text)

        def break_up_but_tags(text: str) -> str:
            return regex.sub(lambda m: m[0] if m[0] in tags else m[0][0] + breaker + m[0][1:], text)

        return [
            _map_strings(entry.message, break_up_but_tags if entry.reply else break_up) for entry in entries
        ], breaker

    def _matching_chunks(self, text: str) -> list[_Chunk]:
        """The longest prefix of the ledger that `text` starts with.

        A rendered chunk stays only before a reply that stays: tokenizing it again gives the same ids, and the
        right ones where its last token merges with what now follows.
        """
        kept: list[_Chunk] = []
        at = 0
        for chunk in self._chunks:
            if text.startswith(chunk.text, at):
                kept.append(chunk)
                at += len(chunk.text)
                continue
            if chunk.ends is not None:
                kept.append(chunk.head(common_prefix(chunk.text, text[at : at + len(chunk.text)])))
            break
        while kept and (kept[-1].ends is None or not kept[-1].ids):
            kept.pop()
        return kept

    def _encode(self, text: str, after: int | None, breaker: str) -> list[int]:
        if isinstance(self._tokenizer, TextTokenizer):
            return self._tokenizer.encode_after(text, after=after, breaker=breaker or None)
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)


@dataclass(frozen=True)
class _Prompt:
    """A rendering up to where a message begins.

    Attributes:
        marked: the text with control tokens in messages broken by `breaker`.
        text: the same without.
        lead: text the template puts before the message that is tokenized with it.
        opened: how the text opens the reasoning, "" if it does not.
        stop_ids, stop_strings, tail: see `Opening`.
    """

    marked: str
    text: str
    breaker: str
    lead: str = ""
    opened: str = ""
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    tail: str = ""


def _opened(prompt: str, tags: ThoughtTags | None) -> str:
    """The end of a prompt that opens the reasoning, "" if there is none."""
    if tags is None or not opens_reasoning(prompt, tags):
        return ""
    return prompt[prompt.rindex(tags[0]) :]


def split_reasoning(text: str, tags: ThoughtTags | None, *, opened: bool = False) -> tuple[str, str | None]:
    """Content and reasoning of a whole message; None is no reasoning, "" an empty one."""
    splitter = ReasoningSplitter(tags, opened=opened)
    pieces = [*splitter.push(text), *splitter.flush()]
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return content, None if content == text and not opened else reasoning


def _chunk_of(state: Mapping[str, Any]) -> _Chunk:
    ends = state["ends"]
    return _Chunk(state["text"], tuple(state["ids"]), None if ends is None else tuple(ends))


def _entry_of(state: Mapping[str, Any]) -> _Entry:
    reply = state["reply"]
    if reply is not None:
        reply = _Reply(**{**reply, "chunk": _chunk_of(reply["chunk"])})
    return _Entry(dict(state["message"]), state["typed"], reply)


def unused_text(*texts: str) -> str:
    """A word that occurs in none of `texts`."""
    return next(
        word for word in (f"SENTINEL{n}END" for n in range(10**6)) if not any(word in text for text in texts)
    )


def _marked_offset(marked: str, breaker: str, plain: int) -> int:
    """Where the first `plain` characters that are not `breaker` end in `marked`."""
    if breaker not in marked:
        return plain
    at = 0
    for _ in range(plain):
        at += 1 + (marked[at] == breaker)
    return at


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, dict keys and roles excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(v, change) for v in value]
    return value


def _strings(value: Any) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _map_strings(value, note)
    return found
