"""What a model says to prompts, as they are or through its chat template: greedy, several at once."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxchat.evaluation.items import Generation, Reply, Turn
from jaxchat.options import GenerateOptions

if TYPE_CHECKING:
    from jaxchat.chat.conversation import Conversation
    from jaxchat.chat.replies import Row
    from jaxchat.runtime import Model


def replies(model: "Model", items: Sequence[Generation]) -> list[Reply]:
    """The most probable reply to each, decoded as one batch; reasoning is no part of it.

    A prompt that leaves no room for the reply is cut on the left, down to half the context at least.
    """
    from jaxchat.chat.replies import Batch

    if not items:
        return []
    rows, cuts = zip(*(_row(model, item) for item in items), strict=True)
    session = model.engine.session(model.plan, batch=len(rows), max_slots=model.max_slots, uses=model.uses)
    batch = Batch(model.vocabulary, session, rows)
    for _ in batch.pieces():
        pass
    results = [batch.result(number) for number in range(len(rows))]
    return [
        Reply((one.text or "") if one.content is None else one.content, one.finish_reason, cut)
        for one, cut in zip(results, cuts, strict=True)
    ]


def _row(model: "Model", item: Generation) -> tuple["Row", int]:
    """What a sequence goes on with, and how many tokens of its prompt were cut."""
    from jaxchat.chat.replies import Row

    limit = model.engine.max_length
    room = max(limit - item.max_new_tokens, (limit + 1) // 2)
    options = GenerateOptions(max_new_tokens=item.max_new_tokens, temperature=0.0, stop=item.stop)
    if isinstance(item.prompt, str):
        ids = model.encode(item.prompt)
        return Row.of_prompt(ids[-room:], options), max(len(ids) - room, 0)
    conversation = conversation_of(model, item.prompt)
    opening = conversation.open()
    model.vocabulary.check((*opening.prompt, *opening.ids))
    room = max(room - len(opening.ids), 1)
    cut = max(len(opening.prompt) - room, 0)
    opening = dataclasses.replace(opening, prompt=opening.prompt[cut:])
    return Row(opening, options, conversation.thought_tags), cut


def conversation_of(model: "Model", turns: Sequence[Turn]) -> "Conversation":
    """Messages as a conversation with a model."""
    conversation = model.conversation()
    conversation.extend([{"role": turn.role, "content": turn.content} for turn in turns])
    return conversation
