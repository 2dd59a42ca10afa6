"""Converts model directories: Hugging Face -> native (mapped, starts at once) or Orbax, and back.

Examples:
  python tools/convert.py --src Llama-3.2-1B-Instruct --dst llama-1b --dtype bfloat16
  python tools/convert.py --src Llama-3.2-1B-Instruct --dst llama-1b-int4 --quant int4
  python tools/convert.py --src Llama-3.2-1B-Instruct --dst llama-1b-orbax --format orbax
  python tools/convert.py --src llama-1b --dst llama-1b-hf --to_hf
  python tools/convert.py --src llama-3-8b --dst llama-13b --to_hf --layer_spec 0:8,4:12,8:16,12:
  python tools/convert.py --recipe expanded.yaml --model_path openchat=models/openchat --dst openchat-9b
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started as a file: the packages are beside this folder, and Ctrl-C while they load just ends it.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxchat.checkpoints import write
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.load import Progress as Report
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES
from jaxchat.checkpoints.quantized import Quant
from jaxchat.cli import command_line
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.quant import QuantFormat
from jaxchat.recipes.recipe import read_recipe

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


_FLAGS = (
    "src", "dst", "layer_spec", "recipe", "model_path", "plan", "dtype", "quant", "format", "to_hf",
    "max_shard_bytes", "dequantize", "overwrite", "help",
)  # fmt: skip
_ONLY_TO_HF = ("max_shard_bytes", "dequantize")
_NEVER_TO_HF = ("dtype", "quant", "format", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code: 0, 1 failure, 2 wrong usage, 130 interrupted.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    values = _flags()
    try:
        rest = _parse(values, list(sys.argv if argv is None else argv))
        if values.help:
            print(_help(values))
            return 0
        _run(values, rest)
    except KeyboardInterrupt:
        _complain(f"interrupted; nothing was left in {values.dst}; run the same command again to start over")
        return INTERRUPTED
    except JaxchatError as error:
        _complain(str(error))
        return error.exit_code
    except (OSError, MemoryError) as error:
        _complain(str(error) or type(error).__name__)
        return 1
    return 0


def _flags() -> flags.FlagValues:
    """The flags, apart from absl's global ones so that importing this module defines nothing there."""
    values = flags.FlagValues()
    flags.DEFINE_string("src", None, "The model directory to read, e.g. --src Llama-3.2-1B-Instruct", values)
    flags.DEFINE_string("dst", None, "The directory to create, e.g. --dst llama-1b", values)
    flags.DEFINE_string(
        "layer_spec",
        None,
        "A layer plan: the layers of the result, in this order, in any notation that generate takes; it "
        "counts the slots of a recipe, or of the plan that --src records, if there is one, e.g. "
        "--layer_spec 0:8,4:12,8:",
        values,
    )
    flags.DEFINE_string(
        "recipe",
        None,
        "Instead of --src: a mergekit recipe (merge_method: passthrough) over one or several models, e.g. "
        "--recipe goliath.yaml",
        values,
    )
    flags.DEFINE_multi_string(
        "model_path",
        [],
        "NAME=DIR: where a model of the recipe is; may be given more than once, e.g. "
        "--model_path Xwin=models/xwin",
        values,
    )
    flags.DEFINE_enum(
        "plan",
        "record",
        list(write.KEEP),
        "What becomes of the layer plan: record stores each layer once, and the plan, under which the result "
        "then runs; bake stores every slot as a layer of its own, an ordinary model, as --to_hf always does, "
        "e.g. --plan bake",
        values,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        list(WEIGHT_DTYPES),
        "Store what is not quantized in this type instead of the one it has, e.g. --dtype bfloat16",
        values,
    )
    flags.DEFINE_string(
        "quant",
        None,
        "Quantize the weights: int8 or int4, optionally with a group :32 :64 :128 :channel and with :affine "
        ":plain :f32, or llama.cpp's q8_0 q4_0 q4_1; norms stay as they are, and at 4 bits embedding and "
        "head get 8, e.g. --quant int4, --quant int8:channel",
        values,
    )
    flags.DEFINE_enum(
        "format",
        "native",
        list(write.FORMATS),
        "native is mapped from disk without loading; orbax is for restoring onto many devices or hosts, "
        "e.g. --format orbax",
        values,
    )
    flags.DEFINE_bool(
        "to_hf",
        False,
        "Write a converted directory back in Hugging Face's layout, e.g. --src llama-1b --dst hf --to_hf",
        values,
    )
    flags.DEFINE_integer(
        "max_shard_bytes",
        5_000_000_000,
        "With --to_hf: split the weights into files of at most this size, e.g. --max_shard_bytes 2000000000",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dequantize",
        False,
        "With --to_hf: write quantized weights as the numbers they stand for, e.g. --to_hf --dequantize",
        values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace --dst if it is a model directory already, e.g. --overwrite", values
    )
    flags.DEFINE_bool("help", False, "Show this text, e.g. --help", values, short_name="h")
    return values


def _parse(values: flags.FlagValues, argv: list[str]) -> list[str]:
    try:
        return values(argv)[1:]
    except flags.Error as error:
        raise UsageError(f"{' '.join(str(error).split())} (--help lists the flags)") from None


def _help(values: flags.FlagValues) -> str:
    lines = [(__doc__ or "").rstrip(), "", "Flags:"]
    for name in _FLAGS:
        flag = values[name]
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        lines += [f"  --{name}", f"      {flag.help}{default}"]
    return "\n".join(lines)


def _run(values: flags.FlagValues, rest: list[str]) -> None:
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; give directories as --src DIR --dst DIR")
    if values.src and values.recipe:
        raise UsageError("both --src and --recipe are given; the recipe says which models it is made from")
    needed = ("dst",) if values.recipe else ("src", "dst")
    missing = [f"--{name}" for name in needed if not values[name].value]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given; --help shows examples")
    refused = [name for name in (_NEVER_TO_HF if values.to_hf else _ONLY_TO_HF) if values[name].present]
    if refused:
        reason = "cannot be combined with --to_hf" if values.to_hf else "needs --to_hf"
        raise UsageError(f"--{refused[0]} {reason}")
    if values.model_path and not values.recipe:
        raise UsageError("--model_path needs --recipe")
    quant: Quant = "auto" if values.quant is None else QuantFormat.parse(values.quant)
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    source = _source(values)
    with _progress() as report:
        if values.to_hf:
            manifest = write.to_hf(
                source,
                values.dst,
                layer_spec=values.layer_spec,
                max_shard_bytes=values.max_shard_bytes,
                dequantize=values.dequantize,
                overwrite=values.overwrite,
                progress=report,
            )
        else:
            manifest = write.convert(
                source,
                values.dst,
                layer_spec=values.layer_spec,
                plan=values.plan,
                dtype=values.dtype,
                quant=quant,
                format=values.format,
                overwrite=values.overwrite,
                progress=report,
            )
    size = sum(path.stat().st_size for path in Path(values.dst).rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    print(f"{values.dst}: {manifest.parameters:,} parameters, {size:,} bytes, {seconds:.1f} s")


def _source(values: flags.FlagValues) -> str | Assembly:
    """What to convert: a directory, or what a recipe assembles; its remarks go to standard error."""
    if not values.recipe:
        return str(values.src)
    assembly = read_recipe(values.recipe, command_line.model_paths(values))
    for note in assembly.notes:
        print(f"note: {note}", file=sys.stderr)
    return assembly


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A bar on standard error with rate and remaining time; nothing where that is not a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
