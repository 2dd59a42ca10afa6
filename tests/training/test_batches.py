"""Batches: which examples are together, and that they follow from seed, epoch and number alone."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text.tokenizer_files import load_tokenizer
from jaxchat.training import batches as module
from jaxchat.training.batches import Batches, best_fit
from jaxchat.training.data import Dataset, Encoder
from tests.support.tiny_chat import write_tiny_chat

LONGEST = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte; no BOS of its own."""
    return load_tokenizer(write_tiny_chat(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 texts of 2 to 220 characters, each another; every tenth line is bad, every twentieth empty."""
    folder = tmp_path_factory.mktemp("data")
    lengths = np.random.default_rng(7).integers(2, 220, 300)
    texts = [f"{k:03d}".ljust(n, "abc"[k % 3])[:n] for k, n in enumerate(lengths)]
    lines = [json.dumps({"text": "" if k % 20 == 5 else text}) for k, text in enumerate(texts)]
    lines = ["bad" if k % 10 == 3 else line for k, line in enumerate(lines)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def batches_of(folder, tokenizer):
    """`batches_of(**options)`: of a data set that nobody has asked for anything."""

    def build(paths=(folder,), lazy=True, **options):
        encoder = Encoder(tokenizer, None, max_length=options.pop("cut", LONGEST))
        dataset = Dataset(paths, encoder, skip_bad_lines=True, lazy=lazy)
        return Batches(dataset, **{"batch_size": 4, "max_length": LONGEST, **options})

    return build


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Several in 300 examples."""
    monkeypatch.setattr(module, "_WINDOW_EXAMPLES", 64)


def texts_in(batch):
    """`(row, first, past the last)` of each text of a batch, as `starts` tells."""
    found = []
    for row, starts in enumerate(batch.starts):
        cuts = [*np.flatnonzero(starts == np.arange(len(starts))).tolist(), len(starts)]
        found += [(row, a, b) for a, b in itertools.pairwise(cuts) if batch.weights[row, a:b].any()]
    return found


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"lazy": False}, {"shuffle": False}], ids=str)
def test_every_example_is_there_once_an_epoch_as_it_is(batches_of, options):
    batches = batches_of(**options)
    dataset = batches.dataset
    examples = {e.place: e for e in map(dataset.__getitem__, range(len(dataset))) if e is not None}
    assert len(examples) == 300 - 30 - 15
    for epoch in (batches.epoch(0), batches.epoch(1)):
        seen = Counter()
        for batch in epoch:
            texts = texts_in(batch)
            assert len(texts) == len(batch.places), "starts keep the texts apart"
            covered = np.zeros(batch.tokens.shape, bool)
            for (row, start, stop), place in zip(texts, batch.places, strict=True):
                example = examples[place]
                assert batch.tokens[row, start:stop].tolist() == example.ids.tolist()
                assert batch.weights[row, start:stop].tolist() == example.weights.tolist()
                assert (batch.starts[row, start:stop] == start).all()
                assert batch.weights[row, start] == 0
                covered[row, start:stop] = True
            index = np.broadcast_to(np.arange(covered.shape[1]), covered.shape)
            assert (batch.starts[~covered] == index[~covered]).all(), "padding is a text for itself"
            assert not batch.weights[~covered].any()
            assert not batch.tokens[~covered].any()
            seen.update(batch.places)
        assert seen == Counter(list(examples))


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_follows_from_seed_epoch_and_number(batches_of, packing):
    epoch = batches_of(packing=packing, seed=5).epoch(2)
    all_of_it = list(epoch)
    assert len(all_of_it) == len(epoch) > 16, "more than a window"
    for number in (len(epoch) - 1, 17, 0, 18):
        assert equal(batches_of(packing=packing, seed=5).epoch(2)[number], all_of_it[number])
    orders = {
        tuple(
            place for batch in batches_of(packing=packing, seed=seed).epoch(number) for place in batch.places
        )
        for seed, number in [(5, 2), (5, 3), (6, 2)]
    }
    assert len(orders) == 3
    with pytest.raises(IndexError):
        epoch[len(epoch)]


def test_resuming_makes_the_examples_of_one_window_only(batches_of, monkeypatch):
    batches = batches_of()
    made = []
    monkeypatch.setattr(
        Dataset, "__getitem__", lambda self, index: made.append(index) or self._encoded(index)
    )
    epoch = batches.epoch(0)
    epoch[20], epoch[21]
    assert len(made) == len(set(made)) == 64
    packed = batches_of(packing=True)
    assert packed.dataset.lengths.any()
    del made[:]
    places = packed.epoch(1)[9].places
    assert len(made) == len(places)


def test_examples_of_about_one_length_are_together_in_rows_of_few_lengths(batches_of):
    epoch = list(batches_of().epoch(0))
    assert {batch.tokens.shape for batch in epoch} == {(4, 64), (4, 128), (4, 200)}
    assert len(epoch) == 300 / 4
    used = sum(np.sum(batch.starts == 0) for batch in epoch)
    longest = sum(batch.tokens.size for batch in epoch)
    unsorted = 300 * LONGEST
    assert used / longest > 1.2 * used / unsorted
    lengths = [batch.tokens.shape[1] for batch in epoch[:16]]
    assert lengths != sorted(lengths), "not the short ones first"
    assert {batch.tokens.shape[1] for batch in batches_of(multiple=48).epoch(0)} == {96, 144, 240}


def test_packed_rows_are_full(batches_of):
    batches = batches_of(packing=True, max_length=256, multiple=100)
    epoch = list(batches.epoch(0))
    assert {batch.tokens.shape for batch in epoch} == {(4, 300)}
    tokens = batches.dataset.lengths.sum()
    assert sum(stop - start for batch in epoch for _, start, stop in texts_in(batch)) == tokens
    assert tokens / (256 * 4 * len(epoch)) > 0.85
    assert all(stop <= 256 for batch in epoch for _, _, stop in texts_in(batch))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_packs_each_record_once_and_wastes_no_row(lengths):
    rows = best_fit(range(len(lengths)), np.array(lengths), 50)
    assert sorted(record for row in rows for record in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[record] for record in row) for row in rows)
    assert sums[-1] <= 50
    assert all(a + b > 50 for a, b in itertools.pairwise(sums)), "no two rows would fit into one"


def test_without_shuffling_windows_keep_the_order_of_the_data(batches_of, folder):
    epoch = batches_of(shuffle=False).epoch(3)
    lines = [
        [int(place.rpartition(":")[2]) for k in range(16) for place in epoch[16 * window + k].places]
        for window in range(2)
    ]
    assert max(lines[0]) < min(lines[1]) == 65


def test_data_without_anything_to_learn_gives_padding_or_is_refused(batches_of, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text('{"text": ""}\nbad\n')
    (batch,) = batches_of([path]).epoch(0)
    assert (batch.tokens.shape, batch.places, batch.weights.any()) == ((4, 64), (), False)
    with pytest.raises(JaxchatError, match="nothing to learn: 1 bad records, 1 without"):
        batches_of([path], packing=True)


def test_rows_hold_every_example(batches_of):
    with pytest.raises(UsageError, match="max_length=100: examples may have 200 tokens"):
        batches_of(max_length=100)
    with pytest.raises(UsageError, match="batch_size"):
        batches_of(batch_size=0)
