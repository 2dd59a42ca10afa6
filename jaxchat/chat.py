"""Chat templates, and conversations whose history is token ids.

The template is the truth: what a turn adds is the difference between two renderings of the conversation. Text
and ids only; running a model on them is the engine's job.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.tokenizer import (
    Detokenizer,
    TextTokenizer,
    Tokenizer,
    read_json_object,
    token_text,
    unused_marks,
)


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
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise JaxchatError(
                f"{path}: broken chat template, line {error.lineno} ({_one_line(error)}): "
                "download the file again"
            ) from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template in `directory`: chat_template.jinja, chat_template.json or tokenizer_config.json.

        Args:
            directory: a model's folder.
            tokenizer: gives `bos_token` where the files do not name it.

        Returns:
            None if there is no template.

        Raises:
            JaxchatError: the template, or the file it is in, is broken.
        """
        directory = Path(directory)
        config = read_json_object(directory / "tokenizer_config.json")
        found = _find_source(directory, config)
        if found is None:
            return None
        path, source = found
        return cls(source, path=path, variables=_variables(directory, config, tokenizer))

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
                f"{self.path}: the chat template failed ({kind}: {_one_line(error)})"
            ) from error


def _find_source(directory: Path, config: Mapping[str, Any]) -> tuple[Path, str | Mapping[str, str]] | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja, jinja.read_text(encoding="utf-8")
        except ValueError as error:
            raise JaxchatError(f"{jinja}: not UTF-8 text ({error}): download the file again") from error
    for path, holder in (
        (directory / "chat_template.json", read_json_object(directory / "chat_template.json")),
        (directory / "tokenizer_config.json", config),
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


def _variables(directory: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`bos_token` and the like, from tokenizer_config.json, special_tokens_map.json or the tokenizer."""
    merged = {**read_json_object(directory / "special_tokens_map.json"), **config}
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


@dataclass(frozen=True)
class _Chunk:
    """A stretch of the ledger: rendered by the template, or generated.

    `ends[k]` is the length of the text of a reply's first k+1 ids, -1 where a cut splits a character; None
    for rendered text, which can be tokenized again with the same result.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int, ...] | None = None

    def head(self, length: int) -> _Chunk:
        """The longest prefix of whole ids of a reply whose text is within the first `length` characters."""
        assert self.ends is not None
        keep = max((k + 1 for k, end in enumerate(self.ends) if 0 <= end <= length), default=0)
        text = self.text[: self.ends[keep - 1]] if keep else ""
        return _Chunk(text, self.ids[:keep], self.ends[:keep])


class Conversation:
    """Message history whose token ids are kept, never re-tokenized.

    The ledger alternates rendered chunks and generated ones. For the next prompt everything is rendered; as
    long as the rendered text starts with the ledger's chunks their ids stay, and only the rest is tokenized.
    Special tokens spelled out inside a message are text.

    Attributes:
        messages: the history as dicts with "role" and "content".
        token_ids: the ledger's ids: what a KV cache should hold.

    Raises:
        UsageError: a system prompt is given and the template has no place for one.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._chunks: list[_Chunk] = []
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self._require_system_support(system)
            self.messages.append({"role": "system", "content": system})

    def _require_system_support(self, system: str) -> None:
        probe = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        advice = "leave the system prompt out, or put it into the first message"
        try:
            text = self._template.render(probe, add_generation_prompt=True, **self._kwargs)
        except UsageError as error:
            raise UsageError(
                f"this model's chat template takes no system prompt ({error}): {advice}"
            ) from error
        if system.strip() not in text:
            raise UsageError(f"this model's chat template ignores the system prompt: {advice}")

    @property
    def token_ids(self) -> list[int]:
        """The ids of everything so far: the last prompt, and the reply to it if there is one."""
        return [i for chunk in self._chunks for i in chunk.ids]

    def rendered_text(self) -> str:
        """The text `token_ids` stand for, special tokens and generation prompt included."""
        return "".join(chunk.text for chunk in self._chunks)

    def add_user(self, text: str) -> None:
        """Append the user's message."""
        self.messages.append({"role": "user", "content": text})

    def prompt_ids(self) -> list[int]:
        """Ids of the whole conversation with the generation prompt; from here on these are `token_ids`.

        Ids of earlier turns are reused wherever the rendered text still starts with the text they stand for.
        Where the template rewrites history (drops reasoning, trims) the rest is tokenized anew.

        Raises:
            UsageError: the template refuses the conversation.
        """
        marked, breaker = self._render_marked()
        text = marked.replace(breaker, "") if breaker else marked
        kept = self._matching_chunks(text)
        start = sum(len(chunk.text) for chunk in kept)
        after = next((c.ids[-1] for c in reversed(kept) if c.ids), None)
        ids = self._encode(marked[_marked_offset(marked, breaker, start) :], after, breaker)
        self._chunks = [*kept, _Chunk(text[start:], tuple(ids))]
        return self.token_ids

    def add_reply(self, ids: Sequence[int]) -> str:
        """Store generated ids as the assistant's message.

        Args:
            ids: as generated after `prompt_ids`, with or without an end-of-turn id.

        Returns:
            The message's text, without special tokens.
        """
        if not self._chunks or self._chunks[-1].ends is not None:
            self.prompt_ids()
        prompt = self.token_ids
        raw = Detokenizer(self._tokenizer, prompt_ids=prompt, skip_special_tokens=False)
        shown = Detokenizer(self._tokenizer, prompt_ids=prompt, skip_special_tokens=True)
        text, content, ends = "", "", []
        for token_id in ids:
            text += raw.push(token_id)
            content += shown.push(token_id)
            ends.append(-1 if raw.pending else len(text))
        text, content = text + raw.flush(), content + shown.flush()
        self._chunks.append(_Chunk(text, tuple(int(i) for i in ids), tuple(ends)))
        self.messages.append({"role": "assistant", "content": content})
        return content

    def _render_marked(self) -> tuple[str, str]:
        """The rendering with control tokens in messages broken by a character, and that character or ""."""
        breaker = unused_marks(*_strings(self.messages))[0]
        regex = self._tokenizer.control_regex if isinstance(self._tokenizer, TextTokenizer) else None
        messages: Any = self.messages
        if regex is not None:
            messages = _map_strings(messages, lambda s: regex.sub(lambda m: m[0][0] + breaker + m[0][1:], s))
        text = self._template.render(messages, add_generation_prompt=True, **self._kwargs)
        return text, breaker if breaker in text else ""

    def _matching_chunks(self, text: str) -> list[_Chunk]:
        """The longest prefix of the ledger that `text` starts with.

        A rendered chunk stays only before a reply that stays: tokenizing it again gives the same ids, and the
        right ones where its last token merges with what now follows.
        """
        kept: list[_Chunk] = []
        at = 0
        for chunk in self._chunks:
            if text.startswith(chunk.text, at):
                kept.append(chunk)
                at += len(chunk.text)
                continue
            if chunk.ends is not None:
                kept.append(chunk.head(_common_length(chunk.text, text[at : at + len(chunk.text)])))
            break
        while kept and (kept[-1].ends is None or not kept[-1].ids):
            kept.pop()
        return kept

    def _encode(self, text: str, after: int | None, breaker: str) -> list[int]:
        if isinstance(self._tokenizer, TextTokenizer):
            return self._tokenizer.encode_after(text, after=after, breaker=breaker or None)
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def _common_length(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _marked_offset(marked: str, breaker: str, plain: int) -> int:
    """Where the first `plain` characters that are not `breaker` end in `marked`."""
    if not breaker:
        return plain
    at = 0
    for _ in range(plain):
        at += 1 + (marked[at] == breaker)
    return at


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, dict keys and roles excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(v, change) for v in value]
    return value


def _strings(value: Any) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _map_strings(value, note)
    return found
