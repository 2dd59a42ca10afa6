"""The command `python -m jaxchat.analyze`: its flags, and the run from model and text to files and tables.

What is measured is `analysis/`'s. Help, errors and exit codes are those of every command: `command_line.py`.
"""

import functools
import hashlib
import importlib.util
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Ctrl-C while modules load just ends the program: an exception there would surface as a failed import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags

from jaxchat.analysis import show
from jaxchat.cli import command_line
from jaxchat.cli.command_line import Flag
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import write_atomically
from jaxchat.recipes.recipe import read_recipe

if TYPE_CHECKING:
    from jaxchat.analysis import Analysis, Questions, Windows
    from jaxchat.runtime import Model
    from jaxchat.text.tokenizer import Tokenizer

JOURNAL = "journal.jsonl"
"""The file of results so far, in the output directory."""

_WINDOW = 256
_PARTS = ("influence", "angular", "skip", "rys", "lens")
_USAGE = """\
usage: python -m jaxchat.analyze -m DIR --text FILE --out DIR [...]

Shows what each layer of a model does: how much it changes its input (block
influence, angular distance), the perplexity without it, without its attention
or its MLP, and with every block of layers run twice (RYS), and what the model
would say if it ended there (logit lens). Writes CSV, JSON and PNG files; an
interrupted run goes on where it stopped.

  python -m jaxchat.analyze -m llama-3-8b --text story.txt --out analysis
  python -m jaxchat.analyze -m llama-3-8b --text story.txt --out analysis \\
      --parts influence,rys --rys_sample 100 --quant int4
"""

