"""What the commands share: flags and help, text files, streams, log level, errors and exit codes.

A command (`generate.py` and others) declares its flags as data; hands `run` what does the work.
Exit codes: 0, 1 failure, 2 wrong usage, 130 interrupted, 141 nobody reads the output any more. Needs no JAX.
"""

import difflib
import io
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import UnreadableError, text_of
from jaxchat.options import KV_DTYPES

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
BROKEN_PIPE = 141
"""The exit code when standard output is closed (`| head -1`), as of a program ended by SIGPIPE."""

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("auto", "reference", "native", "pallas")
LOG_LEVELS = ("debug", "info", "warning", "error")


class Flag(NamedTuple):
    """One flag: how absl defines it, and how the help shows it."""

    name: str
    define: Callable[..., Any]
    value: str  # what the help calls its value; "" for a switch
    help: str
    short: str | None = None
    default: Any = None
    more: dict[str, Any] = {}  # noqa: RUF012 (read only)


Groups = Mapping[str, Sequence[Flag]]
"""The flags of a command under the titles of its help."""

MODEL = Flag(
    "model",
    flags.DEFINE_string,
    "DIR",
    "The model: a directory as on Hugging Face, or one that tools/convert.py wrote, e.g. -m "
    "models/llama-3-8b",
    short="m",
)
LAYER_SPEC = Flag(
    "layer_spec",
    flags.DEFINE_string,
    "LAYERS",
    "The layers to run, in this order: numbers and Python slices, e.g. 0:8,4:12,8: to repeat "
    "layers, 0:10,10:20:2,20: to leave some out, ::-1 to reverse; or a JSON list with scales,"
    " e.g. '[0, [1, 0.5, 1.0], 2]'; or RYS '(4,8)' (layers 0 to 7, then from 4 on), exllamav2's "
    "'[(0,8),(4,12)]', or @FILE, which holds any of these",
)
RECIPE = Flag(
    "recipe",
    flags.DEFINE_string,
    "FILE",
    "The model and its layers as a mergekit recipe says: YAML with merge_method: passthrough, over one or "
    "several models, e.g. --recipe goliath.yml --model_path Xwin-LM/Xwin-LM-70B-V0.1=models/xwin",
)
MODEL_PATH = Flag(
    "model_path",
    flags.DEFINE_multi_string,
    "NAME=DIR",
    "Where a model that the recipe names is; may be given more than once. Other names are directories, "
    "relative to the recipe or to the working directory, e.g. --model_path openchat/openchat-3.5-0106=oc",
    default=[],
)
KEEP_IDENTITY = Flag(
    "keep_identity",
    flags.DEFINE_bool,
    "",
    "Execute the recipe's layers that pass their input through (o_proj and down_proj scaled to 0), with "
    "zeros for weights; otherwise they are counted, but take no time and no memory, e.g. --recipe seed.yml "
    "--keep_identity",
    default=False,
)
DTYPE = Flag(
    "dtype",
    flags.DEFINE_enum,
    "TYPE",
    "Convert the weights to float32, bfloat16 or float16; as stored if not given, e.g. --dtype bfloat16",
    more={"enum_values": DTYPES},
)
QUANT = Flag(
    "quant",
    flags.DEFINE_string,
    "FORMAT",
    "Quantize the weights while loading: int8 or int4, optionally with a group :32 :64 :128 :channel "
    "and with :affine :plain :f32, or llama.cpp's q8_0 q4_0 q4_1; as stored if not given. "
    "tools/convert.py --quant does it once and for all, e.g. --quant int4, --quant int8:channel",
)
KV_DTYPE = Flag(
    "kv_dtype",
    flags.DEFINE_enum,
    "TYPE",
    "Keep the KV cache in float32, bfloat16 or int8 (codes with a scale for each row, about a quarter of "
    "float32); that of the activations if not given: float32 on CPU and with float32 weights, else bfloat16, "
    "e.g. --kv_dtype int8",
    more={"enum_values": KV_DTYPES},
)
KERNELS_FLAG = Flag(
    "kernels",
    flags.DEFINE_enum,
    "WHICH",
    "What computes: reference is plain XLA, native the C++ of CPUs, pallas that of GPUs and TPUs, "
    "auto the fastest there is, e.g. --kernels reference",
    default="auto",
    more={"enum_values": KERNELS},
)
COMPILATION_CACHE_DIR = Flag(
    "compilation_cache_dir",
    flags.DEFINE_string,
    "DIR",
    "Where compiled programs are kept between runs; a user cache directory if not given, e.g."
    " --compilation_cache_dir /tmp/xla, or '' for none",
)
LOG_LEVEL = Flag(
    "log_level",
    flags.DEFINE_enum,
    "LEVEL",
    "debug, info, warning or error; debug also shows where an internal error happened, e.g. "
    "--log_level debug",
    default="warning",
    more={"enum_values": LOG_LEVELS},
)
HELP = Flag("help", flags.DEFINE_bool, "", "Show this text, e.g. -h", short="h", default=False)


