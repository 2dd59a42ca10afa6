"""What a chat in a terminal is set to: what its commands change and its loop reads."""

import dataclasses
from dataclasses import dataclass

from jaxchat.chat import saved
from jaxchat.cli.chosen_model import ChosenModel
from jaxchat.cli.request import Request
from jaxchat.cli.stats import Stats
from jaxchat.cli.terminal.replies import ChatReplies, Replies
from jaxchat.cli.terminal.writing import say
from jaxchat.engine.session import ContextOverflowError
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions, PrefixIn
from jaxchat.visible import visible


@dataclass(kw_only=True)
class ChatState:
    """The settings of a chat, and where it stands.

    Attributes:
      replies: what answers.
      stats: costs so far.
      request: what the chat was started with.
      chosen: the model, as its files say.
      options: how replies are generated.
      prefix: what the next reply begins with; `prefix_in` is the part of it.
      prefix_every_turn: every further reply too.
      markdown: render replies.
      prompts: whether labels and status lines are written: not from a pipe or into one, where they would end
        up among the text.
      session: what the conversation was last saved or loaded as, a name in the list or a file.
      draft: what the next message begins with, where it can be edited.
      leaving: the loop ends.
      last_reply: its part of the status line.
      drawn: the seed that the last reply was asked for with, and how often it was drawn anew since.
      retried: the text of the reply that is being drawn anew.
    """

    replies: Replies
    stats: Stats
    request: Request
    chosen: ChosenModel
    options: GenerateOptions
    prefix: str
    prefix_in: PrefixIn
    prefix_every_turn: bool
    markdown: bool
    prompts: bool
    session: str | None
    draft: str = ""
    leaving: bool = False
    last_reply: str = ""
    drawn: tuple[int, int] = (0, 0)
    retried: str | None = None

    @classmethod
    def of_request(
        cls, request: Request, chosen: ChosenModel, replies: Replies, stats: Stats, *, prompts: bool
    ) -> "ChatState":
        """What a chat begins with."""
        return cls(
            replies=replies,
            stats=stats,
            request=request,
            chosen=chosen,
            options=request.options,
            prefix=request.ai_prefix,
            prefix_in=request.ai_prefix_in,
            prefix_every_turn=request.ai_prefix_every_turn,
            markdown=request.markdown,
            prompts=prompts,
            session=request.save_session or request.load_session,
        )

    def note(self, text: str, codes: str = "") -> None:
        """Says what nobody asked for, unless that is not wanted."""
        if not self.request.quiet:
            say(text, codes)

    def save_session(self, name: str) -> None:
        """Saves the conversation, as what `saved.place` understands."""
        self.replies.session.save(saved.place(name))
        self.session = name

    def use_session(self, name: str) -> None:
        """Goes on with a saved conversation."""
        model = self.replies.model
        try:
            self.replies = ChatReplies(model, model.load_session(saved.existing_place(name)))
        except ContextOverflowError as error:
            raise UsageError(f"{error.found}; load it in a chat with a longer context") from None
        self.session = name
        self.last_reply = ""

    def first_draw(self) -> GenerateOptions:
        """The options of a new reply."""
        self.drawn = (self.options.seed, 0)
        return self.options

    def next_draw(self) -> GenerateOptions:
        """The options to draw the last reply anew: the n-th time with a seed that is n higher.

        A seed that was set since is taken as it is.
        """
        seed, times = self.drawn
        times = times + 1 if seed == self.options.seed else 0
        self.drawn = (self.options.seed, times)
        return dataclasses.replace(self.options, seed=(self.options.seed + times) % 2**32)

    def status(self) -> str:
        """The status line: the last reply's length and speed, the context in use, plan and prefix."""
        model = self.replies.model
        line = f"{self.last_reply}context {self.replies.context_used} of {model.engine.max_length}"
        if str(model.plan) != "all":
            line += f" · plan {model.plan}"
        if model.uses:
            line += f" · adapter {' '.join(map(str, model.uses))}"
        return visible(line + (f" · prefix {self.prefix!r}" if self.prefix else ""))
