"""Token boundaries where a given text and a generated one meet: the ids are to be those of both as one text.

Pure functions of a tokenizer. A given text's last tokens are drawn again among those that spell it and may
go beyond it (token healing); then the tokens at the joint are made those of the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product

from jaxchat.lengths import common_prefix
from jaxchat.text.tokenizer import TextTokenizer, Tokenizer, unused_marks

_ORDINARY = -1  # stands for the id of any ordinary token

SETTLED_AFTER = 4
"""Tokens after a joint from which on more text no longer changes how the joint is cut, as a rule."""


class Healing:
    """Draws the last tokens of a given text anew, so that one token can span its end.

    As many tokens are taken back as some longer token begins with. Going on, each draw is either the given
    text's own next token, or one whose bytes begin with all that is left of the text.

    Args:
      tokenizer: of the ids.
      ids: the given text.

    Attributes:
      kept: how many of `ids` stay; the others are to be drawn again.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        back = _taken_back(tokenizer, ids) if _heals(tokenizer) else 0
        self.kept = len(ids) - back
        self._tokenizer = tokenizer
        self._left = list(ids[self.kept :])

    def allowed(self) -> list[int]:
        """The ids that the next token may be; empty once the whole text is spelled: any."""
        if not self._left:
            return []
        assert isinstance(self._tokenizer, TextTokenizer)
        return sorted({self._left[0], *self._tokenizer.ids_starting_with(self._rest())})

    def push(self, token_id: int) -> bool:
        """Takes a drawn token; true if it says nothing beyond the given text."""
        if not self._left:
            return False
        assert isinstance(self._tokenizer, TextTokenizer)
        rest, drawn = self._rest(), self._tokenizer.token_bytes(token_id)
        if token_id == self._left[0] and not drawn.startswith(rest):
            del self._left[0]
            return True
        self._left = []
        return drawn == rest

    def _rest(self) -> bytes:
        return _bytes(self._tokenizer, self._left)


def join(tokenizer: Tokenizer, ids: Sequence[int], text: str, *, after: int | None) -> list[int]:
    """`ids` with `text` appended, cut where the tokenizer would cut both together.

    Args:
      tokenizer: of the ids.
      ids: what is there, kept as it is except where a token of the whole spans its end.
      text: what comes next. Special tokens spelled out in it are text.
      after: the id before `ids`; None at the beginning of everything.
    """
    if not text:
        return list(ids)
    start = _run_start(tokenizer, ids, len(ids))
    before = ids[start - 1] if start else after
    run = list(ids[start:])
    whole = _encode_run(tokenizer, run, text, before)
    if whole is None:
        return [*ids, *_encode_alone(tokenizer, text, ids[-1] if ids else after)]
    left = _changed_from(tokenizer, run, whole, len(_bytes(tokenizer, run)), before)
    return [*ids[:start], *_splice(tokenizer, run, whole, left, len(_bytes(tokenizer, whole)))]


def settle(tokenizer: Tokenizer, ids: Sequence[int], joint: int, *, after: int | None) -> list[int]:
    """`ids` with those across byte `joint` as the tokenizer would cut the text; the others stay.

    Args:
      tokenizer: of the ids.
      ids: a given text and what was generated after it.
      joint: where the given text ends, in bytes of `ids`.
      after: the id before `ids`.
    """
    ids = list(ids)
    if not _heals(tokenizer):
        return ids
    ends = list(accumulate(len(_bytes(tokenizer, [i])) for i in ids))
    at = next((k + 1 for k, end in enumerate(ends) if end >= joint), len(ids))
    start = _run_start(tokenizer, ids, at)
    stop = next((k for k in range(at, len(ids)) if _is_barrier(tokenizer, ids[k])), len(ids))
    stop = _last_whole_character(tokenizer, ids, start, stop)
    offset = ends[start - 1] if start else 0
    if stop < at or joint <= offset:
        return ids
    before = ids[start - 1] if start else after
    whole = _encode_run(tokenizer, ids[start:stop], "", before)
    if whole is None:
        return ids
    left = _changed_from(tokenizer, ids[start:stop], whole, joint - offset, before)
    middle = _splice(tokenizer, ids[start:stop], whole, left, joint - offset)
    return [*ids[:start], *middle, *ids[stop:]]


