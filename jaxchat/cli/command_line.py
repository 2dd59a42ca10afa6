"""What the commands share: one way to run them, with their help, streams, log level, errors and exit codes.

A command is a dataclass whose fields are flags (`flags.py`) and a function that takes it.
Exit codes: 0, 1 failure, 2 wrong usage, 130 interrupted, 129 or 143 ended by SIGHUP or SIGTERM, 141 nobody
reads the output any more. Needs no JAX.
"""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NoReturn, TypeVar

from jaxchat import __version__
from jaxchat.cli.flags import FlagField, Given, flag_fields, help_text, parse, read
from jaxchat.errors import JaxchatError, UsageError, in_flags
from jaxchat.files import UnreadableError, limited, text_of
from jaxchat.options import Flag
from jaxchat.visible import message, visible

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
MAX_TEXT_BYTES = 1 << 26
"""Of a text that a flag names: more than any context holds."""
BROKEN_PIPE = 141
"""The exit code when standard output is closed (`| head -1`), as of a program ended by SIGPIPE."""

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """The flags of every command."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag(
            help="debug, info, warning or error; debug also shows where an internal error happened",
            example="--log_level debug",
            elsewhere=("debug", "verbosity", "loglevel"),
            group="Other",
            value="LEVEL",
        ),
    ] = "warning"
    version: Annotated[
        bool, Flag(help="Print the version of jaxchat", example="--version", group="Other")
    ] = False
    help: Annotated[bool, Flag(help="Show this text", example="-h", group="Other", short="h")] = False


class Conflict(NamedTuple):
    """Two flags that exclude each other, and what to say about it."""

    one: str
    other: str
    advice: str


class Need(NamedTuple):
    """A flag that means nothing without one of others, and why."""

    name: str
    needed: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[R]):
    """A command.

    Attributes:
      usage: what its help begins with; `{program}` is how it was started.
      request: the dataclass that its flags fill.
      run: does it, given the request and the names of the flags that were there; returns the exit code.
      stray: what to do about an argument that belongs to no flag.
      conflicts, needs: which flags do not go together, and which do not go alone.

    Raises:
      ValueError: `conflicts` or `needs` name what is no flag.
    """

    usage: str
    request: type[R]
    run: Callable[[R, frozenset[str]], int]
    stray: str = "every value belongs to a flag; --help lists the flags"
    conflicts: tuple[Conflict, ...] = ()
    needs: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        known = {field.name for field in dataclasses.fields(self.request)}  # type: ignore[arg-type]
        known |= {field.name for field in self.fields}
        named = [n for c in self.conflicts for n in (c.one, c.other)]
        named += [n for need in self.needs for n in (need.name, *need.needed)]
        if unknown := set(named) - known:
            raise ValueError(f"no flags of {self.request.__name__}: {', '.join(sorted(unknown))}")

    @property
    def fields(self) -> list[FlagField]:
        """Its flags, those of every command last."""
        return flag_fields(self.request) + flag_fields(CommonFlags)

    def refuse(self, given: Given) -> None:
        """Refuses flags that do not go together; a field that is always true counts as given."""
        always = {f.name for f in dataclasses.fields(self.request) if f.default is True}  # type: ignore[arg-type]
        names = given.names | (always - {field.name for field in self.fields})
        for one, other, advice in self.conflicts:
            if {one, other} <= names:
                raise UsageError(f"--{one} cannot be combined with --{other}: {advice}")
        for name, needed, reason in self.needs:
            if name in names and names.isdisjoint(needed):
                raise UsageError(f"--{name} needs --{' or --'.join(sorted(needed))}: {reason}")


def run(command: Command[Any], argv: Sequence[str] | None = None, *, program: str) -> int:
    """Runs a command and returns its exit code; failures become one line on standard error.

    Args:
      command: what to run.
      argv: the arguments, the program's name first; None is `sys.argv`.
      program: how it was started, for its help.
    """
    common = CommonFlags()

    def body() -> int:
        nonlocal common
        fields = command.fields
        given = parse(fields, list(sys.argv if argv is None else argv), command.stray)
        common = read(CommonFlags, given)
        if common.help:
            print(help_text(command.usage.replace("{program}", program), fields))
            return 0
        if common.version:
            print(f"jaxchat {__version__}")
            return 0
        _set_log_level(common.log_level)
        request = read(command.request, given)
        command.refuse(given)
        return command.run(request, given.names)

    return guarded(body, debug=lambda: common.log_level == "debug")


def guarded(body: Callable[[], int], *, debug: Callable[[], bool] = lambda: False) -> int:
    """Runs what returns an exit code; a failure becomes one line on standard error and a code of its own."""
    _use_utf8()
    try:
        with in_flags():
            code = body()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _end_line()
        return INTERRUPTED
    except Ended as end:
        _drop_output()
        return end.exit_code
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except JaxchatError as error:
        complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _drop_output()
        complain(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        return 1
    except MemoryError as error:
        return _out_of_memory(error)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # as JAX says it
            return _out_of_memory(error)
        return _internal_error(error, debug=debug())


def exit_process(code: int) -> NoReturn:
    """Ends the process; a signal may end it sooner, but interrupts nothing that tidies up."""
    for number in (signal.SIGINT, *_ENDING):
        if signal.getsignal(number) in (signal.default_int_handler, _end):
            signal.signal(number, signal.SIG_DFL)
    if code > 128:
        # XLA's threads may be in the middle of a step, and ending the interpreter under them can crash.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def catch_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, in a program that has let it just end the process so far.

    SIGTERM and SIGHUP raise `Ended`, so that what is half written is removed.

    Programs do so while modules load, where an exception would surface as a failed import.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _end)


_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that tell a process to end; Windows has no SIGHUP."""


