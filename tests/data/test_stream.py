"""Batches: any number of ranks reads the same global batch, and a state brings it back."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.mixture import Mixture, WeightedShards
from data.prepare import PreparedData
from data.shards import ShardSet
from data.stream import Batch, BatchStream, combine, row_digests
from tests.data.corpus import make


def mixture(shards: ShardSet, **changes: int) -> Mixture:
    return Mixture([WeightedShards(shards, 1.0)], **({"sequence_length": 32, "seed": 0} | changes))


def stream(prepared: PreparedData, rank: int = 0, size: int = 1, micro_rows: int = 2) -> BatchStream:
    return BatchStream(mixture(prepared.train), rows_per_step=12, micro_rows=micro_rows, rank=rank, size=size)


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    names = ("tokens", "targets", "starts", "samples")
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in names]


@pytest.mark.parametrize("size", [1, 2, 3, 12])
@pytest.mark.parametrize("micro_rows", [1, 5, 100])
def test_any_layout_reads_the_same_global_batch(prepared: PreparedData, size: int, micro_rows: int):
    """Breaks when the number of ranks or micro-batches would change what is trained on."""
    reference = stream(prepared)
    ranks = [stream(prepared, rank, size, micro_rows) for rank in range(size)]
    for _ in range(3):
        expected = reference.next_step()
        parts = [rank.next_step() for rank in ranks]
        assert len({len(part) for part in parts}) == 1, "collectives need equally many micro-batches on every rank"
        for ours, theirs in zip(joined([batch for part in parts for batch in part]), joined(expected), strict=True):
            assert torch.equal(ours, theirs)
        digests = [digest for part in parts for digest in row_digests(part)]
        assert combine(digests) == combine(row_digests(expected))


def test_batches_have_the_agreed_types(prepared: PreparedData):
    """Breaks when the model's inputs change their types."""
    batch = stream(prepared).next_step()[0]
    assert [x.dtype for x in (batch.tokens, batch.targets, batch.starts, batch.samples)] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
    ]
    assert batch.tokens.shape == batch.targets.shape == batch.starts.shape == (2, 32)
    assert batch.samples.tolist() == [0, 1]
    assert batch.valid == int((batch.targets != -100).sum()) > 0


def test_a_state_brings_back_the_rest_of_the_stream(prepared: PreparedData):
    """Breaks when a resumed run would repeat or skip samples, also on another number of ranks."""
    first = stream(prepared)
    first.skip(30, 41)
    first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    rest = [joined(first.next_step()) for _ in range(4)]
    again = [stream(prepared, rank, 2) for rank in range(2)]
    for part in again:
        part.load_state_dict(state)
    for expected in rest:
        for ours, theirs in zip(joined([batch for part in again for batch in part.next_step()]), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert again[0].state_dict() == first.state_dict()


def test_skipped_samples_are_left_out_and_no_others(prepared: PreparedData):
    """Breaks when a skipped range is trained on, or takes its neighbours along."""
    reading = stream(prepared)
    reading.skip(5, 8)
    reading.skip(7, 20)
    reading.skip(26, 27)
    taken = torch.cat([joined(reading.next_step())[3] for _ in range(2)]).tolist()
    assert taken == [0, 1, 2, 3, 4, *range(20, 26), *range(27, 40)]
    with pytest.raises(ValueError, match="skip: got samples 8 to 5"):
        reading.skip(8, 5)


def test_the_hash_of_a_batch_sees_every_token_and_the_order(prepared: PreparedData):
    """Breaks when two runs on different tokens would look alike in their metrics."""
    batches = stream(prepared).next_step()
    before = combine(row_digests(batches))
    assert combine(row_digests(batches[::-1])) != before
    batches[1].tokens[0, 5] += 1
    assert combine(row_digests(batches)) != before


def test_other_data_is_refused_by_name(prepared: PreparedData, tmp_path: Path):
    """Breaks when a run could go on with data that it was not trained on."""
    other = make(tmp_path, validation_fraction=0.3)
    with pytest.raises(ValueError, match="the run was trained on") as error:
        stream(other).load_state_dict(stream(prepared).state_dict())
    assert str(prepared.folder) in str(error.value)
    assert str(other.folder) in str(error.value)


def test_moved_data_is_accepted(prepared: PreparedData, tmp_path: Path):
    """Breaks when a run could not resume after its data was moved."""
    shutil.copytree(prepared.folder, tmp_path / "moved")
    moved = BatchStream(mixture(ShardSet(tmp_path / "moved")), rows_per_step=12, micro_rows=2)
    moved.load_state_dict(stream(prepared).state_dict())


@pytest.mark.parametrize("change", [{"sequence_length": 64}, {"seed": 1}, {"phase": 1}])
def test_another_order_of_the_same_data_is_refused(prepared: PreparedData, change: dict[str, int]):
    """Breaks when a changed recipe would map the saved position to other tokens."""
    changed = BatchStream(mixture(prepared.train, **change), rows_per_step=12, micro_rows=2)
    with pytest.raises(ValueError, match=f"{next(iter(change))}: got .* but the run was saved with"):
        changed.load_state_dict(stream(prepared).state_dict())


def test_another_batch_size_goes_on_at_the_same_sample(prepared: PreparedData):
    """Breaks when a changed batch size would repeat or skip samples."""
    first = stream(prepared)
    first.next_step()
    smaller = BatchStream(mixture(prepared.train), rows_per_step=4, micro_rows=4)
    smaller.load_state_dict(first.state_dict())
    assert smaller.next_step()[0].samples.tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(("rows", "micro_rows", "size"), [(0, 1, 1), (3, 1, 2), (4, 0, 1)])
def test_impossible_batches_are_refused(prepared: PreparedData, rows: int, micro_rows: int, size: int):
    """Breaks when ranks would get unequal shares."""
    with pytest.raises(ValueError, match="rows"):
        BatchStream(mixture(prepared.train), rows_per_step=rows, micro_rows=micro_rows, size=size)
