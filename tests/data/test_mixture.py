"""The order of data: pure, each token once per epoch, weighted to the row."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.mixture import IGNORE, Mixture, Rows, Turns, WeightedShards
from data.permutation import Shuffle, permutation
from data.prepare import PreparedData, TokenizerConfig, prepare
from data.shards import ShardSet
from tests.data.corpus import config, quiet, write_corpus


def mixture(shards: ShardSet, sequence_length: int = 64, seed: int = 0, phase: int = 0) -> Mixture:
    return Mixture([WeightedShards(shards, 1.0)], sequence_length=sequence_length, seed=seed, phase=phase)


def predictions(shards: ShardSet) -> Counter[tuple[int, ...]]:
    """Every (token before, token) inside documents."""
    pairs: Counter[tuple[int, ...]] = Counter()
    for document in range(shards.documents):
        ids = shards.tokens(document).tolist()
        pairs.update(itertools.pairwise(ids))
    return pairs


@pytest.mark.parametrize("length", [1, 2, 63, 64, 1000])
def test_an_epoch_predicts_every_token_once(prepared: PreparedData, length: int):
    """Breaks when a row border, a document border or the last row loses or repeats a token."""
    shards = prepared.train
    order = mixture(shards, length)
    rows = order.rows_per_epoch(0)
    for epoch in range(2):
        seen: Counter[tuple[int, ...]] = Counter()
        for index in range(epoch * rows, (epoch + 1) * rows):
            tokens, targets, _ = order.sample(index)
            valid = targets != IGNORE
            seen.update(zip(tokens[valid].tolist(), targets[valid].tolist(), strict=True))
        assert seen == predictions(shards)


def test_rows_are_the_joined_documents(prepared: PreparedData):
    """Breaks when starts, targets or padding are off by one."""
    shards = prepared.train
    order = permutation(shards.documents, 5)
    rows = Rows(shards, order, 50)
    joined = np.concatenate([shards.tokens(int(document)) for document in order]).astype(np.int64)
    begins = np.zeros(len(joined), dtype=bool)
    begins[np.concatenate([[0], np.cumsum(shards.lengths[order])[:-1]])] = True
    samples = [rows.row(number) for number in range(rows.count)]
    tokens, targets, starts = (np.concatenate(column) for column in zip(*samples, strict=True))
    used = len(joined) - 1 if (len(joined) - 1) % 50 == 0 else len(joined)
    assert np.array_equal(tokens[:used], joined[:used])
    assert np.array_equal(starts[:used], begins[:used])
    expected = np.where(begins[1:], IGNORE, joined[1:])
    assert np.array_equal(targets[: len(expected)], expected)
    assert (tokens[used:] == shards.pad).all()
    assert (targets[len(expected) :] == IGNORE).all()
    assert starts[used:].tolist() == [True] + [False] * (len(tokens) - used - 1)


def test_the_order_is_a_pure_function(prepared: PreparedData):
    """Breaks when a resumed run, or a rank that reads only some rows, would see other tokens."""
    there, back = mixture(prepared.train), mixture(prepared.train)
    count = 3 * there.rows_per_epoch(0) + 5
    forward = [there.sample(index) for index in range(count)]
    for index in reversed(range(count)):
        for a, b in zip(forward[index], back.sample(index), strict=True):
            assert np.array_equal(a, b)


def test_seed_phase_and_epoch_change_the_order(prepared: PreparedData):
    """Breaks when every epoch, or every run, would read the documents in the same order."""
    base = mixture(prepared.train)
    rows = base.rows_per_epoch(0)

    def first(order: Mixture, start: int = 0) -> list[bytes]:
        return [order.sample(start + index).tokens.tobytes() for index in range(rows)]

    others = [mixture(prepared.train, seed=1), mixture(prepared.train, phase=1)]
    orders = [first(base), first(base, rows), *map(first, others)]
    for i, one in enumerate(orders):
        assert all(one != other for other in orders[i + 1 :])
        assert all(set(one) != set(other) for other in orders[i + 1 :]), "documents are cut the same way"


def test_the_order_never_changes(prepared: PreparedData):
    """Breaks when an edit of the permutations would silently reorder the data of every running training."""
    assert permutation(8, 1).tolist() == [6, 2, 0, 4, 3, 5, 7, 1]
    assert [Shuffle(8, 1)(index) for index in range(8)] == [2, 4, 3, 7, 1, 6, 5, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_permutations_permute(n: int):
    """Breaks when a document or a row is read twice in an epoch."""
    for key in (0, 1, 2**64 - 1):
        assert sorted(permutation(n, key).tolist()) == list(range(n))
        shuffle = Shuffle(n, key)
        assert sorted(shuffle(index) for index in range(n)) == list(range(n))


def test_shuffles_scatter():
    """Breaks when neighbouring rows (of one long document) would stay together in a batch."""
    n = 1000
    steps = np.abs(np.diff([Shuffle(n, 3)(index) for index in range(n)]))
    assert 280 < steps.mean() < 390, "a uniform permutation has a mean step of n/3"


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1e-3, 5.0, 2.5]])
def test_every_prefix_keeps_the_weights(weights: list[float]):
    """Breaks when a source is starved or bunched, or an index is answered differently out of order."""
    turns, counts = Turns(weights), [0] * len(weights)
    total = sum(weights)
    for index in range(3000):
        source, number = turns.locate(index)
        assert number == counts[source], "a source's samples are numbered without gaps"
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - weight / total * (index + 1)) < len(weights)
    source, number = turns.locate(10**15)
    assert abs(number - weights[source] / total * 10**15) < 1e6 * len(weights)


def test_sources_are_mixed_and_each_is_read_by_its_own_epochs(prepared: PreparedData, tmp_path: Path):
    """Breaks when a small source in a mixture would skip or repeat tokens within its epoch."""
    model = str(prepared.tokenizer)
    small = prepare(
        config(write_corpus(tmp_path / "c", 20), tmp_path / "o", tokenizer=TokenizerConfig(model=model)), log=quiet
    )
    order = Mixture([WeightedShards(prepared.train, 2.0), WeightedShards(small.train, 1.0)], sequence_length=64, seed=0)
    rows = order.rows_per_epoch(1)
    seen: Counter[tuple[int, ...]] = Counter()
    for index in range(3 * rows):
        source, epoch, _ = order.locate(index)
        if (source, epoch) == (1, 0):
            tokens, targets, _ = order.sample(index)
            valid = targets != IGNORE
            seen.update(zip(tokens[valid].tolist(), targets[valid].tolist(), strict=True))
    assert seen == predictions(small.train)


def test_mistakes_are_one_clear_line(prepared: PreparedData, tmp_path: Path):
    """Breaks when rows longer than the data, wrong weights or mixed tokenizers would train on nonsense."""
    shards = prepared.train
    with pytest.raises(ValueError, match=r"sequence_length: got 1000000, longer than the [\d,]+ tokens of .*out"):
        mixture(shards, 1_000_000)
    mixture(shards, shards.total_tokens - 1).sample(0)
    with pytest.raises(ValueError, match="sequence_length: got 0, wants a positive number"):
        mixture(shards, 0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight: got {weight}"):
            Mixture([WeightedShards(shards, weight)], sequence_length=64, seed=0)
    with pytest.raises(ValueError, match="got no source"):
        Mixture([], sequence_length=64, seed=0)
    other = prepare(
        config(write_corpus(tmp_path / "c"), tmp_path / "o", tokenizer=TokenizerConfig(vocab_size=350)), log=quiet
    )
    with pytest.raises(ValueError, match="were made by different tokenizers"):
        Mixture([WeightedShards(shards, 1.0), WeightedShards(other.train, 1.0)], sequence_length=64, seed=0)
