"""What runs in a terminal: loading with a bar, then one answer (`answer.py`) or a chat (`chat.py`).

The text goes to standard output, everything else to standard error. Flags: `commands/`.
"""

import sys
import time
from pathlib import Path

from jaxchat import demo
from jaxchat.analysis import show
from jaxchat.cli.chosen_model import ChosenModel
from jaxchat.cli.progress_bar import loading_bar
from jaxchat.cli.request import Request
from jaxchat.cli.stats import CompileClock, Stats
from jaxchat.cli.terminal.answer import answer
from jaxchat.cli.terminal.chat import Chat
from jaxchat.cli.terminal.replies import open_replies
from jaxchat.cli.terminal.writing import is_terminal, say
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
    clock = CompileClock()
    started = time.perf_counter()
    with loading_bar() as progress:
        model = request.load(chosen, progress, max_length=request.max_length)
    stats = Stats(load_seconds=time.perf_counter() - started, compile_seconds=clock.seconds())
    replies = open_replies(model, request)
    if is_terminal(sys.stderr) and not (request.hide_banner or request.json):
        say(banner(replies.model, request.model_name, in_the_box=_is_in_the_box(request.model)))
    try:
        if request.interactive:
            return Chat(replies, request, stats, clock).run()
        answer(replies, request, stats, clock)
        return 0
    finally:
        clock.close()


def banner(model: Model, name: str, *, in_the_box: bool = False) -> str:
    """The greeting: which model this is, and how many parameters it has under its plan."""
    count = count_parameters(model.config, len(model.plan))
    what = f"{model.config.family}, the model in the box" if in_the_box else model.config.family
    return (
        f"{BANNER}\nYou are served by {name} ({what}),\n"
        f"with {count} ({show.short_count(count)}) parameters.\n"
    )


def _is_in_the_box(model: str | None) -> bool:
    return model is not None and Path(demo.__file__).resolve().parent in Path(model).resolve().parents
