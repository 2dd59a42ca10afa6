"""What a batch of sequences holds, and how much of it the cache has: token ids and lengths, no device.

Everything that changes a conversation (next turn, rollback, another plan) only changes ids and lengths here;
the cache is brought up to date by the next prefill.
"""

from collections.abc import Sequence

import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError
from jaxchat.families import rope
from jaxchat.layer_plan import Slot
from jaxchat.lengths import common_prefix, next_power_of_two


class Contexts:
    """The contexts of a batch of sequences.

    Attributes:
      ids: per sequence, every token of its context so far, generated ones included.
      cached: per sequence, how many leading tokens of `ids` have valid keys and values.
      regimes: per sequence, `families.rope.regime` of the context whose rotation the cached keys have.
      padded: rows of the arrays on device; those beyond the batch are padding.
    """

    def __init__(self, config: ModelConfig, batch: int):
        self._config = config
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.cached = [0] * batch
        self.regimes = [0] * batch
        self.padded = next_power_of_two(batch)
        self._slots: tuple[Slot, ...] = ()  # that run
        # Those that ran before, of which `_slots` may be just the first, and how many rows all of them have.
        self._longer: tuple[Slot, ...] = ()
        self._cached_longer = [0] * batch

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.ids)

    def run_under(self, slots: tuple[Slot, ...]) -> None:
        """Goes on under other executed slots.

        What is cached stays valid under the first of the slots before, and when those come back.
        """
        if self._slots == self._longer:
            self._cached_longer = list(self.cached)
        if slots != self._longer[: len(slots)]:
            self.forget_all()
            self._longer = slots
        elif slots != self._slots[: len(slots)]:
            self.cached[:] = self._cached_longer
        self._slots = slots

    def forget(self, row: int, length: int) -> None:
        """Declares a sequence's cached rows from `length` on invalid."""
        self.cached[row] = min(self.cached[row], length)
        self._cached_longer[row] = min(self._cached_longer[row], length)

    def forget_all(self) -> None:
        """Declares all cached rows invalid."""
        for row in range(self.batch):
            self.forget(row, 0)

    def rollback(self, length: int, row: int) -> None:
        """Forgets a sequence's tokens from `length` on."""
        if not 0 <= length <= len(self.ids[row]):
            raise UsageError(f"cannot roll back to {length} tokens; the sequence has {len(self.ids[row])}")
        del self.ids[row][length:]
        self.forget(row, length)

    def set_ids(self, ids: Sequence[int], row: int) -> int:
        """Makes `ids` a sequence's context; how many leading tokens are still cached."""
        old = self.ids[row]
        kept = common_prefix(old, ids)
        self.rollback(kept, row)
        old.extend(ids[kept:])
        return min(kept, self.cached[row])

    def truncate_oldest(self, row: int, keep: int) -> None:
        """Drops the oldest tokens of a sequence, but not its first (the BOS), so that `keep` remain."""
        ids = self.ids[row]
        if len(ids) > keep:
            first = ids[: 1 if keep > 1 and ids[0] == self._config.bos_id else 0]
            self.ids[row] = first + ids[len(ids) - (keep - len(first)) :]
            self.forget(row, 0)

    def keeps_rotation(self, row: int, length: int) -> bool:
        """Whether cached keys fit a context of so many tokens: see `families.rope.Kind.is_followed`."""
        return not rope.is_followed(self._config) or rope.regime(self._config, length) == self.regimes[row]

    def follow_rotation(self, row: int) -> None:
        """Forgets cached keys whose rotation is not that of the whole context at its present length."""
        regime = rope.regime(self._config, len(self.ids[row]))
        if regime != self.regimes[row]:
            self.forget(row, 0)
            self.regimes[row] = regime

    def array(self, values: dict[int, int]) -> np.ndarray:
        """int32 [B] of values by sequence, 0 where none is given (padding among them)."""
        out = np.zeros(self.padded, np.int32)
        for row, value in values.items():
            out[row] = value
        return out

    def lengths(self, rows: Sequence[int]) -> np.ndarray:
        """int32 [B], the tokens of each of these sequences."""
        return self.array({row: len(self.ids[row]) for row in rows})
