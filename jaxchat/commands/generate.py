"""`jaxchat generate`: continues one prompt, chats with -i, or only shows the model.

What can be asked for is in `cli/request.py`, what then happens in `cli/terminal/`.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from jaxchat.cli.command_line import Command, Conflict, Need, catch_interrupts, read_text
from jaxchat.cli.flags import flag_fields
from jaxchat.cli.model_flags import RECIPE_NEEDS
from jaxchat.cli.request import Request
from jaxchat.commands.show import print_report
from jaxchat.errors import UsageError
from jaxchat.options import Flag, GenerateOptions

_USAGE = """\
usage: {program} [-m DIR] (-p TEXT | -i | ...)

Continues a text or chats with a model, under any layer plan. The text goes to
standard output, everything else to standard error.

  {program} -i
  {program} -m llama-3-8b -p "Why is the sky blue?"
  {program} -m llama-3-8b -i --layer_spec 0:20,10:32
  {program} -m llama-3-8b --show --layer_spec 0:10,10:20:2,20:
  {program} -m llama-3-8b -i --quant int4
"""
STRAY = 'give the prompt in quotes: -p "..."'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """A request, or only a look at the model."""

    show: Annotated[
        bool,
        Flag(
            help="Print the model's shapes, layers, parameters and memory under the plan, and leave; with "
            "--json as JSON. Needs config.json only",
            example="--show --layer_spec 0:10,10:20:2,20:",
            group="What to do",
        ),
    ] = False


def _run(request: GenerateRequest, given: frozenset[str]) -> int:
    if not request.show:
        return answer(request, given)
    print_report(
        request.or_boxed().chosen(),
        max_length=request.max_length,
        quant=request.quant,
        kv_dtype=request.kv_dtype,
        as_json=request.json,
    )
    return 0


def answer(request: Request, given: frozenset[str]) -> int:
    """Answers one prompt, or chats, and returns the exit code.

    Args:
      request: what is asked for.
      given: the names of the flags that say so; what a model recommends stands in for the others.
    """
    _refuse(request, given)
    request = dataclasses.replace(request.or_boxed(), prompt=_prompt(request))
    if request.quiet:
        logging.getLogger("jaxchat").setLevel(logging.ERROR)
    chosen = request.chosen()
    chosen.check_max_length(request.max_length)
    chat = request.format != "completion" and chosen.has_template(request.chat_template)
    if chat and ("special_tokens" in given or not request.special_tokens):
        raise UsageError("--special_tokens is for --format completion; in messages of a chat they are text")
    _try_sessions(request)
    options = advised(request.options, chosen.advice, given)
    if request.interactive:
        options = of_this_chat(options, given)
    # Not at the top: it imports JAX, which --help, --show and usage errors need not wait for.
    from jaxchat.cli import terminal

    catch_interrupts()
    return terminal.run(dataclasses.replace(request, options=options), chosen)


def _try_sessions(request: Request) -> None:
    """Refuses a session that cannot be loaded or saved before anybody has waited or talked."""
    from jaxchat.chat import saved  # numpy and others, which --help need not wait for

    if request.load_session is not None:
        saved.existing_place(request.load_session)
    if request.save_session is not None:
        saved.try_to_save(saved.place(request.save_session))


def of_this_chat(options: GenerateOptions, given: frozenset[str]) -> GenerateOptions:
    """The options of a chat with what no flag gave: a seed of its own, and no end at a full context.

    One answer has the seed 0: the same command says the same.
    """
    own: dict[str, Any] = {"seed": int.from_bytes(os.urandom(4)), "overflow": "truncate_oldest"}
    return dataclasses.replace(options, **{name: own[name] for name in own if name not in given})


def advised(options: GenerateOptions, advice: Mapping[str, Any], given: frozenset[str]) -> GenerateOptions:
    """The options, as a model advises where no flag was given."""
    return dataclasses.replace(options, **{name: advice[name] for name in advice if name not in given})


def _prompt(request: Request) -> str | None:
    prompt, file, where = request.prompt, request.prompt_file, "--prompt"
    piped = prompt is None and file is None and not request.interactive
    if file is not None:
        where = f"--prompt_file {file}"
    if piped or prompt == "-":
        file, where = "-", "--prompt -"
    if file is not None:
        text = read_text(file, "prompt" if file == "-" else "prompt_file")
        prompt = text.removesuffix("\n").removesuffix("\r")
    if piped and not prompt:
        raise UsageError(f"{_NOTHING_TO_DO} (nothing came from standard input)")
    if prompt == "":
        raise UsageError(f"{where}: the prompt is empty; give at least one character")
    return prompt


def _refuse(request: Request, given: frozenset[str]) -> None:
    if request.format == "completion" and (chat_only := sorted(_CHAT_ONLY & given)):
        raise UsageError(f"--{chat_only[0]} needs a chat; it cannot be combined with --format completion")
    if (
        not request.interactive
        and {"prompt", "prompt_file"}.isdisjoint(given)
        and sys.stdin is not None
        and sys.stdin.isatty()
    ):
        raise UsageError(_NOTHING_TO_DO)
    if request.interactive and "-" in (request.prompt, request.prompt_file):
        raise UsageError("--interactive reads messages from standard input; give the first one with --prompt")


_NOTHING_TO_DO = (
    "nothing to do: give a prompt with -p or --prompt_file (- is standard input), in a pipe, or chat with -i"
)
_CHAT_ONLY = {field.name for field in flag_fields(Request) if field.flag.group == "Chat"}
CONFLICTS = (
    Conflict("prompt", "prompt_file", "give one"),
    Conflict("interactive", "json", "--json is for one prompt"),
    Conflict("markdown", "json", "JSON holds the text as it is"),
    Conflict("quiet", "verbose", "one says less, the other more"),
    Conflict("load_session", "system", "a session has its own; /system changes it"),
    Conflict("load_session", "reversed_role", "a session has its own roles; /role changes them"),
    Conflict("load_session", "thought_tags", "a session has its own"),
    Conflict("adapter", "recipe", "a recipe's layers are of several models, and an adapter is for one"),
)
NEEDS = (
    *RECIPE_NEEDS,
    Need("reversed_role", ("interactive",), "the model asks, and somebody has to answer"),
    Need("ai_prefix_every_turn", ("interactive",), "one prompt is one turn"),
    Need("ai_prefix_in", ("ai_prefix", "interactive"), "it says where a prefix goes"),
    Need("draft_tree", ("draft",), "it is the shape of a draft"),
    Need("draft_accept", ("draft",), "it says what is kept of a draft"),
    Need("history_file", ("interactive",), "it keeps what is typed in a chat"),
)
COMMAND = Command(
    usage=_USAGE,
    request=GenerateRequest,
    run=_run,
    stray=STRAY,
    conflicts=(
        *CONFLICTS,
        Conflict("draft", "show", "it tells about the model, and reads nothing of a draft"),
        Conflict("adapter", "show", "it tells about the model, and reads no weights of it or an adapter"),
    ),
    needs=NEEDS,
)
