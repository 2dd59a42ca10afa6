"""How probable texts are to a model: contexts and continuations as token ids, and long texts in windows.

`ModelProbe` is what asks a model; replies are `replies.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.evaluation.items import Found, Generation, Prompt, Reply, Request, Turn
from jaxchat.evaluation.replies import conversation_of, replies
from jaxchat.visible import shown

if TYPE_CHECKING:
    from jaxchat.runtime import Model

Pair = tuple[list[int], list[int]]

WINDOW = 1024
"""Tokens of a window, unless the context is shorter."""


@dataclass(frozen=True)
class ModelProbe:
    """Asks a model; see `items.Probe`.

    Attributes:
      model: under its plan.
      batch: sequences computed together.
      window: tokens of a window that long texts are read in; None is `WINDOW`, or the context if shorter.
      stride: how far apart windows begin, so that each sees `window - stride` tokens of the one before; None
        is half a window.

    Raises:
      UsageError: a window that the context does not hold, or a stride of a whole one.
    """

    model: "Model"
    batch: int = 8
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        window, stride = windows_of(self.window, self.stride, self.limit)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "stride", stride)

    @property
    def limit(self) -> int:
        """Tokens of the longest context."""
        return self.model.engine.max_length

    def likelihoods(self, requests: Sequence[Request]) -> list[Found]:
        """See `Probe`; a request that is there twice is computed once.

        A context that is too long is cut on the left. A continuation that is too long itself is read in
        windows.
        """
        pairs = {request: encode_pair(self.model, *request) for request in dict.fromkeys(requests)}
        for request, (_, continuation) in pairs.items():
            if not continuation:
                raise JaxchatError(
                    f"the continuation {shown(request.continuation)} adds no token to its context "
                    f"{shown(request.context)}; give one that does"
                )
        found = dict(zip(pairs, self._found([self._fitted(*pair) for pair in pairs.values()]), strict=True))
        return [found[request] for request in requests]

    def passages(self, passages: Sequence[tuple[str, str]]) -> list[Found]:
        """See `Probe`."""
        assert self.window is not None
        assert self.stride is not None
        spread = []
        for before, text in passages:
            context, ids = encode_pair(self.model, before, text)
            if not ids:
                raise JaxchatError(f"the text {shown(text)} has no token; give one that has")
            overlap = self.window - self.stride
            spread.append(
                (list(_windows(context, ids, self._first(), window=self.window, overlap=overlap)), 0)
            )
        return self._found(spread)

    def replies(self, items: Sequence[Generation]) -> list[Reply]:
        """See `Probe`."""
        return replies(self.model, items)

    def _first(self) -> list[int]:
        """What begins every window: the BOS, where the model's texts begin with one."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        begins = self.model.encode("a")[:1]
        return begins if begins == [tokenizer.bos_id] else []

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[Pair], int]:
        """One pair, or windows of a continuation that fills the context, and how many tokens were cut."""
        limit = self.limit
        if len(continuation) < limit:
            kept = context[-(limit - len(continuation)) :]
            return [(kept, continuation)], len(context) - len(kept)
        return list(_windows(context, continuation, self._first(), window=limit, overlap=limit // 2)), 0

    def _found(self, spread: Sequence[tuple[list[Pair], int]]) -> list[Found]:
        pairs = [pair for part, _ in spread for pair in part]
        likelihoods = iter(zip(pairs, self.model.loglikelihoods(pairs, batch_size=self.batch), strict=True))
        found = []
        for part, cut in spread:
            one = Found(0.0, 0, True, cut)
            for _ in part:
                (_, continuation), (total, greedy) = next(likelihoods)
                one = one._replace(
                    nats=one.nats - total, tokens=one.tokens + len(continuation), greedy=one.greedy and greedy
                )
            found.append(one)
        return found


def windows_of(window: int | None, stride: int | None, limit: int) -> tuple[int, int]:
    """The window and the stride that are asked for, in a context of `limit` tokens; see `ModelProbe`.

    Raises:
      UsageError: a window that the context does not hold, or a stride of a whole one.
    """
    window = min(WINDOW, limit) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 2 <= window <= limit:
        raise UsageError(
            f"{option('window')} is {window}; expected 2 to {limit:,}, what the model's context holds"
        )
    if not 1 <= stride < window:
        raise UsageError(
            f"{option('stride')} is {stride}, and {option('window')} {window}; expected 1 to "
            f"{window - 1}: a window sees at least one token of the one before"
        )
    return window, stride


def _windows(
    context: list[int], ids: list[int], first: list[int], *, window: int, overlap: int
) -> Iterator[Pair]:
    """(context, continuation) of at most `window` tokens together, which predict each of `ids` once.

    Each sees `overlap` tokens of what stands before, after `first`, which begins texts.
    """
    overlap = min(overlap, window - 1 - len(first))
    done = 0
    while done < len(ids):
        seen = ids[max(done - overlap, 0) : done]
        seen = (
            context[len(context) - (overlap - len(seen)) if len(context) > overlap - len(seen) else 0 :]
            + seen
        )
        if seen[: len(first)] != first or not seen:
            seen = first + seen
        count = window - len(seen)
        yield seen, ids[done : done + count]
        done += count


def encode_pair(model: "Model", context: Prompt, continuation: str) -> Pair:
    """The token ids of a context and of what follows it, cut from the ids of both together.

    As lm-evaluation-harness does it: blanks at the end of the context go to the continuation, and the ids of
    the whole are cut where those of the context end. A context that is empty is the token that begins a text:
    BOS, or the end-of-text token of a model without. Messages go through the model's chat template, and the
    continuation begins the reply, without the blank before it.

    Raises:
      UsageError: the model has no tokenizer, or no chat template for messages; nothing can begin its texts.
    """
    if not isinstance(context, str):
        return _chat_pair(model, context, continuation)
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if kept:
        whole, before = model.encode(kept + continuation), model.encode(kept)
        return whole[: len(before)], whole[len(before) :]
    whole = model.encode(continuation)
    begin = beginning(model)
    return [begin], whole[1:] if whole[:1] == [begin] else whole


def beginning(model: "Model") -> int:
    """The token id that stands before the first of a text.

    Raises:
      UsageError: there is none.
    """
    bos = None if model.tokenizer is None else model.tokenizer.bos_id
    found = next((one for one in (bos, *model.eos_ids) if one is not None), None)
    if found is None:
        raise UsageError(
            "the model has no token that begins or ends a text; give contexts that are not empty"
        )
    return found


def _chat_pair(model: "Model", context: Sequence[Turn], continuation: str) -> Pair:
    from jaxchat.chat.ledger import encoded

    conversation = conversation_of(model, context)
    opening = conversation.open(prefix=continuation.removeprefix(" "))
    tokenizer, prompt = model.tokenizer, list(opening.prompt)
    assert tokenizer is not None
    lead = encoded(tokenizer, opening.lead, after=prompt[-1] if prompt else None) if opening.lead else []
    ids = list(opening.ids)
    model.vocabulary.check((*prompt, *ids))
    return prompt + ids[: len(lead)], ids[len(lead) :]