class Ended(SystemExit):
    """The process was told to end, by a signal: unlike Ctrl-C this leaves a chat, too."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.exit_code = 128 + number


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # cleaning up is not to be interrupted by the next one
    raise Ended(number)


def read_text(name: str, flag: str) -> str:
    """The UTF-8 text of the file or pipe that a flag names, - is standard input; CRLF is one line break."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            data = limited(file, MAX_TEXT_BYTES)
        return text_of(data).replace("\r\n", "\n")
    except OSError as error:
        raise UsageError(
            f"--{flag} {name}: {error.strerror}; give a text file, or - for standard input"
        ) from None
    except UnreadableError as error:
        raise UsageError(f"--{flag} {name}: {error}; give a text file in UTF-8") from None


def agreed(question: str) -> bool:
    """Asks before something is lost; `--yes` is what a command calls the flag that answers.

    Raises:
      UsageError: nobody is there to answer.
    """
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here; give --yes")
    print(f"{visible(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# --- streams, logging and errors


def complain(text: str) -> None:
    """A line on standard error."""
    print(f"jaxchat: {message(text)}", file=sys.stderr)


def _use_utf8() -> None:
    """UTF-8 whatever the locale; what cannot be written is replaced, what cannot be read is kept apart.

    A byte order mark that begins the input is left out.
    """
    for name, errors in (("stdin", "surrogateescape"), ("stdout", "replace"), ("stderr", "replace")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8-sig" if name == "stdin" else "utf-8", errors=errors)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))


def _set_log_level(level: str) -> None:
    logger = logging.getLogger("jaxchat")
    logger.setLevel(level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("jaxchat: %(levelname)s: %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    if level != "debug":  # of Orbax, about what becomes an error of ours
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _end_line() -> None:
    """Leaves the terminal at the start of a line."""
    try:
        print(flush=True)
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Gives up what could not be written: Python would complain once more when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> int:
    reason = " ".join(str(error).split())[:200] or "no reason was given"
    complain(f"error: out of memory ({reason}); take a shorter context, fewer slots, a smaller batch or int4")
    return 1


def _internal_error(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = " ".join(str(error).split())
    advice = "" if debug else "; run again with --log_level debug to see where"
    complain(f"internal error: {type(error).__name__}: {text[:300]}{advice}")
    return 1
