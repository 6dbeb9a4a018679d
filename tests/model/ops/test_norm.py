"""Norms and SwiGLU: blocks of rows and the hand-written backwards against the equations."""

import pytest
import torch
import torch.nn.functional as F

from model.ops import norm
from model.ops.norm import gated_rms_norm, rms_norm, rms_norm_reference, swiglu
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients

EPS = 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(norm, "BLOCK", 40)


@pytest.fixture
def rows():
    """x, z and a weight; x and z are slices of wider rows, as a fused projection gives them."""
    wide = leaf(3, 5, 24)
    return wide, wide[..., :12], wide[..., 12:], leaf(12)


def test_rms_norm(rows):
    """Equal to torch's own, values and gradients."""
    wide, x, _, w = rows
    want = outputs_and_gradients(lambda: [F.rms_norm(x, (12,), w, EPS)], [wide, w])
    assert_same(outputs_and_gradients(lambda: [rms_norm(x, w, EPS)], [wide, w]), want, 1e-10)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gated_rms_norm(rows, groups, norm_first):
    """Gate before the norm, or after it; each group has its own scale."""
    wide, y, z, w = rows

    def plain():
        if norm_first:
            return [rms_norm_reference(y, w, EPS, groups) * F.silu(z)]
        return [rms_norm_reference(y * F.silu(z), w, EPS, groups)]

    got = outputs_and_gradients(lambda: [gated_rms_norm(y, z, w, EPS, groups, norm_before_gate=norm_first)], [wide, w])
    assert_same(got, outputs_and_gradients(plain, [wide, w]), 1e-10)


def test_swiglu(rows):
    """silu(gate) up, values and gradients."""
    wide, gate, up, _ = rows
    want = outputs_and_gradients(lambda: [F.silu(gate) * up], [wide])
    assert_same(outputs_and_gradients(lambda: [swiglu(gate, up)], [wide]), want, 1e-10)


def test_gradcheck(rows):
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    wide, _, _, w = rows
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x[..., :12], w, EPS), (wide[:1, :2].detach().requires_grad_(), w)
    )
    assert torch.autograd.gradcheck(
        lambda x, w: gated_rms_norm(x[..., :12], x[..., 12:], w, EPS, 2), (wide[:1, :2].detach().requires_grad_(), w)
    )


def test_statistics_are_float32():
    """In bfloat16 only the result is rounded: equal to the float32 norm, rounded."""
    x, z, w = (
        leaf(4, 96, dtype=torch.bfloat16),
        leaf(4, 96, dtype=torch.bfloat16, seed=1),
        leaf(96, dtype=torch.float32),
    )
    assert torch.equal(rms_norm(x, w, EPS), rms_norm(x.float(), w, EPS).to(torch.bfloat16))
    assert torch.equal(gated_rms_norm(x, z, w, EPS), gated_rms_norm(x.float(), z.float(), w, EPS).to(torch.bfloat16))
    assert rms_norm(x.float(), w, EPS, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_inputs_are_left_alone():
    """In-place work never reaches the inputs or the upstream gradient (float32 needs no cast that would copy)."""
    x, z, w = leaves = [
        leaf(4, 6, dtype=torch.float32),
        leaf(4, 6, dtype=torch.float32, seed=1),
        leaf(6, dtype=torch.float32),
    ]
    before = [v.detach().clone() for v in leaves]
    upstream = torch.ones(4, 6)
    for y in (
        rms_norm(x, w, EPS),
        gated_rms_norm(x, z, w, EPS),
        gated_rms_norm(x, z, w, EPS, norm_before_gate=True),
        swiglu(x, z),
    ):
        torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert bool((upstream == 1).all())
