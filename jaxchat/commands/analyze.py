"""`jaxchat analyze`: its flags, and the run from model and text to files and tables.

What is measured is `analysis/`'s.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxchat import __version__
from jaxchat.analysis.questions import Questions
from jaxchat.cli.command_line import Command, Conflict, Ended, Need, catch_interrupts, complain
from jaxchat.cli.model_flags import RECIPE_NEEDS, BoxedModel, LoadFlags
from jaxchat.cli.resumable import JOURNAL, output_directory
from jaxchat.cli.text_flags import TextFlags, given_text, read_windows, refuse_no_text
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import write_atomically
from jaxchat.layer_plan import LayerPlan, PlanError
from jaxchat.options import Flag
from jaxchat.visible import shown

if TYPE_CHECKING:
    from jaxchat.analysis import Analysis, Windows
    from jaxchat.runtime import Model
    from jaxchat.text.tokenizer import Tokenizer

PAGE = "report.html"

_USAGE = """\
usage: {program} [-m DIR] --text FILE --out DIR [...]

Shows what each layer of a model does: how much it changes its input (block
influence, angular distance), the perplexity without it, without its attention
or its MLP, and with every block of layers run twice (RYS), and what the model
would say if it ended there (logit lens). Compares other plans with this one
token by token. Writes CSV, JSON and PNG files, and report.html, an interactive
page that needs no network; an interrupted run goes on where it stopped.

  {program} --text story.txt --out analysis
  {program} -m llama-3-8b --text story.txt --out analysis \\
      --parts influence,rys --rys_sample 100 --quant int4
  {program} --text story.txt --out analysis --compare 0:5,3: --compare ::2
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeRequest(TextFlags, LoadFlags):
    """A model, a text, what to measure, and where to write it."""

    model: BoxedModel = None
    batch: Annotated[
        int | None,
        Flag(
            help="Read so many windows together; as many as have 256 MiB of hidden states if not given",
            example="--batch 4",
            group="Text",
            low=1,
        ),
    ] = None
    questions: Questions = dataclasses.field(default_factory=Questions)
    compare: Annotated[
        tuple[str, ...],
        Flag(
            help="A layer plan to compare with the model's: perplexities with 95 % intervals over windows, "
            "and where on the text the two disagree; may be given more than once",
            example="--compare 0:8,4:",
            group="What to measure",
            value="SPEC",
            many=True,
        ),
    ] = ()
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
    html: Annotated[
        bool,
        Flag(
            help=f"Write {PAGE}, one interactive page of 2 MB and more that a browser shows without a "
            "network; needs plotly (the extra `analyze`)",
            example="--nohtml",
            group="Output",
        ),
    ] = True


def _run(request: AnalyzeRequest, given: frozenset[str]) -> int:
    _refuse(request)
    request = request.or_boxed()
    chosen = request.chosen()
    compare = _compared(request.compare, chosen.source.plan)
    out = output_directory(str(request.out))
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.cli.progress_bar import loading_bar

    text, ids = given_text(request, chosen.config.vocab_size)
    with loading_bar() as progress:
        catch_interrupts()
        model = request.load(chosen, progress)
    windows = read_windows(model, request, text, ids)
    try:
        result = _measure(model, windows, compare, request, out)
    except (KeyboardInterrupt, Ended):
        complain(f"interrupted; the results so far are in {out / JOURNAL}: run again to go on")
        raise
    _write(result, model, request, out)
    return 0


def _measure(
    model: "Model", windows: "Windows", compare: Sequence[LayerPlan], request: AnalyzeRequest, out: Path
) -> "Analysis":
    from jaxchat import analysis
    from jaxchat.cli.progress_bar import counting_bar
    from jaxchat.journal import Journal

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
                compare=compare,
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
    source = Path(request.text or request.token_ids or "").name
    source = "standard input" if source == "-" else source
    if request.plots:
        from jaxchat.analysis import plots

        files |= plots.png_files(result, name, text_of, of=source)
    if request.html:
        from jaxchat.analysis.page import page

        files[PAGE] = page(result, _facts(result, model, request, source), text_of).encode()
    for file, data in files.items():
        write_atomically(out / file, data)
    Console(highlight=False).print(report.tables(result))
    size = f" ({len(files[PAGE]) / 1e6:.1f} MB)" if request.html else ""
    print(f"{out}: {', '.join(files)}{size}")


def _facts(result: "Analysis", model: "Model", request: AnalyzeRequest, source: str) -> dict[str, str]:
    import jax

    engine = model.engine
    return {
        "model": request.model_name,
        "plan": f"{result.plan} (slots: {len(result.plan)})",
        "text": f"{source} (predicted tokens: {result.predicted:,}, windows: {result.windows:,})",
        "weights": f"{request.quant or request.dtype or 'as stored'}; KV cache {engine.kv_dtype.name}",
        "versions": f"jaxchat {__version__}, jax {jax.__version__}, on {engine.platform}",
        "command": shlex.join(["jaxchat", *sys.argv[1:]]),
    }


def _token_text(tokenizer: "Tokenizer", token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


# --- flags -> what they mean


def _refuse(request: AnalyzeRequest) -> None:
    example = "e.g. jaxchat analyze -m models/llama-3-8b --text story.txt --out analysis"
    refuse_no_text(request, example)
    if request.out is None:
        raise UsageError(f"no --out: give the directory for the results, {example}")
    for wanted, package, what, flag in (
        (request.plots, "matplotlib", "the plots need", "--noplots"),
        (request.html, "plotly", f"{PAGE} needs", "--nohtml"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise JaxchatError(
                f"{what} {package}, which is not installed; pip install 'jaxchat[analyze]', or give {flag} "
                "to do without"
            )


def _compared(specs: Sequence[str], base: LayerPlan) -> list[LayerPlan]:
    """The plans of --compare, each once; text counts the slots of `base`, as --layer_spec does."""
    plans = []
    for spec in specs:
        try:
            plans.append(base.select(spec))
        except PlanError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--compare {shown(spec)}: {reason}") from None
    return list(dict.fromkeys(plans))


def _dependencies(model: "Model", windows: "Windows", request: AnalyzeRequest, batch: int) -> dict[str, str]:
    """What results depend on, by the flag that sets it."""
    from jaxchat.checkpoints.fingerprint import model_digest

    return {
        "--recipe" if request.model is None else "--model": model_digest(model.config, model.engine.params),
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
