"""A conversation with a model, its KV cache kept between turns: send, continue, retry, undo, reshape, save.

It is a batch of one (`batch.ChatBatch`) whose replies are streamed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, get_args

from jaxchat import arguments
from jaxchat.adapter_use import AdapterLike
from jaxchat.chat.batch import ChatBatch, Continue, Retry, Send, Turn
from jaxchat.chat.conversation import Conversation
from jaxchat.chat.replies import TextStream, numbered
from jaxchat.engine.session import Session
from jaxchat.layer_plan import LayerPlan, PlanLike
from jaxchat.options import DEFAULTS, GenerateOptions, GenerateOverrides, checked_options
from jaxchat.text.reasoning import Kind
from jaxchat.visible import shown


class ChatSession:
    """A conversation with a model: history as token ids, KV cache kept between turns.

    The options of each turn are those of `GenerateOptions`. A message joins the history when its stream ends.

    Args:
      chats: a batch of this one conversation.
    """

    def __init__(self, chats: ChatBatch):
        self._chats = chats

    def __repr__(self) -> str:
        """What it is, in a line."""
        count = len(self.messages)
        plan = shown(str(self.plan))
        return f"<ChatSession of {count} messages, {len(self.token_ids)} tokens, plan {plan}>"

    @property
    def conversation(self) -> Conversation:
        """The history."""
        return self._chats.conversations[0]

    @property
    def session(self) -> Session:
        """The token ids and their KV cache."""
        return self._chats.session

    @property
    def plan(self) -> LayerPlan:
        """The layer plan that runs now."""
        return self._chats.plan

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history as dicts with "role" and "content"."""
        return self.conversation.messages

    @property
    def token_ids(self) -> list[int]:
        """The ids of the history, as the cache holds them."""
        return self.conversation.token_ids

    @property
    def reversed_role(self) -> bool:
        """Whether the model plays the user."""
        return self.conversation.reversed_role

    def send(
        self,
        text: str,
        *,
        prefix: str = "",
        prefix_in: Kind = "content",
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> TextStream:
        """Adds what was typed and streams the model's reply.

        Args:
          text: the user's message or, in reversed role, the assistant's. "" adds none: the model goes first.
          prefix: opens the reply, which goes on from there; it is streamed, and part of message and history.
          prefix_in: `content`, or `reasoning` to open the model's reasoning.
          options: how to go on; single ones can be given by name: `max_new_tokens=20`.

        Raises:
          ContextOverflowError: the conversation does not fit the context (the message is taken back).
          UsageError: the template refuses the conversation, or has no place for the prefix.
        """
        settings = checked_options(overrides, options)
        arguments.text("text", text)
        arguments.text("prefix", prefix)
        arguments.one_of("prefix_in", prefix_in, get_args(Kind))
        return self._stream(Send(text, prefix, prefix_in), settings)

    def reply(
        self,
        *,
        prefix: str = "",
        prefix_in: Kind = "content",
        options: GenerateOptions = DEFAULTS,
        **overrides: Unpack[GenerateOverrides],
    ) -> TextStream:
        """Streams the model's next message to the conversation as it stands."""
        return self.send("", prefix=prefix, prefix_in=prefix_in, options=options, **overrides)

    def continue_(
        self, suffix: str = "", *, options: GenerateOptions = DEFAULTS, **overrides: Unpack[GenerateOverrides]
    ) -> TextStream:
        """Appends to the model's last message, which then goes on; streams the suffix and the new text.

        Raises:
          UsageError: the last message is not the model's.
        """
        settings = checked_options(overrides, options)
        return self._stream(Continue(arguments.text("suffix", suffix)), settings)

    def retry(
        self, *, options: GenerateOptions = DEFAULTS, **overrides: Unpack[GenerateOverrides]
    ) -> TextStream:
        """Generates the last message anew, with the same prefix; only other options make another text.

        `seed` is one: a chat in a terminal draws the n-th time with the seed plus n.

        Raises:
          UsageError: the last message is not the model's.
        """
        return self._stream(Retry(), checked_options(overrides, options))

    def undo(self) -> str | None:
        """Forgets the last exchange.

        Returns:
          The message that was typed in it ("" if the model went first), None if there is none to forget.
        """
        typed = self.conversation.undo()
        self._chats.hold()
        return typed

    def set_plan(self, plan: PlanLike) -> None:
        """Reshapes the model in mid-conversation; the plan is as for `Model.with_plan`.

        See `engine.Session.set_plan`: what the new plan has to compute anew, the next turn does.
        """
        self._chats.set_plan(plan)

    def set_adapters(self, adapters: AdapterLike | Sequence[AdapterLike] | None) -> None:
        """Goes on with other adapters, of those the model was loaded with; see `Model.with_adapters`."""
        self._chats.set_adapters(adapters)

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt, from the next turn on for the whole history; None takes it away."""
        self.conversation.set_system(None if text is None else arguments.text("text", text))
        self._chats.hold()

    def set_role(self, reversed_role: bool) -> None:
        """Lets the model play the user from now on, or the assistant again."""
        self.conversation.reversed_role = arguments.switch("reversed_role", reversed_role)

    def restart(self) -> None:
        """Forgets the conversation, but not the system prompt and the opening line."""
        self.conversation.restart()
        self._chats.hold()

    def save(self, path: str | Path) -> None:
        """Writes conversation and KV cache to a file; see `Model.load_session`.

        Raises:
          UsageError: the file cannot be written, or holds something that is no session.
        """
        self._chats.save(path)

    def load(self, path: str | Path) -> None:
        """Goes on with a conversation that was saved, see `Model.load_session`."""
        self._chats.load(path)

    def _stream(self, turn: Turn, options: GenerateOptions) -> TextStream:
        return TextStream(self._chats.begin([turn], [numbered(options, 0)]))
