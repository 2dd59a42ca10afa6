"""Conversations with one model, decoded together; one, streamed, is `session.ChatSession`.

The histories are `Conversation`s; the replies while they are drawn are in `replies`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxchat.adapter_use import AdapterLike, Uses, read_uses
from jaxchat.arguments import refused
from jaxchat.chat import session_file
from jaxchat.chat.conversation import Conversation
from jaxchat.chat.identity import Fingerprint, described, difference, fingerprint_of
from jaxchat.chat.opening import Opening
from jaxchat.chat.replies import Batch, Row, numbered
from jaxchat.chat.session_file import SavedChat
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.engine.generation import FinishReason
from jaxchat.engine.session import ContextOverflowError, Engine
from jaxchat.errors import AdvisedError, UsageError, option, told
from jaxchat.layer_plan import LayerPlan, PlanLike, as_plan
from jaxchat.options import GenerateOptions
from jaxchat.text.reasoning import Kind


class OtherPlanError(AdvisedError):
    """A saved chat is another layer plan's."""

    between = ": "


class Turn(Protocol):
    """What a conversation is to go on with."""

    def begin(self, conversation: Conversation) -> Callable[[], Opening]:
        """Changes the history, and returns what opens the model's message, again after one has shortened it.

        Raises:
          UsageError: the conversation cannot go on so.
        """


@dataclass(frozen=True)
class Send:
    """Something is typed, and the model replies.

    Attributes:
      text: the user's message or, in reversed role, the assistant's. "" adds none: the model goes first.
      prefix: opens the reply, which goes on from there; it is streamed, and part of message and history.
      prefix_in: `content`, or `reasoning` to open the model's reasoning.
    """

    text: str = ""
    prefix: str = ""
    prefix_in: Kind = "content"

    def begin(self, conversation: Conversation) -> Callable[[], Opening]:
        """See `Turn`."""
        if self.text:
            conversation.add_typed(self.text)
        return lambda: conversation.open(prefix=self.prefix, prefix_in=self.prefix_in)


@dataclass(frozen=True)
class Continue:
    """`suffix` is appended to the model's last message, which then goes on."""

    suffix: str = ""

    def begin(self, conversation: Conversation) -> Callable[[], Opening]:
        """See `Turn`."""
        return lambda: conversation.reopen(self.suffix)


@dataclass(frozen=True)
class Retry:
    """The last message is generated anew, with the same prefix; only other options make another text."""

    def begin(self, conversation: Conversation) -> Callable[[], Opening]:
        """See `Turn`."""
        return conversation.reopen_anew


class Message(NamedTuple):
    """A message that a model wrote."""

    text: str
    finish_reason: FinishReason


