"""What a chat template writes around messages, found out by rendering: prompts, leads, ends of turns.

Text and ids of added tokens only: what becomes of a prompt's text is up to `ledger`, what is said to
`conversation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxchat.arguments import refused
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.reasoning import Kind, ThoughtTags, opens_reasoning
from jaxchat.text.tokenizer import TextTokenizer, Tokenizer, alternation, unused_marks


class Message(NamedTuple):
    """A message to be rendered; special tokens spelled out in it are text.

    Attributes:
        values: what the template reads, "role" and "content" among it.
        generated: the model wrote it: thought tags in it are tags.
    """

    values: Mapping[str, Any]
    generated: bool


@dataclass(frozen=True)
class Prompt:
    """A rendering up to where a message begins.

    Attributes:
        marked: the text with control tokens in messages broken by `breaker`.
        text: the same without.
        breaker: the character.
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

    def marked_after(self, length: int) -> str:
        """`marked` from where the first `length` characters of `text` end in it."""
        if self.breaker not in self.marked:
            return self.marked[length:]
        at = 0
        for _ in range(length):
            at += 1 + (self.marked[at] == self.breaker)
        return self.marked[at:]


class Prompts:
    """The renderings of conversations by one template.

    Args:
        template: the model's chat template.
        tokenizer: the model's tokenizer.
        tags: what the model thinks between.
        variables: further template variables, such as `enable_thinking`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        tags: ThoughtTags | None,
        variables: Mapping[str, Any],
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._tags, self._variables = tags, variables

    def require_system_support(self, system: str) -> None:
        """Raises UsageError if a system prompt makes no difference to the template.

        It need not be written out as it is: some take switches such as `/no_think` out of it.
        """
        advice = "leave the system prompt out, or put it into the first message"
        try:
            text = self._with_system(system)
        except UsageError as error:
            raise UsageError(
                f"this model's chat template takes no system prompt ({error}): {advice}"
            ) from error
        if system.strip() in text:
            return
        other = unused_text(text, system)
        if (without := self._with_system(other)) == text and other not in without:
            raise UsageError(f"this model's chat template ignores the system prompt: {advice}")

    def _with_system(self, system: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        return self._render(messages, add_generation_prompt=True)

    @property
    def reads_parts(self) -> bool:
        """Whether the template takes a message's content as a list of parts, and not as a text only."""
        text = unused_text()
        parts = [{"type": "text", "text": text}]
        try:
            rendered = self._render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except JaxchatError:
            return False
        return text in rendered and str(parts) not in rendered

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template reads "reasoning_content" of messages."""
        return "reasoning_content" in self._template.source

    def before(self, messages: Sequence[Message], role: str) -> Prompt:
        """The rendering of messages up to where the next one, of `role`, begins.

        Raises:
            UsageError: the template refuses the messages or the role.
        """
        if role == "assistant" and not messages:
            raise UsageError("there is nothing to reply to; send a message first")
        broken, breaker = self._broken(messages)
        if role == "assistant":
            marked = self._render(broken, add_generation_prompt=True)
            text = marked.replace(breaker, "")
            if not text:
                raise JaxchatError(
                    f"{self._template.path}: the chat template writes nothing for this conversation; "
                    "download the file again"
                )
            end = self._end_of_reply(broken)
            stops = dict.fromkeys((*end.pop("stop_strings", ()), *self._template.stop_strings))
            return Prompt(
                marked, text, breaker, opened=self.opened_by(text), stop_strings=tuple(stops), **end
            )
        return self._before_user(broken, breaker)

    def whole(self, messages: Sequence[Message]) -> Prompt:
        """The rendering of messages that are all there, with nothing opened after them.

        Raises:
            UsageError: the template refuses the messages.
        """
        broken, breaker = self._broken(messages)
        marked = self._render(broken)
        return Prompt(marked, marked.replace(breaker, ""), breaker)

    def opened_by(self, text: str) -> str:
        """The end of a prompt that opens the reasoning, "" if there is none."""
        if self._tags is None or not opens_reasoning(text, self._tags):
            return ""
        return text[text.rindex(self._tags[0]) :]

    def lead(self, messages: Sequence[Message], prompt: str, part: Kind) -> str:
        """What the template writes between the generation prompt and a reply's answer, or its reasoning.

        Raises:
            UsageError: there is no place for reasoning.
        """
        tags = self._tags
        opened = opens_reasoning(prompt, tags)
        if part == "content":
            closing = f"\n{tags[1]}\n\n" if tags and opened else ""
            return closing or self._rendered_lead(messages, prompt, "content") or ""
        if tags is None:
            raise UsageError(
                "this model's chat template knows no reasoning: put the prefix into the content, "
                "or name the tags (thought_tags)"
            )
        if prompt.rstrip().endswith(tags[1]):
            raise UsageError("the prompt has closed the reasoning: put the prefix into the content")
        return "" if opened else self._rendered_lead(messages, prompt, "reasoning_content") or f"{tags[0]}\n"

    def _render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        return self._template.render(messages, **variables, **self._variables)

    def _before_user(self, messages: Sequence[Mapping[str, Any]], breaker: str) -> Prompt:
        """What the template writes before and after a user's message: there a sentinel is put and cut at."""
        sentinel = unused_text(*_strings(messages))
        try:
            marked = self._render(
                [*messages, {"role": "user", "content": sentinel}], add_generation_prompt=True
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
        prompt = Prompt(stripped, stripped.replace(breaker, ""), breaker, head[len(stripped) :])
        return dataclasses.replace(prompt, **self._end_of_message(tail.replace(breaker, "")))

    def _end_of_reply(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What ends an assistant's message: what the template writes after the last one or, where that is
        nothing, between one and the user's next."""
        sentinel = unused_text(*_strings(messages))
        following = unused_text(*_strings(messages), sentinel)
        reply = [{"role": "assistant", "content": sentinel}]
        for messages_after in ([], [{"role": "user", "content": following}]):
            try:
                text = self._render([*messages, *reply, *messages_after])
            except JaxchatError:  # the model's own end tokens have to do
                continue
            _, found, after = text.rpartition(sentinel)
            end = self._end_of_message(after.partition(following)[0]) if found else {}
            if end.keys() & {"stop_ids", "stop_strings"}:
                return end
        return {}

    def _end_of_message(self, after: str) -> dict[str, Any]:
        """`stop_ids` or `stop_strings`, and `tail`, of a message that is followed by this text."""
        tokens = self._tokenizer
        added = tokens.added_tokens if isinstance(tokens, TextTokenizer) else tokens.special_tokens
        match = alternation(added).search(after)
        plain = after[: match.start()] if match else after
        body = plain.lstrip()
        if not body:
            return {"stop_ids": (added[match[0]],), "tail": plain} if match else {"tail": plain}
        blank = plain[: len(plain) - len(body)]
        tail = blank if not blank.strip(" ") else ""
        return {"stop_strings": ((blank[len(tail) :] + body.split("\n", 1)[0]).rstrip(" "),), "tail": tail}

    def _rendered_lead(self, messages: Sequence[Message], prompt: str, key: str) -> str | None:
        """What the template writes between `prompt` and one part of the assistant's message, if it does."""
        sentinel = unused_text(prompt)
        reply = {"role": "assistant", "content": "", key: sentinel}
        try:
            text = self._render([*(message.values for message in messages), reply])
        except JaxchatError:
            return None
        head, found, _ = text.rpartition(sentinel)
        return head[len(prompt) :] if found and head.startswith(prompt) else None

    def _broken(self, messages: Sequence[Message]) -> tuple[list[Mapping[str, Any]], str]:
        """The messages with control tokens in them broken by a character, and that character."""
        values = [message.values for message in messages]
        breaker = unused_marks(*_strings(values))[0]
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            return values, breaker

        def broken(message: Message) -> Mapping[str, Any]:
            tags = self._tags or () if message.generated else ()
            result: Mapping[str, Any] = _map_strings(
                message.values, lambda text: tokenizer.break_control(text, breaker, but=tags)
            )
            return result

        return [broken(message) for message in messages], breaker


def check_message(name: str, message: Any) -> Mapping[str, Any]:
    """A message with a role, and with content or what tools were called.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(message, Mapping):
        raise refused(name, message, "a dict with role and content")
    called = bool(message.get("tool_calls"))
    for key in ("role",) if called else ("role", "content"):
        if message.get(key) is None:
            raise UsageError(f"{name} has no {key!r}; a message is a dict with role and content")
    if not isinstance(message["role"], str):
        raise refused(f"{name}['role']", message["role"], "a text such as 'user'")
    content = message.get("content") or ""
    if not isinstance(content, str | list | tuple) or not all(
        isinstance(part, str | Mapping) for part in content
    ):
        raise refused(f"{name}['content']", content, "a text")
    return message


def unused_text(*texts: str) -> str:
    """A word that occurs in none of `texts`."""
    return next(
        word for word in (f"SENTINEL{n}END" for n in range(10**6)) if not any(word in text for text in texts)
    )


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