def byte_length(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Bytes that `ids` stand for; 0 where the tokenizer's tokens have none of their own."""
    return len(_bytes(tokenizer, ids)) if _heals(tokenizer) else 0


def literal(tokenizer: Tokenizer, text: str) -> tuple[str, str | None]:
    """`text` with the names of control tokens broken by a character, and that character, if there are any."""
    if not isinstance(tokenizer, TextTokenizer) or not tokenizer.control_regex.search(text):
        return text, None
    breaker = unused_marks(text)[0]
    return tokenizer.break_control(text, breaker), breaker


def _heals(tokenizer: Tokenizer) -> bool:
    """Whether text is the concatenation of its tokens' bytes."""
    return isinstance(tokenizer, TextTokenizer) and getattr(tokenizer, "decodes_by_piece", True)


def _bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    assert isinstance(tokenizer, TextTokenizer)
    return b"".join(tokenizer.token_bytes(i) for i in ids)


def _is_barrier(tokenizer: Tokenizer, token_id: int) -> bool:
    """A control token: text is never tokenized across one."""
    return isinstance(tokenizer, TextTokenizer) and tokenizer.is_control(token_id)


def _run_start(tokenizer: Tokenizer, ids: Sequence[int], stop: int) -> int:
    """Where the run of ordinary tokens that ends at `stop` starts."""
    return next((k + 1 for k in range(stop - 1, -1, -1) if _is_barrier(tokenizer, ids[k])), 0)


def _taken_back(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """The most last tokens whose bytes some longer token begins with."""
    assert isinstance(tokenizer, TextTokenizer)
    found, text = 0, b""
    for count, token_id in enumerate(reversed(ids), start=1):
        text = tokenizer.token_bytes(token_id) + text
        if tokenizer.is_control(token_id) or len(text) >= tokenizer.longest_token:
            break
        if any(len(tokenizer.token_bytes(i)) > len(text) for i in tokenizer.ids_starting_with(text)):
            found = count
    return found


def _encode_text(tokenizer: Tokenizer, text: str, after: int | None) -> list[int]:
    if not isinstance(tokenizer, TextTokenizer):
        return tokenizer.encode(text, add_special_tokens=False)
    broken, breaker = literal(tokenizer, text)
    return tokenizer.encode_after(broken, after=after, breaker=breaker)


def _encode_alone(tokenizer: Tokenizer, text: str, after: int | None) -> list[int]:
    """The ids of `text` where it is no continuation of a run."""
    ids = _encode_text(tokenizer, text, after)
    if _heals(tokenizer) and _swallowed(text, _bytes(tokenizer, ids)):
        return _encode_text(tokenizer, text, _ORDINARY)
    return ids


def _encode_run(tokenizer: Tokenizer, run: Sequence[int], text: str, before: int | None) -> list[int] | None:
    """The tokenizer's ids of a run of ordinary tokens and a text after it; None if they spell another."""
    if not _heals(tokenizer):
        return None
    assert isinstance(tokenizer, TextTokenizer)
    return _encode_bytes(tokenizer, _bytes(tokenizer, run), text, before)


def _encode_bytes(
    tokenizer: TextTokenizer, spelled: bytes, text: str, before: int | None
) -> list[int] | None:
    """The tokenizer's ids that spell these bytes and a text after them, if there are such."""
    if not _is_text(spelled):
        return None
    head = spelled.decode()
    # A first space may be one that the tokenizer adds by itself; special tokens may swallow white space.
    heads = (head, head[1:]) if head.startswith(" ") else (head,)
    for given, after in product(heads, (before, _ORDINARY)):
        whole = _encode_text(tokenizer, given + text, after)
        found = _bytes(tokenizer, whole)
        if found == spelled or (text and found.startswith(spelled) and not _swallowed(head + text, found)):
            return whole
    return None


def _swallowed(text: str, spelled: bytes) -> bool:
    """Whether a special token before `text` has swallowed its first white space, as Phi-3's do."""
    return text[:1].isspace() and not spelled[:1].isspace()


def _changed_from(
    tokenizer: Tokenizer, ids: Sequence[int], whole: Sequence[int], joint: int, before: int | None
) -> int:
    """The byte from which what precedes `joint` is cut otherwise as a part of the whole than alone."""
    assert isinstance(tokenizer, TextTokenizer)
    alone = _encode_bytes(tokenizer, _bytes(tokenizer, ids)[:joint], "", before) or []
    same = alone[: common_prefix(alone, whole)]
    return min(len(_bytes(tokenizer, same)), joint) if alone else joint


def _last_whole_character(tokenizer: Tokenizer, ids: Sequence[int], start: int, stop: int) -> int:
    """The last place up to `stop` before which the tokens from `start` on are valid UTF-8."""
    try:
        _bytes(tokenizer, ids[start:stop]).decode()
        return stop
    except UnicodeDecodeError as error:
        valid = error.start
    while stop > start and len(_bytes(tokenizer, ids[start:stop])) > valid:
        stop -= 1
    while stop > start and not _is_text(_bytes(tokenizer, ids[start:stop])):
        stop -= 1
    return stop


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _splice(tokenizer: Tokenizer, old: Sequence[int], new: Sequence[int], left: int, right: int) -> list[int]:
    """`new` between the common token boundaries around bytes `left` to `right`, `old` before and after."""
    old_ends = {end: k for k, end in enumerate(accumulate((_length(tokenizer, i) for i in old), initial=0))}
    new_ends = {end: k for k, end in enumerate(accumulate((_length(tokenizer, i) for i in new), initial=0))}
    common = sorted(old_ends.keys() & new_ends.keys())
    low = max(end for end in common if end <= left)
    high = next((end for end in common if end >= right), None)
    if high is None:
        return [*old[: old_ends[low]], *new[new_ends[low] :]]
    return [*old[: old_ends[low]], *new[new_ends[low] : new_ends[high]], *old[old_ends[high] :]]


def _length(tokenizer: Tokenizer, token_id: int) -> int:
    return len(_bytes(tokenizer, [token_id]))