class ChatBatch:
    """Conversations with one model under one plan, whose replies are decoded as one batch.

    Each has its own history, system prompt and role, and gets the tokens it would get alone. A message joins
    its history when the batch that it was drawn in ends.

    Args:
      engine: runs the model.
      plan: the layer plan that it begins under.
      conversations: one a sequence, from `Model.conversation`.
      vocabulary: of the model.
      base_plan: what plans in text count the slots of, see `Model.base_plan`.
      max_slots: cache slots to reserve.

    Attributes:
      conversations: the histories; each may be changed between turns.
      session: their token ids and KV cache.
    """

    def __init__(
        self,
        engine: Engine,
        plan: LayerPlan,
        conversations: Sequence[Conversation],
        vocabulary: Vocabulary,
        *,
        base_plan: LayerPlan,
        max_slots: int = 0,
        uses: Uses = (),
    ):
        self.conversations = list(conversations)
        batch = len(self.conversations)
        self.session = engine.session(plan, batch=batch, max_slots=max_slots, uses=uses)
        self._engine = engine
        self._vocabulary = vocabulary
        self._base_plan = base_plan

    @property
    def plan(self) -> LayerPlan:
        """The layer plan that runs now."""
        return self.session.plan

    def set_plan(self, plan: PlanLike) -> None:
        """Reshapes the model in mid-conversation; the plan is as for `Model.with_plan`.

        See `Session.set_plan`: what the new plan has to compute anew, the next turn does.
        """
        if plan is None:
            raise refused("plan", plan, "a layer plan; 'all' is every layer once")
        self.session.set_plan(as_plan(plan, self._base_plan))

    def set_adapters(self, adapters: AdapterLike | Sequence[AdapterLike] | None, row: int = 0) -> None:
        """Goes on in a conversation with other adapters, as for `Model.with_adapters`.

        What the cache holds is of those before: the next turn computes it anew.
        """
        self.session.set_adapters(read_uses(adapters, "adapters"), row)

    def send(self, texts: Sequence[str | None], options: GenerateOptions) -> list[Message | None]:
        """Says something in each conversation, and returns the replies.

        Args:
          texts: what is typed in each; "" lets the model go first, None leaves the conversation out.
          options: how to reply; conversation i draws with the seed `options.seed + i`.

        Raises:
          ContextOverflowError: a conversation does not fit the context; nothing is said in any.
        """
        turns = [None if text is None else Send(text) for text in texts]
        batch = self.begin(turns, [numbered(options, i) for i in range(len(turns))])
        for _ in batch.pieces():
            pass
        return [self._message(batch, i) if turn else None for i, turn in enumerate(turns)]

    def begin(self, turns: Sequence[Turn | None], options: Sequence[GenerateOptions]) -> Batch:
        """Begins the model's next message of each conversation; iterate the batch's `pieces` for the text.

        Args:
          turns: one a conversation; None leaves it out.
          options: one a conversation: how to reply.

        Raises:
          ContextOverflowError: a conversation does not fit the context.
          UsageError: a template refuses a conversation, or it cannot go on so. All are as they were, then.
        """
        for row in range(len(self.conversations)):
            self.hold(row)
        before = [conversation.snapshot() for conversation in self.conversations]
        try:
            rows = [
                None if turn is None else self._row(i, turn, own)
                for i, (turn, own) in enumerate(zip(turns, options, strict=True))
            ]
            return Batch(self._vocabulary, self.session, rows, on_end=self._finish)
        except Exception:
            for i, (conversation, snapshot) in enumerate(zip(self.conversations, before, strict=True)):
                conversation.restore(snapshot)
                self.session.set_ids(conversation.token_ids, i)
            raise

    def hold(self, row: int = 0) -> None:
        """Makes ids and cache hold a conversation as it is now: what its history has forgotten goes at once.

        The next turn of any does so too. Of a reply that outgrew the context they hold the end.
        """
        ids, held = self.conversations[row].token_ids, self.session.ids[row]
        if len(ids) <= self._engine.max_length:
            self.session.set_ids(ids, row)
        elif len(held) < 2 or held[1:] != ids[1 - len(held) :]:
            self.session.set_ids([], row)

    def save(self, path: str | Path, row: int = 0) -> None:
        """Writes a conversation and its KV cache to a file, for `load`; nothing of what is forgotten.

        Raises:
          UsageError: the file cannot be written, or holds something that is no session.
        """
        self.hold(row)
        session_file.save(path, self._saved(row))

    def load(self, path: str | Path, row: int = 0) -> None:
        """Goes on with a conversation that was saved, instead of another; it equals never having stopped.

        Raises:
          UsageError: there is no such file, or the chat is another model's or another plan's; the message
            says what differs and what to do.
          JaxchatError: the file is damaged, no session, or of another version.
        """
        saved = session_file.load(path)
        try:
            self._restore(saved, row)
        except AdvisedError as error:
            raise error.at(path) from None
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def _row(self, number: int, turn: Turn, options: GenerateOptions) -> Row:
        name = f"conversation {number}" if len(self.conversations) > 1 else "the conversation"
        conversation, limit = self.conversations[number], self._engine.max_length
        return opened_row(conversation, turn, options, self._vocabulary, max_length=limit, name=name)

    def _finish(self, batch: Batch) -> None:
        """Adds what was drawn to the histories, and makes the cache hold them."""
        for number, reply in batch.replies.items():
            conversation, opening = self.conversations[number], reply.row.opening
            reply.settle()
            reply.text.end()
            conversation.add_message(reply.ids, opening, reply.text)
            if self.session.ids[number][: len(opening.prompt)] == list(opening.prompt):
                self.session.set_ids(conversation.token_ids, number)

    def _message(self, batch: Batch, number: int) -> Message:
        said = self.conversations[number].messages[-1]["content"]
        return Message(said, batch.result(number).finish_reason)

    # --- session files

    def _saved(self, row: int) -> SavedChat:
        return SavedChat(
            ids=self.session.ids[row],
            rows=self.session.cached_rows(row),
            plan=str(self.plan),
            model=self._fingerprint(row),
            conversation=self.conversations[row].state(),
        )

    def _restore(self, saved: SavedChat, row: int) -> None:
        here = self._fingerprint(row)
        if found := difference(saved.model, here):
            raise UsageError(
                f"made with another model ({described(saved.model)}), this is {described(here)}: "
                f"{found}. Load it with its own model"
            )
        plan = LayerPlan.recorded(saved.plan, self._engine.config.num_layers)
        if plan != self.plan:
            raise OtherPlanError(f"made under the layer plan {plan}, this is {self.plan}", self._advice(plan))
        own = self.conversations[row]
        conversation = Conversation.from_state(own.template, own.tokenizer, saved.conversation)
        self.session.restore(saved.ids, saved.rows, row)
        self.conversations[row] = conversation

    def _fingerprint(self, row: int) -> Fingerprint:
        conversation = self.conversations[row]
        uses = self.session.uses[row]
        return fingerprint_of(self._engine, conversation.tokenizer, conversation.template, uses)

    def _advice(self, plan: LayerPlan) -> str:
        if self._base_plan != LayerPlan.identity(plan.num_layers):  # whose slots plans in text count
            return f"give the {option('plan', flag='layer_spec')} or {option('recipe')} it was made with"
        return told(f"give plan={str(plan)!r}", f"give --layer_spec '{plan}'")


