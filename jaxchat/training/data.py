"""Examples to train on: token ids with the weight of each, made of data files when they are asked for.

Where files and records come from is in `data_files` and `records`; what becomes of examples in `batches`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxchat.arguments import one_of, whole
from jaxchat.chat.ledger import encoded
from jaxchat.chat.prompts import Message, Prompt, Prompts, unused_text
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.named_templates import chosen_template
from jaxchat.text.reasoning import ThoughtTags, thought_tags_of
from jaxchat.text.tokenizer import TextTokenizer, Tokenizer, unused_marks
from jaxchat.training.data_files import (
    RecordError,
    Records,
    data_files,
    digest,
    is_text,
    records_of,
    text_blocks,
)
from jaxchat.training.records import Chat, Task, Text, advice, record_of

TRAIN_ON = ("assistant", "all")
_INPUT = "\n\n### Input:\n"  # of Alpaca's own format: tatsu-lab/stanford_alpaca, train.py


class Example(NamedTuple):
    """A text to learn from.

    Attributes:
        ids: int32 [n].
        weights: float32 [n], of predicting the token from those before it; the first is 0.
        place: where it is from: `train.jsonl:17`.
    """

    ids: np.ndarray
    weights: np.ndarray
    place: str


class Encoded(NamedTuple):
    """What became of a record.

    Attributes:
        example: None if nothing in it is learnt.
        unlearnt: replies that the template writes differently once the conversation goes on (without their
            reasoning, say). They stand there as later turns see them, and are not learnt.
    """

    example: Example | None
    unlearnt: int = 0


class Encoder:
    """Makes token ids of records: those that a chat makes of the same messages, special tokens in them text.

    Of a conversation the replies are learnt, with what ends each: the token or the string that the template
    writes there, or the tokenizer's EOS where it writes none. A reply is rendered as the last message of the
    conversation up to it, as the model has to write it.

    Where a template takes something out of all replies but the last, as reasoning, only the last is learnt;
    of a conversation that is too long for that, the last one whose beginning fits.

    Of a text all is learnt but the first token: BOS if the tokenizer adds one. EOS ends it.

    Args:
        tokenizer: the model's.
        template: the model's chat template; None if it has none: there can be no conversations then.
        max_length: tokens of an example; what is longer is cut at the end.
        train_on: "assistant" learns replies only, "all" all of a conversation.
        alpaca: the template of records with an instruction; default the model's or, without one, `alpaca`.
        eos_ids: what ends a text, the first of them; default the tokenizer's.
        thought_tags: what the model thinks between; default what the template says.
        template_kwargs: further template variables, such as `enable_thinking`.

    Raises:
        UsageError: an option is not what it should be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        max_length: int,
        train_on: Literal["assistant", "all"] = "assistant",
        alpaca: ChatTemplate | None = None,
        eos_ids: Sequence[int] | None = None,
        thought_tags: ThoughtTags | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.max_length = whole("max_length", max_length, 2)
        self.train_on = one_of("train_on", train_on, TRAIN_ON)
        self._alpaca = alpaca or template or chosen_template("alpaca", tokenizer, None)
        self._input = "\n\n" if alpaca or template else _INPUT
        self._eos = tuple(tokenizer.eos_ids if eos_ids is None else eos_ids)
        self._tags, self._variables = thought_tags, dict(template_kwargs or {})
        self._checked: list[ChatTemplate] = []

    def encode(self, record: Text | Chat | Task, place: str) -> Encoded:
        """Makes an example of a record.

        Raises:
            RecordError: the template does not write it as a chat with the model would have it.
            JaxchatError: there is no template, or it is broken: no other record will do.
        """
        if isinstance(record, Text):
            return Encoded(self._example(self._text_ids(record.text), place))
        template = self.template
        if isinstance(record, Task):
            record, template = self._chat_of(record), self._alpaca
        if template is None:
            raise UsageError(
                f"{place}: a conversation, but the model has no chat template; "
                f"name one ({option('chat_template')})"
            )
        if template not in self._checked:
            template.check()
            self._checked.append(template)
        try:
            return self._conversation(record, template, place)
        except RecordError:
            raise
        except JaxchatError as error:
            raise RecordError(f"{place}: {error}; {advice()}") from None

    def pieces(self, path: Path) -> list[np.ndarray]:
        """The token ids of a text file, EOS at its end, in pieces of `max_length`: int32 [n] each.

        Each begins with BOS if the tokenizer adds one: the model has seen no text without.

        Raises:
            JaxchatError: the file cannot be read, is not UTF-8, or has no text.
        """
        parts: list[np.ndarray] = []
        before: int | None = None
        for block in text_blocks(path):
            ids = self._more_ids(block, before)
            if ids:
                before = ids[-1]
                parts.append(np.array(ids, np.int32))
        if not parts:
            raise JaxchatError(f"{path}: no text; expected some, in UTF-8")
        whole_text = np.concatenate([*parts, np.array(self._eos[:1], np.int32)])
        start = np.array(self._start, np.int32)
        size = self.max_length - len(start)
        return [np.concatenate([start, whole_text[at : at + size]]) for at in range(0, len(whole_text), size)]

    def piece(self, ids: np.ndarray, place: str) -> Example | None:
        """One of `pieces` as an example."""
        return self._example((ids.tolist(), [1.0] * len(ids)), place)

    # --- texts

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text."""
        bos = self.tokenizer.bos_id
        return [bos] if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else []

    def _text_ids(self, text: str) -> tuple[list[int], list[float]]:
        ids = self.tokenizer.encode(text) if text else []
        if ids and ids[-1] not in self._eos:
            ids = [*ids, *self._eos[:1]]
        return ids, [1.0] * len(ids)

    def _more_ids(self, text: str, before: int | None) -> list[int]:
        """The ids of a text that goes on after others, without BOS and EOS."""
        tokenizer = self.tokenizer
        if before is None or not isinstance(tokenizer, TextTokenizer):
            return tokenizer.encode(text, add_special_tokens=False)
        breaker = unused_marks(text)[0]
        return tokenizer.encode_after(tokenizer.break_control(text, breaker), after=before, breaker=breaker)

    def _example(self, learnt: tuple[list[int], list[float]], place: str) -> Example | None:
        """Cut to size, and after the last token that is learnt; None if there is none."""
        ids = np.array(learnt[0][: self.max_length], np.int32)
        weights = np.array(learnt[1][: self.max_length], np.float32)
        weights[:1] = 0
        last = np.flatnonzero(weights)
        if not len(last):
            return None
        return Example(ids[: last[-1] + 1], weights[: last[-1] + 1], place)

    # --- conversations

    def _chat_of(self, task: Task) -> Chat:
        system = [{"role": "system", "content": task.system}] if task.system else []
        content = f"{task.instruction}{self._input}{task.input}" if task.input.strip() else task.instruction
        reply = {"role": "assistant", "content": task.output}
        return Chat([*system, {"role": "user", "content": content}, reply])

    def _conversation(self, chat: Chat, template: ChatTemplate, place: str) -> Encoded:
        tags = self._tags or thought_tags_of(template.source)
        tools = {} if chat.tools is None else {"tools": chat.tools}
        prompts = Prompts(template, self.tokenizer, tags, self._variables | tools)
        rendering = _Rendering(prompts, self.tokenizer, tags, chat.messages)
        if len(rendering.replies) > _MANY:
            return self._rendered(self._fitting(rendering), place)
        encoded = self._rendered(rendering, place)
        return encoded if encoded.example else self._rendered(self._fitting(rendering), place)

    def _rendered(self, rendering: _Rendering, place: str) -> Encoded:
        everything = self.train_on == "all"
        pieces, unlearnt = rendering.pieces(rest=everything)
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            new = self._piece_ids(piece, ids[-1] if ids else None)
            ids += new
            weights += [float(piece.learnt or everything)] * len(new)
            if len(ids) >= self.max_length:
                break
        return Encoded(self._example((ids, weights), place), 0 if everything else unlearnt)

    def _fitting(self, rendering: _Rendering) -> _Rendering:
        """The longest beginning of a conversation whose last reply begins within `max_length` tokens.

        Where the template takes something out of all replies but the last, only that one can be learnt. To
        learn all of a conversation, another message is of use: some of it may be within them.
        """
        # Each message has one token, or more.
        low, high = 0, min(len(rendering.replies), self.max_length)
        while low < high:
            count = (low + high + 1) // 2
            head = rendering.up_to(count).head
            ids = self._piece_ids(_Piece(head.marked, head.breaker), None)
            low, high = (count, high) if len(ids) < self.max_length else (low, count - 1)
        return rendering.up_to(min(low + (self.train_on == "all"), len(rendering.replies)))

    def _piece_ids(self, piece: _Piece, after: int | None) -> list[int]:
        breaker = piece.breaker if piece.breaker in piece.marked else ""
        ids = encoded(self.tokenizer, piece.marked, after=after, breaker=breaker) if piece.marked else []
        return ids if piece.ended else [*ids, *(piece.end_ids or self._eos)[:1]]


_MANY = 16
"""Replies of a conversation that is cut to size before each of them is looked at."""


class _Piece(NamedTuple):
    """A stretch of a rendered conversation that is tokenized for itself, as in a chat.

    Attributes:
        marked, breaker: see `Prompt`.
        learnt: it is a reply, and what ends it.
        ended: false if the template writes no end: the first of `end_ids` follows, or EOS.
    """

    marked: str
    breaker: str
    learnt: bool = False
    ended: bool = True
    end_ids: tuple[int, ...] = ()


class _Reply(NamedTuple):
    """A reply as the last message: after the prompt `head` the model writes `body`, then `after` follows."""

    head: Prompt
    body: Prompt
    after: str


class _Rendering:
    """How a chat template writes a conversation, in pieces."""

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: Tokenizer,
        tags: ThoughtTags | None,
        messages: Sequence[Mapping[str, Any]],
    ) -> None:
        self._prompts, self._tokenizer, self._tags = prompts, tokenizer, tags
        self._messages = [Message(self._readable(m), m["role"] == "assistant") for m in messages]
        self.replies = [at for at, message in enumerate(self._messages) if message.generated]

    def up_to(self, count: int) -> _Rendering:
        """That of the conversation up to and with so many of its replies."""
        if count == len(self.replies):
            return self
        stop = self.replies[count - 1] + 1 if count else 0
        messages = [message.values for message in self._messages[:stop]]
        return _Rendering(self._prompts, self._tokenizer, self._tags, messages)

    @property
    def head(self) -> Prompt:
        """The prompt of the last reply."""
        return self._prompts.before(self._messages[: self.replies[-1]], "assistant")

    def pieces(self, *, rest: bool) -> tuple[list[_Piece], int]:
        """The pieces up to the last reply (`rest`: and what follows), and how many replies are unlearnt."""
        replies = self.replies
        if not replies:
            whole = self._prompts.whole(self._messages) if rest and self._messages else None
            return ([] if whole is None else [_Piece(whole.marked, whole.breaker)]), 0
        last = self._reply(replies[-1])
        self._require_system(last.head.text)
        pieces, at = self._earlier(replies[:-1], last.head)
        end = self._end(last.after, last.head)
        tail = last.head.tail if end is None and last.head.stop_ids else ""
        pieces += [
            _Piece(_cut(last.head, at, len(last.head.text)), last.head.breaker),
            _Piece(
                last.body.marked + (tail if end is None else last.after[:end]),
                last.body.breaker,
                learnt=True,
                ended=end is not None,
                end_ids=last.head.stop_ids,
            ),
        ]
        if rest and replies[-1] + 1 < len(self._messages):
            pieces += self._after(last.head.text + last.body.text + last.after[: end or 0])
        return pieces, len(replies) - sum(piece.learnt for piece in pieces)

    def _earlier(self, replies: Sequence[int], base: Prompt) -> tuple[list[_Piece], int]:
        """Pieces of the last reply's prompt, each reply in it that stands there as it was written a piece.

        Returns:
            They, and how many characters of the prompt they have.
        """
        pieces, at = [], 0
        for number in replies:
            reply = self._reply(number)
            start = len(reply.head.text)
            stop = start + len(reply.body.text)
            if start < at or not base.text.startswith(reply.head.text + reply.body.text):
                continue
            end = self._end(base.marked_after(stop), reply.head)
            if end is not None:
                pieces.append(_Piece(_cut(base, at, start), base.breaker))
                pieces.append(_Piece(_cut(base, start, stop + end), base.breaker, learnt=True))
                at = stop + end
        return pieces, at

    def _after(self, text: str) -> list[_Piece]:
        """What the template writes after the last reply, if it is written after `text`."""
        whole = self._prompts.whole(self._messages)
        if not whole.text.startswith(text):
            return []
        return [_Piece(whole.marked_after(len(text)), whole.breaker)]

    def _reply(self, number: int) -> _Reply:
        """One of the messages as the model has to write it.

        Raises:
            UsageError: the template writes something else.
        """
        history, reply = self._messages[:number], self._messages[number]
        head = self._prompts.before(history, "assistant")
        whole = self._prompts.whole([*history, reply])
        after = self._after_reply(history, whole.text)
        length = len(whole.text) - len(after) - len(head.text)
        if length > 0 and whole.text.startswith(head.text) and whole.text.endswith(after):
            text = whole.text[len(head.text) :][:length]
            if self._says(text, reply):
                marked = _cut(whole, len(head.text), len(head.text) + length)
                return _Reply(head, Prompt(marked, text, whole.breaker), after)
        content: str = reply.values["content"]
        if self._tags is None or "tool_calls" in reply.values or "reasoning_content" in reply.values:
            raise UsageError(
                f"the chat template does not write reply {number} ({content[:40]!r}) as the model has to"
            )
        return _Reply(head, self._spelled(content, head, history), after)

    def _after_reply(self, history: Sequence[Message], text: str) -> str:
        """What the template writes after a reply that is the last message."""
        sentinel = unused_text(text)
        reply = Message({"role": "assistant", "content": sentinel}, generated=True)
        _, found, after = self._prompts.whole([*history, reply]).text.rpartition(sentinel)
        if not found:
            raise UsageError("the chat template does not write out what the assistant says")
        return after

    def _says(self, text: str, reply: Message) -> bool:
        """Whether a rendered reply has the content of the message, and its reasoning if that had any."""
        content: str = reply.values["content"]
        if reply.values.get("reasoning_content", "").strip() not in text:
            return False
        if self._tags is None or self._tags[1] not in content:
            return content.strip() in text
        return self._tags[1] in text and content.rpartition(self._tags[1])[2].strip() in text

    def _spelled(self, content: str, head: Prompt, history: Sequence[Message]) -> Prompt:
        """A reply as it is: templates of models that think may not write what they have thought."""
        assert self._tags is not None
        if head.opened:
            start, found, rest = content.partition(self._tags[0])
            thought = found and not start.strip()
            lead = self._prompts.lead(history, head.text, "content")
            content = rest.lstrip("\n") if thought else lead + content
        breaker = unused_marks(content)[0]
        marked = content
        if isinstance(self._tokenizer, TextTokenizer):
            marked = self._tokenizer.break_control(content, breaker, but=self._tags)
        return Prompt(marked, content, breaker)

    def _end(self, after: str, head: Prompt) -> int | None:
        """How many characters of what follows a reply end it; None if none do.

        White space may stand before what ends it.
        """
        tokens = self._tokenizer
        added = tokens.added_tokens if isinstance(tokens, TextTokenizer) else tokens.special_tokens
        texts = [text for text, number in added.items() if number in head.stop_ids]
        found = (re.match(rf"\s*?{re.escape(text)}", after) for text in (*texts, *head.stop_strings))
        return min((match.end() for match in found if match), default=None)

    def _require_system(self, text: str) -> None:
        for message in self._messages:
            content = message.values["content"]
            if message.values["role"] == "system" and content.strip() not in text:
                self._prompts.require_system_support(content)

    def _readable(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message in the keys that the template reads."""
        reasoning = message.get("reasoning_content")
        if reasoning is None or self._prompts.reads_reasoning:
            return message
        if self._tags is None:
            raise UsageError("a message has 'reasoning_content', and the chat template knows no reasoning")
        spelled = f"{self._tags[0]}\n{reasoning}\n{self._tags[1]}\n\n{message['content']}"
        return {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": spelled}


def _cut(prompt: Prompt, start: int, stop: int) -> str:
    """`marked` from where one number of characters of `text` end in it to where another do."""
    rest = prompt.marked_after(start)
    return rest[: len(rest) - len(prompt.marked_after(stop))]


# --- data sets

_UNKNOWN, _GOOD, _SKIPPED, _EMPTY = range(4)


class _Pieces:
    """The pieces of a text file."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self.path = path
        self._pieces = encoder.pieces(path)
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, index: int) -> Encoded:
        return Encoded(self._encoder.piece(self._pieces[index], f"{self.path}, piece {index + 1}"))


class _JsonRecords:
    """The records of a JSON file."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self._records: Records = records_of(path)
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._records)

    def encode(self, index: int) -> Encoded:
        place = self._records.place(index)
        return self._encoder.encode(record_of(self._records.read(index), place), place)


