"""The text that a command measures on: its flags, and the windows that a model reads of it."""

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Annotated

from jaxchat.cli.command_line import complain, read_text
from jaxchat.errors import UsageError
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.analysis import Windows
    from jaxchat.runtime import Model

WINDOW = 256
"""Tokens of a window, where nobody says."""

_text = functools.partial(Flag, group="Text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFlags:
    """A text, and how it is read."""

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
            f"the model (BOS); {WINDOW} if not given, or the model's context if that is shorter",
            example="--window 512",
            low=2,
        ),
    ] = None
    max_tokens: Annotated[
        int,
        _text(help="Use so many tokens from the beginning of the text", example="--max_tokens 20000", low=2),
    ] = 4096


def given_text(request: TextFlags, vocabulary: int) -> tuple[str | None, list[int] | None]:
    """The text or the token ids that the flags name; one of the two is None."""
    text = None if request.text is None else read_text(request.text, "text")
    ids = None if request.token_ids is None else _token_ids(request.token_ids, vocabulary)
    return text, ids


def refuse_no_text(request: TextFlags, example: str) -> None:
    """Raises UsageError where there is no text, or flags are of another kind of text."""
    if request.text is None and request.token_ids is None:
        raise UsageError(f"no text: give a file with --text, {example}")
    if request.text is None and not request.special_tokens:
        raise UsageError("--nospecial_tokens needs --text: token ids are what they are")


def _token_ids(name: str, size: int) -> list[int]:
    words = read_text(name, "token_ids").replace(",", " ").split()
    for number, word in enumerate(words):
        if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) >= size:
            raise UsageError(
                f"--token_ids {name}: entry {number} is {word[:20]!r}; expected a token id of this "
                f"model, 0 to {size - 1}"
            )
    return [int(word) for word in words]


def read_windows(model: "Model", request: TextFlags, text: str | None, given: list[int] | None) -> "Windows":
    """The windows of a text, or of token ids: what `given_text` gave.

    Raises:
      UsageError: the text predicts nothing, or the windows do not fit the model's context.
    """
    from jaxchat.analysis import cut_windows

    special = request.special_tokens
    ids = (
        _first_ids(model, text, request.max_tokens, parse_special=special)
        if text is not None
        else given or []
    )
    _refuse_unreadable(model, request, text, ids)
    length = request.window or min(WINDOW, model.engine.max_length)
    if length > model.engine.max_length:
        raise UsageError(
            f"--window is {length}, but the model's context holds {model.engine.max_length} tokens; "
            "give fewer"
        )
    bos = model.tokenizer.bos_id if model.tokenizer is not None and text is not None else None
    if not ids or ids[0] != bos:
        bos = None
    return cut_windows(ids[bos is not None : request.max_tokens], length, bos=bos)


def _refuse_unreadable(model: "Model", request: TextFlags, text: str | None, ids: list[int]) -> None:
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
