"""The parameter table: splits, copies, initial values."""

import itertools
import math

import pytest
import torch

from model.params import (
    Block,
    Constant,
    InverseSoftplusLogUniform,
    Normal,
    ParamSpec,
    Place,
    Split,
    Uniform,
    box_numel,
    count_parameters,
    draw_box,
    initialise,
    local_layout,
    split_evenly,
    stable_seed,
)


def test_uneven_heads_are_dealt_without_gap_or_overlap() -> None:
    """11 query heads on 4 ranks (Samba 3.8B)."""
    split = split_evenly(0, 11)
    bounds = [split.bounds(rank, 4) for rank in range(4)]
    assert bounds[0][0] == 0 and bounds[-1][1] == 11
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert {stop - start for start, stop in bounds} == {2, 3}


def test_a_shared_group_is_held_by_every_rank_that_has_its_heads() -> None:
    """One key/value head under 11 query heads on 4 ranks; 2 groups under 6 heads on 3 ranks."""
    assert [Split(0, 1, 11).bounds(rank, 4) for rank in range(4)] == [(0, 1)] * 4
    shared = Split(0, 2, 6)
    assert [shared.bounds(rank, 3) for rank in range(3)] == [(0, 1), (0, 2), (1, 2)]
    assert [shared.holders(unit, 3) for unit in range(2)] == [(0, 2), (1, 2)]


def test_copies_and_owners_of_a_straddling_group() -> None:
    spec = ParamSpec((12, 5), Normal(1.0), blocks=(Block("q", 6, split_evenly(0, 6)), Block("k", 6, Split(0, 2, 6))))
    middle = local_layout(spec, Place(1, 3))
    assert middle.shape == (2 + 6, 5)
    assert [(p.block, p.box[0], p.copies, p.owner) for p in middle.pieces] == [
        ("q", (2, 4), 1, True),
        ("k", (6, 9), 2, False),
        ("k", (9, 12), 2, True),
    ]
    assert [p.offset for p in middle.pieces] == [0, 10, 25]
    total = sum(p.numel for rank in range(3) for p in local_layout(spec, Place(rank, 3)).pieces if p.owner)
    assert total == spec.numel == count_parameters({"w": spec})


def test_padding_rows_are_zero_and_belong_to_nobody() -> None:
    spec = ParamSpec((10, 3), Normal(1.0), split=split_evenly(0, 10), pad_rows=8)
    layout = local_layout(spec)
    assert layout.shape == (16, 3)
    assert sum(p.numel for p in layout.pieces) == 30
    local = torch.full((16, 3), float("nan"))
    initialise(local, "w", spec, seed=0)
    assert local[10:].abs().max() == 0 and local[:10].abs().min() > 0
    assert local_layout(spec, Place(1, 4)).shape == (8, 3)


def test_columns_split_for_row_parallel_weights() -> None:
    spec = ParamSpec((4, 12), Normal(1.0), split=split_evenly(1, 3))
    assert local_layout(spec, Place(1, 2)).pieces[0].box == ((0, 4), (4, 12))
    assert box_numel(local_layout(spec, Place(0, 2)).pieces[0].box) == 16


def test_large_tensors_are_drawn_in_chunks_that_boxes_can_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.params.INIT_CHUNK_ELEMENTS", 64)
    spec = ParamSpec((37, 10), Normal(1.0))
    whole = draw_box("w", spec, ((0, 37), (0, 10)), seed=5)
    assert torch.equal(draw_box("w", spec, ((11, 30), (2, 7)), seed=5), whole[11:30, 2:7])
    assert not torch.equal(whole[:6], whole[6:12]), "chunks must not repeat"


def test_initial_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (20_000,)
    step = torch.nn.functional.softplus(InverseSoftplusLogUniform(1e-3, 1e-1, 1e-4).draw(shape, generator))
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001
    assert abs(step.log().mean() - math.log(1e-2)) < 0.05, "log-uniform"
    A = Uniform(1, 16, log=True).draw(shape, generator).exp()
    assert A.min() >= 1 and A.max() <= 16 and abs(A.mean() - 8.5) < 0.1
    assert abs(Normal(0.02).draw(shape, generator).std() - 0.02) < 5e-4
    assert (Constant(3.0).draw((4,), generator) == 3).all()


def test_seeds_do_not_depend_on_the_process() -> None:
    """Python's own hash differs between processes; this number must never change, or old runs cannot be repeated."""
    assert stable_seed(1, "embedding.weight", 0) == 5868389335355191464
