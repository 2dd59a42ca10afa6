"""The command line, `python -m jaxchat.generate`: flags, help, errors and exit codes.

What it then does is in `terminal.py` (generate, chat) and `show.py` (--show). Exit codes: 0, 1 failure,
2 wrong usage, 130 interrupted, 141 nobody reads the output any more.
"""

import difflib
import io
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

if __name__ == "__main__":
    # Ctrl-C while modules load just ends the program: an exception there would surface as a failed import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags

from jaxchat import show
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.options import Format, GenerateOptions, Overflow, Request

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
BROKEN_PIPE = 141
"""The exit code when standard output is closed (`| head -1`), as of a program ended by SIGPIPE."""

_DEFAULTS = GenerateOptions()
_DTYPES = ("float32", "bfloat16", "float16")
_KERNELS = ("auto", "reference", "native", "pallas")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_USAGE = """\
usage: python -m jaxchat.generate -m DIR (-p TEXT | --prompt_file FILE | -i) [...]

Continues a text or chats with a model, under any layer plan. The text goes to
standard output, everything else to standard error.

  python -m jaxchat.generate -m llama-3-8b -p "Why is the sky blue?"
  python -m jaxchat.generate -m llama-3-8b -i --layer_spec 0:20,10:32
  python -m jaxchat.generate -m llama-3-8b --show --layer_spec 0:10,10:20:2,20:
  python -m jaxchat.generate -m llama-3-8b -i --quant int4
"""


class _Flag(NamedTuple):
    """One flag: how absl defines it, and how the help shows it."""

    name: str
    define: Callable[..., Any]
    value: str  # what the help calls its value; "" for a switch
    help: str
    short: str | None = None
    default: Any = None
    more: dict[str, Any] = {}  # noqa: RUF012 (read only)


def _sampling(name: str, define: Callable[..., Any], value: str, help: str, **rest: Any) -> _Flag:
    """A flag named and defaulting as in `GenerateOptions`."""
    return _Flag(name, define, value, help, default=getattr(_DEFAULTS, name), **rest)


