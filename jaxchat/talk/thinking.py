"""Thinking deeper: one model thinks, is nudged to go on thinking, and another sums up."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from jaxchat.chat.replies import TextStream
from jaxchat.chat.session import ChatSession
from jaxchat.options import GenerateOptions
from jaxchat.runtime import Model

PREFIX = "Let's break it down and think step by step.\n"
NUDGES = (
    "\nThis question looks complex. Let me think again.\n",
    "\nLet me check if my answer is correct or not.\n",
)
SYSTEM = (
    "You are an AI assistant that answers questions by checking and summarizing the thought given by user. "
    "ALWAYS use the thought given by user. DO NOT answer it yourself."
)
PROMPT = (
    "Answer this question by summarizing the given analysis and thoughts:\n\n# Question:\n\n{question}\n\n"
    "# Analysis and thought:\n\n{thoughts}"
)


class Nudge(NamedTuple):
    """A text that makes a finished thought go on.

    Attributes:
      text: is appended to the thought.
      max_new_tokens: how long it then goes on at most; None is as the thinker's options say.
    """

    text: str
    max_new_tokens: int | None = None


class Thought(NamedTuple):
    """A piece of what is thought or answered, as it comes.

    Attributes:
      step: `think`, `nudge` (from the second stretch on) or `answer`.
      text: the piece; a nudge's own text is part of it.
    """

    step: Literal["think", "nudge", "answer"]
    text: str


@dataclasses.dataclass(kw_only=True)
class Thinker:
    """Thinks about questions in several stretches of one reply, and sums up.

    Attributes:
      thinker: the model that thinks.
      summarizer: the model that answers; may be the thinker, under another plan or the same.
      prefix: what every thought begins with.
      nudges: what makes it go on; as many stretches follow.
      budget: at most so many tokens of thought in all, None is no limit; no nudge is given beyond it.
      system: the summarizer's system prompt; None where its template takes none.
      prompt: the summarizer's task, with `{question}` and `{thoughts}`.
      options: how to think.
      summary_options: how to answer.
    """

    thinker: Model
    summarizer: Model
    prefix: str = PREFIX
    nudges: Sequence[Nudge] = tuple(map(Nudge, NUDGES))
    budget: int | None = None
    system: str | None = SYSTEM
    prompt: str = PROMPT
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)
    summary_options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)

    def ask(self, question: str) -> Iterator[Thought]:
        """Thinks about a question and answers it; nothing is remembered of it afterwards."""
        thinking = self.thinker.chat_session()
        thoughts, left = "", self.budget
        for number, nudge in enumerate((Nudge(self.prefix), *self.nudges)):
            options = self._limited(nudge.max_new_tokens, left)
            if options is None:
                break
            stream = self._stretch(thinking, question if number == 0 else None, nudge.text, options)
            for piece in stream:
                thoughts += piece
                yield Thought("nudge" if number else "think", piece)
            if left is not None:
                left -= len(stream.result.token_ids)
        summing = self.summarizer.chat_session(self.system)
        task = self.prompt.replace("{question}", question).replace("{thoughts}", thoughts)
        for piece in summing.send(task, options=self.summary_options):
            yield Thought("answer", piece)

    def _stretch(
        self, thinking: ChatSession, question: str | None, text: str, options: GenerateOptions
    ) -> TextStream:
        if question is None:
            return thinking.continue_(text, options=options)
        return thinking.send(question, prefix=text, options=options)

    def _limited(self, own: int | None, left: int | None) -> GenerateOptions | None:
        """The options of a stretch; None if the budget is spent."""
        limits = [n for n in (own, self.options.max_new_tokens, left) if n is not None]
        if limits and min(limits) < 1:
            return None
        return dataclasses.replace(self.options, max_new_tokens=min(limits) if limits else None)
