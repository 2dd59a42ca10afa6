"""What a chat in a terminal is set to: what its commands change and its loop reads."""

from dataclasses import dataclass

from jaxchat.cli.request import Request
from jaxchat.cli.stats import Stats
from jaxchat.cli.terminal.replies import ChatReplies, Replies
from jaxchat.options import GenerateOptions, PrefixIn
from jaxchat.visible import visible


@dataclass(kw_only=True)
class ChatState:
    """The settings of a chat, and where it stands.

    Attributes:
      replies: what answers.
      stats: costs so far.
      model_name: what people call the model.
      options: how replies are generated.
      prefix: what the next reply begins with; `prefix_in` is the part of it.
      prefix_every_turn: every further reply too.
      markdown: render replies.
      prompts: whether labels and status lines are written: not from a pipe or into one, where they would end
        up among the text.
      session_file: where the conversation was last saved or loaded.
      draft: what the next message begins with, where it can be edited.
      leaving: the loop ends.
      last_reply: its part of the status line.
    """

    replies: Replies
    stats: Stats
    model_name: str
    options: GenerateOptions
    prefix: str
    prefix_in: PrefixIn
    prefix_every_turn: bool
    markdown: bool
    prompts: bool
    session_file: str | None
    draft: str = ""
    leaving: bool = False
    last_reply: str = ""

    @classmethod
    def of_request(cls, request: Request, replies: Replies, stats: Stats, *, prompts: bool) -> "ChatState":
        """What a chat begins with."""
        return cls(
            replies=replies,
            stats=stats,
            model_name=request.model_name,
            options=request.options,
            prefix=request.ai_prefix,
            prefix_in=request.ai_prefix_in,
            prefix_every_turn=request.ai_prefix_every_turn,
            markdown=request.markdown,
            prompts=prompts,
            session_file=request.save_session or request.load_session,
        )

    def use_session(self, path: str) -> None:
        """Goes on with a saved conversation."""
        model = self.replies.model
        self.replies = ChatReplies(model, model.load_session(path))
        self.session_file = path
        self.last_reply = ""

    def status(self) -> str:
        """The status line: the last reply's length and speed, the context in use, plan and prefix."""
        model = self.replies.model
        line = f"{self.last_reply}context {self.replies.context_used} of {model.engine.max_length}"
        if str(model.plan) != "all":
            line += f" · plan {model.plan}"
        return visible(line + (f" · prefix {self.prefix!r}" if self.prefix else ""))
