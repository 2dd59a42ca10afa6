"""What can be typed in a chat instead of a message: the `/commands`, their help and their completion."""

import dataclasses
import difflib
import glob
import os
import shlex
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

import jax

from jaxchat.adapter_use import read_uses
from jaxchat.analysis import show
from jaxchat.chat import saved
from jaxchat.chat.replies import TextStream
from jaxchat.cli.terminal.reading import Candidate
from jaxchat.cli.terminal.state import ChatState
from jaxchat.cli.terminal.transcript import write_last_exchange
from jaxchat.cli.terminal.writing import say
from jaxchat.errors import UsageError
from jaxchat.families import count_parameters
from jaxchat.options import GenerateOptions, PrefixIn, setting_text, unescape, with_setting
from jaxchat.values import read_choice, read_switch

StartReply = Callable[[], TextStream]
"""Begins a reply, for the loop to write."""


class Command(NamedTuple):
    """A `/command`.

    Attributes:
      run: does it, given what follows the name and one space; returns the reply that it asks for, if any.
      arguments: what it takes, as its help shows it.
      help: one line.
      complete: ways to complete its arguments.
    """

    run: Callable[[ChatState, str], StartReply | None]
    arguments: str
    help: str
    complete: Callable[[str], Iterable[Candidate]] = lambda text: ()


def obey(chat: ChatState, text: str) -> StartReply | None:
    """Runs the command that a message beginning with a slash is, and returns the reply that it asks for.

    Raises:
      UsageError: there is no such command.
    """
    name, _, rest = text[1:].partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], 1)
        advice = f"did you mean /{close[0]}" if close else "/help lists them"
        raise UsageError(f"no command /{name}; {advice}, or is it a message? //{name} sends it")
    return COMMANDS[name].run(chat, rest)


def completions(text: str) -> Iterable[Candidate]:
    """Ways to go on with the text before the cursor: names of commands, and their arguments."""
    if not text.startswith("/") or "\n" in text:
        return ()
    name, space, rest = text[1:].partition(" ")
    name = ALIASES.get(name, name) if space else name
    if space:
        return COMMANDS[name].complete(rest) if name in COMMANDS else ()
    return [
        Candidate(f"/{known}" + (" " if command.arguments else ""), len(text), command.help)
        for known, command in (*COMMANDS.items(), *((a, COMMANDS[n]) for a, n in ALIASES.items()))
        if known.startswith(name)
    ]


def explained_word(text: str) -> str | None:
    """What to type instead of a word that other programs obey without a slash; None for a message."""
    command = _BARE_WORDS.get(text.strip().lower())
    return command and f"{command}; the word alone is sent as a message if you type it again"


# --- the commands


def _help(chat: ChatState, name: str) -> None:
    name = name.strip().removeprefix("/")
    name = ALIASES.get(name, name)
    if name and name not in COMMANDS:
        raise UsageError(f"no command /{name}; /help lists them")
    shown = {name: COMMANDS[name]} if name else COMMANDS
    width = max(len(f"/{known} {command.arguments}") for known, command in COMMANDS.items())
    for known, command in shown.items():
        first = f"  {f'/{known} {command.arguments}':<{width}}  "
        say(textwrap.fill(command.help, 80, initial_indent=first, subsequent_indent=" " * len(first)))
    if not name:
        say(_KEYS)


_KEYS = """\
/exit and /bye are /quit, /clear is /restart, /? is /help.
A message that begins with a slash is typed with two. A line that ends in a
backslash goes on in the next; Alt-Enter or Ctrl-J begin a new line too, and a
pasted text stays one message. A reply that Ctrl-C has stopped counts."""


def _system(chat: ChatState, text: str) -> None:
    session = chat.replies.session
    if text.strip():
        session.set_system(None if text.strip() == '""' else text)
    system = session.conversation.system
    say("no system prompt" if system is None else f"system prompt: {system}")


def _plan(chat: ChatState, spec: str) -> None:
    if spec.strip():
        chat.replies.set_plan(spec.strip())
    model = chat.replies.model
    count = count_parameters(model.config, len(model.plan))
    say(f"layer plan {model.plan}: {len(model.plan)} slots, {show.counted(count)} parameters")


def _adapter(chat: ChatState, text: str) -> None:
    model, words = chat.replies.model, _split(text)
    if model.engine.adapters is None:
        raise UsageError("/adapter: the model was loaded without one; start with --adapter DIR")
    if words:
        uses = read_uses([] if words == ["none"] else words, "/adapter")
        chat.replies.set_adapters(uses)
    used = " ".join(map(str, chat.replies.model.uses)) or "none"
    say(f"adapter: {used} (there are {', '.join(model.engine.adapters.names)})")