def opened_row(
    conversation: Conversation,
    turn: Turn,
    options: GenerateOptions,
    vocabulary: Vocabulary,
    *,
    max_length: int,
    name: str = "the conversation",
) -> Row:
    """What the model's next message of a conversation begins with: what `Batch` draws.

    Args:
      conversation: changed by the turn; with `truncate_oldest` its oldest turns go where it is too long.
      turn: what it is to go on with.
      options: how to reply.
      vocabulary: of the model.
      max_length: tokens that the context holds.
      name: what to call the conversation in an error.

    Raises:
      ContextOverflowError: the conversation does not fit the context.
      UsageError: the template refuses the conversation, or it cannot go on so.
    """
    opening = _fitting(conversation, turn.begin(conversation), options, max_length, name)
    vocabulary.check((*opening.prompt, *opening.ids))
    return Row(opening, options, conversation.thought_tags)


def _fitting(
    conversation: Conversation,
    opened: Callable[[], Opening],
    options: GenerateOptions,
    limit: int,
    name: str,
) -> Opening:
    """An opening within the context; `truncate_oldest` drops oldest turns until a quarter is free."""
    opening = opened()
    if opening.length < limit:
        return opening
    while options.overflow == "truncate_oldest" and opening.length > limit * 3 // 4:
        if not conversation.drop_oldest():
            break
        opening = opened()
    if opening.length >= limit:
        advice = f"shorten it or raise {option('max_length')}"
        if options.overflow == "error":
            advice = (
                f"start anew, raise {option('max_length')} or use {option('overflow', 'truncate_oldest')}"
            )
        raise ContextOverflowError(
            f"{name} has {opening.length} tokens, too many for the context of {limit}", advice
        )
    return opening
