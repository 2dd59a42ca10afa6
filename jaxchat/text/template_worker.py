"""Compiles and renders chat templates, the programs of strangers, in a process of its own.

`template_process.py` starts it and says what to do; this file is all that runs there, and imports nothing of
jaxchat. What is told comes pickled from the one that started it, answers go back as lines of JSON.
"""

from __future__ import annotations

import datetime
import json
import pickle
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY = 1 << 30
"""Bytes of address space: a long conversation takes some megabytes."""
MAX_OUTPUT = 1 << 26
"""Characters of a rendering: more than any context holds."""
_TOO_MUCH = f"it needs more than {MAX_MEMORY >> 20} MiB of memory"
_MAX_WORDS = 1000
"""Characters of an error message."""


class _Refused(jinja2.TemplateError):
    """The template called `raise_exception`: it does not accept these messages."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what to train on; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's body, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace()` without underscore names: templates are code from strangers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja2's own signature: `namespace(self=...)` is a valid attribute.
        self, attributes = args[0], dict(*args[1:], **kwargs)
        jinja2.utils.Namespace.__init__(self)
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute named {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter would escape `<` and `&` for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment templates are written for: transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=_Namespace,
    )
    return environment


class Templates:
    """Compiled templates by their text.

    Each answer is a mapping with one of `text`; `refused`, why the template refuses the messages; `failed`,
    what went wrong while it ran; or `broken`, why it is no template.
    """

    def __init__(self) -> None:
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def compile(self, source: str) -> dict[str, str]:
        """Finds out whether a text is a template; answers "" if so."""
        if source in self._compiled:
            return {"text": ""}
        try:
            self._compiled[source] = self._environment.from_string(source)
        except MemoryError:
            return {"broken": _TOO_MUCH}
        except Exception as error:  # beside syntax errors of jinja2 those of the Python that it makes
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            return {"broken": line + _words(error)}
        return {"text": ""}

    def render(self, source: str, context: Mapping[str, Any]) -> dict[str, str]:
        """Renders a template."""
        answer = self.compile(source)
        if "broken" in answer:
            return answer
        try:
            text = self._compiled[source].render(context)
            text.encode()
        except _Refused as error:
            return {"refused": _words(error) if str(error).strip() else "it gives no reason"}
        except MemoryError:
            return {"failed": _TOO_MUCH}
        except UnicodeEncodeError as error:
            return {"failed": f"it writes {error.object[error.start]!a}, which is no character"}
        except Exception as error:  # a template is a program: it can raise anything
            return {"failed": f"{type(error).__name__}: {_words(error)}"}
        if len(text) > MAX_OUTPUT:
            return {"failed": f"it writes {len(text)} characters; {MAX_OUTPUT} are too many"}
        return {"text": text}


def _words(error: Exception) -> str:
    """An error in one line that can be sent."""
    text = " ".join(str(error)[: 2 * _MAX_WORDS].split()) or type(error).__name__
    return text[:_MAX_WORDS].encode(errors="replace").decode()


def _limit_memory() -> None:
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_MEMORY if most == resource.RLIM_INFINITY else min(MAX_MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not every system has such a limit
        pass


def serve(commands: BinaryIO, answers: BinaryIO) -> None:
    """Does what is told until there is nothing more."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started this
    _limit_memory()
    templates = Templates()
    answers.write(b"\n")  # ready
    while True:
        answers.flush()
        try:
            name, *arguments = pickle.load(commands)
        except EOFError:
            return
        answers.write(json.dumps(getattr(templates, name)(*arguments)).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
