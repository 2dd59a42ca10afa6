"""What runs in a terminal: loading with a bar, one answer or a chat, the banner and the statistics.

The text goes to standard output, everything else to standard error. Flags, exit codes: `generate.py`.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxchat import show
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import count_parameters
from jaxchat.options import GenerateOptions, Request
from jaxchat.runtime import Model, Result, TextStream, as_plan, load, sampling_params
from jaxchat.stats import CompileClock, Stats

with contextlib.suppress(ImportError):  # not part of every Python
    import readline  # noqa: F401  (line editing and history in `input`)

BANNER = r"""
       _                 __          __
      (_)___ __  _______/ /_  ____ _/ /_
     / / __ `/ |/_/ ___/ __ \/ __ `/ __/
    / / /_/ />  </ /__/ / / / /_/ / /_
 __/ /\__,_/_/|_|\___/_/ /_/\__,_/\__/
/___/"""

_YOU, _AI = "You  > ", "A.I. > "


def run(request: Request) -> int:
    """Does what was asked for and returns the exit code."""
    sampling_params(request.options, 1)  # a bad value should not be told after the model has loaded
    clock = CompileClock()
    started = time.perf_counter()
    with _loading_bar() as progress:
        model = load(
            request.model,
            request.layer_spec,
            recipe=request.recipe,
            model_paths=request.model_paths,
            keep_identity=request.keep_identity,
            dtype=request.dtype,
            quant=request.quant,
            kv_dtype=request.kv_dtype,
            kernels=request.kernels,
            max_length=request.max_length,
            compilation_cache_dir=request.compilation_cache_dir,
            progress=progress,
        )
    stats = Stats(load_seconds=time.perf_counter() - started, compile_seconds=clock.seconds())
    replies = open_replies(model, request)
    if _is_terminal(sys.stderr) and not (request.hide_banner or request.json):
        _say(banner(model, request.model_name))
    try:
        if request.interactive:
            return Chat(replies, request, stats, clock).run()
        return _answer(replies, request, stats, clock)
    finally:
        clock.close()


def banner(model: Model, name: str) -> str:
    """The greeting: which model this is, and how many parameters it has under its plan."""
    count = count_parameters(model.config, len(model.plan))
    return (
        f"{BANNER}\nYou are served by {name} ({model.config.family}),\n"
        f"with {count} ({show.short_count(count)}) parameters.\n"
    )


# --- what answers: a chat session, or a model that continues every prompt for itself


class Replies(Protocol):
    """Something that answers one text after the other."""

    model: Model
    format: str

    def send(self, text: str, options: GenerateOptions) -> TextStream:
        """Streams the answer to a text."""

    def set_plan(self, spec: str) -> None:
        """Answers under another layer plan from now on."""

    def restart(self) -> None:
        """Forgets what was said."""


class ChatReplies:
    """Answers through the chat template, remembering the conversation."""

    format = "chat"

    def __init__(self, model: Model, system: str | None):
        self.model = model
        self._session = model.chat_session(system)

    def send(self, text: str, options: GenerateOptions) -> TextStream:
        """See `Replies`."""
        return self._session.send(text, **vars(options))

    def set_plan(self, spec: str) -> None:
        """See `Replies`."""
        plan = as_plan(spec, self.model.config)
        self._session.set_plan(plan)
        self.model = self.model.with_plan(plan)

    def restart(self) -> None:
        """See `Replies`."""
        self._session.restart()


class CompletionReplies:
    """Continues each text as it is, remembering nothing."""

    format = "completion"

    def __init__(self, model: Model):
        self.model = model

    def send(self, text: str, options: GenerateOptions) -> TextStream:
        """See `Replies`."""
        return self.model.stream(text, **vars(options))

    def set_plan(self, spec: str) -> None:
        """See `Replies`."""
        self.model = self.model.with_plan(spec)

    def restart(self) -> None:
        """See `Replies`."""


def open_replies(model: Model, request: Request) -> Replies:
    """A chat where asked for or where the model has a template; says so if it has none."""
    if request.format == "chat" or (request.format is None and model.template is not None):
        return ChatReplies(model, request.system)
    if request.system is not None:
        raise UsageError("--system needs a chat template, and this model has none; put it into the prompt")
    if request.format is None:
        what = "every line is" if request.interactive else "the prompt is"
        _say(f"jaxchat: this model has no chat template: {what} continued as text (--format completion)")
    return CompletionReplies(model)


# --- one answer


def _answer(replies: Replies, request: Request, stats: Stats, clock: CompileClock) -> int:
    assert request.prompt is not None  # generate.py saw to it
    started = time.perf_counter()
    stream = replies.send(request.prompt, request.options)
    for piece in stream:
        if not request.json:
            _write(piece)
    stats.add(stream.result.timings, clock, started)
    if request.json:
        print(json.dumps(_as_json(replies, request, stream.result, stats), ensure_ascii=False), flush=True)
        return 0
    _write("\n")
    _say_if_full(stream.result, replies.model)
    for line in stats.lines():
        _say(line)
    return 0


def _as_json(replies: Replies, request: Request, result: Result, stats: Stats) -> dict[str, Any]:
    model = replies.model
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "model": request.model_name,
        "family": model.config.family,
        "layer_spec": str(model.plan),
        "parameters": count_parameters(model.config, len(model.plan)),
        "format": replies.format,
        "seed": request.options.seed,
        "timings": stats.as_json(),
    }


# --- a chat


class _Command(NamedTuple):
    """A `/command` of the chat: what it does with the rest of the line; true leaves the chat."""

    run: Callable[["Chat", str], bool]
    help: str


class Chat:
    """The interactive loop: a message, the reply as it comes, and `/commands`."""

    def __init__(self, replies: Replies, request: Request, stats: Stats, clock: CompileClock):
        self._replies = replies
        self._request = request
        self._stats = stats
        self._clock = clock
        # With a pipe at either end prompts would end up among the text.
        self._prompts = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)

    def run(self) -> int:
        """Runs to the end of the input and returns the exit code."""
        if self._prompts:
            _say("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.")
        if self._request.prompt is not None:
            if self._prompts:
                _write(f"{_YOU}{self._request.prompt}\n")
            self._tried(self._reply, self._request.prompt)
        while (line := self._read()) is not None:
            if self._tried(self._take, line):
                break
        for line in self._stats.lines():
            _say(line)
        return 0

    def _take(self, line: str) -> bool:
        """Obeys or answers one line; true leaves the chat."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in COMMANDS:
                raise UsageError(f"no command /{name}; /help lists them, //{name} sends it as a message")
            return COMMANDS[name].run(self, rest.strip())
        text = line.removeprefix("/") if line.startswith("//") else line
        return self._reply(text) if text.strip() else False

    def _tried(self, action: Callable[[str], bool], text: str) -> bool:
        """An error in one line does not end the chat."""
        try:
            text.encode()
            return action(text)
        except UnicodeEncodeError:
            _say("jaxchat: error: the line is not UTF-8 text")
        except JaxchatError as error:
            _say(f"jaxchat: error: {error}")
        return False

    def _read(self) -> str | None:
        """The next line without its end, None when there is none."""
        if self._prompts:
            try:
                return input(_YOU)
            except EOFError:
                _write("\n")
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _reply(self, text: str) -> bool:
        started = time.perf_counter()
        with _stoppable() as stopped:
            stream = self._replies.send(text, self._request.options)
            if self._prompts:
                _write(_AI)
            for piece in stream:
                _write(piece)
                if stopped():
                    stream.close()
                    break
        _write("\n")
        self._stats.add(stream.result.timings, self._clock, started)
        _say_if_full(stream.result, self._replies.model)
        return False

    def _quit(self, _: str) -> bool:
        return True

    def _help(self, _: str) -> bool:
        for name, command in COMMANDS.items():
            _say(f"  /{name:<12} {command.help}")
        return False

    def _restart(self, _: str) -> bool:
        self._replies.restart()
        return False

    def _plan(self, spec: str) -> bool:
        if spec:
            self._replies.set_plan(spec)
        model = self._replies.model
        count = count_parameters(model.config, len(model.plan))
        size = f"{len(model.plan)} slots, {count} ({show.short_count(count)}) parameters"
        _say(f"layer plan {model.plan}: {size}")
        return False

    def _show(self, _: str) -> bool:
        model = self._replies.model
        _say(show.render(show.describe(model.config, model.plan, name=self._request.model_name,
                                       max_length=model.engine.max_length)))  # fmt: skip
        return False

    def _say_stats(self, _: str) -> bool:
        for line in self._stats.lines():
            _say(line)
        return False


