"""What runs in a terminal: loading with a bar, then one answer (`answer.py`) or a chat (`chat.py`).

The text goes to standard output, everything else to standard error. Flags: `commands/`.
"""

import contextlib
import sys
import time
from pathlib import Path

from jaxchat import demo
from jaxchat.analysis import cost, show
from jaxchat.cli.chosen_model import ChosenModel
from jaxchat.cli.progress_bar import loading_bar
from jaxchat.cli.request import Request
from jaxchat.cli.stats import CompileClock, Stats
from jaxchat.cli.terminal import commands
from jaxchat.cli.terminal.answer import answer
from jaxchat.cli.terminal.chat import Chat
from jaxchat.cli.terminal.history import MessageFile, default_file
from jaxchat.cli.terminal.keyboard import quiet_keyboard
from jaxchat.cli.terminal.reading import LineReader, Reader
from jaxchat.cli.terminal.replies import Replies, open_replies
from jaxchat.cli.terminal.state import ChatState
from jaxchat.cli.terminal.waiting import Waiting
from jaxchat.cli.terminal.writing import is_dumb, is_terminal, say
from jaxchat.engine.session import Engine
from jaxchat.families import count_parameters
from jaxchat.runtime import Model

BANNER = r"""
       _                 __          __
      (_)___ __  _______/ /_  ____ _/ /_
     / / __ `/ |/_/ ___/ __ \/ __ `/ __/
    / / /_/ />  </ /__/ / / / /_/ / /_
 __/ /\__,_/_/|_|\___/_/ /_/\__,_/\__/
/___/"""


def run(request: Request, chosen: ChosenModel) -> int:
    """Does what was asked for, with the model that was chosen, and returns the exit code."""
    prompts = request.interactive and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    # From here on: what is typed while the model loads is sent as it was typed.
    with quiet_keyboard() if prompts and not is_dumb() else contextlib.nullcontext("") as typed_ahead:
        clock = CompileClock()
        try:
            replies, stats = _opened(request, chosen, clock)
            if not request.interactive:
                answer(replies, request, stats, clock)
                return 0
            state = ChatState.of_request(request, chosen, replies, stats, prompts=prompts)
            return Chat(state, clock).run(_reader(state, typed_ahead))
        finally:
            clock.close()


def _opened(request: Request, chosen: ChosenModel, clock: CompileClock) -> tuple[Replies, Stats]:
    """Loads the model, greets, and opens the conversation."""
    started = time.perf_counter()
    with (
        Waiting(lambda: f"loading {request.model_name}", hidden=request.quiet) as waiting,
        loading_bar(hidden=request.quiet, before=waiting.stop) as progress,
    ):
        model = request.load(
            chosen,
            progress,
            max_length=request.max_length,
            max_slots=request.max_slots or 0,
            chat_template=request.chat_template,
            adapter=request.adapter,
            draft=request.draft,
            draft_tree=request.draft_tree,
            draft_accept=request.draft_accept,
        )
    if request.interactive and request.max_slots is None:
        model.max_slots = spare_slots(model.engine)
    stats = Stats(
        load_seconds=time.perf_counter() - started,
        compile_seconds=clock.seconds(),
        draft_rule=None if request.draft is None else request.draft_accept,
    )
    replies = open_replies(model, request)
    if is_terminal(sys.stderr) and not (request.hide_banner or request.quiet or request.json):
        say(banner(replies.model, request.model_name, in_the_box=_is_in_the_box(request.model)))
    return replies, stats


def _reader(state: ChatState, typed_ahead: str) -> Reader:
    """Where messages come from."""
    if not state.prompts or is_dumb():
        return LineReader(prompts=state.prompts)
    from jaxchat.cli.terminal.prompt import KeyReader  # not at the top: pipes need not wait for it

    given = state.request.history_file
    path = default_file() if given is None else Path(given) if given else None
    return KeyReader(MessageFile(path), state.status, commands.completions, typed_ahead)


_SPARE_BYTES = 256 << 20


def spare_slots(engine: Engine) -> int:
    """How many cache slots a chat reserves, so that `/plan` compiles nothing: up to twice the layers.

    A slot takes memory once the cache is there, used or not: those beyond the model's own take no more than
    256 MiB at the full context.
    """
    layers = engine.config.num_layers
    dtype = engine.kv_dtype.name
    slot_bytes = cost.kv_row_bytes(engine.config, dtype) * engine.max_length
    return layers + min(layers, _SPARE_BYTES // slot_bytes)


def banner(model: Model, name: str, *, in_the_box: bool = False) -> str:
    """The greeting: which model this is, and how many parameters it has under its plan."""
    count = count_parameters(model.config, len(model.plan))
    what = f"{model.config.family}, the model in the box" if in_the_box else model.config.family
    return f"{BANNER}\nYou are served by {name} ({what}),\nwith {show.counted(count)} parameters.\n"


def _is_in_the_box(model: str | None) -> bool:
    return model is not None and Path(demo.__file__).resolve().parent in Path(model).resolve().parents
