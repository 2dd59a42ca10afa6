"""`jaxchat analyze`: its flags, and the run from model and text to files and tables.

What is measured is `analysis/`'s.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxchat.analysis.questions import Questions
from jaxchat.cli.command_line import Command, Conflict, Ended, Need, catch_interrupts, complain, read_text
from jaxchat.cli.model_flags import RECIPE_NEEDS, BoxedModel, LoadFlags
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import try_to_replace, write_atomically
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.analysis import Analysis, Windows
    from jaxchat.runtime import Model
    from jaxchat.text.tokenizer import Tokenizer

JOURNAL = "journal.jsonl"
"""The file of results so far, in the output directory."""

_WINDOW = 256
_USAGE = """\
usage: {program} [-m DIR] --text FILE --out DIR [...]

Shows what each layer of a model does: how much it changes its input (block
influence, angular distance), the perplexity without it, without its attention
or its MLP, and with every block of layers run twice (RYS), and what the model
would say if it ended there (logit lens). Writes CSV, JSON and PNG files; an
interrupted run goes on where it stopped.

  {program} --text story.txt --out analysis
  {program} -m llama-3-8b --text story.txt --out analysis \\
      --parts influence,rys --rys_sample 100 --quant int4
"""

_text = functools.partial(Flag, group="Text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeRequest(LoadFlags):
    """A model, a text, what to measure, and where to write it."""

    model: BoxedModel = None
    text: Annotated[
        str | None,
        _text(
            help="The text to measure on, a UTF-8 file, - for standard input",
            example="--text story.txt",
            value="FILE",
        ),
    ] = None
    token_ids: Annotated[
        str | None,
        _text(
            help="Instead of --text, token ids with blanks or commas between them; needs no tokenizer",
            example="--token_ids ids.txt",
            value="FILE",
        ),
    ] = None
    special_tokens: Annotated[
        bool,
        _text(
            help="Special tokens spelled out in the text are those; with --nospecial_tokens they are text",
            example="--text chats.txt --nospecial_tokens",
        ),
    ] = True
    window: Annotated[
        int | None,
        _text(
            help="Read the text in windows of so many tokens, each by itself and beginning as texts do for "
            f"the model (BOS); {_WINDOW} if not given, or the model's context if that is shorter",
            example="--window 512",
            low=2,
        ),
    ] = None
    max_tokens: Annotated[
        int,
        _text(help="Use so many tokens from the beginning of the text", example="--max_tokens 20000", low=2),
    ] = 4096
    batch: Annotated[
        int | None,
        _text(
            help="Read so many windows together; as many as have 256 MiB of hidden states if not given",
            example="--batch 4",
            low=1,
        ),
    ] = None
    questions: Questions = dataclasses.field(default_factory=Questions)
    out: Annotated[
        str | None,
        Flag(
            help=f"Where the files go; made if it is not there. {JOURNAL} in it holds the results so far: "
            "the same command goes on from there, other --parts or samples add to it",
            example="--out analysis",
            group="Output",
            value="DIR",
        ),
    ] = None
    plots: Annotated[
        bool,
        Flag(
            help="Draw PNG files, which needs matplotlib (the extra `analyze`); CSV and JSON only without",
            example="--noplots",
            group="Output",
        ),
    ] = True


def _run(request: AnalyzeRequest, given: frozenset[str]) -> int:
    _refuse(request)
    request = request.or_boxed()
    chosen = request.chosen()
    out = _output_directory(str(request.out))
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.cli.progress_bar import loading_bar

    text = None if request.text is None else read_text(request.text, "text")
    ids = None if request.token_ids is None else _token_ids(request.token_ids, chosen.config.vocab_size)
    with loading_bar() as progress:
        catch_interrupts()
        model = request.load(chosen, progress)
    windows = _windows(model, request, text, ids)
    try:
        result = _measure(model, windows, request, out)
    except (KeyboardInterrupt, Ended):
        complain(f"interrupted; the results so far are in {out / JOURNAL}: run again to go on")
        raise
    _write(result, model, request, out)
    return 0


def _measure(model: "Model", windows: "Windows", request: AnalyzeRequest, out: Path) -> "Analysis":
    from jaxchat import analysis
    from jaxchat.analysis.journal import Journal
    from jaxchat.cli.progress_bar import counting_bar

    batch = request.batch or analysis.windows_at_once(model.engine, model.plan, windows)
    journal = Journal(out / JOURNAL, _dependencies(model, windows, request, batch))
    try:
        before, started = len(journal), time.perf_counter()
        known = f"; {before} results are there already" if before else ""
        complain(
            f"{len(windows.lengths)} windows, {windows.predicted} predicted tokens, "
            f"{len(model.plan.executed())} slots{known}"
        )
        with counting_bar("analyzing", "plans") as progress:
            result = analysis.analyze(
                model.engine,
                model.plan,
                windows,
                request.questions,
                batch=batch,
                results=journal,
                progress=progress,
            )
        new, seconds = len(journal) - before, time.perf_counter() - started
    except analysis.KnownResultError as error:
        raise JaxchatError(f"{journal.path}: {error}; delete the file, or give another --out") from None
    finally:
        journal.close()
    if new:
        complain(f"{new} results in {seconds:.1f} s, {new / seconds:.3g} a second")
    return result


def _write(result: "Analysis", model: "Model", request: AnalyzeRequest, out: Path) -> None:
    from rich.console import Console

    from jaxchat.analysis import report

    name = request.model_name
    text_of = None if model.tokenizer is None else functools.partial(_token_text, model.tokenizer)
    files = {file: text.encode() for file, text in report.csv_files(result, text_of).items()}
    everything = {"model": name, **report.as_json(result, text_of)}
    files["analysis.json"] = json.dumps(everything, allow_nan=False, ensure_ascii=False, indent=1).encode()
    if request.plots:
        from jaxchat.analysis import plots

        source = Path(request.text or request.token_ids or "").name
        files |= plots.png_files(result, name, text_of, of="standard input" if source == "-" else source)
    for file, data in files.items():
        write_atomically(out / file, data)
    Console(highlight=False).print(report.tables(result))
    print(f"{out}: {', '.join(files)}")


def _token_text(tokenizer: "Tokenizer", token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


# --- flags -> what they mean


def _refuse(request: AnalyzeRequest) -> None:
    example = "e.g. jaxchat analyze -m models/llama-3-8b --text story.txt --out analysis"
    if request.text is None and request.token_ids is None:
        raise UsageError(f"no text: give a file with --text, {example}")
    if request.text is None and not request.special_tokens:
        raise UsageError("--nospecial_tokens needs --text: token ids are what they are")
    if request.out is None:
        raise UsageError(f"no --out: give the directory for the results, {example}")
    if request.plots and importlib.util.find_spec("matplotlib") is None:
        raise JaxchatError(
            "the plots need matplotlib, which is not installed; pip install 'jaxchat[analyze]', or give "
            "--noplots for CSV and JSON only"
        )


def _output_directory(name: str) -> Path:
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try_to_replace(out / JOURNAL)
    except OSError as error:
        raise UsageError(f"--out {name}: {error.strerror}; give a directory to write to") from None
    return out


def _token_ids(name: str, size: int) -> list[int]:
    words = read_text(name, "token_ids").replace(",", " ").split()
    for number, word in enumerate(words):
        if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) >= size:
            raise UsageError(
                f"--token_ids {name}: entry {number} is {word[:20]!r}; expected a token id of this "
                f"model, 0 to {size - 1}"
            )
    return [int(word) for word in words]


def _windows(model: "Model", request: AnalyzeRequest, text: str | None, given: list[int] | None) -> "Windows":
    from jaxchat.analysis import cut_windows

    special = request.special_tokens
    ids = (
        _first_ids(model, text, request.max_tokens, parse_special=special)
        if text is not None
        else given or []
    )
    _refuse_unreadable(model, request, text, ids)
    length = request.window or min(_WINDOW, model.engine.max_length)
    if length > model.engine.max_length:
        raise UsageError(
            f"--window is {length}, but the model's context holds {model.engine.max_length} tokens; "
            "give fewer"
        )
    bos = model.tokenizer.bos_id if model.tokenizer is not None and text is not None else None
    if not ids or ids[0] != bos:
        bos = None
    return cut_windows(ids[bos is not None : request.max_tokens], length, bos=bos)


def _refuse_unreadable(model: "Model", request: AnalyzeRequest, text: str | None, ids: list[int]) -> None:
    """Refuses a text that predicts nothing, and says so of one that the tokenizer hardly knows."""
    from jaxchat.analysis import unknown

    where = f"--token_ids {request.token_ids}" if text is None else f"--text {request.text}"
    tokens = model.tokenizer
    if tokens is None or text is None:
        own, problem = ids, None
    else:
        own = ids[1:] if ids[:1] == [tokens.bos_id] else ids
        problem = unknown.problem(tokens, text, own)
    if len(ids) >= 2:
        if problem is not None:
            complain(f"warning: {where}: {problem}; what follows is mostly about that token")
        return
    found = problem or f"{len(ids)} {'token' if len(ids) == 1 else 'tokens'}, and predicting one takes two"
    raise UsageError(f"{where}: {found}; give a {'longer text' if problem is None else 'text it can read'}")


def _first_ids(model: "Model", text: str, count: int, *, parse_special: bool) -> list[int]:
    """The first `count` or more token ids of a text, of which a tokenizer need not read gigabytes."""
    length = 8 * count
    if not text:
        return []
    while True:
        ids = model.encode(text[:length], parse_special=parse_special)
        # Where the text was cut, the last few tokens may be others than in the whole.
        if length >= len(text) or len(ids) >= count + 64:
            return ids
        length *= 2


def _dependencies(model: "Model", windows: "Windows", request: AnalyzeRequest, batch: int) -> dict[str, str]:
    """What results depend on, by the flag that sets it."""
    from jaxchat.checkpoints.fingerprint import weights_fingerprint

    weights = weights_fingerprint(model.engine.params)
    return {
        "--recipe" if request.model is None else "--model": _digest(repr((model.config, weights)).encode()),
        "--layer_spec": str(model.plan),
        "--dtype": request.dtype or "as stored",
        "--quant": request.quant or "as stored",
        "--kv_dtype": model.engine.kv_dtype.name,
        "--kernels": model.engine.kernels.name,
        "--window": str(windows.tokens.shape[1]),
        "--max_tokens": str(int(windows.lengths.sum())),
        "--text": _digest(windows.tokens.tobytes() + windows.lengths.tobytes()),
        "--batch": str(batch),
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


COMMAND = Command(
    usage=_USAGE,
    request=AnalyzeRequest,
    run=_run,
    conflicts=(
        Conflict("model", "recipe", "a recipe names its own models"),
        Conflict("text", "token_ids", "give one"),
    ),
    needs=(*RECIPE_NEEDS, Need("special_tokens", ("text",), "token ids are what they are")),
)
