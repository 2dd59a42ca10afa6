"""Batches of a data set, the same for the same seed, epoch and number. Knows no files and no text.

The order of an epoch is cut into windows. What a batch puts together comes from one of them, so that a batch
costs no more than making the examples of its window.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from jaxchat.arguments import switch, whole
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.training.data import Dataset, Example

SHORTEST = 64
"""Tokens of the shortest row without packing; the others are its doubles, up to the longest."""
WINDOW = 64
"""Batches of a window."""
_WINDOW_EXAMPLES = 4096
"""At most so many examples are made ahead, if that is a batch; packing fits so many together."""


class Batch(NamedTuple):
    """Rows of one length, `B` of them and `T` tokens long.

    Attributes:
        tokens: int32 [B, T]; padding is 0.
        weights: float32 [B, T], of predicting each token from those of its text before it; 0 for padding.
        starts: int32 [B, T], where in its row the text of each token begins. Padding is a text for itself.
        places: where the texts are from.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    places: tuple[str, ...]


class Epoch(Protocol):
    """The batches of one pass over a data set."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, number: int) -> Batch:
        """One of them, made when it is asked for; those before need not have been.

        Raises:
            JaxchatError: one of its records is bad.
        """

    def __iter__(self) -> Iterator[Batch]:
        """All in turn."""


class Batches:
    """Every example of a data set once an epoch.

    Without packing a row is one example, padded to 64 tokens, 128 and so on up to `max_length`: so few shapes
    compile soon. Examples of about one length are together. Where examples are left out, batches have
    fewer rows, and padding for the others.

    With packing a row has `max_length` tokens, and as many examples as fit: those of a window, the longest
    first, each into the row where it leaves least room. That needs the lengths of all, so that all examples
    are made once.

    Args:
        dataset: what to learn.
        batch_size: rows of a batch.
        max_length: tokens of the longest row.
        packing: see above.
        seed: of the order.
        shuffle: False keeps the data's order, of windows if not within them.
        multiple: lengths of rows are rounded up to multiples of it.

    Raises:
        UsageError: an option is not what it should be, or examples may be longer than rows.
        JaxchatError: packing: a record is bad, or none is good.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        max_length: int,
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        multiple: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = whole("batch_size", batch_size, 1)
        self.max_length = whole("max_length", max_length, 2)
        self.packing, self.shuffle = switch("packing", packing), switch("shuffle", shuffle)
        self.seed, self.multiple = whole("seed", seed, 0), whole("multiple", multiple, 1)
        longest = dataset.encoder.max_length
        if longest > self.max_length:
            raise UsageError(
                f"{option('max_length', self.max_length)}: examples may have {longest} tokens; "
                "give both the same"
            )
        if packing and not dataset.lengths.any():
            raise JaxchatError(dataset.nothing)

    def epoch(self, number: int) -> Epoch:
        """The batches of a pass, the first being 0; each has another order."""
        whole("epoch", number, 0)
        return _Packed(self, number) if self.packing else _Bucketed(self, number)

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *numbers])

    def _order(self, epoch: int) -> np.ndarray:
        count = len(self.dataset)
        return self._random(epoch).permutation(count) if self.shuffle else np.arange(count)

    def _rounded(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def _row_length(self, longest: int) -> int:
        """The shortest length of rows that holds so many tokens."""
        length = SHORTEST
        while length < longest:
            length *= 2
        return self._rounded(min(length, self.max_length))


class _Bucketed:
    """An epoch without packing."""

    def __init__(self, batches: Batches, number: int) -> None:
        self._batches, self._number = batches, number
        self._order = batches._order(number)
        self._window_batches = max(1, min(WINDOW, _WINDOW_EXAMPLES // batches.batch_size))
        self._made: tuple[int, list[list[Example]]] = (-1, [])

    def __len__(self) -> int:
        return -(-len(self._order) // self._batches.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        window, within = divmod(number, self._window_batches)
        if self._made[0] != window:
            self._made = (window, self._groups(window))
        examples = self._made[1][within]
        length = self._batches._row_length(max((len(e.ids) for e in examples), default=0))
        return _batch([[example] for example in examples], self._batches.batch_size, length)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def _groups(self, window: int) -> list[list[Example]]:
        """The examples of a window's batches: as many batches as its records fill, whatever is left out."""
        size = self._window_batches * self._batches.batch_size
        records = self._order[window * size :][:size]
        made = (self._batches.dataset[int(record)] for record in records)
        examples = sorted((e for e in made if e is not None), key=lambda e: len(e.ids))
        count = -(-len(records) // self._batches.batch_size)
        cuts = [len(examples) * k // count for k in range(count + 1)]
        if self._batches.shuffle:
            order = self._batches._random(self._number, window + 1).permutation(count)
        else:
            order = np.arange(count)
        return [examples[cuts[k] : cuts[k + 1]] for k in order]


class _Packed:
    """An epoch with packing."""

    def __init__(self, batches: Batches, number: int) -> None:
        self._batches, self._number = batches, number

    @cached_property
    def _rows(self) -> list[list[int]]:
        """The records of each row."""
        batches, lengths = self._batches, self._batches.dataset.lengths
        order = batches._order(self._number)
        order = order[lengths[order] > 0]
        rows = []
        for window, at in enumerate(range(0, len(order), _WINDOW_EXAMPLES)):
            found = best_fit(order[at : at + _WINDOW_EXAMPLES], lengths, batches.max_length)
            if batches.shuffle:
                shuffled = batches._random(self._number, window + 1).permutation(len(found))
                found = [found[k] for k in shuffled]
            rows += found
        return rows

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batches.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        size = self._batches.batch_size
        rows = self._rows[number * size :][:size]
        made = [[self._batches.dataset[record] for record in row] for row in rows]
        examples = [[example for example in row if example is not None] for row in made]
        return _batch(examples, size, self._batches._rounded(self._batches.max_length))

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def best_fit(records: Sequence[int] | np.ndarray, lengths: np.ndarray, size: int) -> list[list[int]]:
    """Puts records together in rows of at most `size` tokens, the longest first ("best fit decreasing").

    Args:
        records: numbers of records.
        lengths: int [N], how many tokens each record has: 1 to `size`.
        size: tokens of a row.

    Returns:
        The records of each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row, and its number, the fullest first
    for record in sorted(map(int, records), key=lambda record: -lengths[record]):
        length = int(lengths[record])
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(record)
        else:
            left, row = size, len(rows)
            rows.append([record])
        bisect.insort(room, (left - length, row))
    return rows


def _batch(rows: Sequence[Sequence[Example]], size: int, length: int) -> Batch:
    """Examples one behind the other in each row, and padding after them."""
    tokens = np.zeros((size, length), np.int32)
    weights = np.zeros((size, length), np.float32)
    starts = np.tile(np.arange(length, dtype=np.int32), (size, 1))
    for row, examples in enumerate(rows):
        at = 0
        for example in examples:
            stop = at + len(example.ids)
            tokens[row, at:stop], weights[row, at:stop] = example.ids, example.weights
            starts[row, at:stop] = at
            at = stop
    return Batch(tokens, weights, starts, tuple(e.place for examples in rows for e in examples))
