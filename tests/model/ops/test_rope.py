"""Rotary frequencies under scalings: what each promises about its fastest and slowest pairs, and what it refuses.

The formulas themselves are compared with Hugging Face's in `tests/model/hf/test_attention.py`.
"""

import math

import pytest
import torch

from model.ops.rope import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, YarnScaling, frequencies

THETA, DIMS, LENGTH = 10_000.0, 64, 2048
SCALINGS: list[RopeScaling] = [
    LinearScaling(8.0),
    NTKScaling(8.0),
    YarnScaling(8.0, LENGTH),
    YarnScaling(8.0, LENGTH, truncate=False),
    Llama3Scaling(8.0, LENGTH),
]


def turns(scaling: RopeScaling | None, dims: int = DIMS) -> torch.Tensor:
    return frequencies(THETA, dims, scaling, torch.float64, torch.device("cpu"))


def test_plain_frequencies():
    assert turns(None)[0] == 1
    assert turns(None)[-1].item() == pytest.approx(THETA ** (-62 / 64))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind)
def test_every_pair_is_slowed_by_one_to_factor(scaling: RopeScaling):
    """The slowest pair is stretched over the whole new context; all but linear leave the fastest alone."""
    slowed = turns(None) / turns(scaling)
    assert slowed.min() >= 1 - 1e-12 and slowed.max() <= 8 + 1e-9
    assert (slowed.diff() >= -1e-12).all()
    assert slowed[-1].item() == pytest.approx(8)
    assert slowed[0].item() == pytest.approx(8 if scaling.kind == "linear" else 1)


@pytest.mark.parametrize("scaling", [type(s)(**{**s.__dict__, "factor": 1.0}) for s in SCALINGS], ids=lambda s: s.kind)
def test_a_factor_of_one_changes_nothing(scaling: RopeScaling):
    assert torch.allclose(turns(scaling), turns(None), atol=0, rtol=1e-14) and scaling.amplitude == 1


def test_yarn_makes_vectors_longer():
    assert YarnScaling(8.0, LENGTH).amplitude == pytest.approx(0.1 * math.log(8) + 1)
    assert YarnScaling(8.0, LENGTH, attention_factor=1.5).amplitude == 1.5


def test_a_single_pair_keeps_its_frequency_under_ntk():
    assert turns(NTKScaling(4.0), dims=2).tolist() == [1.0]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LinearScaling(0.5), "factor: got 0.5"),
        (lambda: NTKScaling(0.0), "factor: got 0.0"),
        (lambda: YarnScaling(2.0, 0), "original_length: got 0"),
        (lambda: YarnScaling(2.0, 64, beta_slow=0.0), "beta_slow: got 0.0"),
        (lambda: YarnScaling(2.0, 64, beta_fast=1.0), "beta_fast: got 1.0, wants more than beta_slow=1.0"),
        (lambda: YarnScaling(2.0, 64, attention_factor=0.0), "attention_factor: got 0.0"),
        (lambda: Llama3Scaling(2.0, -1), "original_length: got -1"),
        (lambda: Llama3Scaling(2.0, 64, high_frequency=0.5), "high_frequency: got 0.5"),
    ],
)
def test_wrong_numbers_are_refused(make, line: str):
    with pytest.raises(ValueError, match=line):
        make()
