"""A model's chat template: found in its directory, and rendered as transformers would.

Text only; what a conversation makes of the renderings is in `chat/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError, UsageError, told
from jaxchat.files import UnreadableError, read_optional_json, read_small_text
from jaxchat.misplaced import refuse_misplaced
from jaxchat.text.template_process import Answer, ask, start
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.text.tokenizer_config import ADDITIONAL_TEMPLATES, Config, read_config, token_text
from jaxchat.visible import shown


class ChatTemplate:
    """A model's chat template, rendered as transformers' `apply_chat_template(tokenize=False)` renders it.

    It is a program of whoever made the model, and runs in a process of its own: see `template_process.py`. It
    is compiled when it is first needed, so that a broken one is in nobody's way who needs none.

    Args:
        source: the Jinja text, or several by name: "default", and "tool_use" for where tools are given.
        path: the file it came from, for error messages.
        variables: what the template may refer to beside the messages (`bos_token`, ...).
        problem: why no template could be read there; whoever needs one is told.
        stop_strings: what ends a reply, beside what the template writes behind it.

    Attributes:
        source: the text of the default template, or of another where there is none.
        sources: all texts by name.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        path: Path | str = "chat template",
        variables: Mapping[str, Any] | None = None,
        problem: JaxchatError | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.variables = dict(variables or {})
        self.stop_strings = tuple(stop_strings)
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.source = self.sources.get("default") or next(iter(self.sources.values()), "")
        self._problem = problem

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, config: Config | None = None) -> ChatTemplate | None:
        """The chat template in `directory`, and others by name.

        The default is in chat_template.jinja, else chat_template.json, else tokenizer_config.json; the last
        two may hold several, as a list of `name` and `template` or a mapping, and
        additional_chat_templates/NAME.jinja is one more.

        Args:
            directory: a model's folder.
            tokenizer: gives `bos_token` where the files do not name it.
            config: what `read_config` read there, if it has been.

        Returns:
            None if there is no template. What is wrong with one is told by `check` and `render`.
        """
        directory = Path(directory)
        config = config or read_config(directory)
        variables = _variables(config, tokenizer)
        try:
            found = _find_sources(directory, config)
        except JaxchatError as error:
            return cls({}, path=directory, variables=variables, problem=error)
        if found is None:
            return None
        start()  # what renders it is ready when the weights are
        return cls(found[1], path=found[0], variables=variables)

    def check(self) -> None:
        """Finds out what `render` would meet in the template itself.

        Raises:
            JaxchatError: the file is broken, there is no default template, or it is not valid Jinja.
        """
        self._text_of(ask("compile", self._source_of("default")))

    def _source_of(self, name: str) -> str:
        if self._problem is not None:
            raise self._problem
        if name not in self.sources:
            names = ", ".join(sorted(self.sources)) or "none"
            raise JaxchatError(
                f"{self.path}: no chat template named {name!r} (found: {names}); {_continued()}"
            )
        return self.sources[name]

    def _text_of(self, answer: Answer) -> str:
        if "refused" in answer:
            raise UsageError(f"the chat template refuses this conversation: {answer['refused']}")
        if "broken" in answer:
            raise JaxchatError(
                f"{self.path}: broken chat template ({answer['broken']}): download the file again; "
                f"{_continued()}"
            )
        if "failed" in answer:
            raise JaxchatError(
                f"{self.path}: the chat template failed ({answer['failed']}); "
                "it may need a variable, as in template_kwargs={'tools': []}"
            )
        return answer["text"]

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
        source = self._source_of("tool_use" if tools and "tool_use" in self.sources else "default")
        context = {**self.variables, "documents": None, **kwargs}
        context |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._text_of(ask("render", source, context))


def _continued() -> str:
    """What can be done without a template."""
    return f"texts can be continued with {told('generate() or stream()', '--format completion')}"


def _find_sources(directory: Path, config: Config) -> tuple[Path, dict[str, str]] | None:
    """The file of the default template, or of another where there is none; and templates by name."""
    found = _default_sources(directory, config)
    folder = directory / ADDITIONAL_TEMPLATES
    more = {path.stem: path for path in sorted(folder.glob("*.jinja")) if path.is_file()}
    if found is None and not more:
        return None
    path, sources = found or (folder, {})
    return path, sources | {name: _read_jinja(path) for name, path in more.items()}


def _default_sources(directory: Path, config: Config) -> tuple[Path, dict[str, str]] | None:
    jinja = directory / "chat_template.jinja"
    if os.path.lexists(jinja):
        return jinja, {"default": _read_jinja(jinja)}
    for path, holder in (
        (directory / "chat_template.json", read_optional_json(directory / "chat_template.json")),
        (directory / "tokenizer_config.json", config.raw),
    ):
        template = holder.get("chat_template")
        if template is None:
            continue
        named = _named(template)
        if named is None:
            raise JaxchatError(
                f"{path}: key 'chat_template' is {shown(template)}; expected a text, or templates by name: "
                "download the file again"
            )
        return path, named
    return None


def _named(template: Any) -> dict[str, str] | None:
    """Templates by name; None where `chat_template` is nothing of the kind."""
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}
    if not isinstance(template, dict) or not template:
        return None
    texts = all(isinstance(part, str) for entry in template.items() for part in entry)
    return template if texts else None


def _read_jinja(path: Path) -> str:
    refuse_misplaced(path)
    try:
        return read_small_text(path)
    except UnreadableError as error:
        raise JaxchatError(f"{path}: no chat template ({error}); download the file again") from None


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
    values = special_texts(tokenizer) | values
    additional = merged.get("additional_special_tokens")
    if isinstance(additional, list):
        values["additional_special_tokens"] = [t for t in map(token_text, additional) if t is not None]
    return values


def special_texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """`bos_token` and `eos_token`, as far as the tokenizer itself knows them."""
    by_id = {i: text for text, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    return {name: by_id[i] for name, i in ids.items() if i in by_id}
