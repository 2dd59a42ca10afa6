"""The tasks there are: a row of `TASKS` each, and one file a kind of task. Needs no JAX.

    prepared = prepare(["piqa", "choice:mine.jsonl"], data="evals", few_shot=2)

A new task is a row in its file's table, a new kind a file.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.evaluation.items import Generation
from jaxchat.evaluation.rows import read_all
from jaxchat.evaluation.tasks import arc, gsm8k, ifeval, lambada, mmlu, olmo, own, piqa, rys
from jaxchat.evaluation.tasks.find import DataDirectory
from jaxchat.evaluation.tasks.task import Example, Prepared, Task, framed, shots_of
from jaxchat.visible import shown

__all__ = ["KINDS", "TASKS", "DataDirectory", "Example", "Prepared", "Task", "names", "prepare"]

TASKS: Mapping[str, Task] = {
    task.name: task for module in (arc, piqa, lambada, mmlu, gsm8k, ifeval, rys) for task in module.TASKS
}
"""Name -> task, of data that is found in a directory."""

KINDS: Mapping[str, Callable[[str, DataDirectory | None], Task]] = {**own.KINDS, "olmo": olmo.task}
"""What stands before `:` in a task's name -> the task, from what stands after it and the data."""


def names(text: str) -> list[str]:
    """`arc_easy,choice:a.jsonl` as a list; the whole is one name if it is that of a file."""
    if Path(text.partition(":")[2]).is_file():
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def prepare(
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool | None = None,
    has_template: bool = False,
    max_new_tokens: int | None = None,
    seed: int = 0,
    called: str = "tasks",
) -> list[Prepared]:
    """Reads the questions of tasks, and makes the items that a model is asked.

    Args:
      tasks: names of `TASKS`, `KIND:FILE` of `KINDS`, or `olmo:NAME/VARIANT`.
      data: the directory that their files are found in.
      limit: ask the first so many questions of each task, of MMLU of each subject.
      few_shot: examples before each question; default what the task has.
      chat: whether questions go through the chat template; default what the task has, if there is a template.
      has_template: whether the model has a chat template.
      max_new_tokens: of replies; default the task's.
      seed: draws the examples.
      called: what the caller calls `tasks`, for errors.

    Raises:
      UsageError, JaxchatError: a task is not known, or its files are missing or malformed; see the message.
    """
    listed = names(tasks) if isinstance(tasks, str) else [name for text in tasks for name in names(text)]
    if not listed:
        raise UsageError(f"{option(called)} is empty; give names, such as arc_easy or choice:FILE")
    for number, name in enumerate(listed):
        if name in listed[:number]:
            raise UsageError(f"{option(called)}: {name} is there twice; give it once")
    directory = None if data is None else DataDirectory(Path(data))
    found = [_found(name, directory, called) for name in listed]
    chosen = [_located(task, directory) for task in found]
    for task in found:
        _check(task, few_shot, chat, has_template)
    return [
        _prepared(
            task,
            files,
            directory,
            limit=limit,
            few_shot=few_shot if few_shot is not None else task.few_shot or 0,
            chat=bool(task.chat and has_template) if chat is None else chat,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        for task, files in zip(found, chosen, strict=True)
    ]


def _found(name: str, directory: DataDirectory | None, called: str) -> Task:
    kind, colon, rest = name.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](rest, directory)
    if name in TASKS:
        return TASKS[name]
    known = [*TASKS, *(f"{kind}:" for kind in KINDS)]
    close = difflib.get_close_matches(name, known, 2, cutoff=0.5)
    advice = f"did you mean {' or '.join(close)}?" if close else f"there are {_listed()}"
    raise UsageError(f"{option(called)}: no task {shown(name)}; {advice}")


def _listed() -> str:
    plain = [name for name in TASKS if not name.startswith("mmlu_")]
    return ", ".join([*plain, "mmlu_SUBJECT", "olmo:NAME/VARIANT", *(f"{kind}:FILE" for kind in own.KINDS)])


def _located(task: Task, directory: DataDirectory | None) -> list[Path]:
    if task.paths:
        return list(task.paths)
    if directory is None:
        raise UsageError(f"{task.name}: no data; say where its files are with {option('data', 'DIR')}")
    files = directory.first(task.files)
    if not files:
        raise UsageError(
            f"{task.name}: no file of it in {directory.path}; expected one such as "
            f"{task.files[0].lstrip('*/')}"
        )
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1 and not task.folders:
        raise UsageError(
            f"{task.name}: files of it in several folders, {folders[0]} and {folders[1]}; name the one with "
            f"{option('data', 'DIR')}"
        )
    return files


def _check(task: Task, few_shot: int | None, chat: bool | None, has_template: bool) -> None:
    if few_shot and task.few_shot is None:
        raise UsageError(f"{option('few_shot')} is {few_shot}, but {task.name} has no examples; leave it out")
    if chat and task.chat is None:
        raise UsageError(
            f"{task.name} is text that is read as it is; leave {option('apply_chat_template')} out, or "
            "evaluate it apart"
        )
    if chat and not has_template:
        raise UsageError(
            f"{option('apply_chat_template')} is given, and the model has no chat template; leave it out"
        )
    for package in task.needs:
        if importlib.util.find_spec(package) is None:
            raise JaxchatError(
                f"{task.name} needs {package}, which is not installed; pip install 'jaxchat[eval]'"
            )


def _prepared(
    task: Task,
    files: Sequence[Path],
    directory: DataDirectory | None,
    *,
    limit: int | None,
    few_shot: int,
    chat: bool,
    max_new_tokens: int | None,
    seed: int,
) -> Prepared:
    examples = task.read(read_all(files))
    _refuse_twice(task, examples)
    pools = _pools(task, examples, directory) if few_shot else {}
    items = []
    for example in _first(examples, limit):
        shots = shots_of(task, example, pools, few_shot, seed)
        item = example.ask(framed(example, shots, chat=chat))
        if max_new_tokens is not None and isinstance(item, Generation):
            item = dataclasses.replace(item, max_new_tokens=max_new_tokens)
        items.append(item)
    return Prepared(
        task.name,
        task.about,
        task.metric,
        tuple(items),
        files=tuple(files),
        few_shot=few_shot,
        chat=chat,
        total=len(examples),
    )


def _first(examples: Sequence[Example], limit: int | None) -> Iterator[Example]:
    """The first so many of each group."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.group] = counts.get(example.group, 0) + 1
        if limit is None or counts[example.group] <= limit:
            yield example


def _pools(
    task: Task, examples: Sequence[Example], directory: DataDirectory | None
) -> Mapping[str, list[Example]]:
    """What examples are taken from, by group: the task's own rows for that, else its questions."""
    files = directory.first(task.shots) if directory is not None else []
    rows = read_all(files)
    pools: dict[str, list[Example]] = {}
    for example in task.read(rows) if rows else examples:
        pools.setdefault(example.group, []).append(example)
    return pools


def _refuse_twice(task: Task, examples: Sequence[Example]) -> None:
    places: dict[str, str] = {}
    for example in examples:
        if example.id in places:
            raise JaxchatError(
                f"{example.place}: the id {shown(example.id)} of {task.name} is that of "
                f"{places[example.id]}, too; each must have its own"
            )
        places[example.id] = example.place
