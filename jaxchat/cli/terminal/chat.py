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
from jaxchat.cli.terminal.commands import StartReply
from jaxchat.cli.terminal.history import MessageFile, default_file
from jaxchat.cli.terminal.reading import LineReader, Reader
from jaxchat.cli.terminal.replies import Replies
from jaxchat.cli.terminal.state import ChatState
from jaxchat.cli.terminal.transcript import AI, YOU, write_label, write_last_exchange, write_message
from jaxchat.cli.terminal.writing import is_dumb, is_terminal, reply_writer, say
from jaxchat.errors import JaxchatError

_DIM = "2"


class Chat:
    """The loop of a chat.

    Attributes:
      state: its settings, which commands change.
    """

    def __init__(self, replies: Replies, request: Request, stats: Stats, clock: CompileClock):
        prompts = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self.state = ChatState.of_request(request, replies, stats, prompts=prompts)
        self._request = request
        self._clock = clock
        self._status_below = False  # the reader shows the status line
        self._interrupted = False  # Ctrl-C was the last thing that happened
        self._torn = False  # a reply was interrupted in the middle of a step

    def run(self) -> int:
        """Runs to the end of the input and returns the exit code."""
        with self._reader() as reader:
            self._status_below = reader.shows_status
            self._begin()
            code = self._loop(reader)
        if self._torn:
            return code
        if self._request.save_session is not None:
            self.state.replies.session.save(self._request.save_session)
        for line in self.state.stats.lines():
            say(line)
        return code

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Reader]:
        if not self.state.prompts or is_dumb():
            yield LineReader(prompts=self.state.prompts)
            return
        # Not at the top: pipes need not wait for it.
        from jaxchat.cli.terminal.prompt import KeyReader, quiet_keyboard

        given = self._request.history_file
        path = default_file() if given is None else Path(given) if given else None
        with quiet_keyboard():
            yield KeyReader(MessageFile(path), self.state.status, commands.completions)

    def _begin(self) -> None:
        if self.state.prompts:
            say("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.", _DIM)
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
                if self._interrupted or not self.state.prompts:
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
            say(f"jaxchat: error: {error}")
            self.state.draft = text

    def _take(self, text: str) -> None:
        """Obeys or answers one message."""
        if not text.startswith("/"):
            if text.strip():
                self._send(text)
        elif text.startswith("//"):
            self._send(text[1:])
        elif (start := commands.obey(self.state, text)) is not None:
            self._reply(start)

    # --- replies

    def _send(self, text: str) -> None:
        state = self.state
        self._reply(lambda: state.replies.send(text, state.prefix, state.prefix_in, state.options))
        if not state.prefix_every_turn:
            state.prefix = ""

    def _reply(self, start: StartReply) -> None:
        """Writes the reply that `start` begins. The first Ctrl-C stops it, and what there is of it counts."""
        begun = time.perf_counter()
        with _stoppable() as stop:
            stream = start()
            stop.set_stream(stream)
            if self.state.prompts:
                write_label(AI)
            writer = reply_writer(markdown=self.state.markdown)
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
        say_if_full(stream.result, self.state.replies.model, "/restart, or /set overflow=truncate_oldest")
        if self.state.prompts and not self._status_below:
            say(f"[{self.state.status()}]")
        if stop.noted and self.state.prompts:
            say("Stopped. /continue goes on, Ctrl-C again leaves.", _DIM)

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