_GROUPS: dict[str, tuple[_Flag, ...]] = {
    "Model": (
        _Flag(
            "model",
            flags.DEFINE_string,
            "DIR",
            "The model: a directory as on Hugging Face, or one that tools/convert.py wrote, e.g. -m "
            "models/llama-3-8b",
            short="m",
        ),
        _Flag(
            "layer_spec",
            flags.DEFINE_string,
            "LAYERS",
            "The layers to run, in this order: numbers and Python slices, e.g. 0:8,4:12,8: to repeat "
            "layers, 0:10,10:20:2,20: to leave some out, ::-1 to reverse; or a JSON list with scales,"
            " e.g. '[0, [1, 0.5, 1.0], 2]'. Look with --show first",
        ),
        _Flag(
            "dtype",
            flags.DEFINE_enum,
            "TYPE",
            "Convert the weights to float32, bfloat16 or float16; as stored if not given, e.g. "
            "--dtype bfloat16",
            more={"enum_values": _DTYPES},
        ),
        _Flag(
            "quant",
            flags.DEFINE_string,
            "FORMAT",
            "Quantize the weights while loading: int8 or int4, optionally with a group :32 :64 :128 :channel "
            "and with :affine :plain :f32, or llama.cpp's q8_0 q4_0 q4_1; as stored if not given. "
            "tools/convert.py --quant does it once and for all, e.g. --quant int4, --quant int8:channel",
        ),
        _Flag(
            "kernels",
            flags.DEFINE_enum,
            "WHICH",
            "What computes: reference is plain XLA, native the C++ of CPUs, pallas that of GPUs and TPUs, "
            "auto the fastest there is, e.g. --kernels reference",
            default="auto",
            more={"enum_values": _KERNELS},
        ),
        _Flag(
            "max_length",
            flags.DEFINE_integer,
            "N",
            "The longest context, prompt and output together: how far the KV cache may grow; the "
            "model's own if not given, e.g. -l 4096",
            short="l",
            more={"lower_bound": 1},
        ),
        _Flag(
            "compilation_cache_dir",
            flags.DEFINE_string,
            "DIR",
            "Where compiled programs are kept between runs; a user cache directory if not given, e.g."
            " --compilation_cache_dir /tmp/xla, or '' for none",
        ),
    ),
    "What to do": (
        _Flag(
            "prompt",
            flags.DEFINE_string,
            "TEXT",
            'The prompt; with -i the first message, e.g. -p "Hello"',
            short="p",
        ),
        _Flag(
            "prompt_file",
            flags.DEFINE_string,
            "FILE",
            "Read the prompt from a UTF-8 file, - for standard input; one line break at its end is "
            "left out, e.g. --prompt_file question.txt",
        ),
        _Flag(
            "system",
            flags.DEFINE_string,
            "TEXT",
            'The system prompt of a chat, e.g. -s "Answer in verse."',
            short="s",
        ),
        _Flag(
            "interactive",
            flags.DEFINE_bool,
            "",
            "Chat, line by line. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands, e.g. -i",
            short="i",
            default=False,
        ),
        _Flag(
            "format",
            flags.DEFINE_enum,
            "HOW",
            "chat puts the prompt into the model's chat template, completion continues it as it is; "
            "chat if the model has a template, e.g. --format completion",
            more={"enum_values": get_args(Format)},
        ),
        _Flag(
            "show",
            flags.DEFINE_bool,
            "",
            "Print the model's shapes, layers, parameters and memory under the plan, and leave. Needs"
            " config.json only, e.g. --show --layer_spec 0:10,10:20:2,20:",
            default=False,
        ),
    ),
    "How long": (
        _sampling(
            "max_new_tokens",
            flags.DEFINE_integer,
            "N",
            "At most so many new tokens; if not given, until the model ends or the context is full, "
            "e.g. --max_new_tokens 200",
            more={"lower_bound": 1},
        ),
        _Flag(
            "stop",
            flags.DEFINE_multi_string,
            "TEXT",
            "End before this text; may be given more than once; \\n, \\t and \\\\ are a line break, a tab"
            " and a backslash, e.g. --stop '\\n\\n' --stop END",
            default=[],
        ),
        _sampling(
            "ignore_eos",
            flags.DEFINE_bool,
            "",
            "Go on at the model's own end-of-text tokens, e.g. --ignore_eos --max_new_tokens 100",
        ),
        _sampling(
            "overflow",
            flags.DEFINE_enum,
            "HOW",
            "When the context is full: error ends the reply and refuses a longer prompt, "
            "truncate_oldest forgets the oldest, e.g. --overflow truncate_oldest",
            more={"enum_values": get_args(Overflow)},
        ),
    ),
    "Sampling": (
        _sampling(
            "temperature",
            flags.DEFINE_float,
            "X",
            "0 always takes the most probable token, higher is more varied, e.g. -t 0.7",
            short="t",
        ),
        _sampling(
            "top_k",
            flags.DEFINE_integer,
            "N",
            "Choose among the N most probable tokens; 0 is off, e.g. -k 40",
            short="k",
        ),
        _sampling(
            "top_p",
            flags.DEFINE_float,
            "X",
            "Choose among the fewest tokens with this total probability; 1 is off, e.g. -q 0.9",
            short="q",
        ),
        _sampling(
            "min_p",
            flags.DEFINE_float,
            "X",
            "Leave out tokens less probable than this fraction of the most probable; 0 is off, e.g. "
            "--min_p 0.05",
        ),
        _sampling(
            "repetition_penalty",
            flags.DEFINE_float,
            "X",
            "Weaken every token of prompt and output; 1 is off, e.g. --repetition_penalty 1.1",
        ),
        _sampling(
            "presence_penalty",
            flags.DEFINE_float,
            "X",
            "Subtract from the logit of tokens already generated; 0 is off, e.g. --presence_penalty 0.5",
        ),
        _sampling(
            "frequency_penalty",
            flags.DEFINE_float,
            "X",
            "The same for every time they were generated; 0 is off, e.g. --frequency_penalty 0.5",
        ),
        _sampling(
            "seed",
            flags.DEFINE_integer,
            "N",
            "The same seed gives the same text on the same kind of machine, e.g. --seed 7",
            more={"lower_bound": 0, "upper_bound": 2**32 - 1},
        ),
    ),
    "Output": (
        _Flag(
            "json",
            flags.DEFINE_bool,
            "",
            "Print one JSON object (text, token_ids, finish_reason, timings and more) and nothing "
            "else on standard output; also with --show, e.g. -p Hello --json",
            default=False,
        ),
        _Flag(
            "hide_banner",
            flags.DEFINE_bool,
            "",
            "Start without the banner, which is shown only if standard error is a terminal, e.g. -i "
            "--hide_banner",
            default=False,
        ),
        _Flag(
            "log_level",
            flags.DEFINE_enum,
            "LEVEL",
            "debug, info, warning or error; debug also shows where an internal error happened, e.g. "
            "--log_level debug",
            default="warning",
            more={"enum_values": _LOG_LEVELS},
        ),
        _Flag(
            "help",
            flags.DEFINE_bool,
            "",
            "Show this text, e.g. -h",
            short="h",
            default=False,
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    _use_utf8()
    values = define_flags()
    try:
        code = _run(_parse(values, list(sys.argv if argv is None else argv)))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _end_line()
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except JaxchatError as error:
        _complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _drop_output()
        _complain(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        return 1
    except Exception as error:
        return _internal_error(error, debug=values["log_level"].value == "debug")


def define_flags() -> flags.FlagValues:
    """The flags, apart from absl's global ones so that importing this module defines nothing there."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for group in _GROUPS.values():
        for flag in group:
            more = {**flag.more, "flag_values": values, "short_name": flag.short}
            flag.define(flag.name, flag.default, help=flag.help, **more)
    return values


def help_text() -> str:
    """What `--help` prints: every flag with an example, in 80 columns."""
    lines = [_USAGE]
    for title, group in _GROUPS.items():
        lines.append(f"{title}:")
        for flag in group:
            names = (f"-{flag.short}, " if flag.short else "") + f"--{flag.name}"
            lines.append(f"  {names} {flag.value}".rstrip())
            unset = flag.default is None or flag.default is False or flag.default == []
            text = flag.help + ("" if unset else f" (default: {flag.default})")
            lines += textwrap.wrap(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6,
                                   break_on_hyphens=False)  # fmt: skip
        lines.append("")
    lines.append("Flags may be spelled with dashes too: --layer-spec is --layer_spec.")
    return "\n".join(lines)


def _run(values: flags.FlagValues) -> int:
    if values.help:
        print(help_text())
        return 0
    _set_log_level(values.log_level)
    if values.model is None:
        raise UsageError(
            "no model: give its directory with -m, "
            'e.g. python -m jaxchat.generate -m models/llama-3-8b -p "Hello"'
        )
    if values.show:
        report = _describe(values)
        print(json.dumps(show.as_json(report), indent=2) if values.json else show.render(report))
        return 0
    request = _request(values)
    _describe(values)  # errors at once
    # Not at the top: it imports JAX, which --help, --show and usage errors need not wait for.
    from jaxchat import terminal

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return terminal.run(request)


def _describe(values: flags.FlagValues) -> show.Report:
    return show.describe_directory(
        values.model, values.layer_spec, max_length=values.max_length, quant=values.quant
    )


# --- flags -> a request


def _parse(values: flags.FlagValues, argv: list[str]) -> flags.FlagValues:
    try:
        rest = values([argv[0], *_with_underscores(values, argv[1:])])[1:]
    except flags.UnrecognizedFlagError as error:
        known = sorted(values.flag_values_dict())
        close = difflib.get_close_matches(error.flagname.replace("-", "_"), known, 1)
        advice = f"did you mean --{close[0]}?" if close else "--help lists the flags"
        raise UsageError(f"unknown flag --{error.flagname}; {advice}") from None
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split()).removeprefix("flag ")) from None
    if rest:
        raise UsageError(f'unexpected argument {rest[0]!r}; give the prompt in quotes: -p "..."')
    return values


def _with_underscores(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """`--layer-spec` -> `--layer_spec`; values are left alone."""
    result: list[str] = []
    is_value = False
    for number, argument in enumerate(arguments):
        if argument == "--" and not is_value:
            return result + arguments[number:]
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        known = name in values or name.removeprefix("no") in values
        if is_value or not argument.startswith("-") or not known:
            result.append(argument)
            is_value = False
        else:
            result.append(f"--{name}{equals}{value}")
            is_value = name in values and not equals and not values[name].boolean
    return result


def _request(values: flags.FlagValues) -> Request:
    _refuse_combinations(values)
    names = [
        flag.name for title in ("How long", "Sampling") for flag in _GROUPS[title] if flag.name != "stop"
    ]
    options = GenerateOptions(
        **{name: getattr(values, name) for name in names}, stop=tuple(map(_unescape, values.stop))
    )
    return Request(
        model=values.model,
        layer_spec=values.layer_spec,
        dtype=values.dtype,
        quant=values.quant,
        kernels=values.kernels,
        max_length=values.max_length,
        compilation_cache_dir=values.compilation_cache_dir,
        format=values.format,
        system=values.system,
        prompt=_prompt(values),
        interactive=values.interactive,
        json=values.json,
        hide_banner=values.hide_banner,
        options=options,
    )


def _refuse_combinations(values: flags.FlagValues) -> None:
    if values.prompt is not None and values.prompt_file is not None:
        raise UsageError("both --prompt and --prompt_file are given; give one")
    if values.prompt is None and values.prompt_file is None and not values.interactive:
        raise UsageError(
            "nothing to do: give a prompt with -p or --prompt_file (- is standard input), or chat with -i"
        )
    if values.interactive and values.json:
        raise UsageError("--json is for one prompt; it cannot be combined with --interactive")
    if values.interactive and values.prompt_file == "-":
        raise UsageError("--interactive reads messages from standard input; give the first one with --prompt")
    if values.system is not None and values.format == "completion":
        raise UsageError("--system needs a chat; it cannot be combined with --format completion")
    for name in ("prompt", "system"):
        _check_text(getattr(values, name), name)


def _check_text(text: str | None, name: str) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError:  # Python keeps bytes it cannot read as lone surrogates
        raise UsageError(f"--{name} is not UTF-8 text") from None


def _prompt(values: flags.FlagValues) -> str | None:
    prompt: str | None = values.prompt
    where = "--prompt"
    if values.prompt_file is not None:
        prompt, where = _read_prompt(values.prompt_file), f"--prompt_file {values.prompt_file}"
    if prompt == "":
        raise UsageError(f"{where}: the prompt is empty; give at least one character")
    return prompt


def _read_prompt(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--prompt_file {name}: {error.strerror}; give a text file, or - for standard input"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--prompt_file {name}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _unescape(text: str) -> str:
    # One after the other would read the `\\n` of a backslash and an n as a line break.
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


# --- streams, logging and errors


def _use_utf8() -> None:
    """UTF-8 whatever the locale; what cannot be written is replaced, what cannot be read is kept apart."""
    for name, errors in (("stdin", "surrogateescape"), ("stdout", "replace"), ("stderr", "replace")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _set_log_level(level: str) -> None:
    logger = logging.getLogger("jaxchat")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("jaxchat: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _complain(message: str) -> None:
    print(f"jaxchat: {message}", file=sys.stderr)


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


def _internal_error(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = " ".join(str(error).split())
    advice = "" if debug else "; run again with --log_level debug to see where"
    _complain(f"internal error: {type(error).__name__}: {text[:300]}{advice}")
    return 1


def _exit(code: int) -> NoReturn:
    """Ends the process."""
    if code in (INTERRUPTED, BROKEN_PIPE):
        # XLA's threads may be in the middle of a step, and ending the interpreter under them can crash.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
