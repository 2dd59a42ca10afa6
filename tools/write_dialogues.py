"""Writes the conversations that the model in the box learns as JSON lines, for `jaxchat train`.

Examples:
  python tools/write_dialogues.py --data ../shared/data/corpora --out train.jsonl --epochs 3
  python tools/write_dialogues.py --data ../shared/data/corpora --out held_out.jsonl --held_out
"""

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxchat.cli.command_line import Command, exit_process, run
from jaxchat.files import write_atomically
from jaxchat.options import Flag
from tools.dialogues import Document, make_documents
from tools.stories import Corpus, read_corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to write."""

    data: Annotated[str, Flag(help="The folder of the corpora", example="--data corpora", value="DIR")]
    out: Annotated[str, Flag(help="The file to write", example="--out train.jsonl", value="FILE")]
    epochs: Annotated[
        int, Flag(help="Make conversations of every story so often", example="--epochs 3", low=1)
    ] = 1
    held_out: Annotated[bool, Flag(help="Of the stories that are not trained on", example="--held_out")] = (
        False
    )
    seed: Annotated[int, Flag(help="Of what is asked", example="--seed 1", low=0)] = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    command = Command(usage=f"{__doc__}\n", request=Request, run=_run)
    return run(command, argv, program="python tools/write_dialogues.py")


def _run(request: Request, given: frozenset[str]) -> int:
    corpus = read_corpus(Path(request.data))
    if request.held_out:
        corpus = dataclasses.replace(corpus, train=corpus.held_out, held_out=(), fragments=())
    lines = [json.dumps(record) + "\n" for record in records(corpus, request)]
    write_atomically(Path(request.out), "".join(lines).encode())
    print(f"{request.out}: {len(lines)} records")
    return 0


def records(corpus: Corpus, request: Request) -> Iterator[dict[str, Any]]:
    """Every document, as `jaxchat train` reads it."""
    for epoch in range(request.seed, request.seed + request.epochs):
        for document in make_documents(corpus, random.Random(f"heads/{epoch}")):
            yield _record(document)


def _record(document: Document) -> dict[str, Any]:
    if not document.messages:
        return {"text": document.text}
    said = ("role", "content")
    return {"messages": [{name: message[name] for name in said} for message in document.messages]}


if __name__ == "__main__":
    exit_process(main())
