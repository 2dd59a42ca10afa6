"""`jaxchat search`: its flags, and the run from model and data to the report.

Which plans are tried, and what is made of their scores, is `search/`'s.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxchat import __version__
from jaxchat.cli.command_line import Command, Conflict, Ended, Need, catch_interrupts, complain
from jaxchat.cli.model_flags import RECIPE_NEEDS, BoxedModel, LoadFlags
from jaxchat.cli.resumable import JOURNAL, output_directory
from jaxchat.cli.text_flags import TextFlags, given_text, read_windows, refuse_no_text
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import write_atomically
from jaxchat.options import SEEDS, Flag
from jaxchat.values import Range

if TYPE_CHECKING:
    from jaxchat.analysis import Windows
    from jaxchat.cli.chosen_model import ChosenModel
    from jaxchat.engine.session import Engine
    from jaxchat.evaluation.tasks import Prepared
    from jaxchat.runtime import Model
    from jaxchat.search.run import Found, Question

_TEXT_OBJECTIVES = ("loss", "kl", "agreement")
_USAGE = """\
usage: {program} [-m DIR] --text FILE --out DIR [--minutes X] [...]
       {program} [-m DIR] --objective TASK --data DIR --out DIR [...]

Searches for the layer plan that is best for a text or a task: blocks of layers
run twice, left out, or run again with a half at less weight, and several of
them together. Part of the data is for the search, the rest is for the
validation: only what is better there, too, for certain, is said to beat the
model as it is. An interrupted search goes on where it stopped.

  {program} --text stories.txt --out found --minutes 10
  {program} -m llama-3-8b --text code.txt --out found --plans 500
  {program} --text stories.txt --out shorter --objective kl
  {program} -m llama-3-8b --objective arc_easy --data evals --out found \\
      --probe piqa,lambada --text stories.txt
  jaxchat chat --layer_spec @found/best.json
