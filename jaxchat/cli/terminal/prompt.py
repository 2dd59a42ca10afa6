"""Messages from a terminal's keys: editing over several lines, history, completion and the status line.

The only module that imports prompt_toolkit; pipes and dumb terminals are read by `reading.py`.
"""

import os
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from jaxchat.cli.terminal.history import MessageFile
from jaxchat.cli.terminal.keyboard import mark_pastes
from jaxchat.cli.terminal.reading import Candidate
from jaxchat.cli.terminal.transcript import write_message


class KeyReader:
    """Reads messages with prompt_toolkit.

    Enter sends; Alt-Enter, Ctrl-J, and Enter after a backslash begin a new line; a paste stays one message.
    Ctrl-C empties the line, and raises KeyboardInterrupt if it is empty.

    Args:
      history: where messages are kept.
      status: gives the line below the message.
      complete: ways to go on with the text before the cursor, for the tab key.
      typed_ahead: what was typed before there was a prompt: whole lines are messages, the rest begins one.
    """

    shows_status = True

    def __init__(
        self,
        history: MessageFile,
        status: Callable[[], str],
        complete: Callable[[str], Iterable[Candidate]],
        typed_ahead: str = "",
    ):
        *self._lines, self._begun = typed_ahead.replace("\r", "\n").split("\n")
        self._prompt: PromptSession[str] = PromptSession(
            multiline=True,
            history=_FileHistory(history),
            completer=_Commands(complete),
            complete_while_typing=False,
            enable_suspend=True,
            key_bindings=_bindings(),
            bottom_toolbar=status,
            style=Style.from_dict({"label": "bold", "bottom-toolbar": "noreverse ansibrightblack"}),
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            prompt_continuation=lambda width, _line, _wrap: " " * width,
        )
        # Without an answer about the cursor there is no status line; that is no reason to complain.
        self._prompt.app.renderer.cpr_not_supported_callback = lambda: None

    def read(self, label: str, draft: str = "") -> str | None:
        """See `reading.Reader`."""
        if self._lines:
            line = self._lines.pop(0)
            self._prompt.history.append_string(line)
            write_message(label, line)
            return line
        begun, self._begun = self._begun, ""
        try:
            text = self._prompt.prompt([("class:label", label)], default=draft or begun)
            return text.strip("\n")  # which a paste may bring along
        except EOFError:
            return None
        finally:
            mark_pastes()


class _FileHistory(History):
    def __init__(self, file: MessageFile):
        super().__init__()
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._file.load())

    def store_string(self, string: str) -> None:
        self._file.add(string)


class _Commands(Completer):
    def __init__(self, complete: Callable[[str], Iterable[Candidate]]):
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for text, replaces, help in self._complete(document.text_before_cursor):
            yield Completion(text, -replaces, display_meta=help)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("c-j")
    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings
