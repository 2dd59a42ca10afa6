"""The ledger of a conversation: its token ids beside the text that they stand for, chunk by chunk.

Knows no messages and no template: prompts come from `prompts`, replies from `conversation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.chat.prompts import Prompt
from jaxchat.lengths import common_prefix
from jaxchat.text.healing import join
from jaxchat.text.tokenizer import Detokenizer, TextTokenizer, Tokenizer


@dataclass(frozen=True)
class Chunk:
    """A stretch of the ledger: rendered by the template, or generated.

    `ends[k]` is the length of the text of a reply's first k+1 ids, -1 where a cut splits a character; None
    for rendered text, which can be tokenized again with the same result.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int, ...] | None = None

    @property
    def is_consistent(self) -> bool:
        """Whether it can be one: an end an id, each within the text."""
        return self.ends is None or (
            len(self.ends) == len(self.ids) and all(-1 <= end <= len(self.text) for end in self.ends)
        )

    def head(self, length: int) -> Chunk:
        """The longest prefix of whole ids of a reply whose text is within the first `length` characters."""
        assert self.ends is not None
        keep = max((k + 1 for k, end in enumerate(self.ends) if 0 <= end <= length), default=0)
        text = self.text[: self.ends[keep - 1]] if keep else ""
        return Chunk(text, self.ids[:keep], self.ends[:keep])


@dataclass(frozen=True)
class Ledger:
    """Rendered chunks and generated ones in turn. A value: what changes it returns another."""

    chunks: tuple[Chunk, ...] = ()

    @property
    def ids(self) -> list[int]:
        """All ids."""
        return [i for chunk in self.chunks for i in chunk.ids]

    @property
    def text(self) -> str:
        """What they stand for, special tokens included."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def ends_with_reply(self) -> bool:
        """Whether a generated chunk is the last."""
        return bool(self.chunks) and self.chunks[-1].ends is not None

    def replied(self, chunk: Chunk, *, replaces: bool = False) -> Ledger:
        """With a generated chunk at the end; `replaces`: instead of the last."""
        return Ledger((*(self.chunks[:-1] if replaces else self.chunks), chunk))

    def rendered(self, prompt: Prompt, tokenizer: Tokenizer) -> Ledger:
        """The ledger of a prompt: the chunks that its text starts with, and one with the rest."""
        kept = self._matching(prompt.text)
        start = sum(len(chunk.text) for chunk in kept)
        after = next((c.ids[-1] for c in reversed(kept) if c.ids), None)
        rest = prompt.marked_after(start)
        ids = encoded(tokenizer, rest, after=after, breaker=prompt.breaker if prompt.breaker in rest else "")
        return Ledger((*kept, Chunk(prompt.text[start:], tuple(ids))))

    def _matching(self, text: str) -> list[Chunk]:
        """The longest prefix of the ledger that `text` starts with.

        A rendered chunk stays only before a reply that stays: tokenizing it again gives the same ids, and the
        right ones where its last token merges with what now follows.
        """
        kept: list[Chunk] = []
        at = 0
        for chunk in self.chunks:
            if text.startswith(chunk.text, at):
                kept.append(chunk)
                at += len(chunk.text)
                continue
            if chunk.ends is not None:
                kept.append(chunk.head(common_prefix(chunk.text, text[at : at + len(chunk.text)])))
            break
        while kept and (kept[-1].ends is None or not kept[-1].ids):
            kept.pop()
        return kept


def encoded(tokenizer: Tokenizer, text: str, *, after: int | None, breaker: str = "") -> list[int]:
    """Ids of rendered text that follows the id `after`; special tokens spelled out are those."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.encode_after(text, after=after, breaker=breaker or None)
    return tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def decoded(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    ids: Sequence[int],
    *,
    hidden: frozenset[int] = frozenset(),
    cut: bool = True,
) -> Chunk:
    """Ids that were generated after `prompt` as a chunk; those that are `hidden` have no text.

    `cut`: a character that the last ids only begin is U+FFFD, as nothing follows; otherwise it is left out.
    """
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt, skip_special_tokens=False)
    text, ends = "", []
    for token_id in ids:
        if token_id not in hidden:
            text += detokenizer.push(token_id)
        ends.append(-1 if detokenizer.pending else len(text))
    return Chunk(text + (detokenizer.flush() if cut else ""), tuple(ids), tuple(ends))


def shortened(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], characters: int, hidden: frozenset[int]
) -> list[int]:
    """`ids` without the last `characters` of their text, a token across that place cut in two.

    The characters are those of all ids; of one that is `hidden` no part stays.
    """
    whole = decoded(tokenizer, prompt, ids)
    length = len(whole.text) - characters
    head = whole.head(length)
    rest = whole.text[len(head.text) : length]
    if len(head.ids) < len(ids) and ids[len(head.ids)] in hidden:
        rest = ""
    return join(tokenizer, head.ids, rest, after=prompt[-1] if prompt else None)