"""

_search = functools.partial(Flag, group="Search")
_cluster = functools.partial(Flag, group="Workers")
_SHARE = Range(float, 0.05, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRequest(TextFlags, LoadFlags):
    """A model, what it is to be good at, and how long to look."""

    model: BoxedModel = None
    objective: Annotated[
        str,
        _search(
            help="What is searched for: loss, the text's, in nats per token; or, among plans that cost less "
            "than the base, kl, the divergence from what the base says, or agreement, how often the most "
            "probable token is the base's, which is how often a draft would be accepted; or the score of a "
            "task, named as for `jaxchat evaluate`, whose questions the likelihood of continuations answers",
            example="--objective kl, --objective arc_easy --data evals",
            value="WHAT",
        ),
    ] = "loss"
    metric: Annotated[
        str | None,
        _search(
            help="Which score of the task; its headline if not given. Those that do not count right answers "
            "tell plans apart with fewer questions",
            example="--objective arc_easy --metric bits_per_byte",
            value="NAME",
        ),
    ] = None
    data: Annotated[
        str | None,
        _search(
            help="The directory in which the files of tasks are",
            example="--data evals",
            value="DIR",
        ),
    ] = None
    limit: Annotated[
        int | None,
        _search(help="Use the first so many questions of the task", example="--limit 500", low=2),
    ] = None
    few_shot: Annotated[
        int | None,
        _search(
            help="Examples before each question of the objective; as the task has it if not given",
            example="--few_shot 5",
            low=0,
        ),
    ] = None
    probe: Annotated[
        str | None,
        _search(
            help="Also tell what becomes of these tasks, which the search does not look at; of the task "
            "itself the headline, on the questions that validate; of a --text beside a task the loss",
            example="--probe piqa,lambada",
            value="TASK,...",
        ),
    ] = None
    probe_limit: Annotated[
        int | None,
        _search(help="Use the first so many questions of each probe", example="--probe_limit 200", low=2),
    ] = None
    minutes: Annotated[
        float | None,
        _search(
            help="Search for so many minutes, those before an interruption counted; the validation comes on "
            "top. If neither this nor --plans is given, 10",
            example="--minutes 30",
            limits=Range(float, sys.float_info.min, words="a number above 0"),
        ),
    ] = None
    plans: Annotated[
        int | None,
        _search(
            help="Score so many plans instead: the same command gives the same result, bit for bit",
            example="--plans 500",
            low=1,
        ),
    ] = None
    search_share: Annotated[
        float,
        _search(
            help="The part of the data that is for the search; the rest is for the validation",
            example="--search_share 0.4",
            limits=_SHARE,
        ),
    ] = 0.5
    candidates: Annotated[
        int,
        _search(
            help="Validate so many of the best; the more, the wider each interval",
            example="--candidates 3",
            low=1,
            high=100,
        ),
    ] = 6
    max_slots: Annotated[
        int | None,
        _search(
            help="Try no plan of more slots; if not given, twice the model's",
            example="--max_slots 40",
            low=1,
        ),
    ] = None
    max_cost: Annotated[
        float | None,
        _search(
            help="Try no plan whose token costs more, in units of the base plan's: the bytes of weights that "
            "it reads, or see --measure_cost. 1 is as fast as the base",
            example="--max_cost 1",
            limits=Range(float, sys.float_info.min, words="a number above 0"),
        ),
    ] = None
    measure_cost: Annotated[
        bool,
        _search(
            help="Let the time of decode steps on this machine say what plans cost, instead of the bytes "
            "they read; measured once, and kept with the scores",
            example="--measure_cost",
        ),
    ] = False
    surrogate: Annotated[
        bool,
        _search(
            help="Let a surrogate model (Optuna's TPE, the extra `search`) propose plans with the last fifth "
            "of the budget",
            example="--surrogate",
        ),
    ] = False
    seed: Annotated[int, _search(help="Of the surrogate", example="--seed 7", limits=SEEDS)] = 0
    workers: Annotated[
        int | None,
        _cluster(
            help="Load the model in so many processes, which share the plans and the cores of this machine, "
            "or the GPUs or TPUs of a cluster, one each. Needs Ray (the extra `ray`)",
            example="--workers 4",
            low=1,
            high=4096,
        ),
    ] = None
    ray: Annotated[
        str | None,
        _cluster(
            help="The address of a Ray cluster whose machines score: auto, or what `ray start` says. They "
            "need jaxchat, and the model and the data in the same places. Without --workers one worker a "
            "GPU or TPU, or else a machine",
            example="--ray 10.0.0.1:6379",
            value="ADDRESS",
        ),
    ] = None
    out: Annotated[
        str | None,
        Flag(
            help=f"Where the files go; made if it is not there. {JOURNAL} in it holds the scores so far: the "
            "same command goes on from there, also with more --minutes or --plans",
            example="--out found",
            group="Output",
            value="DIR",
        ),
    ] = None
    plots: Annotated[
        bool,
        Flag(
            help="Draw PNG files, which needs matplotlib (the extra `analyze`)",
            example="--noplots",
            group="Output",
        ),
    ] = True


def _run(request: SearchRequest, given: frozenset[str]) -> int:
    _refuse(request)
    request = request.or_boxed()
    chosen = request.chosen()
    out = output_directory(str(request.out))
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.cli.progress_bar import loading_bar

    if request.workers is not None or request.ray is not None:
        _leave_accelerators()
    given_data = _given_data(request, chosen)
    with loading_bar() as progress:
        catch_interrupts()
        model = request.load(chosen, progress)
    question = _asked(model, request, *given_data)
    try:
        found, question = _found(model, question, request, out)
    except (KeyboardInterrupt, Ended):
        complain(f"interrupted; the scores so far are in {out / JOURNAL}: run again to go on")
        raise
    _write(found, question, model, request, out)
    return 0


def _given_data(request: SearchRequest, chosen: "ChosenModel") -> tuple[Any, ...]:
    """Text, token ids and tasks, read before the model is."""
    return *given_text(request, chosen.config.vocab_size), _tasks(request)


def _asked(
    model: "Model", request: SearchRequest, text: str | None, ids: list[int] | None, tasks: "list[Prepared]"
) -> "Question":
    windows = None if text is None and ids is None else read_windows(model, request, text, ids)
    return _question(model, request, windows, tasks)


def _built(request: SearchRequest) -> "tuple[Engine, Question]":
    """What a worker needs, in its process."""
    chosen = request.chosen()
    model = request.load(chosen)
    return model.engine, _asked(model, request, *_given_data(request, chosen))


def _leave_accelerators() -> None:
    """This process only deals out plans: its model is not to be where those of the workers are."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _tasks(request: SearchRequest) -> "list[Prepared]":
    """The task to search for, if it is one, and those to probe with; read before the model is."""
    from jaxchat.evaluation.tasks import names, prepare

    asked = [] if request.objective in _TEXT_OBJECTIVES else names(request.objective)
    if len(asked) > 1:
        raise UsageError(f"--objective is {request.objective}; give one task, and others with --probe")
    probes = names(request.probe or "")
    searched: dict[str, Any] = {"limit": request.limit, "few_shot": request.few_shot}
    found = prepare(asked, data=request.data, called="objective", **searched) if asked else []
    if probes:
        found += prepare(probes, data=request.data, limit=request.probe_limit, called="probe")
    return found


