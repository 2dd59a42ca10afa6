"""The interactive loop: a message, the reply as it comes, and `/commands` (`commands.py`)."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxchat.chat.replies import TextStream
from jaxchat.cli.command_line import INTERRUPTED
from jaxchat.cli.request import Request
from jaxchat.cli.stats import CompileClock, Stats
from jaxchat.cli.terminal import commands
from jaxchat.cli.terminal.answer import say_if_full
from jaxchat.cli.terminal.history import MessageFile, default_file
from jaxchat.cli.terminal.reading import LineReader, Reader
from jaxchat.cli.terminal.replies import ChatReplies, Replies
from jaxchat.cli.terminal.visible import visible
from jaxchat.cli.terminal.writing import is_dumb, is_terminal, reply_writer, say, styled, write
from jaxchat.errors import JaxchatError
from jaxchat.options import PrefixIn

YOU, AI = "You  > ", "A.I. > "
_BOLD, _DIM = "1", "2"


class Chat:
    """A chat, and what its commands may change.

    Attributes:
      replies: what answers.
      stats: costs so far.
      model_name: what people call the model.
      options: how replies are generated.
      prefix: what the next reply begins with; `prefix_in` is the part of it.
      prefix_every_turn: every further reply too.
      markdown: render replies.
      session_file: where the conversation was last saved or loaded.
      draft: what the next message begins with, where it can be edited.
      leaving: the loop ends.
    """

    def __init__(self, replies: Replies, request: Request, stats: Stats, clock: CompileClock):
        self.replies = replies
        self.stats = stats
        self.model_name = request.model_name
        self.options = request.options
        self.prefix = request.ai_prefix
        self.prefix_in: PrefixIn = request.ai_prefix_in
        self.prefix_every_turn = request.ai_prefix_every_turn
        self.markdown = request.markdown
        self.session_file = request.save_session or request.load_session
        self.draft = ""
        self.leaving = False
        self._request = request
        self._clock = clock
        self._last_reply = ""  # its part of the status line
        self._status_below = False  # the reader shows the status line
        self._interrupted = False  # Ctrl-C was the last thing that happened
        self._torn = False  # a reply was interrupted in the middle of a step
        # With a pipe at either end prompts would end up among the text.
        self.prompts = is_terminal(sys.stdin) and is_terminal(sys.stdout)

    def run(self) -> int:
        """Runs to the end of the input and returns the exit code."""
        with self._reader() as reader:
            self._status_below = reader.shows_status
            self._begin()
            code = self._loop(reader)
        if self._torn:
            return code
        if self._request.save_session is not None:
            self.replies.session.save(self._request.save_session)
        for line in self.stats.lines():
            say(line)
        return code

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Reader]:
        if not self.prompts or is_dumb():
            yield LineReader(prompts=self.prompts)
            return
        # Not at the top: pipes need not wait for it.
        from jaxchat.cli.terminal.prompt import KeyReader, quiet_keyboard

        given = self._request.history_file
        path = default_file() if given is None else Path(given) if given else None
        with quiet_keyboard():
            yield KeyReader(MessageFile(path), self.status, commands.completions)

    def _begin(self) -> None:
        if self.prompts:
            say("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.", _DIM)
        request = self._request
        if self.prompts and (request.load_session or (request.reversed_role and request.prompt)):
            self.show_last_exchange()
        if request.reversed_role:
            if request.prompt is None:  # a user speaks first
                self._tried(self._send, "")
        elif request.prompt is not None:
            if self.prompts:
                write(f"{styled(YOU, _BOLD, sys.stdout)}{visible(request.prompt)}\n")
            self._tried(self._send, request.prompt)

    def _loop(self, reader: Reader) -> int:
        while not self.leaving:
            try:
                if not self._take_turn(reader):
                    break
            except KeyboardInterrupt:
                if self._interrupted or not self.prompts:
                    return INTERRUPTED
                self._interrupted = True
                say("Ctrl-C again leaves, and so does Ctrl-D.", _DIM)
        return 0

    def _take_turn(self, reader: Reader) -> bool:
        """Reads a message and does what it asks for; false at the end of the input."""
        draft, self.draft = self.draft, ""
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
            say(f"jaxchat: error: {error}")
            self.draft = text

    def _take(self, text: str) -> None:
        """Obeys or answers one message."""
        if not text.startswith("/"):
            if text.strip():
                self._send(text)
        elif text.startswith("//"):
            self._send(text[1:])
        else:
            commands.obey(self, text)

    # --- replies

    def _send(self, text: str) -> None:
        self.reply(lambda: self.replies.send(text, self.prefix, self.prefix_in, self.options))
        if not self.prefix_every_turn:
            self.prefix = ""

    def reply(self, start: Callable[[], TextStream]) -> None:
        """Writes the reply that `start` begins. The first Ctrl-C stops it, and what there is of it counts."""
        begun = time.perf_counter()
        with _stoppable() as stop:
            stream = start()
            stop.set_stream(stream)
            if self.prompts:
                write(styled(AI, _BOLD, sys.stdout))
            writer = reply_writer(markdown=self.markdown)
            try:
                for piece in stream.parts():
                    writer.write(piece)
            except KeyboardInterrupt:
                self._torn = True
                raise
            finally:
                writer.end()
                self._interrupted = stop.noted
        self._add_stats(stream, begun)
        say_if_full(stream.result, self.replies.model, "/restart, or /set overflow=truncate_oldest")
        if self.prompts and not self._status_below:
            say(f"[{self.status()}]")
        if stop.noted and self.prompts:
            say("Stopped. /continue goes on, Ctrl-C again leaves.", _DIM)

    def _add_stats(self, stream: TextStream, begun: float) -> None:
        tokens, seconds = self.stats.decode_tokens, self.stats.decode_seconds
        self.stats.add(stream.result.timings, self._clock, begun)
        tokens, seconds = self.stats.decode_tokens - tokens, self.stats.decode_seconds - seconds
        rate = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds else ""
        self._last_reply = f"{len(stream.result.token_ids)} tokens{rate} · "

    def status(self) -> str:
        """The status line: the last reply's length and speed, the context in use, plan and prefix."""
        model = self.replies.model
        line = f"{self._last_reply}context {self.replies.context_used} of {model.engine.max_length}"
        if str(model.plan) != "all":
            line += f" · plan {model.plan}"
        return visible(line + (f" · prefix {self.prefix!r}" if self.prefix else ""))

    # --- sessions

    def use_session(self, path: str) -> None:
        """Goes on with a saved conversation."""
        self.replies = ChatReplies(self.replies.model, self.replies.model.load_session(path))
        self.session_file = path
        self._last_reply = ""

    def show_last_exchange(self) -> None:
        """Writes the last two messages as they stood on the screen."""
        session = self.replies.session
        model_role = "user" if session.reversed_role else "assistant"
        for message in [m for m in session.messages if m["role"] != "system"][-2:]:
            label = AI if message["role"] == model_role else YOU
            write(f"{styled(label, _BOLD, sys.stdout)}{visible(str(message['content']))}\n")


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
