"""The norm counts what the table says, and refuses what is not finite. Layouts of real engines: see test_engine.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from model.params import Block, Constant, ParamSpec, Place, Split, local_layout, split_evenly
from train.health import (
    CHUNK_ELEMENTS,
    GradientFragment,
    Health,
    TrainingHealthError,
    clip_coefficient,
    joined,
    sum_of_squares,
)

FUSED = ParamSpec(
    (14, 3),
    Constant(0.0),
    blocks=(Block("z", 8, split_evenly(0, 4)), Block("B", 4, Split(0, units=2, leaders=4)), Block("s", 2)),
)
VOCAB = ParamSpec((10, 2), Constant(0.0), split=split_evenly(0, 10), pad_rows=4)
TABLE = {"fused": FUSED, "vocab": VOCAB}


class FakeEngine:
    """Gradients of one rank, cut into fragments of `cut` elements."""

    def __init__(self, gradients: dict[str, torch.Tensor], cut: int = 1000) -> None:
        self.fragments = [
            GradientFragment(name, start, min(start + cut, value.numel()), value.flatten()[start : start + cut])
            for name, value in gradients.items()
            for start in range(0, value.numel(), cut)
        ]

    def gradients(self) -> list[GradientFragment]:
        return self.fragments


def fake_mesh(tensor_rank: int = 0, tensor_size: int = 1):
    return SimpleNamespace(place=Place(tensor_rank, tensor_size), device=torch.device("cpu"), sum_=lambda x: x)


def logical_gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in TABLE.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_copies_count_once_and_padding_never(size, cut):
    """Over all tensor ranks the squares add up to those of the logical gradient, however it is cut."""
    logical = logical_gradients()
    total = 0.0
    for rank in range(size):
        local = {}
        for name, spec in TABLE.items():
            layout = local_layout(spec, Place(rank, size))
            flat = torch.full((math.prod(layout.shape),), 7.0)
            for piece in layout.pieces:
                box = logical[name][tuple(slice(low, high) for low, high in piece.box)]
                flat[piece.offset : piece.offset + piece.numel] = box.flatten()
            local[name] = flat
        total += Health(TABLE, fake_mesh(rank, size), max_skipped=1).norm(FakeEngine(local, cut)) ** 2
    expected = sum(value.double().square().sum().item() for value in logical.values())
    assert total == pytest.approx(expected, rel=1e-6)


def test_sum_of_squares_stays_exact_on_large_tensors():
    """A float32 running sum over millions of elements is off by more than layouts may differ."""
    values = torch.rand(3_000_001, generator=torch.Generator().manual_seed(0)) + 0.5
    assert sum_of_squares(values).item() == pytest.approx(values.double().square().sum().item(), rel=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_bad_element_is_seen(bad):
    gradients = logical_gradients()
    gradients["fused"][13, 2] = bad
    assert not math.isfinite(Health(TABLE, fake_mesh(), max_skipped=1).norm(FakeEngine(gradients)))


@pytest.mark.parametrize("size", [0, 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1])
def test_sum_of_squares_of_any_size(size: int):
    assert sum_of_squares(torch.full((size,), 2.0)).item() == pytest.approx(4 * size, rel=1e-6)
    assert sum_of_squares(torch.zeros(size)).dtype == torch.float64


def test_pieces_that_touch_are_taken_as_one():
    assert joined([(0, 3), (3, 5), (7, 8), (8, 9)]) == [(0, 5), (7, 9)]
    assert joined([]) == []


def test_stops_after_skips_in_a_row():
    """Only an uninterrupted row of refusals ends the run; a good update starts the count anew."""
    health = Health(TABLE, fake_mesh(), max_skipped=3)
    norms = (math.nan, math.inf, 1.0, math.nan, math.nan)
    assert [health.admit(norm, 1) for norm in norms] == [False, False, True, False, False]
    with pytest.raises(TrainingHealthError, match=r"step 9.*3 updates in a row"):
        health.admit(math.nan, 9)


def test_clip_coefficient():
    assert clip_coefficient(2.0, 1.0) == 0.5
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(0.0, 1.0) == 1.0
    assert clip_coefficient(5.0, 0.0) == 1.0, "0 switches clipping off"
