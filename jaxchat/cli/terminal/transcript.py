"""How messages stand on the screen: who says them, and the exchange that a chat goes on after."""

import sys

from jaxchat.chat.session import ChatSession
from jaxchat.cli.terminal.writing import styled, write
from jaxchat.visible import visible

YOU, AI = "You  > ", "A.I. > "
_BOLD = "1"


def write_label(label: str) -> None:
    """Writes who says what comes next."""
    write(styled(label, _BOLD, sys.stdout))


def write_message(label: str, text: str) -> None:
    """Writes a message that is known already."""
    write_label(label)
    write(f"{visible(text)}\n")


def write_last_exchange(session: ChatSession) -> None:
    """Writes the last two messages as they stood on the screen."""
    model_role = "user" if session.reversed_role else "assistant"
    for message in [m for m in session.messages if m["role"] != "system"][-2:]:
        write_message(AI if message["role"] == model_role else YOU, str(message["content"]))
