"""What answers in a terminal: a chat session, or a model that continues every text for itself."""

from typing import Protocol

from jaxchat.adapter_use import Uses
from jaxchat.chat import saved
from jaxchat.chat.replies import TextStream
from jaxchat.chat.session import ChatSession
from jaxchat.cli.request import Request
from jaxchat.cli.terminal.writing import say
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions, PrefixIn
from jaxchat.runtime import Model
from jaxchat.text.named_templates import advice_on


class Replies(Protocol):
    """Something that answers one text after the other.

    Attributes:
      format: `chat` or `completion`.
    """

    format: str

    @property
    def model(self) -> Model:
        """The model, under the plan that runs now."""

    @property
    def session(self) -> ChatSession:
        """The conversation; without one a `UsageError`."""

    @property
    def context_used(self) -> int:
        """Tokens of the context that are taken."""

    @property
    def forgotten_messages(self) -> str:
        """Which messages the context had no room for, as is known before the answer; "" if it held all."""

    @property
    def forgotten(self) -> str:
        """What the context had no room for, after the answer; "" if it held all."""

    def send(self, text: str, prefix: str, prefix_in: PrefixIn, options: GenerateOptions) -> TextStream:
        """Streams the answer to a text."""

    def set_plan(self, spec: str) -> None:
        """Answers under another layer plan from now on."""

    def set_adapters(self, uses: Uses) -> None:
        """Answers with other adapters from now on."""

    def restart(self) -> None:
        """Forgets what was said."""


class ChatReplies:
    """Answers through the chat template, remembering the conversation."""

    format = "chat"

    def __init__(self, model: Model, session: ChatSession):
        self.model = model
        self.session = session

    @property
    def context_used(self) -> int:
        """See `Replies`."""
        return len(self.session.session.ids[0])

    @property
    def forgotten_messages(self) -> str:
        """See `Replies`."""
        dropped = self.session.conversation.dropped
        return f"the oldest {dropped} messages" if dropped > 1 else "the oldest message" if dropped else ""

    @property
    def forgotten(self) -> str:
        """See `Replies`."""
        cut = "the oldest part" if self.context_used < len(self.session.token_ids) else ""
        return self.forgotten_messages or cut

    def send(self, text: str, prefix: str, prefix_in: PrefixIn, options: GenerateOptions) -> TextStream:
        """See `Replies`."""
        return self.session.send(text, prefix=prefix, prefix_in=prefix_in, options=options)

    def set_plan(self, spec: str) -> None:
        """See `Replies`."""
        model = self.model.with_plan(spec)
        self.session.set_plan(model.plan)
        self.model = model

    def set_adapters(self, uses: Uses) -> None:
        """See `Replies`."""
        self.model = self.model.with_adapters(uses)
        self.session.set_adapters(uses)

    def restart(self) -> None:
        """See `Replies`."""
        self.session.restart()


class CompletionReplies:
    """Continues each text as it is, remembering nothing."""

    format = "completion"

    def __init__(self, model: Model, *, parse_special: bool = True):
        self.model = model
        self._parse_special = parse_special
        self._stream: TextStream | None = None

    @property
    def session(self) -> ChatSession:
        """See `Replies`."""
        raise UsageError("this needs a chat, and here every text is continued as it is")

    @property
    def context_used(self) -> int:
        """See `Replies`."""
        if self._stream is None:
            return 0
        used = self._stream.result.prompt_tokens + len(self._stream.result.token_ids)
        return min(used, self.model.engine.max_length)

    @property
    def forgotten_messages(self) -> str:
        """See `Replies`."""
        return ""

    @property
    def forgotten(self) -> str:
        """See `Replies`."""
        result = None if self._stream is None else self._stream.result
        limit = self.model.engine.max_length
        return "the oldest part" if result and result.prompt_tokens + len(result.token_ids) > limit else ""

    def send(self, text: str, prefix: str, prefix_in: PrefixIn, options: GenerateOptions) -> TextStream:
        """See `Replies`; the text itself is the place for a prefix."""
        if prefix:
            raise UsageError("a prefix needs a chat; put it at the end of the text")
        self._stream = self.model.stream(text, parse_special=self._parse_special, options=options)
        return self._stream

    def set_plan(self, spec: str) -> None:
        """See `Replies`."""
        self.model = self.model.with_plan(spec)

    def set_adapters(self, uses: Uses) -> None:
        """See `Replies`."""
        self.model = self.model.with_adapters(uses)

    def restart(self) -> None:
        """See `Replies`."""
        self._stream = None


def open_replies(model: Model, request: Request) -> Replies:
    """A chat where asked for or where the model has a template; says so if it has none."""
    if request.load_session is not None:
        return ChatReplies(model, model.load_session(saved.existing_place(request.load_session)))
    if request.format == "chat" or (request.format is None and model.template is not None):
        # In a chat with reversed roles the prompt is what the model has said already.
        opening = request.prompt if request.reversed_role else None
        return ChatReplies(
            model,
            model.chat_session(
                request.system,
                reversed_role=request.reversed_role,
                opening=opening,
                thought_tags=request.thought_tags,
            ),
        )
    for flag in ("system", "ai_prefix", "reversed_role", "thought_tags", "save_session"):
        if getattr(request, flag):
            raise UsageError(f"--{flag} needs a chat template, and this model has none")
    if request.format is None and not request.quiet:
        what = "every line is" if request.interactive else "the prompt is"
        advice = advice_on(model.name)
        say(
            f"jaxchat: this model has no chat template: {what} continued as text (--format completion)"
            + (f"; {advice}" if advice else "")
        )
    return CompletionReplies(model, parse_special=request.special_tokens)
