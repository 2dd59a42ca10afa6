"""A model's chat template: found in its directory, and rendered as transformers would.

Text only; what a conversation makes of the renderings is in `chat/`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_optional_json
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.text.tokenizer_config import Config, read_config, token_text


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
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=_Namespace,
    )
    return environment


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ChatTemplate:
    """A model's chat template, rendered as transformers' `apply_chat_template(tokenize=False)` renders it.

    Args:
        source: the Jinja text, or several by name: "default", and "tool_use" for where tools are given.
        path: the file it came from, for error messages.
        variables: what the template may refer to beside the messages (`bos_token`, ...).

    Attributes:
        source: the text of the default template.

    Raises:
        JaxchatError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        path: Path | str = "chat template",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.variables = dict(variables or {})
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            names = ", ".join(sorted(sources)) or "none"
            raise JaxchatError(f'{path}: no chat template named "default" (found: {names})')
        self.source = sources["default"]
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise JaxchatError(
                f"{path}: broken chat template, line {error.lineno} ({_one_line(error)}): "
                "download the file again"
            ) from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, config: Config | None = None) -> ChatTemplate | None:
        """The chat template in `directory`: chat_template.jinja, chat_template.json or tokenizer_config.json.

        Args:
            directory: a model's folder.
            tokenizer: gives `bos_token` where the files do not name it.
            config: what `read_config` read there, if it has been.

        Returns:
            None if there is no template.

        Raises:
            JaxchatError: the template, or the file it is in, is broken.
        """
        directory = Path(directory)
        config = config or read_config(directory)
        found = _find_source(directory, config)
        if found is None:
            return None
        path, source = found
        return cls(source, path=path, variables=_variables(config, tokenizer))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the text the model was trained on.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with the beginning of the assistant's next message.
            tools: JSON schemas of functions the model may call.
            **kwargs: further template variables, such as `enable_thinking`.

        Raises:
            UsageError: the template refuses these messages (its `raise_exception`).
            JaxchatError: the template itself fails.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        context = {**self.variables, "documents": None, **kwargs}
        context |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._templates[name].render(context)
        except _Refused as error:
            raise UsageError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        except Exception as error:  # a template is a program: it can raise anything
            kind = type(error).__name__
            raise JaxchatError(
                f"{self.path}: the chat template failed ({kind}: {_one_line(error)}); "
                "it may need a variable, as in template_kwargs={'tools': []}"
            ) from error


def _find_source(directory: Path, config: Config) -> tuple[Path, str | Mapping[str, str]] | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja, jinja.read_text(encoding="utf-8")
        except ValueError as error:
            raise JaxchatError(f"{jinja}: not UTF-8 text ({error}): download the file again") from error
    for path, holder in (
        (directory / "chat_template.json", read_optional_json(directory / "chat_template.json")),
        (directory / "tokenizer_config.json", config.raw),
    ):
        template = holder.get("chat_template")
        if template is None:
            continue
        if isinstance(template, str):
            return path, template
        named = template if isinstance(template, list) else []
        if named and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in named):
            return path, {str(t["name"]): str(t["template"]) for t in named}
        raise JaxchatError(f"{path}: chat_template must be a string or a list of named templates")
    return None


def _variables(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """`bos_token` and the like, from tokenizer_config.json, special_tokens_map.json or the tokenizer."""
    merged = dict(config.raw)
    extra = merged.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        merged |= extra
    values: dict[str, Any] = {
        name: text
        for name, value in merged.items()
        if name.endswith("_token") and (text := token_text(value)) is not None
    }
    by_id = {i: text for text, i in tokenizer.special_tokens.items()}
    if tokenizer.bos_id in by_id:
        values.setdefault("bos_token", by_id[tokenizer.bos_id])
    if tokenizer.eos_ids and tokenizer.eos_ids[0] in by_id:
        values.setdefault("eos_token", by_id[tokenizer.eos_ids[0]])
    additional = merged.get("additional_special_tokens")
    if isinstance(additional, list):
        values["additional_special_tokens"] = [t for t in map(token_text, additional) if t is not None]
    return values
