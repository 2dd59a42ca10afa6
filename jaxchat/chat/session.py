"""A conversation with a model, its KV cache kept between turns: send, continue, retry, undo, reshape, save.

The history itself is `Conversation`; the streams that it hands out are in `replies`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxchat.chat import session_file
from jaxchat.chat.conversation import Conversation, Opening, Snapshot
from jaxchat.chat.identity import Fingerprint, described, difference, fingerprint_of
from jaxchat.chat.replies import Batch, TextStream
from jaxchat.chat.session_file import SavedChat
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.engine.session import ContextOverflowError, Engine
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import GenerateOptions, Overflow, checked_options
from jaxchat.text.reasoning import Kind


class ChatSession:
    """A conversation with a model: history as token ids, KV cache kept between turns.

    The options of each turn are those of `GenerateOptions`. A message joins the history when its stream ends.

    Args:
      engine: runs the model.
      plan: the layer plan that it begins under.
      conversation: the history.
      vocabulary: of the model.
      base_plan: what plans in text count the slots of, see `Model.base_plan`.
      max_slots: cache slots to reserve.

    Attributes:
      conversation: the history.
      session: the token ids and their KV cache.
    """

    def __init__(
        self,
        engine: Engine,
        plan: LayerPlan,
        conversation: Conversation,
        vocabulary: Vocabulary,
        *,
        base_plan: LayerPlan,
        max_slots: int = 0,
    ):
        self.conversation = conversation
        self.session = engine.session(plan, max_slots=max_slots)
        self._engine = engine
        self._vocabulary = vocabulary
        self._base_plan = base_plan

    @property
    def plan(self) -> LayerPlan:
        """The layer plan that runs now."""
        return self.session.plan

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

    def send(self, text: str, *, prefix: str = "", prefix_in: Kind = "content", **options: Any) -> TextStream:
        """Adds what was typed and streams the model's reply.

        Args:
          text: the user's message or, in reversed role, the assistant's. "" adds none: the model goes first.
          prefix: opens the reply, which goes on from there; it is streamed, and part of message and history.
          prefix_in: `content`, or `reasoning` to open the model's reasoning.
          **options: see `GenerateOptions`.

        Raises:
          ContextOverflowError: the conversation does not fit the context (the message is taken back).
          UsageError: the template refuses the conversation, or has no place for the prefix.
        """
        settings = checked_options(options)

        def open_message() -> Opening:
            return self.conversation.open(prefix=prefix, prefix_in=prefix_in)

        before = self.conversation.snapshot()
        if text:
            self.conversation.add_typed(text)
        return self._stream(open_message, settings, before)

    def reply(self, *, prefix: str = "", prefix_in: Kind = "content", **options: Any) -> TextStream:
        """Streams the model's next message to the conversation as it stands."""
        return self.send("", prefix=prefix, prefix_in=prefix_in, **options)

    def continue_(self, suffix: str = "", **options: Any) -> TextStream:
        """Appends to the model's last message, which then goes on; streams the suffix and the new text.

        Raises:
          UsageError: the last message is not the model's.
        """
        settings = checked_options(options)
        before = self.conversation.snapshot()
        return self._stream(lambda: self.conversation.reopen(suffix), settings, before)

    def retry(self, **options: Any) -> TextStream:
        """Generates the last message anew, with the same prefix; only other options make another text.

        Raises:
          UsageError: the last message is not the model's.
        """
        settings = checked_options(options)
        return self._stream(self.conversation.reopen_anew, settings, self.conversation.snapshot())

    def undo(self) -> str | None:
        """Forgets the last exchange.

        Returns:
          The message that was typed in it ("" if the model went first), None if there is none to forget.
        """
        return self.conversation.undo()

    def set_plan(self, plan: str | LayerPlan) -> None:
        """Reshapes the model in mid-conversation.

        The KV of the slots that both plans begin with is kept; the rest is recomputed at the next turn.
        """
        self.session.set_plan(self._base_plan.select(plan) if isinstance(plan, str) else plan)

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt, from the next turn on for the whole history; None takes it away."""
        self.conversation.set_system(text)

    def set_role(self, reversed_role: bool) -> None:
        """Lets the model play the user from now on, or the assistant again."""
        self.conversation.reversed_role = reversed_role

    def restart(self) -> None:
        """Forgets the conversation, but not the system prompt and the opening line."""
        self.conversation.restart()

    def save(self, path: str | Path) -> None:
        """Writes conversation and KV cache to a file; see `Model.load_session`."""
        session_file.save(path, self.saved())

    def saved(self) -> SavedChat:
        """All of the chat, for `restore`."""
        return SavedChat(
            ids=self.session.ids[0],
            rows=self.session.cached_rows(),
            plan=str(self.plan),
            model=self._fingerprint(),
            conversation=self.conversation.state(),
        )

    def restore(self, saved: SavedChat) -> None:
        """Goes on with a chat that was saved; it equals never having stopped.

        Raises:
          UsageError: it is another model's or another plan's; the message says what differs and what to do.
        """
        here = self._fingerprint()
        if found := difference(saved.model, here):
            raise UsageError(
                f"made with another model ({described(saved.model)}), this is {described(here)}: "
                f"{found}. Load it with its own model"
            )
        plan = LayerPlan.parse(saved.plan, self._engine.config.num_layers)
        if plan != self.plan:
            raise UsageError(f"made under the layer plan {plan}, this is {self.plan}: {self._advice(plan)}")
        own = self.conversation
        conversation = Conversation.from_state(own.template, own.tokenizer, saved.conversation)
        self.session.restore(saved.ids, saved.rows)
        self.conversation = conversation

    def _fingerprint(self) -> Fingerprint:
        return fingerprint_of(self._engine, self.conversation.tokenizer, self.conversation.template)

    def _advice(self, plan: LayerPlan) -> str:
        if self._base_plan != LayerPlan.identity(plan.num_layers):  # --layer_spec counts its slots
            return "give the --layer_spec or --recipe it was made with"
        return f"give --layer_spec '{plan}'"

    def _stream(
        self, open_message: Callable[[], Opening], settings: GenerateOptions, before: Snapshot
    ) -> TextStream:
        """Starts the model's message; where that fails, all is as it was `before`."""
        limit = self._engine.max_length
        try:
            opening = fitting(self.conversation, open_message, limit, settings.overflow)
            batch = Batch(self._vocabulary, self.session, settings, opening, self.conversation.thought_tags)
        except Exception:
            self.conversation.restore(before)
            self.session.set_ids(self.conversation.token_ids)
            raise
        return TextStream(batch, on_end=self._finish)

    def _finish(self, batch: Batch) -> None:
        message, row = batch.message, batch.rows[0]
        assert message is not None
        message.settle()
        self.conversation.add_reply(
            message.ids,
            message.opening,
            end_ids=self._vocabulary.eos_ids,
            length=row.length if row.stopped else None,
        )
        if self.session.ids[0][: len(message.opening.prompt)] == list(message.opening.prompt):
            self.session.set_ids(self.conversation.token_ids)


def fitting(
    conversation: Conversation, open_message: Callable[[], Opening], limit: int, overflow: Overflow
) -> Opening:
    """An opening of at most `limit` tokens; `truncate_oldest` drops oldest turns until a quarter is free."""
    opening = open_message()
    if opening.length < limit:
        return opening
    while overflow == "truncate_oldest" and opening.length > limit * 3 // 4:
        if not conversation.drop_oldest():
            break
        opening = open_message()
    if opening.length >= limit:
        advice = "shorten it or raise --max_length"
        if overflow == "error":
            advice = "start anew, raise --max_length or use --overflow truncate_oldest"
        raise ContextOverflowError(
            f"the conversation has {opening.length} tokens, too many for the context of {limit}; {advice}"
        )
    return opening