def run(
    body: Callable[[flags.FlagValues], int],
    groups: Groups,
    usage: str,
    argv: Sequence[str] | None = None,
    *,
    stray: str = "every value belongs to a flag; --help lists the flags",
) -> int:
    """Runs a command and returns its exit code; failures become one line on standard error.

    Args:
      body: what to do with the parsed flags.
      groups: the command's flags; `HELP` and `LOG_LEVEL` must be among them.
      usage: what its help begins with.
      argv: the arguments, the program's name first; None is `sys.argv`.
      stray: what to do about an argument that belongs to no flag.
    """
    _use_utf8()
    values = define_flags(groups)
    try:
        _parse(values, list(sys.argv if argv is None else argv), stray)
        if values.help:
            print(help_text(usage, groups))
            code = 0
        else:
            _set_log_level(values.log_level)
            code = body(values)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _end_line()
        return INTERRUPTED
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
    except Exception as error:
        return _internal_error(error, debug=values["log_level"].value == "debug")


def exit_process(code: int) -> NoReturn:
    """Ends the process."""
    if code in (INTERRUPTED, BROKEN_PIPE):
        # XLA's threads may be in the middle of a step, and ending the interpreter under them can crash.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# --- flags


def define_flags(groups: Groups) -> flags.FlagValues:
    """The flags, apart from absl's global ones so that importing a command defines nothing there."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for group in groups.values():
        for flag in group:
            more = {**flag.more, "flag_values": values, "short_name": flag.short}
            flag.define(flag.name, flag.default, help=flag.help, **more)
    return values


def help_text(usage: str, groups: Groups) -> str:
    """What `--help` prints: every flag with an example, in 80 columns."""
    lines = [usage]
    for title, group in groups.items():
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


def _parse(values: flags.FlagValues, argv: list[str], stray: str) -> None:
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
        raise UsageError(f"unexpected argument {rest[0]!r}; {stray}")


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


def model_paths(values: flags.FlagValues) -> dict[str, str]:
    """`--model_path NAME=DIR` as name -> directory; refuses what says how to read a recipe without one."""
    for name in (MODEL_PATH.name, KEEP_IDENTITY.name):
        if name in values and values[name].value and values.recipe is None:
            raise UsageError(f"--{name} needs --recipe: it says how to read one")
    found: dict[str, str] = {}
    for text in values.model_path:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--model_path {text}: expected NAME=DIR, the recipe's name and a directory")
        if name in found:
            raise UsageError(f"--model_path {name} is given twice; give it once")
        found[name] = directory
    return found


def check_text(text: str | None, flag: str) -> None:
    """Refuses a flag's text that was not UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:  # Python keeps bytes it cannot read as lone surrogates
        raise UsageError(f"--{flag} is not UTF-8 text") from None


def read_text(name: str, flag: str) -> str:
    """The UTF-8 text of the file a flag names; - is standard input."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--{flag} {name}: {error.strerror}; give a text file, or - for standard input"
        ) from None
    try:
        return text_of(data)
    except UnreadableError as error:
        raise UsageError(f"--{flag} {name}: {error}; convert the file to UTF-8") from None


# --- streams, logging and errors


def complain(message: str) -> None:
    """A line on standard error."""
    print(f"jaxchat: {message}", file=sys.stderr)


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
    complain(f"internal error: {type(error).__name__}: {text[:300]}{advice}")
    return 1
