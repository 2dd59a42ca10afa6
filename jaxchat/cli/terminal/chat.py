"""The interactive loop: a message, the reply as it comes, and `/commands` (`commands.py`)."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxchat.chat.batch import OtherPlanError
from jaxchat.chat.replies import TextStream
from jaxchat.cli.command_line import INTERRUPTED
from jaxchat.cli.stats import CompileClock
from jaxchat.cli.terminal import commands
from jaxchat.cli.terminal.commands import StartReply
from jaxchat.cli.terminal.reading import Reader
from jaxchat.cli.terminal.state import ChatState
from jaxchat.cli.terminal.transcript import AI, YOU, write_label, write_last_exchange, write_message
from jaxchat.cli.terminal.waiting import Waiting, reply_awaited
from jaxchat.cli.terminal.writing import ReplyWriter, reply_writer, say
from jaxchat.engine.session import ContextOverflowError
from jaxchat.errors import JaxchatError

_DIM = "2"
_FULL = "/restart forgets the conversation, /set overflow=truncate_oldest its oldest messages"


class Chat:
    """The loop of a chat.

    Attributes:
      state: its settings, which commands change.
    """

    def __init__(self, state: ChatState, clock: CompileClock):
        self.state = state
        self._request = state.request
        self._clock = clock
        self._status_below = False  # the reader shows the status line
        self._interrupted = False  # Ctrl-C was the last thing that happened
        self._explained = ""  # a word that was no message yet, and is one if it comes again
        self._told_forgotten = False
        self._torn = False  # a reply was interrupted in the middle of a step

    def run(self, reader: Reader) -> int:
        """Runs to the end of the input, saves what is to be saved, and returns the exit code."""
        self._status_below = reader.shows_status
        try:
            self._begin()
            code = self._loop(reader)
        finally:
            if self._request.save_session is not None:
                if self._torn:  # the cache may be ahead of the text, or behind it
                    self.state.replies.session.session.drop_cache()
                self.state.save_session(self._request.save_session)
        if self._request.verbose:
            commands.obey(self.state, "/stats")
        return code

    def _begin(self) -> None:
        if self.state.prompts:
            self.state.note("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.", _DIM)
        request = self._request
        if self.state.prompts and (request.load_session or (request.reversed_role and request.prompt)):
            write_last_exchange(self.state.replies.session)
        if request.reversed_role:
            if request.prompt is None:  # a user speaks first
                self._tried(self._send, "")
        elif request.prompt is not None:
            if self.state.prompts:
                write_message(YOU, request.prompt)
            self._tried(self._send, request.prompt)

    def _loop(self, reader: Reader) -> int:
        while not self.state.leaving:
            try:
                if not self._take_turn(reader):
                    break
            except KeyboardInterrupt:
                if self._interrupted or self._torn or not self.state.prompts:
                    return INTERRUPTED
                self._interrupted = True
                say("Ctrl-C again leaves, and so does Ctrl-D.", _DIM)
        return 0

    def _take_turn(self, reader: Reader) -> bool:
        """Reads a message and does what it asks for; false at the end of the input."""
        draft, self.state.draft = self.state.draft, ""
        text = reader.read(YOU, draft)
        if text is None:
            return False
        self._interrupted = False
        self._tried(self._take, text)
        return True

    def _tried(self, action: Callable[[str], None], text: str) -> None:
        """An error in one message does not end the chat, and the message can be corrected."""
        try:
            text.encode()
            action(text)
        except UnicodeEncodeError:
            say("jaxchat: error: the line is not UTF-8 text")
        except JaxchatError as error:
            say(f"jaxchat: error: {self._in_the_chat(error)}")
            if not text.startswith("/"):  # Up brings commands back
                self.state.draft = text

    def _in_the_chat(self, error: JaxchatError) -> str:
        """An error with the advice that can be followed here."""
        if isinstance(error, OtherPlanError):
            return f"{error.found}; /plan with the layers it was made with, then load it"
        if not isinstance(error, ContextOverflowError):
            return str(error)
        if self.state.options.overflow == "error":
            return f"{error.found}; {_FULL}"
        return f"{error.found}; shorten the message, or /restart forgets the conversation"

    def _take(self, text: str) -> None:
        """Obeys or answers one message."""
        explained, self._explained = self._explained, ""
        if not text.startswith("/"):
            if self.state.prompts and text != explained and (advice := commands.explained_word(text)):
                say(advice)
                self._explained = text
            elif text.strip():
                self._send(text)
        elif text.startswith("//"):
            self._send(text[1:])
        elif (start := commands.obey(self.state, text)) is not None:
            self._reply(start)

    # --- replies

    def _send(self, text: str) -> None:
        state = self.state
        self._reply(lambda: state.replies.send(text, state.prefix, state.prefix_in, state.first_draw()))
        if not state.prefix_every_turn:
            state.prefix = ""

    def _reply(self, start: StartReply) -> None:
        """Writes the reply that `start` begins. The first Ctrl-C stops it, and what there is of it counts."""
        begun = time.perf_counter()
        with _stoppable() as stop, reply_awaited(self._clock, hidden=self._request.quiet) as waiting:
            stream = start()
            stop.set_stream(stream)
            self._write_reply(stream, waiting)
        self._add_stats(stream, begun)
        self._tell_same()
        self._tell_forgotten(self.state.replies.forgotten)
        if stream.result.finish_reason == "context":
            limit = self.state.replies.model.engine.max_length
            self.state.note(f"jaxchat: the context of {limit} tokens is full; {_FULL}")
        if self.state.prompts and not self._status_below:
            say(f"[{self.state.status()}]")
        if stop.noted and self.state.prompts:
            say("Stopped. /continue goes on.", _DIM)

    def _write_reply(self, stream: TextStream, waiting: Waiting) -> None:
        """Writes a reply behind its label as it comes."""
        writer: ReplyWriter | None = None
        try:
            for piece in stream.parts():
                writer = writer or self._begun_reply(waiting)
                writer.write(piece)
        except KeyboardInterrupt:
            self._torn = True
            raise
        finally:
            (writer or self._begun_reply(waiting)).end()

    def _begun_reply(self, waiting: Waiting) -> ReplyWriter:
        waiting.stop()
        self._tell_forgotten(self.state.replies.forgotten_messages)
        if not self.state.prompts:
            return reply_writer(markdown=self.state.markdown)
        write_label(AI)
        return reply_writer(markdown=self.state.markdown, column=len(AI))

    def _tell_same(self) -> None:
        """Says why a reply that was to be drawn anew came out as it was."""
        before, self.state.retried = self.state.retried, None
        if before is None or self.state.options.temperature != 0:
            return
        if self.state.replies.session.messages[-1]["content"] == before:
            self.state.note("at temperature 0 a prompt has one reply; /set temperature=0.8 draws others")

    def _tell_forgotten(self, what: str) -> None:
        """Says once that the context was too small, and for what."""
        if self._told_forgotten or not what:
            return
        self._told_forgotten = True
        limit = self.state.replies.model.engine.max_length
        self.state.note(
            f"The context of {limit} tokens is full: forgot {what}, and so it goes on; /restart begins anew, "
            "/set overflow=error refuses instead.",
            _DIM,
        )

    def _add_stats(self, stream: TextStream, begun: float) -> None:
        tokens, seconds = self.state.stats.decode_tokens, self.state.stats.decode_seconds
        self.state.stats.add(stream.result.timings, self._clock, begun)
        tokens, seconds = self.state.stats.decode_tokens - tokens, self.state.stats.decode_seconds - seconds
        rate = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds else ""
        self.state.last_reply = f"{len(stream.result.token_ids)} tokens{rate} · "


class _Stop:
    """What Ctrl-C does to a reply: the first ends it after the token being computed, the second interrupts.

    An interrupt in the middle of a step leaves text, history and KV cache at different lengths.
    """

    def __init__(self) -> None:
        self.noted = False
        self._stream: TextStream | None = None

    def set_stream(self, stream: TextStream) -> None:
        """What to stop."""
        self._stream = stream
        if self.noted:
            stream.stop()

    def __call__(self, signum: int, frame: Any) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        if self._stream is not None:
            self._stream.stop()


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stop]:
    stop = _Stop()
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
