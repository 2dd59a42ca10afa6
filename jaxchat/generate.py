"""The command line, `python -m jaxchat.generate`: its flags, and what they ask for.

What it then does is in `terminal/` (generate, chat) and `show.py` (--show). Help, errors and exit codes are
those of every command: `command_line.py`.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    # Ctrl-C while modules load just ends the program: an exception there would surface as a failed import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags

from jaxchat import demo
from jaxchat.analysis import show
from jaxchat.cli import command_line
from jaxchat.cli.command_line import Flag
from jaxchat.errors import UsageError
from jaxchat.options import (
    Format,
    GenerateOptions,
    Overflow,
    PrefixIn,
    Request,
    recommended_sampling,
    unescape,
)
from jaxchat.recipes.recipe import read_recipe
from jaxchat.text.reasoning import parse_thought_tags

_DEFAULTS = GenerateOptions()
_USAGE = """\
usage: python -m jaxchat.generate [-m DIR] (-p TEXT | --prompt_file FILE | -i) ...

Continues a text or chats with a model, under any layer plan. The text goes to
standard output, everything else to standard error.

  python -m jaxchat.generate -i
  python -m jaxchat.generate -m llama-3-8b -p "Why is the sky blue?"
  python -m jaxchat.generate -m llama-3-8b -i --layer_spec 0:20,10:32
  python -m jaxchat.generate -m llama-3-8b --show --layer_spec 0:10,10:20:2,20:
  python -m jaxchat.generate -m llama-3-8b -i --quant int4
