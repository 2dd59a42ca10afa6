"""What is called cached is in the cache, after any history; the cache here remembers what wrote it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.engine.rows import Contexts
from jaxchat.errors import UsageError
from jaxchat.families import read_config
from jaxchat.layer_plan import Slot
from tests.support.tiny import TINY_CONFIGS

CONFIG = read_config({"model_type": "llama", **TINY_CONFIGS["llama"]})
PLANS = [tuple(map(Slot, layers)) for layers in ((0, 1, 2), (0, 1), (0,), (0, 1, 1, 2), (2, 1), ())]

steps = st.one_of(
    st.tuples(st.just("plan"), st.sampled_from(PLANS)),
    st.tuples(st.just("ids"), st.lists(st.integers(1, 3), max_size=6)),
    st.tuples(st.just("rollback"), st.integers(0, 6)),
    st.tuples(st.just("oldest"), st.integers(1, 4)),
    st.tuples(st.just("compute"), st.integers(1, 6)),
)


class Cache:
    """For each slot and position: the slots and the tokens up to it that its row was computed from."""

    def __init__(self):
        self.rows = {}

    def compute(self, contexts: Contexts, slots: tuple[Slot, ...], row: int, count: int) -> None:
        """Runs the next `count` tokens of a sequence, as a prefill does."""
        ids, start = contexts.ids[row], contexts.cached[row]
        for position in range(start, min(start + count, len(ids))):
            for slot in range(len(slots)):
                self.rows[row, slot, position] = slots[: slot + 1], tuple(ids[: position + 1])
            contexts.cached[row] = position + 1

    def holds(self, contexts: Contexts, slots: tuple[Slot, ...], row: int) -> bool:
        """Whether all that is called cached was computed from what the context now holds."""
        ids = contexts.ids[row]
        return contexts.cached[row] <= len(ids) and all(
            self.rows.get((row, slot, position)) == (slots[: slot + 1], tuple(ids[: position + 1]))
            for slot in range(len(slots))
            for position in range(contexts.cached[row])
        )


@given(st.lists(st.tuples(steps, st.integers(0, 1)), max_size=25))
def test_what_is_called_cached_was_computed_from_the_context_as_it_is(history):
    contexts, cache, slots = Contexts(CONFIG, 2), Cache(), PLANS[0]
    contexts.run_under(slots)
    for (kind, value), row in history:
        if kind == "plan":
            slots = value
            contexts.run_under(slots)
        elif kind == "ids":
            contexts.set_ids(value, row)
            assert contexts.ids[row] == value
        elif kind == "rollback":
            contexts.rollback(min(value, len(contexts.ids[row])), row)
        elif kind == "oldest":
            contexts.truncate_oldest(row, value)
        else:
            cache.compute(contexts, slots, row, value)
        assert all(cache.holds(contexts, slots, each) for each in range(2))


def test_the_beginning_of_a_plan_keeps_what_is_cached_and_so_does_coming_back():
    contexts, cache = Contexts(CONFIG, 1), Cache()
    contexts.run_under(PLANS[0])
    contexts.set_ids([1, 2, 3, 1], 0)
    cache.compute(contexts, PLANS[0], 0, 4)
    contexts.run_under(PLANS[1])
    assert contexts.cached == [4]
    contexts.set_ids([1, 2, 3, 1, 2], 0)
    cache.compute(contexts, PLANS[1], 0, 1)
    contexts.run_under(PLANS[0])
    assert contexts.cached == [4]
    contexts.run_under(PLANS[4])
    assert contexts.cached == [0]


def test_the_first_token_is_kept_if_it_begins_texts():
    contexts = Contexts(dataclasses.replace(CONFIG, bos_id=1), 2)
    for row, ids in enumerate(([1, 5, 6, 7, 8], [4, 5, 6, 7, 8])):
        contexts.set_ids(ids, row)
        contexts.truncate_oldest(row, 3)
    assert contexts.ids == [[1, 7, 8], [6, 7, 8]]


def test_rolling_back_further_than_there_is_is_an_error():
    with pytest.raises(UsageError, match="cannot roll back to 3 tokens; the sequence has 0"):
        Contexts(CONFIG, 1).rollback(3, 0)
