"""Several conversations with one model, decoded together; one, streamed, is `chat_session.ChatSession`."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxchat.chat.conversation import Conversation
from jaxchat.chat.replies import Batch
from jaxchat.chat.session import fitting
from jaxchat.chat.vocabulary import Vocabulary
from jaxchat.engine.generation import FinishReason
from jaxchat.engine.session import Engine
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import GenerateOptions


class Message(NamedTuple):
    """A message that a model wrote."""

    text: str
    finish_reason: FinishReason


class ChatBatch:
    """Conversations with one model under one plan, whose replies are decoded as one batch.

    Each has its own history, system prompt and role, and gets the tokens it would get alone.

    Args:
      engine: runs the model.
      plan: the layer plan that it runs under.
      conversations: one a sequence, from `Model.conversation`.
      vocabulary: of the model.
    """

    def __init__(
        self, engine: Engine, plan: LayerPlan, conversations: Sequence[Conversation], vocabulary: Vocabulary
    ):
        self.conversations = list(conversations)
        self._session = engine.session(plan, batch=len(self.conversations))
        self._engine = engine
        self._vocabulary = vocabulary

    def send(self, texts: Sequence[str | None], options: GenerateOptions) -> list[Message | None]:
        """Says something in each conversation, and returns the replies.

        Args:
          texts: what is typed in each; "" lets the model go first, None leaves the conversation out.
          options: how to reply; conversation i draws with the seed `options.seed + i`.

        Raises:
          ContextOverflowError: a conversation does not fit the context; nothing is said in any.
        """
        rows = [row for row, text in enumerate(texts) if text is not None]
        typed: list[int] = []
        try:
            for row in rows:
                if texts[row]:
                    self.conversations[row].add_typed(texts[row] or "")
                    typed.append(row)
            limit = self._engine.max_length
            openings = {
                row: fitting(talk, talk.open, limit, options.overflow)
                for row, talk in enumerate(self.conversations)
                if row in rows
            }
        except Exception:
            for row in typed:
                self.conversations[row].take_back()
            raise
        for row, opening in openings.items():
            self._session.set_ids([*opening.prompt, *opening.ids], row)
        for row, ids in enumerate(self._session.ids):
            if not ids:  # has never spoken, and does not now: a sequence cannot be empty
                self._session.set_ids([0], row)
        batch = Batch(self._vocabulary, self._session, options, ends=tuple(openings.values()))
        for row in range(len(self.conversations)):
            if row not in openings:
                batch.generation.stop(row)
        for _ in batch.pieces():
            pass
        replies: list[Message | None] = [None] * len(self.conversations)
        for row, opening in openings.items():
            text = batch.rows[row]
            self.conversations[row].add_reply(
                [*opening.ids, *batch.ids[row]],
                opening,
                end_ids=self._vocabulary.eos_ids,
                length=text.length if text.stopped else None,
            )
            said = self.conversations[row].messages[-1]["content"]
            replies[row] = Message(said, batch.generation.finish_reasons[row] or "stop")
        return replies
