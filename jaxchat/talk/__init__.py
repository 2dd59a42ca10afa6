"""Conversations among models: two that talk, experts and who chooses them, thinking and summing up.

The programs over these are in `examples/`. One model under several plans is loaded once, and conversations
over one set of weights and one plan are decoded as one batch.
"""

from jaxchat.chat.batch import ChatBatch, Message
from jaxchat.talk.crosstalk import Speaker, Turn, crosstalk, says_goodbye
from jaxchat.talk.experts import Choice, Expert, Panel, choose
from jaxchat.talk.models import ModelLoader
from jaxchat.talk.thinking import Nudge, Thinker, Thought

__all__ = [
    "ChatBatch",
    "Choice",
    "Expert",
    "Message",
    "ModelLoader",
    "Nudge",
    "Panel",
    "Speaker",
    "Thinker",
    "Thought",
    "Turn",
    "choose",
    "crosstalk",
    "says_goodbye",
]