"""


def _sampling(name: str, define: Callable[..., Any], value: str, help: str, **rest: Any) -> Flag:
    """A flag named and defaulting as in `GenerateOptions`."""
    return Flag(name, define, value, help, default=getattr(_DEFAULTS, name), **rest)


_GROUPS: dict[str, tuple[Flag, ...]] = {
    "Model": (
        command_line.MODEL._replace(help=command_line.MODEL.help + "; the model in the box if not given"),
        command_line.LAYER_SPEC._replace(help=command_line.LAYER_SPEC.help + ". Look with --show first"),
        command_line.RECIPE,
        command_line.MODEL_PATH,
        command_line.KEEP_IDENTITY,
        command_line.DTYPE,
        command_line.QUANT,
        command_line.KV_DTYPE,
        command_line.KERNELS_FLAG,
        Flag(
            "max_length",
            flags.DEFINE_integer,
            "N",
            "The longest context, prompt and output together: how far the KV cache may grow; the "
            "model's own if not given, e.g. -l 4096",
            short="l",
            more={"lower_bound": 1},
        ),
        command_line.COMPILATION_CACHE_DIR,
    ),
    "What to do": (
        Flag(
            "prompt",
            flags.DEFINE_string,
            "TEXT",
            'The prompt; with -i the first message, e.g. -p "Hello"',
            short="p",
        ),
        Flag(
            "prompt_file",
            flags.DEFINE_string,
            "FILE",
            "Read the prompt from a UTF-8 file, - for standard input; one line break at its end is "
            "left out, e.g. --prompt_file question.txt",
        ),
        Flag(
            "interactive",
            flags.DEFINE_bool,
            "",
            "Chat, line by line. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands, e.g. -i",
            short="i",
            default=False,
        ),
        Flag(
            "format",
            flags.DEFINE_enum,
            "HOW",
            "chat puts the prompt into the model's chat template, completion continues it as it is; "
            "chat if the model has a template, e.g. --format completion",
            more={"enum_values": get_args(Format)},
        ),
        Flag(
            "show",
            flags.DEFINE_bool,
            "",
            "Print the model's shapes, layers, parameters and memory under the plan, and leave. Needs"
            " config.json only, e.g. --show --layer_spec 0:10,10:20:2,20:",
            default=False,
        ),
    ),
    "Chat": (
        Flag(
            "system",
            flags.DEFINE_string,
            "TEXT",
            'The system prompt of a chat, e.g. -s "Answer in verse."',
            short="s",
        ),
        Flag(
            "reversed_role",
            flags.DEFINE_bool,
            "",
            "The model plays the user and you the assistant; --prompt is the model's opening line, e.g. -i "
            '--reversed_role -p "Hello"',
            default=False,
        ),
        Flag(
            "ai_prefix",
            flags.DEFINE_string,
            "TEXT",
            "Begin the next reply with this text, which is part of it; C escapes such as \\n work, e.g. "
            "--ai_prefix 'Let us think step by step:\\n'",
        ),
        Flag(
            "ai_prefix_every_turn",
            flags.DEFINE_bool,
            "",
            "Begin every reply with --ai_prefix, not only the next, e.g. -i --ai_prefix 'Sure: ' "
            "--ai_prefix_every_turn",
            default=False,
        ),
        Flag(
            "ai_prefix_in",
            flags.DEFINE_enum,
            "PART",
            "Which part of a reply the prefix begins: content, or the reasoning of a model that thinks, e.g. "
            "--ai_prefix 'Hm, ' --ai_prefix_in reasoning",
            default="content",
            more={"enum_values": get_args(PrefixIn)},
        ),
        Flag(
            "thought_tags",
            flags.DEFINE_string,
            "'OPEN CLOSE'",
            "The two tags, with a space between them, that the model thinks between, to tell reasoning from "
            "content; as in the model's chat template if not given, e.g. --thought_tags '<think> </think>'",
        ),
        Flag(
            "load_session",
            flags.DEFINE_string,
            "FILE",
            "Go on with a conversation that --save_session or /save has written, with the same model, e.g. "
            "--load_session talk.session -p 'And then?'",
        ),
        Flag(
            "save_session",
            flags.DEFINE_string,
            "FILE",
            "Write the conversation to this file at the end, to go on another time without computing it "
            "anew, e.g. -i --save_session talk.session",
        ),
    ),
    "How long": (
        _sampling(
            "max_new_tokens",
            flags.DEFINE_integer,
            "N",
            "At most so many new tokens; if not given, until the model ends or the context is full, "
            "e.g. --max_new_tokens 200",
            more={"lower_bound": 1},
        ),
        Flag(
            "stop",
            flags.DEFINE_multi_string,
            "TEXT",
            "End before this text; may be given more than once; \\n, \\t and \\\\ are a line break, a tab"
            " and a backslash, e.g. --stop '\\n\\n' --stop END",
            default=[],
        ),
        _sampling(
            "ignore_eos",
            flags.DEFINE_bool,
            "",
            "Go on at the model's own end-of-text tokens, e.g. --ignore_eos --max_new_tokens 100",
        ),
        _sampling(
            "overflow",
            flags.DEFINE_enum,
            "HOW",
            "When the context is full: error ends the reply and refuses a longer prompt, "
            "truncate_oldest forgets the oldest, e.g. --overflow truncate_oldest",
            more={"enum_values": get_args(Overflow)},
        ),
    ),
    "Sampling": (
        _sampling(
            "temperature",
            flags.DEFINE_float,
            "X",
            "0 always takes the most probable token, higher is more varied. Where this and the next four are "
            "not given, they are as the model's generation_config.json recommends, if it does, e.g. -t 0.7",
            short="t",
        ),
        _sampling(
            "top_k",
            flags.DEFINE_integer,
            "N",
            "Choose among the N most probable tokens; 0 is off, e.g. -k 40",
            short="k",
        ),
        _sampling(
            "top_p",
            flags.DEFINE_float,
            "X",
            "Choose among the fewest tokens with this total probability; 1 is off, e.g. -q 0.9",
            short="q",
        ),
        _sampling(
            "min_p",
            flags.DEFINE_float,
            "X",
            "Leave out tokens less probable than this fraction of the most probable; 0 is off, e.g. "
            "--min_p 0.05",
        ),
        _sampling(
            "repetition_penalty",
            flags.DEFINE_float,
            "X",
            "Weaken every token of prompt and output; 1 is off, e.g. --repetition_penalty 1.1",
        ),
        _sampling(
            "presence_penalty",
            flags.DEFINE_float,
            "X",
            "Subtract from the logit of tokens already generated; 0 is off, e.g. --presence_penalty 0.5",
        ),
        _sampling(
            "frequency_penalty",
            flags.DEFINE_float,
            "X",
            "The same for every time they were generated; 0 is off, e.g. --frequency_penalty 0.5",
        ),
        _sampling(
            "seed",
            flags.DEFINE_integer,
            "N",
            "The same seed gives the same text on the same kind of machine, e.g. --seed 7",
            more={"lower_bound": 0, "upper_bound": 2**32 - 1},
        ),
    ),
    "Output": (
        Flag(
            "json",
            flags.DEFINE_bool,
            "",
            "Print one JSON object (text, token_ids, finish_reason, timings and more) and nothing "
            "else on standard output; also with --show, e.g. -p Hello --json",
            default=False,
        ),
        Flag(
            "markdown",
            flags.DEFINE_bool,
            "",
            "Render the Markdown of replies: headings, lists, tables, code, e.g. -i --markdown",
            default=False,
        ),
        Flag(
            "history_file",
            flags.DEFINE_string,
            "FILE",
            "Where messages typed in a chat are kept, for the arrow keys; a file in your state directory"
            " if not given, e.g. -i --history_file notes.txt, or '' for none",
        ),
        Flag(
            "hide_banner",
            flags.DEFINE_bool,
            "",
            "Start without the banner, which is shown only if standard error is a terminal, e.g. -i "
            "--hide_banner",
            default=False,
        ),
        command_line.LOG_LEVEL,
        command_line.HELP,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    return command_line.run(_run, _GROUPS, _USAGE, argv, stray='give the prompt in quotes: -p "..."')


def define_flags() -> flags.FlagValues:
    """The flags of this command, unparsed."""
    return command_line.define_flags(_GROUPS)


def _run(values: flags.FlagValues) -> int:
    if values.model is not None and values.recipe is not None:
        raise UsageError("--model and --recipe are given; a recipe names its own models, give one")
    if not values.show:
        _refuse_combinations(values)
    if values.model is None and values.recipe is None:
        values["model"].value = str(demo.path())
    if values.show:
        report = _describe(values)
        print(json.dumps(show.as_json(report), indent=2) if values.json else show.render(report))
        return 0
    request = _request(values)
    _describe(values)  # errors at once
    # Not at the top: it imports JAX, which --help, --show and usage errors need not wait for.
    from jaxchat.cli import terminal

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return terminal.run(request)


def _describe(values: flags.FlagValues) -> show.Report:
    paths = command_line.model_paths(values)
    if values.recipe is not None:
        assembly = read_recipe(values.recipe, paths, keep_identity=values.keep_identity)
        report = show.describe_assembly(
            assembly,
            values.layer_spec,
            name=_model_name(values),
            max_length=values.max_length,
            quant=values.quant,
        )
    else:
        report = show.describe_directory(
            values.model, values.layer_spec, max_length=values.max_length, quant=values.quant
        )
    return dataclasses.replace(report, kv_dtype=values.kv_dtype)


# --- flags -> a request


def _request(values: flags.FlagValues) -> Request:
    own = {field.name for field in dataclasses.fields(Request)} - {"options", "model_name"}
    read: dict[str, Any] = {
        "ai_prefix": unescape(values.ai_prefix or "", "--ai_prefix"),
        "thought_tags": None if values.thought_tags is None else parse_thought_tags(values.thought_tags),
        "prompt": _prompt(values),
        "model_paths": command_line.model_paths(values),
    }
    return Request(
        **{name: getattr(values, name) for name in own - read.keys()},
        **read,
        model_name=_model_name(values),
        options=_options(values),
    )


def _model_name(values: flags.FlagValues) -> str:
    return Path(values.model).resolve().name if values.recipe is None else Path(values.recipe).stem


def _options(values: flags.FlagValues) -> GenerateOptions:
    names = [
        flag.name for title in ("How long", "Sampling") for flag in _GROUPS[title] if flag.name != "stop"
    ]
    stop = tuple(unescape(text, "--stop") for text in values.stop)
    asked = {name: getattr(values, name) for name in names}
    if values.recipe is None:
        recommended = recommended_sampling(Path(values.model))
        asked |= {name: value for name, value in recommended.items() if not values[name].present}
    return GenerateOptions(**asked, stop=stop)


def _refuse_combinations(values: flags.FlagValues) -> None:
    given = {name for name in values if values[name].present and values[name].value is not False}
    for one, other, advice in _CONFLICTS:
        if {one, other} <= given:
            raise UsageError(f"--{one} cannot be combined with --{other}: {advice}")
    for name, needed, advice in _NEEDS:
        if name in given and not needed & given:
            raise UsageError(f"--{name} needs --{' or --'.join(sorted(needed))}: {advice}")
    if values.format == "completion" and (chat_only := sorted(_CHAT_ONLY & given)):
        raise UsageError(f"--{chat_only[0]} needs a chat; it cannot be combined with --format completion")
    if not {"prompt", "prompt_file", "interactive"} & given:
        raise UsageError(
            "nothing to do: give a prompt with -p or --prompt_file (- is standard input), or chat with -i"
        )
    if values.interactive and values.prompt_file == "-":
        raise UsageError("--interactive reads messages from standard input; give the first one with --prompt")
    for name in ("prompt", "system", "ai_prefix", "thought_tags"):
        command_line.check_text(getattr(values, name), name)


_CHAT_ONLY = {flag.name for flag in _GROUPS["Chat"]}
_CONFLICTS = (
    ("prompt", "prompt_file", "give one"),
    ("interactive", "json", "--json is for one prompt"),
    ("markdown", "json", "JSON holds the text as it is"),
    ("load_session", "system", "a session has its own; /system changes it"),
    ("load_session", "reversed_role", "a session has its own roles; /role changes them"),
    ("load_session", "thought_tags", "a session has its own"),
)
"""Pairs of flags that exclude each other, and what to say about it."""
_NEEDS = (
    ("reversed_role", {"interactive"}, "the model asks, and somebody has to answer"),
    ("ai_prefix_every_turn", {"interactive"}, "one prompt is one turn"),
    ("ai_prefix_in", {"ai_prefix", "interactive"}, "it says where a prefix goes"),
    ("history_file", {"interactive"}, "it keeps what is typed in a chat"),
)
"""Flags that mean nothing without one of others, and why."""


def _prompt(values: flags.FlagValues) -> str | None:
    prompt: str | None = values.prompt
    where = "--prompt"
    if values.prompt_file is not None:
        text = command_line.read_text(values.prompt_file, "prompt_file")
        prompt = text.removesuffix("\n").removesuffix("\r")
        where = f"--prompt_file {values.prompt_file}"
    if prompt == "":
        raise UsageError(f"{where}: the prompt is empty; give at least one character")
    return prompt


if __name__ == "__main__":
    command_line.exit_process(main())
