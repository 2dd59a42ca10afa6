"""From the ids of a message to its text: the one place where it is derived, while it grows or afterwards.

Text and ids only: when ids come is up to `replies`, where the message goes to `conversation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxchat.chat.opening import Opening
from jaxchat.text.reasoning import Kind, Piece, ReasoningSplitter, ThoughtTags, overlap
from jaxchat.text.tokenizer import Detokenizer, Tokenizer


class MessageText:
    """Text of one message while its ids come.

    Detokenizes, holds back what may turn out to be no part of it (a stop string, the white space before the
    end), and tells reasoning from content. Special tokens are no part of the text, but stop strings find them
    by their names, as if they were.

    Args:
        tokenizer: None is no text.
        opening: what the message begins with.
        kept: so many of the ids that open it stay; the others are pushed again, as they are or drawn anew.
        tags: what the model thinks between.
        stops: strings that end the message, beside those of its role.
        end_ids: ids that end the message and are no text of it, beside those of its role.

    Attributes:
        whole: all of it but special tokens (thought tags are not), stop strings and what the template writes.
        ended: the last id ended it.
        stopped: a stop string ended it.
        dropped: how many characters the stop string has, and what was said after it, special tokens by name.
        hidden: ids that are no text of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        opening: Opening,
        *,
        kept: int = 0,
        tags: ThoughtTags | None = None,
        stops: Sequence[str] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        self._opening = opening
        self._tokenizer = tokenizer
        self._special = hidden_ids(tokenizer, tags)
        self.hidden = self._special.union(opening.stop_ids, end_ids)
        self._stops = tuple(dict.fromkeys((*stops, *opening.stop_strings)))
        self._tags = tags
        start = [*opening.prompt, *opening.ids[:kept]]
        self._detokenizer = self._detokenizer_after(start)
        self._skip = self._characters_after(start, opening.ids[kept:])
        # A user's message has no reasoning.
        self._splitter = ReasoningSplitter(
            None if opening.role == "user" else tags, opened=bool(opening.opened)
        )
        self.whole = opening.continued or ""
        self._before = self._splitter.push(self.whole)
        self._pieces: list[Piece] = []
        self._held: list[tuple[str, bool]] = []  # stretches of text, and whether they are text of the message
        self._closed = False
        self.ended = self.stopped = False
        self.dropped = 0

    def begin(self) -> list[Piece]:
        """The text that is given, no draw of the model's."""
        return self._shown(self._opening.given)

    def push(self, token_id: int) -> list[Piece]:
        """Adds an id; returns the text that is now certain."""
        self.ended = token_id in self.hidden
        if self._detokenizer is None or self._tokenizer is None:
            return []
        if self.ended:
            text = self._tokenizer.decode([token_id]) if self._stops else ""
        else:
            text = self._detokenizer.push(token_id)
        if self.stopped:
            self.dropped += len(text)
            return []
        return self._release(text, visible=not self.ended)

    def end(self) -> list[Piece]:
        """Ends the message; returns the rest of the text."""
        if self._detokenizer is None or self._closed:
            return []
        self._closed = True
        rest = self._detokenizer.flush()
        if self.stopped:
            self.dropped += len(rest)
        pieces = [] if self.stopped else self._release(rest, last=True)
        return [*pieces, *self._noted(self._splitter.flush())]

    @property
    def text(self) -> str | None:
        """All that was returned so far; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(piece.text for piece in self._pieces)

    def part(self, kind: Kind) -> str:
        """What of that is of one kind."""
        return _joined(self._pieces, kind)

    @property
    def content(self) -> str:
        """What of the whole message is no reasoning."""
        return _joined([*self._before, *self._pieces], "content")

    @property
    def reasoning(self) -> str | None:
        """The reasoning of the whole message; None if nothing in it was, "" if it was empty."""
        if self.content == self.whole and not self._opening.opened:
            return None
        return _joined([*self._before, *self._pieces], "reasoning")

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told from content."""
        return self._tags is not None

    def _detokenizer_after(self, ids: Sequence[int]) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        all_hidden = len(self._special) == len(self._tokenizer.special_tokens)
        return Detokenizer(self._tokenizer, prompt_ids=ids, skip_special_tokens=all_hidden)

    def _characters_after(self, start: Sequence[int], ids: Sequence[int]) -> int:
        """Characters of the text of ids that follow `start`; a character that they only begin is none."""
        detokenizer = self._detokenizer_after(start)
        if detokenizer is None:
            return 0
        return sum(len(detokenizer.push(i)) for i in ids if i not in self._special)

    def _release(self, text: str, *, visible: bool = True, last: bool = False) -> list[Piece]:
        if visible:
            self._skip, text = max(self._skip - len(text), 0), text[self._skip :]
        if text:
            self._held.append((text, visible))
        held = "".join(text for text, _ in self._held)
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self.dropped = len(held) - min(found)
            out = self._take(min(found)).removesuffix(self._opening.tail)
            self._held = []
        elif last:
            out = self._take(len(held))
            out = out.removesuffix(self._opening.tail) if self.ended else out
        elif not visible:
            return []  # what is held back before it may be white space before the end
        else:
            out = self._take(len(held) - self._undecided(held))
        return self._shown(out)

    def _take(self, count: int) -> str:
        """Takes `count` characters off what is held back; returns those of them that are text."""
        out, rest = "", []
        for text, visible in self._held:
            out += text[:count] if visible else ""
            rest += [(text[count:], visible)] if count < len(text) else []
            count = max(count - len(text), 0)
        self._held = rest
        return out

    def _undecided(self, held: str) -> int:
        """Characters held back that may begin a stop string, or stand between the message and its end."""
        stop = max((overlap(held, stop) for stop in self._stops), default=0)
        tail = self._opening.tail + "\0"  # all of the tail is a proper prefix of this
        return max(stop + overlap(held[: len(held) - stop], tail), overlap(held, tail))

    def _shown(self, text: str) -> list[Piece]:
        self.whole += text
        return self._noted(self._splitter.push(text)) if text else []

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        self._pieces += pieces
        return pieces


def hidden_ids(tokenizer: Tokenizer | None, tags: ThoughtTags | None) -> frozenset[int]:
    """Special tokens that are no text of a message: all but the thought tags."""
    special = tokenizer.special_tokens if tokenizer else {}
    return frozenset(special.values()) - {special[tag] for tag in tags or () if tag in special}


def _joined(pieces: Sequence[Piece], kind: Kind) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)
