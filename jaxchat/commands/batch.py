"""`jaxchat batch`: its flags, and the run from a file of requests to the file of answers.

What lines may say and what becomes of them is `jobs/`'s.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxchat.adapter_use import Uses, read_uses
from jaxchat.cli.chosen_model import ChosenModel
from jaxchat.cli.command_line import Command, Conflict, Ended, catch_interrupts, complain
from jaxchat.cli.model_flags import MAX_LENGTH, RECIPE_NEEDS, BoxedModel, LoadFlags
from jaxchat.commands.generate import advised
from jaxchat.errors import UsageError
from jaxchat.files import try_to_replace
from jaxchat.options import Flag, GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxchat.jobs.answering import Manner
    from jaxchat.jobs.answers import Finished
    from jaxchat.jobs.input_file import InputFile
    from jaxchat.jobs.record import Record
    from jaxchat.runtime import Model

_USAGE = """\
usage: {program} --input FILE --output FILE [-m DIR] [...]

Answers every line of a file, and writes the answers to another, in the same
order. A job that was interrupted, even killed, goes on with --resume; OUTPUT is
there when all of it is.

  {program} --input questions.jsonl --output answers.jsonl
  {program} -m llama-3-8b --input questions.jsonl \\
      --output answers.jsonl --resume
  {program} -m llama-3-8b --input questions.jsonl \\
      --output answers.jsonl --workers 4 --quant int4

A line of the input is one of OpenAI's Batch API, for /v1/chat/completions,
/v1/completions or /v1/embeddings,

  {{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
   "body": {{"messages": [{{"role": "user", "content": "Hello"}}]}}}}

with top_k, min_p, repetition_penalty, ignore_eos, layer_plan and adapter in its
body, too; or a plain one with prompt, messages or token_ids, if wanted an id,
and the options below by their names, layer_plan and adapter:

  {{"id": 1, "prompt": "Once", "max_new_tokens": 20, "layer_plan": "0:3,1:"}}