COMMANDS: dict[str, _Command] = {
    "help": _Command(Chat._help, "list the commands"),
    "quit": _Command(Chat._quit, "leave (also Ctrl-D)"),
    "restart": _Command(Chat._restart, "forget the conversation, but not the system prompt"),
    "plan": _Command(
        Chat._plan, "SPEC: run these layers from now on, e.g. /plan 0:8,4:12,8: (all: as trained)"
    ),
    "show": _Command(Chat._show, "the model's shapes, layers and memory under the plan"),
    "stats": _Command(Chat._say_stats, "speed, compile time and memory so far"),
}
"""What can be typed instead of a message; a message that starts with a slash is typed with two."""


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is only noted (the call yielded tells), and the second interrupts.

    An interrupt in the middle of a step would leave text, history and KV cache at different lengths.
    """
    noted = False

    def note(signum: int, frame: Any) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, previous)


# --- the terminal


@contextlib.contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar with rate and remaining time, once loading turns out to take more than a second."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    started = time.perf_counter()
    bar = Progress(
        TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task("", total=None)

    def report(done: int, total: int) -> None:
        elapsed = time.perf_counter() - started
        if not bar.live.is_started and elapsed > 0.3 and elapsed * total > done:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()  # also shows the cursor again


def _say_if_full(result: Result, model: Model) -> None:
    if result.finish_reason == "context":
        _say(
            f"jaxchat: the context of {model.engine.max_length} tokens is full; raise --max_length or use "
            "--overflow truncate_oldest to go on"
        )


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