def _show(chat: ChatState, _: str) -> None:
    """As `--show` does, with what is in memory now."""
    model, request = chat.replies.model, chat.request
    chosen = dataclasses.replace(chat.chosen, plan=model.plan)
    report = chosen.report(max_length=model.engine.max_length, quant=request.quant)
    report = dataclasses.replace(report, kv_dtype=model.engine.kv_dtype.name)
    weights = sum(part.nbytes for part in jax.tree.leaves(model.engine.params))
    now = f"{show.short_bytes(weights)} of weights"
    if chat.replies.format == "chat":
        held = chat.replies.session.session
        now += f", {show.short_bytes(held.cache_bytes)} of KV cache, for plans of up to {held.slots} slots"
    say(show.render(report, in_memory=now))


def _prefix(chat: ChatState, text: str) -> None:
    _ = chat.replies.session  # a prefix needs a chat
    when = "every reply" if chat.prefix_every_turn else "the next reply"
    if text:
        chat.prefix = unescape(text, "/prefix")
        say(f"{when} begins with {chat.prefix!r}")
    elif chat.prefix:
        say(f"{when} no longer begins with {chat.prefix!r}")
        chat.prefix = ""
    else:
        say("no prefix is set; /prefix TEXT sets one")


def _continue(chat: ChatState, text: str) -> StartReply:
    session, suffix = chat.replies.session, unescape(text, "/continue")
    return lambda: session.continue_(suffix, options=chat.first_draw())


def _retry(chat: ChatState, _: str) -> StartReply:
    session = chat.replies.session
    session.conversation.require_reply("retry")
    chat.retried = session.messages[-1]["content"]
    options = chat.next_draw()
    return lambda: session.retry(options=options)


def _undo(chat: ChatState, _: str) -> None:
    typed = chat.replies.session.undo()
    if typed is None:
        raise UsageError("there is nothing to undo")
    say(f"forgot the last exchange, which began with: {typed}" if typed else "forgot the last reply")
    chat.draft = typed


def _role(chat: ChatState, role: str) -> None:
    session, role = chat.replies.session, role.strip()
    if role not in ("", "user", "assistant"):
        raise UsageError(f"/role {role}: expected user or assistant, the part that the model is to play")
    if role:
        session.set_role(role == "user")
    say(f"the model plays the {'user, you the assistant' if session.reversed_role else 'assistant'}")


def _save(chat: ChatState, text: str) -> None:
    name = _session_name(chat, text, "save")
    chat.save_session(name)
    say(f"saved {name}: {chat.replies.context_used} tokens")


def _load(chat: ChatState, text: str) -> None:
    _ = chat.replies.session  # there is none where texts are continued
    name = _session_name(chat, text, "load")
    chat.use_session(name)
    say(f"loaded {name}: {chat.replies.context_used} tokens")
    if chat.prompts:
        write_last_exchange(chat.replies.session)


def _session_name(chat: ChatState, text: str, command: str) -> str:
    """A name or a file, without the quotes that may be around it."""
    name = text.strip()
    if name[:1] in ("'", '"'):
        if len(name) < 2 or name[-1] != name[0]:
            raise UsageError(f"/{command} {name}: a quote is not closed")
        name = name[1:-1]
    name = name or (chat.session if not text.strip() else "") or ""
    if not name:
        raise UsageError(
            f"/{command} needs a name, e.g. /{command} talk, or a file, e.g. /{command} ./talk.session"
        )
    return name


def _sessions(chat: ChatState, _: str) -> None:
    say(saved.table(saved.listed()))


def _set(chat: ChatState, text: str) -> None:
    """Reads all settings before it changes any."""
    options, own = chat.options, {}
    for setting in _split(text):
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(
                f"/set {setting}: expected name=value, e.g. /set temperature=0.2; /set lists them"
            )
        if name in _OWN:
            own[name] = _read_own(name, value)
        else:
            options = with_setting(options, name, value)
    chat.options = options
    for name, value in own.items():
        setattr(chat, _OWN[name], value)
    changed = [setting.partition("=")[0] for setting in _split(text)]
    shown = _settings(chat)
    say(textwrap.fill("  ".join(f"{name}={shown[name]}" for name in changed or shown), 80))


