"""`jaxchat evaluate`: its flags, and the run from model and tasks to scores, files and tables.

What is asked and what becomes of it is `evaluation/`'s.
"""

import dataclasses
import functools
import importlib.util
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxchat import __version__
from jaxchat.adapter_use import Uses, read_uses
from jaxchat.cli.command_line import Command, Conflict, Ended, catch_interrupts, complain
from jaxchat.cli.flags import flag_fields
from jaxchat.cli.model_flags import MAX_LENGTH, RECIPE_NEEDS, BoxedModel, LoadFlags
from jaxchat.cli.resumable import JOURNAL, output_directory
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import write_atomically
from jaxchat.options import SEEDS, Flag

if TYPE_CHECKING:
    from jaxchat.cli.chosen_model import ChosenModel
    from jaxchat.evaluation.baseline import Baseline
    from jaxchat.evaluation.report import Summary
    from jaxchat.evaluation.run import Measured
    from jaxchat.evaluation.tasks import Prepared
    from jaxchat.runtime import Model

BATCH = 8

_USAGE = """\
usage: {program} [-m DIR] --tasks NAME,... [--data DIR] --out DIR [...]

Scores a model, under a layer plan if wanted, on tasks: with standard errors,
95 % intervals and, with --baseline, paired comparisons with another run.
Writes evaluation.json, .md, .csv and .png, and items.jsonl, every answer; an
interrupted run goes on where it stopped.

  {program} -m assistant --tasks arc_easy,piqa --data evals --out plain
  {program} -m assistant --tasks arc_easy,piqa --data evals \\
      --out longer --layer_spec 0:16,12: --baseline plain/evaluation.json
  {program} --tasks text:story.txt,choice:mine.jsonl --out mine

Tasks whose files are found below --data:
  arc_easy arc_challenge piqa lambada mmlu mmlu_SUBJECT gsm8k ifeval
  rys_math rys_math_16 rys_eq rys_eq_16 olmo:NAME/VARIANT
Of a file of your own (.jsonl .json .csv .txt .arrow .parquet), by columns:
  choice:FILE      question, choices, answer (number, letter or text)
  completion:FILE  context, continuation
  match:FILE       prompt, answer (or several), regex that finds it (optional)
  text:FILE        text; or a .txt
each with an id, if wanted. Code that a model writes is never run.
"""