Blank lines are left out. A line that cannot be answered says so in its place,
and the exit code is 1.
""".replace("{{", "{").replace("}}", "}")

_job = functools.partial(Flag, group="Job")
_cluster = functools.partial(Flag, group="Workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRequest(LoadFlags):
    """A model, a file of requests, and where the answers go."""

    input: Annotated[
        str,
        _job(
            help="The requests, a file of JSON lines",
            example="--input questions.jsonl",
            value="FILE",
            elsewhere=("input_file", "i"),
        ),
    ]
    output: Annotated[
        str,
        _job(
            help="Where the answers go, in the order of the requests. Those that are finished are kept in "
            "FILE.partial until all are",
            example="--output answers.jsonl",
            value="FILE",
            elsewhere=("output_file", "o"),
        ),
    ]
    resume: Annotated[
        bool,
        _job(
            help="Go on with a job that was interrupted, where there is one: no line is answered twice",
            example="--resume",
        ),
    ] = False
    overwrite: Annotated[
        bool,
        _job(
            help="Replace an --output that is there already, when the new one is finished; without --resume "
            "what is left of an interrupted job is given up, too",
            example="--overwrite",
        ),
    ] = False
    max_inflight: Annotated[
        int,
        _job(
            help="Decode so many sequences together, on a CPU 8 at most. More are faster, as far as memory "
            "goes",
            example="--max_inflight 32",
            low=1,
            high=4096,
            elsewhere=("batch_size", "max_num_seqs", "parallel"),
        ),
    ] = 8
    cost_per_hour: Annotated[
        float | None,
        _job(
            help="What the machines cost an hour, to be told at the end what 1,000 lines have cost",
            example="--cost_per_hour 2.50",
            low=0,
        ),
    ] = None
    workers: Annotated[
        int | None,
        _cluster(
            help="Load the model in so many processes, which share the lines and the cores of this machine, "
            "or the GPUs or TPUs of a cluster, one each. Needs Ray (the extra `ray`)",
            example="--workers 4",
            low=1,
            high=4096,
        ),
    ] = None
    ray: Annotated[
        str | None,
        _cluster(
            help="The address of a Ray cluster whose machines do the work: auto, or what `ray start` says. "
            "They need jaxchat, and the model in the same place. Without --workers one worker a GPU or TPU, "
            "or else a machine",
            example="--ray 10.0.0.1:6379",
            value="ADDRESS",
        ),
    ] = None
    model: BoxedModel = None
    adapter: Annotated[
        Uses,
        Flag(
            help="Load a LoRA adapter, as PEFT saves it or in GGUF, and use it where a line does not say "
            "otherwise; =STRENGTH of it, or only in @SLOT of the layer plan. May be given more than once",
            example="--adapter loras/poet, --adapter loras/poet=0.5 --adapter loras/critic@3",
            group="Model",
            elsewhere=("lora", "lora_path", "lora_scaled", "lora_modules", "peft"),
            value="DIR[@SLOT][=STRENGTH]",
            many=True,
            read=lambda texts: read_uses(texts, "--adapter"),
        ),
    ] = ()
    max_length: Annotated[int | None, MAX_LENGTH] = None
    chat_template: Annotated[
        str | None,
        Flag(
            help="Chat in another format than the model's own: a Jinja file, or a name that `jaxchat chat "
            "--help` lists",
            example="--chat_template vicuna_v1.1",
            group="Chat",
            value="NAME|FILE",
        ),
    ] = None
    system: Annotated[
        str | None,
        Flag(
            help="The system prompt of chats that have none of their own",
            example='--system "Answer in verse."',
            group="Chat",
            elsewhere=("system_prompt", "sys"),
        ),
    ] = None
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)

    def chosen(self) -> ChosenModel:
        """See `ModelFlags`; an adapter may repeat layers."""
        return self._chosen(self.adapter)


def _run(request: BatchRequest, given: frozenset[str]) -> int:
    output = Path(request.output)
    _refuse(request, output)
    request = _placed(request.or_boxed())
    chosen = request.chosen()
    chosen.check_max_length(request.max_length)
    chosen.has_template(request.chat_template)
    request = dataclasses.replace(request, options=advised(request.options, chosen.advice, given))
    catch_interrupts()
    # Not at the top: they import JAX, which --help and usage errors need not wait for.
    from jaxchat.jobs import record
    from jaxchat.jobs.answering import Manner
    from jaxchat.jobs.input_file import InputFile
    from jaxchat.jobs.job import asked

    source = InputFile(Path(request.input))
    manner = Manner(
        options=request.options,
        system=request.system,
        together=request.max_inflight,
        lines=source.total,
        model=request.model_name,
        created=source.created,
    )
    partial = record.path_for(output)
    if request.resume and partial.exists():
        begun = record.described(partial)
        if begun is not None:
            record.refuse_others(partial, begun.of, asked(source, manner))
            manner = dataclasses.replace(manner, created=begun.created)
    try:
        if request.workers is None and request.ray is None:
            return _alone(request, chosen, source, manner)
        return _together(request, source, manner)
    finally:
        source.close()


def _alone(request: BatchRequest, chosen: ChosenModel, source: "InputFile", manner: "Manner") -> int:
    from jaxchat.cli.progress_bar import loading_bar
    from jaxchat.jobs import job

    with loading_bar() as progress:
        model = _loaded(request, chosen, progress)
    with _record(request, source, manner, job.answering(model)) as kept:
        return _answered(request, source, kept, job.answered_here(model, manner, source, kept))


def _together(request: BatchRequest, source: "InputFile", manner: "Manner") -> int:
    from jaxchat.jobs.cluster import Workers

    load = functools.partial(_load_anew, request)
    with (
        Workers(load, manner, count=request.workers, address=request.ray) as workers,
        _record(request, source, manner, dict(workers.ready())) as kept,
    ):
        return _answered(request, source, kept, workers.answers(source, kept))


def _record(request: BatchRequest, source: "InputFile", manner: "Manner", model: dict[str, str]) -> "Record":
    from jaxchat.jobs.job import asked
    from jaxchat.jobs.record import Record

    return Record(
        Path(request.output),
        asked(source, manner) | model,
        created=manner.created,
        last=source.total,
        resume=request.resume,
    )


def _answered(
    request: BatchRequest, source: "InputFile", kept: "Record", answers: "Iterator[Finished]"
) -> int:
    """Answers what is left, writes the output, and says what it took."""
    from jaxchat.cli.progress_bar import job_bar
    from jaxchat.jobs.job import keep

    before, started = _Tally.of(kept), time.perf_counter()
    output = Path(request.output)
    if output.exists() and not request.overwrite and before.lines < len(source):
        raise UsageError(_THERE.format(output=output))
    if before.lines:
        complain(f"goes on after {before.lines:,} of {len(source):,} lines")
    try:
        with job_bar() as report:
            keep(answers, source, kept, report)
    except (KeyboardInterrupt, Ended):
        complain(
            f"interrupted; the {len(kept):,} of {len(source):,} lines that are finished are kept in "
            f"{kept.path}: the same command with --resume goes on"
        )
        raise
    kept.assemble(output)
    complain(_summary(_Tally.of(kept), before, time.perf_counter() - started, request.cost_per_hour))
    return 1 if kept.errors else 0


@dataclasses.dataclass(frozen=True)
class _Tally:
    """What a record holds."""

    lines: int
    errors: int
    prompt: int
    completion: int

    @classmethod
    def of(cls, kept: "Record") -> "_Tally":
        """As it is now."""
        return cls(len(kept), kept.errors, kept.prompt_tokens, kept.completion_tokens)


def _summary(all_: _Tally, before: _Tally, seconds: float, cost_per_hour: float | None) -> str:
    new = all_.lines - before.lines
    tokens = all_.prompt + all_.completion - before.prompt - before.completion
    text = (
        f"{all_.lines:,} lines, {all_.errors:,} with errors; {all_.prompt:,} prompt and "
        f"{all_.completion:,} completion tokens; {tokens / max(seconds, 1e-9):,.0f} tokens/s, "
        f"{seconds:,.1f} s"
    )
    if before.lines:
        text += f" for the last {new:,} lines"
    if cost_per_hour is not None and new:
        text += f"; {cost_per_hour * seconds / 3600 / new * 1000:.4g} per 1,000 lines"
    return text


# --- models


def _loaded(request: BatchRequest, chosen: ChosenModel, progress: Any = None) -> "Model":
    return request.load(
        chosen,
        progress,
        max_length=request.max_length,
        chat_template=request.chat_template,
        adapter=request.adapter,
    )


def _load_anew(request: BatchRequest) -> "Model":
    """The same in another process, on another machine."""
    return _loaded(request, request.chosen())


def _placed(request: BatchRequest) -> BatchRequest:
    """The same with whole paths, which a worker finds from wherever it is."""

    def whole(name: str | None) -> str | None:
        return name if name is None or not Path(name).exists() else str(Path(name).absolute())

    uses = tuple(dataclasses.replace(use, name=whole(use.name) or use.name) for use in request.adapter)
    paths = {name: whole(place) or place for name, place in request.model_path.items()}
    named = {name: whole(getattr(request, name)) for name in ("model", "base", "recipe", "chat_template")}
    return dataclasses.replace(request, adapter=uses, model_path=paths, **named)  # type: ignore[arg-type]


# --- flags -> what they mean

_THERE = "--output {output} is there already; give --overwrite to replace it, or another name"


def _refuse(request: BatchRequest, output: Path) -> None:
    """What is wrong with the files, before anything is loaded."""
    partial = output.with_name(f"{output.name}.partial")
    try:
        try_to_replace(output)
        try_to_replace(partial)
        if Path(request.input).exists() and output.exists() and Path(request.input).samefile(output):
            raise UsageError(f"--output {output} is --input; give another name")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--output {output}: {reason}; give a file that can be written") from None
    half_done = partial.exists()
    if half_done and not request.resume and not request.overwrite:
        raise UsageError(
            f"{partial} holds the answers of a job that was interrupted; give --resume to go on with it, or "
            "--overwrite to begin anew"
        )
    if output.exists() and not request.overwrite and not (half_done and request.resume):
        raise UsageError(_THERE.format(output=output))


COMMAND = Command(
    usage=_USAGE,
    request=BatchRequest,
    run=_run,
    stray="give the requests as --input FILE, the model as -m DIR",
    conflicts=(
        Conflict("adapter", "recipe", "a recipe's layers are of several models, and an adapter is for one"),
    ),
    needs=RECIPE_NEEDS,
)
