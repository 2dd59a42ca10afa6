"""One job: which lines are left, who answers them, and what is kept; and what answers depend on."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxchat.chat.identity import fingerprint_of
from jaxchat.checkpoints.fingerprint import model_digest
from jaxchat.errors import JaxchatError
from jaxchat.jobs.answering import Answerer, Manner
from jaxchat.jobs.answers import Finished
from jaxchat.jobs.input_file import InputFile, Line
from jaxchat.jobs.record import Record
from jaxchat.options import GenerateOptions, setting_text
from jaxchat.runtime import Model

WINDOW = 4096
"""Lines that are sorted together: so many texts are held, and no more."""
WINDOW_BYTES = 1 << 24
"""Or so many bytes, where lines are long."""


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
      lines, total: that have answers, of all.
      tokens: generated and read in this run.
    """

    lines: int
    total: int
    tokens: int


Report = Callable[[Progress], None]


def windows(source: InputFile, record: Record, size: Callable[[int], int]) -> Iterator[list[Line]]:
    """The lines that have no answer yet, so many at a time.

    Args:
      source: of the lines.
      record: of the answers.
      size: of a window, given how many lines are left.
    """
    left = len(source) - len(record)
    window: list[Line] = []
    limit, held = max(size(left), 1), 0
    for index in range(len(source)):
        if source.number(index) in record:
            continue
        line = source.line(index)
        window.append(line)
        held += len(line.data or b"")
        if len(window) >= limit or held >= WINDOW_BYTES:
            yield window
            left -= len(window)
            window, held, limit = [], 0, max(size(left), 1)
    if window:
        yield window


def answered_here(model: Model, manner: Manner, source: InputFile, record: Record) -> Iterator[Finished]:
    """The answers to what is left, by a model in this process."""
    answerer = Answerer(model, manner)
    for window in windows(source, record, lambda left: WINDOW):
        yield from answerer.answers(window)


def keep(answers: Iterator[Finished], source: InputFile, record: Record, report: Report) -> None:
    """Keeps answers as they come."""
    tokens = 0
    report(Progress(len(record), len(source), 0))
    for finished in answers:
        record.add(finished)
        tokens += finished.prompt_tokens + finished.completion_tokens
        report(Progress(len(record), len(source), tokens))
    if len(record) < len(source):
        raise JaxchatError(
            f"{len(source) - len(record)} lines have no answer, which is an error of jaxchat; the others are "
            f"kept in {record.path}: the same command with --resume goes on"
        )


def asked(source: InputFile, manner: Manner) -> dict[str, str]:
    """What answers depend on beside the model, by the flag that says it."""
    found = {"--input": source.digest, "--system": "none" if manner.system is None else manner.system}
    for field in dataclasses.fields(GenerateOptions):
        found[f"--{field.name}"] = setting_text(getattr(manner.options, field.name))
    return found


def answering(model: Model) -> dict[str, str]:
    """What answers depend on of the model, by the flag that says it."""
    engine = model.engine
    adapters = [] if engine.adapters is None else engine.adapters.identity(model.uses)
    found = {
        "--model": model_digest(model.config, engine.params),
        "--layer_spec": str(model.plan),
        "--adapter": " and ".join(adapters) or "none",
        "--kv_dtype": engine.kv_dtype.name,
        "--kernels": f"{engine.kernels.name} on {engine.platform}",
        "--max_length": str(engine.max_length),
    }
    if model.tokenizer is not None and model.template is not None:
        words = fingerprint_of(engine, model.tokenizer, model.template)
        found["--chat_template"] = _digest(repr((words.tokenizer, words.template)))
    return found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