_OWN = {
    "ai_prefix_in": "prefix_in",
    "ai_prefix_every_turn": "prefix_every_turn",
    "markdown": "markdown",
}
"""Settings of the chat beside those of `GenerateOptions`, named as their flags, and its attributes."""


def _read_own(name: str, value: str) -> Any:
    return (
        read_choice(name, value, get_args(PrefixIn)) if name == "ai_prefix_in" else read_switch(name, value)
    )


def _settings(chat: ChatState) -> dict[str, str]:
    values = {**vars(chat.options), **{name: getattr(chat, attribute) for name, attribute in _OWN.items()}}
    return {name: setting_text(value) for name, value in values.items()}


def _split(text: str) -> list[str]:
    """Splits at spaces outside quotes, and leaves backslashes alone."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return list(words)
    except ValueError:
        raise UsageError(f"/set {text}: a quote is not closed") from None


def _stats(chat: ChatState, _: str) -> None:
    for line in (chat.status(), *chat.stats.lines(), f"seed: {chat.options.seed}"):
        say(line)


def _restart(chat: ChatState, _: str) -> None:
    chat.replies.restart()
    say("forgot the conversation")


def _quit(chat: ChatState, _: str) -> None:
    chat.leaving = True


# --- completion of arguments


def _names(text: str) -> Iterable[Candidate]:
    return _words(text, COMMANDS)


def _adapters(text: str) -> Iterable[Candidate]:
    return _words(text, ("none",))


def _roles(text: str) -> Iterable[Candidate]:
    return _words(text, ("user", "assistant"))


def _setting_names(text: str) -> Iterable[Candidate]:
    fields = [field.name for field in dataclasses.fields(GenerateOptions)]
    return _words(text, [f"{name}=" for name in (*fields, *_OWN)])


def _words(text: str, words: Iterable[str]) -> Iterable[Candidate]:
    last = text.rpartition(" ")[2]
    return [Candidate(word, len(last)) for word in words if word.startswith(last)]


def _saved_sessions(text: str) -> Iterable[Candidate]:
    """Names in the list, then files."""
    names = [Candidate(name, len(text), "saved") for name in saved.names() if name.startswith(text)]
    found = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
    # A file whose name could be one in the list is given by its path.
    paths = [f"./{path}" if saved.is_name(path) else path for path in found]
    return [*names, *(Candidate(p + ("/" if os.path.isdir(p) else ""), len(text)) for p in paths)]


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "[COMMAND]", "list the commands", _names),
    "system": Command(_system, "[TEXT]", 'show or change the system prompt; "" is none'),
    "plan": Command(_plan, "[LAYERS]", "run these layers from now on, e.g. 0:8,4:12,8: (all: as trained)"),
    "adapter": Command(
        _adapter, "[NAME...]", "use these adapters from now on, e.g. poet=0.5 critic@3, or none", _adapters
    ),
    "show": Command(_show, "", "the model's shapes, layers and memory under the plan"),
    "prefix": Command(
        _prefix, "[TEXT]", "begin the next reply with this text, \\n a new line; alone: do not"
    ),
    "continue": Command(_continue, "[TEXT]", "go on with the last reply, after this text if any"),
    "retry": Command(_retry, "", "draw the last reply anew: the n-th time with the seed plus n"),
    "undo": Command(_undo, "", "forget the last exchange; its message can be edited and sent again"),
    "role": Command(_role, "[ROLE]", "the part that the model plays from now on: user or assistant", _roles),
    "save": Command(
        _save,
        "[NAME]",
        "keep the conversation under a name; with a dot or slash in it, in that file",
        _saved_sessions,
    ),
    "load": Command(_load, "[NAME]", "go on with a conversation that was saved", _saved_sessions),
    "sessions": Command(_sessions, "", "list the conversations that were saved under a name"),
    "set": Command(_set, "[NAME=VALUE]", "change settings, e.g. temperature=0.2 stop=END", _setting_names),
    "stats": Command(_stats, "", "speed, compile time, memory and the seed"),
    "restart": Command(_restart, "", "forget the conversation, but not the system prompt"),
    "quit": Command(_quit, "", "leave (also Ctrl-D)"),
}
"""By name; a message that starts with a slash is typed with two."""

ALIASES = {"?": "help", "clear": "restart", "exit": "quit", "bye": "quit"}
"""What some are called elsewhere."""

_BARE_WORDS = dict.fromkeys(("exit", "quit", "bye", "q"), "to leave: /quit") | {"help": "for help: /help"}
