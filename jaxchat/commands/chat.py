"""`jaxchat chat`: a chat, line by line; what `jaxchat generate -i` is."""

import dataclasses

from jaxchat.cli.command_line import Command
from jaxchat.cli.request import Request
from jaxchat.commands.generate import CONFLICTS, NEEDS, STRAY, answer

_USAGE = """\
usage: {program} [-m DIR] [...]

Chats with a model, line by line, under any layer plan; /help in the chat lists
its commands. In a pipe every line is a message, and only replies are written.

  {program}
  {program} -m llama-3-8b -s "Answer in verse."
  {program} -m llama-3-8b --layer_spec 0:20,10:32 --quant int4
  {program} -m llama-3-8b --load_session talk.session
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """A request that is a chat: what only one answer has is no flag."""

    interactive: bool = True
    json: bool = False


COMMAND = Command(
    usage=_USAGE, request=ChatRequest, run=answer, stray=STRAY, conflicts=CONFLICTS, needs=NEEDS
)