def _question(
    model: "Model", request: SearchRequest, windows: "Windows | None", tasks: "Sequence[Prepared]"
) -> "Question":
    from jaxchat.layer_plan import LayerPlan
    from jaxchat.search import sample
    from jaxchat.search.decode_cost import relative_cost
    from jaxchat.search.run import Question, text_question
    from jaxchat.search.tasks import split_items, task_sample

    base = LayerPlan(model.plan.executed(), model.plan.num_layers)
    bounds: dict[str, Any] = {
        "max_slots": request.max_slots or 2 * len(base),
        "max_cost": request.max_cost or float("inf"),
        "candidates": request.candidates,
        "surrogate": request.seed if request.surrogate else None,
    }
    if request.objective in _TEXT_OBJECTIVES:
        assert windows is not None
        probes = {task.name: task_sample(model, task) for task in tasks}
        text: dict[str, Any] = {"objective": request.objective, "share": request.search_share}
        return text_question(model.engine, base, windows, probes=probes, **text, **bounds)
    task, share, seed = tasks[0], request.search_share, request.seed
    searched, validated = split_items(task_sample(model, task, request.metric), share, seed)
    probes = {
        # Of the task itself what the search has not seen.
        probe.name: split_items(task_sample(model, task), share, seed)[1]
        if probe.name == task.name
        else task_sample(model, probe)
        for probe in tasks[1:]
    }
    if windows is not None:
        probes["loss"] = sample.text_sample(windows, sample.LOSS)
    cost = relative_cost(model.engine, base)
    return Question(base=base, searched=searched, validated=validated, probes=probes, cost=cost, **bounds)


def _found(
    model: "Model", question: "Question", request: SearchRequest, out: Path
) -> tuple["Found", "Question"]:
    """What a search finds, and the question as it was asked in the end."""
    from jaxchat.cli.progress_bar import share_bar
    from jaxchat.journal import Journal
    from jaxchat.search.decode_cost import measured_cost
    from jaxchat.search.run import search
    from jaxchat.search.trials import Budget

    minutes = request.minutes if request.minutes or request.plans else 10.0
    journal = Journal(out / JOURNAL, _dependencies(model, question, request))
    try:
        known = f"; {len(journal)} results are there already" if len(journal) else ""
        complain(
            f"{len(question.searched.items)} items for the search, {len(question.validated.items)} for the "
            f"validation, {len(question.base)} slots{known}"
        )
        if request.measure_cost:
            cost = measured_cost(model.engine, question.base, journal)
            question = dataclasses.replace(question, cost=cost)
        budget = Budget(plans=request.plans, minutes=minutes)
        with _workers(request, question) as workers, share_bar("searching", "plans") as progress:
            found = search(model.engine, question, budget, journal, progress=progress, **workers)
            return found, question
    finally:
        journal.close()


@contextlib.contextmanager
def _workers(request: SearchRequest, question: "Question") -> Iterator[dict[str, Any]]:
    """What scores, where it is not this process alone: as `search` takes it."""
    if request.workers is None and request.ray is None:
        yield {}
        return
    from jaxchat.search.cluster import RemoteScorers

    build = functools.partial(_built, request)
    with RemoteScorers(build, question, count=request.workers, address=request.ray) as remote:
        yield {"scorers": remote.by_sample(), "workers": remote.count}