class Dataset:
    """The examples of data files, in the files' order.

    Args:
        paths: files (JSON Lines, JSON lists, text) and directories of such.
        encoder: makes examples of records.
        skip_bad_lines: leave bad records out, and count them; default they are errors.
        lazy: make each example when it is asked for, and keep none. Otherwise all are made at once, kept, and
            those without anything to learn left out.
        progress: called with how many records are done, and how many there are, while all are gone through.

    Attributes:
        encoder: as above.
        skipped: bad records met so far.
        empty: records met so far in which nothing is learnt, within `max_length`.
        unlearnt: replies met so far that are not learnt, see `Encoded`.

    Raises:
        UsageError: a path leads to no data.
        JaxchatError: a file cannot be read, or a record is bad; names file and line. If lazy, only once its
            records are asked for: opening a large file takes no time.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        encoder: Encoder,
        *,
        skip_bad_lines: bool = False,
        lazy: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.encoder = encoder
        self.skipped = self.empty = self.unlearnt = 0
        self._files = data_files(paths)
        self._skip, self._progress = skip_bad_lines, progress
        self._examples: list[Example] | None = None
        if not lazy:
            self._examples = list(self._all())
            if not self._examples:
                raise JaxchatError(f"{self._files[0]}: {self.nothing}")

    @cached_property
    def digest(self) -> str:
        """Tells this data from other data, wherever it lies."""
        return digest(self._files)

    @cached_property
    def lengths(self) -> np.ndarray:
        """How many tokens each example has, 0 where there is none: int32 [N]. Makes all of them once."""
        found = np.zeros(len(self), np.int32)
        for index in range(len(self)):
            example = self[index]
            found[index] = 0 if example is None else len(example.ids)
            if self._examples is None:
                self._tell(index + 1)
        return found

    @property
    def nothing(self) -> str:
        """What to say where there is no example at all."""
        return (
            f"nothing to learn: {self.skipped} bad records, {self.empty} without a reply within "
            f"{option('max_length', self.encoder.max_length)}; give other data"
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._examples is None else len(self._examples)

    def __getitem__(self, index: int) -> Example | None:
        """An example; None if it is left out: bad, or nothing to learn.

        Raises:
            JaxchatError: the record is bad; names file and line.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._encoded(int(index)) if self._examples is None else self._examples[index]

    @cached_property
    def _sources(self) -> list[_Pieces | _JsonRecords]:
        return [(_Pieces if is_text(path) else _JsonRecords)(path, self.encoder) for path in self._files]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source) for source in self._sources])

    @cached_property
    def _states(self) -> np.ndarray:
        """What is known of each record, so that each counts once."""
        return np.zeros(int(self._ends[-1]), np.uint8)

    def _all(self) -> Iterator[Example]:
        for index in range(int(self._ends[-1])):
            example = self._encoded(index)
            self._tell(index + 1)
            if example is not None:
                yield example

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, int(self._ends[-1]))

    def _encoded(self, index: int) -> Example | None:
        if self._states[index] in (_SKIPPED, _EMPTY):
            return None
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[number]
        try:
            example, unlearnt = source.encode(index - int(self._ends[number]) + len(source))
        except RecordError:
            if not self._skip:
                raise
            self._note(index, _SKIPPED)
            return None
        if self._states[index] == _UNKNOWN:
            self.unlearnt += unlearnt
        self._note(index, _EMPTY if example is None else _GOOD)
        return example

    def _note(self, index: int, state: int) -> None:
        """A record without an example is never made again: each counts once."""
        self._states[index] = state
        self.skipped += state == _SKIPPED
        self.empty += state == _EMPTY