_GROUPS: dict[str, tuple[Flag, ...]] = {
    "Model": (
        command_line.MODEL,
        command_line.RECIPE,
        command_line.MODEL_PATH,
        command_line.KEEP_IDENTITY,
        command_line.LAYER_SPEC,
        command_line.DTYPE,
        command_line.QUANT,
        command_line.KV_DTYPE,
        command_line.KERNELS_FLAG,
        command_line.COMPILATION_CACHE_DIR,
    ),
    "Text": (
        Flag(
            "text",
            flags.DEFINE_string,
            "FILE",
            "The text to measure on, a UTF-8 file, - for standard input, e.g. --text story.txt",
        ),
        Flag(
            "token_ids",
            flags.DEFINE_string,
            "FILE",
            "Instead of --text, token ids with blanks or commas between them; needs no tokenizer, e.g. "
            "--token_ids ids.txt",
        ),
        Flag(
            "window",
            flags.DEFINE_integer,
            "N",
            "Read the text in windows of so many tokens, each by itself and beginning as texts do for the "
            f"model (BOS); {_WINDOW} if not given, or the model's context if that is shorter, e.g. "
            "--window 512",
            more={"lower_bound": 2},
        ),
        Flag(
            "max_tokens",
            flags.DEFINE_integer,
            "N",
            "Use so many tokens from the beginning of the text, e.g. --max_tokens 20000",
            default=4096,
            more={"lower_bound": 2},
        ),
        Flag(
            "batch",
            flags.DEFINE_integer,
            "N",
            "Read so many windows together; as many as have 256 MiB of hidden states if not given, e.g. "
            "--batch 4",
            more={"lower_bound": 1},
        ),
    ),
    "What to measure": (
        Flag(
            "parts",
            flags.DEFINE_list,
            "LIST",
            f"Some of {','.join(_PARTS)}, e.g. --parts influence,skip",
            default=",".join(_PARTS),
        ),
        Flag(
            "rys_sample",
            flags.DEFINE_integer,
            "N",
            "Of the repeats (i, j), try so many drawn at random; all if not given, e.g. --rys_sample 200",
            more={"lower_bound": 1},
        ),
        Flag(
            "seed",
            flags.DEFINE_integer,
            "N",
            "Of the sample, e.g. --seed 7",
            default=0,
            more={"lower_bound": 0},
        ),
        Flag(
            "lens_positions",
            flags.DEFINE_string,
            "START:STOP",
            "The tokens of the first window whose successors the lens shows, a Python slice, e.g. "
            "--lens_positions 20:36",
            default="-12:",
        ),
        Flag(
            "top_k",
            flags.DEFINE_integer,
            "N",
            "How many candidates the lens lists for each, e.g. --top_k 10",
            default=5,
            more={"lower_bound": 1},
        ),
    ),
    "Output": (
        Flag(
            "out",
            flags.DEFINE_string,
            "DIR",
            f"Where the files go; made if it is not there. {JOURNAL} in it holds the results so far: the "
            "same command goes on from there, other --parts or samples add to it, e.g. --out analysis",
        ),
        Flag(
            "plots",
            flags.DEFINE_bool,
            "",
            "Draw PNG files, which needs matplotlib (the extra `analyze`), e.g. --noplots for CSV and "
            "JSON only",
            default=True,
        ),
        command_line.LOG_LEVEL,
        command_line.HELP,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    return command_line.run(_run, _GROUPS, _USAGE, argv)


def define_flags() -> flags.FlagValues:
    """The flags of this command, unparsed."""
    return command_line.define_flags(_GROUPS)


def _run(values: flags.FlagValues) -> int:
    _check(values)
    _describe(values)  # errors at once
    out = _output_directory(values.out)
    # Not at the top: it imports JAX, which --help and usage errors need not wait for.
    from jaxchat.analysis.measure import Questions

    questions = Questions(
        parts=tuple(values.parts),
        rys_sample=values.rys_sample,
        seed=values.seed,
        lens_positions=_lens_positions(values.lens_positions),
        top_k=values.top_k,
    )
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _analyze(values, questions, out)
    except KeyboardInterrupt:
        command_line.complain(f"interrupted; the results so far are in {out / JOURNAL}: run again to go on")
        raise


def _analyze(values: flags.FlagValues, questions: "Questions", out: Path) -> int:
    from jaxchat.cli.progress_bar import loading_bar
    from jaxchat.runtime import load

    text = None if values.text is None else command_line.read_text(values.text, "text")
    given = None if values.token_ids is None else _token_ids(values.token_ids)
    with loading_bar() as progress:
        model = load(
            values.model,
            values.layer_spec,
            recipe=values.recipe,
            model_paths=command_line.model_paths(values),
            keep_identity=values.keep_identity,
            dtype=values.dtype,
            quant=values.quant,
            kv_dtype=values.kv_dtype,
            kernels=values.kernels,
            compilation_cache_dir=values.compilation_cache_dir,
            progress=progress,
        )
    windows = _windows(model, values, text, given)
    result = _measure(model, windows, questions, values, out)
    _write(result, model, values, out)
    return 0


def _measure(
    model: "Model", windows: "Windows", questions: "Questions", values: flags.FlagValues, out: Path
) -> "Analysis":
    from jaxchat import analysis
    from jaxchat.analysis.journal import Journal
    from jaxchat.cli.progress_bar import counting_bar

    batch = values.batch or analysis.windows_at_once(model.engine, model.plan, windows)
    journal = Journal(out / JOURNAL, _dependencies(model, windows, values, batch))
    try:
        before, started = len(journal), time.perf_counter()
        known = f"; {before} results are there already" if before else ""
        _say(
            f"{len(windows.lengths)} windows, {windows.predicted} predicted tokens, "
            f"{len(model.plan.executed())} slots{known}"
        )
        with counting_bar("analyzing", "plans") as progress:
            result = analysis.analyze(
                model.engine, model.plan, windows, questions, batch=batch, results=journal, progress=progress
            )
        new, seconds = len(journal) - before, time.perf_counter() - started
    finally:
        journal.close()
    if new:
        _say(f"{new} results in {seconds:.1f} s, {new / seconds:.3g} a second")
    return result


def _write(result: "Analysis", model: "Model", values: flags.FlagValues, out: Path) -> None:
    from rich.console import Console

    from jaxchat.analysis import report

    name = _model_name(values)
    text_of = None if model.tokenizer is None else functools.partial(_token_text, model.tokenizer)
    files = {file: text.encode() for file, text in report.csv_files(result, text_of).items()}
    everything = {"model": name, **report.as_json(result, text_of)}
    files["analysis.json"] = json.dumps(everything, allow_nan=False, ensure_ascii=False, indent=1).encode()
    if values.plots:
        from jaxchat.analysis import plots

        files |= plots.png_files(result, name, text_of)
    for file, data in files.items():
        write_atomically(out / file, data)
    Console(highlight=False).print(report.tables(result))
    print(f"{out}: {', '.join(files)}")


def _token_text(tokenizer: "Tokenizer", token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


# --- flags -> what they mean


def _describe(values: flags.FlagValues) -> show.Report:
    if values.recipe is None:
        return show.describe_directory(values.model, values.layer_spec, quant=values.quant)
    paths = command_line.model_paths(values)
    assembly = read_recipe(values.recipe, paths, keep_identity=values.keep_identity)
    return show.describe_assembly(assembly, values.layer_spec, name=_model_name(values), quant=values.quant)


def _model_name(values: flags.FlagValues) -> str:
    return Path(values.recipe).stem if values.model is None else Path(values.model).resolve().name


def _check(values: flags.FlagValues) -> None:
    example = "e.g. python -m jaxchat.analyze -m models/llama-3-8b --text story.txt --out analysis"
    if values.model is not None and values.recipe is not None:
        raise UsageError("--model and --recipe are given; a recipe names its own models, give one")
    if values.model is None and values.recipe is None:
        raise UsageError(f"no model: give its directory with -m, {example}")
    command_line.model_paths(values)
    if (values.text is None) == (values.token_ids is None):
        many = "both --text and --token_ids are given; give one"
        raise UsageError(many if values.text is not None else f"no text: give a file with --text, {example}")
    if values.out is None:
        raise UsageError(f"no --out: give the directory for the results, {example}")
    for part in values.parts:
        if part not in _PARTS:
            raise UsageError(f"--parts: unknown part {part!r}; expected some of {','.join(_PARTS)}")
    if not values.parts:
        raise UsageError(f"--parts is empty; give some of {','.join(_PARTS)}")
    _lens_positions(values.lens_positions)
    if values.plots and importlib.util.find_spec("matplotlib") is None:
        raise JaxchatError(
            "the plots need matplotlib, which is not installed; pip install 'jaxchat[analyze]', or give "
            "--noplots for CSV and JSON only"
        )


def _lens_positions(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", text.strip())
    if not match:
        raise UsageError(f"--lens_positions is {text!r}; expected a slice START:STOP, e.g. -12: or 20:36")
    start, stop = (None if part is None else int(part) for part in match.groups())
    return start, stop


def _output_directory(name: str) -> Path:
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {name}: {error.strerror}; give a directory to write to") from None
    return out


def _token_ids(name: str) -> list[int]:
    words = command_line.read_text(name, "token_ids").replace(",", " ").split()
    for number, word in enumerate(words):
        if not re.fullmatch(r"[0-9]{1,9}", word):
            raise UsageError(f"--token_ids {name}: entry {number} is {word[:20]!r}; expected a token id")
    return [int(word) for word in words]


def _windows(
    model: "Model", values: flags.FlagValues, text: str | None, given: list[int] | None
) -> "Windows":
    from jaxchat.analysis import cut_windows

    ids = _first_ids(model, text, values.max_tokens) if text is not None else given or []
    length = values.window or min(_WINDOW, model.engine.max_length)
    if length > model.engine.max_length:
        raise UsageError(
            f"--window is {length}, but the model's context holds {model.engine.max_length} tokens"
        )
    bos = model.tokenizer.bos_id if model.tokenizer is not None and text is not None else None
    if not ids or ids[0] != bos:
        bos = None
    return cut_windows(ids[bos is not None : values.max_tokens], length, bos=bos)


def _first_ids(model: "Model", text: str, count: int) -> list[int]:
    """The first `count` or more token ids of a text, of which a tokenizer need not read gigabytes."""
    length = 8 * count
    while True:
        ids = model.encode(text[:length])
        # Where the text was cut, the last few tokens may be others than in the whole.
        if length >= len(text) or len(ids) >= count + 64:
            return ids
        length *= 2


def _dependencies(model: "Model", windows: "Windows", values: flags.FlagValues, batch: int) -> dict[str, str]:
    """What results depend on, by the flag that sets it."""
    from jaxchat.checkpoints.fingerprint import weights_fingerprint

    weights = weights_fingerprint(model.engine.params)
    return {
        "--recipe" if values.model is None else "--model": _digest(repr((model.config, weights)).encode()),
        "--layer_spec": str(model.plan),
        "--dtype": values.dtype or "as stored",
        "--quant": values.quant or "as stored",
        "--kv_dtype": model.engine.kv_dtype.name,
        "--kernels": model.engine.kernels.name,
        "--window": str(windows.tokens.shape[1]),
        "--max_tokens": str(int(windows.lengths.sum())),
        "--text": _digest(windows.tokens.tobytes() + windows.lengths.tobytes()),
        "--batch": str(batch),
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _say(message: str) -> None:
    print(f"jaxchat: {message}", file=sys.stderr)


if __name__ == "__main__":
    command_line.exit_process(main())