def _write(found: "Found", question: "Question", model: "Model", request: SearchRequest, out: Path) -> None:
    from jaxchat.recipes.recipe import to_mergekit
    from jaxchat.search import report

    about = _about(model, question, request)
    best = question.base if found.verdict.best is None else found.verdict.best.plan
    files = {
        "report.md": report.markdown(found, question, about).encode(),
        "search.json": report.dumped(report.as_json(found, about)).encode(),
        "plans.csv": report.plans_csv(found, question).encode(),
        "best.json": report.best_json(found.verdict).encode(),
    }
    if request.recipe is None:
        files["best.yml"] = to_mergekit(best, str(request.model)).encode()
    if request.plots:
        from jaxchat.search import plots

        files |= plots.png_files(found, question, request.model_name)
    for file, data in files.items():
        write_atomically(out / file, data)
    print(report.headline(found.verdict))
    print(f"{out}: {', '.join(files)}")


def _about(model: "Model", question: "Question", request: SearchRequest) -> dict[str, str]:
    import jax

    from jaxchat.checkpoints.fingerprint import model_digest

    return {
        "model": request.model_name,
        "base plan": str(question.base),
        "objective": f"{question.measure.name} ({question.measure.unit})",
        "data": f"{_data(request)}: {len(question.searched.items)} items of "
        f"{question.searched.tokens:,} tokens for the search, {len(question.validated.items)} of "
        f"{question.validated.tokens:,} for the validation",
        "weights": model_digest(model.config, model.engine.params),
        "versions": f"jaxchat {__version__}, jax {jax.__version__}, on {model.engine.platform}",
        "command": shlex.join(["jaxchat", *sys.argv[1:]]),
    }


def _data(request: SearchRequest) -> str:
    if request.objective in _TEXT_OBJECTIVES:
        return str(request.text or request.token_ids)
    return f"{request.objective}" + ("" if request.data is None else f" of {request.data}")


# --- flags -> what they mean


def _refuse(request: SearchRequest) -> None:
    example = "e.g. jaxchat search -m models/llama-3-8b --text story.txt --out found"
    if request.objective in _TEXT_OBJECTIVES:
        refuse_no_text(request, example)
        if request.metric is not None:
            raise UsageError(f"--metric is for tasks; --objective {request.objective} has one")
    if request.out is None:
        raise UsageError(f"no --out: give the directory for the results, {example}")
    for wanted, package, extra in (
        (request.plots, "matplotlib", "analyze"),
        (request.surrogate, "optuna", "search"),
        (request.workers is not None or request.ray is not None, "ray", "ray"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            flag = {"matplotlib": "--noplots", "optuna": "no --surrogate", "ray": "no --workers"}[package]
            raise JaxchatError(
                f"this needs {package}, which is not installed; pip install 'jaxchat[{extra}]', or give "
                f"{flag}"
            )


def _dependencies(model: "Model", question: "Question", request: SearchRequest) -> dict[str, str]:
    """What results depend on, by the flag that sets it."""
    from jaxchat.checkpoints.fingerprint import model_digest

    def digest(sample: Any) -> str:
        return hashlib.blake2b(repr(sample.rows).encode(), digest_size=8).hexdigest()

    return {
        "--recipe" if request.model is None else "--model": model_digest(model.config, model.engine.params),
        "--layer_spec": str(question.base),
        "--objective": question.measure.name,
        "--text" if request.objective in _TEXT_OBJECTIVES else "--data": " ".join(
            digest(sample) for name, sample in question.samples.items() if not name.startswith("probe")
        ),
        **{f"--probe {name}": digest(sample) for name, sample in question.probes.items()},
        "--dtype": request.dtype or "as stored",
        "--quant": request.quant or "as stored",
        "--kernels": model.engine.kernels.name,
        "--max_slots": str(question.max_slots),
        "--measure_cost": str(request.measure_cost),
    }


COMMAND = Command(
    usage=_USAGE,
    request=SearchRequest,
    run=_run,
    conflicts=(
        Conflict("model", "recipe", "a recipe names its own models"),
        Conflict("text", "token_ids", "give one"),
        Conflict("minutes", "plans", "give one"),
    ),
    needs=(
        *RECIPE_NEEDS,
        Need("special_tokens", ("text",), "token ids are what they are"),
        Need("probe_limit", ("probe",), "it says how much of one"),
    ),
)