_what = functools.partial(Flag, group="Tasks")
_how = functools.partial(Flag, group="How they are asked")
_output = functools.partial(Flag, group="Output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateRequest(LoadFlags):
    """A model, tasks, how they are asked, and where the scores go."""

    model: BoxedModel = None
    adapter: Annotated[
        Uses,
        Flag(
            help="Evaluate with a LoRA adapter, as PEFT saves it or in GGUF: all of it, =STRENGTH of it, or "
            "only in @SLOT of the layer plan. May be given more than once",
            example="--adapter loras/poet, --adapter loras/poet=0.5",
            group="Model",
            elsewhere=("lora", "lora_path", "peft"),
            value="DIR[@SLOT][=STRENGTH]",
            many=True,
            read=lambda texts: read_uses(texts, "--adapter"),
        ),
    ] = ()
    max_length: Annotated[int | None, dataclasses.replace(MAX_LENGTH, group="Model")] = None
    tasks: Annotated[
        tuple[str, ...],
        _what(
            help="The tasks, with commas between them; may be given more than once. See above",
            example="--tasks arc_easy,lambada,choice:mine.jsonl",
            value="NAME,...",
            many=True,
        ),
    ] = ()
    data: Annotated[
        str | None,
        _what(
            help="The directory that the files of tasks are found in, however deep, as published, and "
            "those of your own that are not here",
            example="--data evals",
            value="DIR",
        ),
    ] = None
    limit: Annotated[
        int | None,
        _what(
            help="Ask the first so many questions of each task, of MMLU of each subject",
            example="--limit 100",
            low=1,
        ),
    ] = None
    few_shot: Annotated[
        int | None,
        _how(
            help="Show so many examples before each question: from the task's rows for that "
            "(train, dev), else from its other questions. Drawn with --seed, the same for all; of MMLU "
            "the first ones. If not given, what the task has: 5 of gsm8k, else 0",
            example="--few_shot 5",
            elsewhere=("num_fewshot", "fewshot", "shots"),
            low=0,
            high=1000,
        ),
    ] = None
    apply_chat_template: Annotated[
        bool | None,
        _how(
            help="Put questions into the model's chat template, examples as turns before them; with "
            "--noapply_chat_template as text. If not given: ifeval, rys_* and match:FILE if there is a "
            "template, and no other task",
            example="--apply_chat_template",
            elsewhere=("fewshot_as_multiturn",),
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        _how(
            help="The longest reply; what the task has if not given: 256, of ifeval 1280",
            example="--max_new_tokens 400",
            elsewhere=("max_gen_toks", "max_tokens"),
            low=1,
        ),
    ] = None
    window: Annotated[
        int | None,
        _how(
            help="Read long texts in windows of so many tokens; 1024 if not given, or the context if shorter",
            example="--window 2048",
            low=2,
        ),
    ] = None
    stride: Annotated[
        int | None,
        _how(
            help="Begin a window so many tokens after the one before: each sees the last --window less "
            "--stride tokens of that; half a window if not given",
            example="--stride 256",
            low=1,
        ),
    ] = None
    batch: Annotated[
        int,
        _how(
            help="Compute so many sequences together. Scores are the same but for rounding",
            example="--batch 16",
            elsewhere=("batch_size",),
            low=1,
            high=1 << 16,
        ),
    ] = BATCH
    seed: Annotated[
        int,
        _how(
            help="Draws the examples, and the resamples that intervals are made of",
            example="--seed 7",
            limits=SEEDS,
        ),
    ] = 0
    baseline: Annotated[
        str | None,
        _output(
            help="Compare with an earlier run, item by item: the evaluation.json that it wrote",
            example="--baseline plain/evaluation.json",
            value="FILE",
        ),
    ] = None
    out: Annotated[
        str | None,
        _output(
            help=f"Where the files go; made if it is not there. {JOURNAL} in it holds the results so far: "
            "the same command goes on from there, other tasks add to it",
            example="--out scores",
            value="DIR",
        ),
    ] = None
    plots: Annotated[
        bool,
        _output(
            help="Draw evaluation.png, which needs matplotlib (the extra `eval`)",
            example="--noplots",
        ),
    ] = True

    def chosen(self) -> "ChosenModel":
        """See `ModelFlags`; an adapter may repeat layers."""
        return self._chosen(self.adapter)


def _run(request: EvaluateRequest, given: frozenset[str]) -> int:
    _refuse(request)
    request = request.or_boxed()
    chosen = request.chosen()
    chosen.check_max_length(request.max_length)
    from jaxchat.evaluation.likelihood import windows_of  # numpy and others, which --help need not wait for

    if not chosen.has_tokenizer:
        raise UsageError(f"{request.model_name}: has no tokenizer, and tasks are texts; add its files")
    tasks = _prepared(request, chosen)
    _refuse_idle(given, tasks)
    windows_of(request.window, request.stride, request.max_length or chosen.config.max_position_embeddings)
    baseline = _baseline(request, tasks)
    out = output_directory(str(request.out))
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.cli.progress_bar import loading_bar

    with loading_bar() as progress:
        catch_interrupts()
        model = request.load(chosen, progress, max_length=request.max_length, adapter=request.adapter)
    try:
        measured = _measure(model, tasks, request, out)
    except (KeyboardInterrupt, Ended):
        complain(f"interrupted; the results so far are in {out / JOURNAL}: run again to go on")
        raise
    from jaxchat.evaluation.report import summaries

    results = summaries(measured, seed=request.seed, baseline=baseline)
    _write(results, _about(model, request, given, baseline), request, out)
    return 0


def _prepared(request: EvaluateRequest, chosen: "ChosenModel") -> list["Prepared"]:
    from jaxchat.evaluation.tasks import prepare

    wants_template = request.apply_chat_template is not False
    return prepare(
        request.tasks,
        data=request.data,
        limit=request.limit,
        few_shot=request.few_shot,
        chat=request.apply_chat_template,
        has_template=wants_template and chosen.has_template(),
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
    )


def _baseline(request: EvaluateRequest, tasks: Sequence["Prepared"]) -> "Baseline | None":
    if request.baseline is None:
        return None
    from jaxchat.evaluation.baseline import read_baseline, remarks

    found = read_baseline(Path(request.baseline))
    for remark in remarks(found, tasks):
        complain(remark)
    return found


def _measure(
    model: "Model", tasks: Sequence["Prepared"], request: EvaluateRequest, out: Path
) -> list["Measured"]:
    from jaxchat.cli.progress_bar import counting_bar
    from jaxchat.evaluation.likelihood import ModelProbe
    from jaxchat.evaluation.run import GROUP, asked
    from jaxchat.journal import Journal

    probe = ModelProbe(model, request.batch, request.window, request.stride)
    journal = Journal(out / JOURNAL, _dependencies(model, probe, request))
    try:
        before, started = len(journal), time.perf_counter()
        listed = ", ".join(f"{len(task.items)} of {task.name}" for task in tasks)
        complain(f"items: {listed}" + (f"; {before} results are there already" if before else ""))
        with counting_bar("evaluating", "items") as progress:
            measured = asked(probe, tasks, most=GROUP * request.batch, results=journal, progress=progress)
        new, seconds = len(journal) - before, time.perf_counter() - started
    finally:
        journal.close()
    if new:
        complain(f"{new} items in {seconds:.1f} s, {new / seconds:.3g} a second")
    return measured


def _write(results: list["Summary"], about: dict[str, Any], request: EvaluateRequest, out: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from jaxchat.evaluation import report

    files = {
        "evaluation.json": report.as_json(results, about),
        "evaluation.md": report.as_markdown(results, about),
        "evaluation.csv": report.as_csv(results),
        "items.jsonl": report.items_json(results),
    }
    if request.plots:
        from jaxchat.evaluation import plots

        files["evaluation.png"] = plots.png(results, f"{about['model']}, {about['layer_spec']}"[:90])
    for file, data in files.items():
        write_atomically(out / file, data)
    Console(highlight=False).print(Markdown("\n".join(report.headlines(results))))
    for line in report.changes(results):
        print(line)
    print(f"{out}: {', '.join(files)}")


# --- flags -> what they mean


def _refuse(request: EvaluateRequest) -> None:
    example = "e.g. jaxchat evaluate -m assistant --tasks arc_easy --data evals --out scores"
    if not request.tasks:
        raise UsageError(f"no tasks: name some with --tasks, {example}")
    if request.out is None:
        raise UsageError(f"no --out: give the directory for the scores, {example}")
    if request.plots and importlib.util.find_spec("matplotlib") is None:
        raise JaxchatError(
            "the picture needs matplotlib, which is not installed; pip install 'jaxchat[eval]', or give "
            "--noplots"
        )


def _refuse_idle(given: frozenset[str], tasks: Sequence["Prepared"]) -> None:
    """Refuses flags that say nothing about the tasks there are."""
    from jaxchat.evaluation.items import Document, Generation

    kinds = {type(item) for task in tasks for item in task.items}
    for name, kind, what in (
        ("max_new_tokens", Generation, "of which the replies are checked, such as gsm8k"),
        ("window", Document, "of long texts, text:FILE"),
        ("stride", Document, "of long texts, text:FILE"),
    ):
        if name in given and kind not in kinds:
            raise UsageError(f"--{name} is for tasks {what}; there are none, leave it out")


def _dependencies(model: "Model", probe: Any, request: EvaluateRequest) -> dict[str, str]:
    """What results depend on beside the item, by the flag that sets it."""
    return {
        "--recipe" if request.model is None else "--model": _weights(model),
        "--layer_spec": str(model.plan),
        "--adapter": _adapters(model),
        "--dtype": request.dtype or "as stored",
        "--quant": request.quant or "as stored",
        "--kv_dtype": model.engine.kv_dtype.name,
        "--kernels": model.engine.kernels.name,
        "--max_length": str(model.engine.max_length),
        "--window": str(probe.window),
        "--stride": str(probe.stride),
        "--batch": str(request.batch),
    }


def _weights(model: "Model") -> str:
    """A fingerprint of the configuration and the weights, as loaded."""
    from jaxchat.checkpoints.fingerprint import model_digest

    return model_digest(model.config, model.engine.params)


def _adapters(model: "Model") -> str:
    """Digests of the adapters that are used, each with its strength and slot."""
    if model.engine.adapters is None:
        return "none"
    return " ".join(model.engine.adapters.identity(model.uses)) or "none"


def _about(
    model: "Model", request: EvaluateRequest, given: frozenset[str], baseline: "Baseline | None"
) -> dict[str, Any]:
    """What was evaluated, and how: the same whenever the same command ends."""
    import jax

    return {
        "model": request.model_name,
        "layer_spec": str(model.plan),
        "weights": _weights(model),
        "adapters": [str(use) for use in request.adapter],
        "dtype": request.dtype or "as stored",
        "quant": request.quant or "as stored",
        "kv_dtype": model.engine.kv_dtype.name,
        "kernels": model.engine.kernels.name,
        "max_length": model.engine.max_length,
        "batch": request.batch,
        "seed": request.seed,
        "baseline": None
        if baseline is None
        else {"file": str(baseline.path), "model": baseline.model, "layer_spec": baseline.layer_spec},
        "versions": {"jaxchat": __version__, "jax": jax.__version__},
        "command": _command(request, given),
    }


def _command(request: EvaluateRequest, given: frozenset[str]) -> str:
    """The command line again, in one spelling."""
    words = ["jaxchat", "evaluate"]
    for field in flag_fields(EvaluateRequest):
        value = getattr(request, field.name, None)
        if field.type is bool:
            if value != field.default:
                words.append(f"--{'' if value else 'no'}{field.name}")
        elif field.name in given:
            for one in _several(value):
                words += [f"--{field.name}", one]
    return shlex.join(words)


def _several(value: Any) -> list[str]:
    """What a flag was given, once each time."""
    if isinstance(value, dict):
        return [f"{key}={part}" for key, part in value.items()]
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


COMMAND = Command(
    usage=_USAGE,
    request=EvaluateRequest,
    run=_run,
    conflicts=(
        Conflict("model", "recipe", "a recipe names its own models"),
        Conflict("adapter", "recipe", "a recipe's layers are of several models, and an adapter is for one"),
    ),
    needs=RECIPE_NEEDS,
)
