"""softplus(x + bias): autograd's softplus is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from model.ops import softplus as module
from model.ops.softplus import softplus
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients


@pytest.mark.parametrize("block", [1, 12, 2**17])
def test_it_is_softplus(monkeypatch, block):
    """Values and both gradients, in blocks of any size, from far below zero to far above."""
    monkeypatch.setattr(module, "BLOCK", block)
    x, bias = leaf(2, 5, 6), leaf(6)
    with torch.no_grad():
        x.mul_(20)
    got = outputs_and_gradients(lambda: [softplus(x, bias)], [x, bias])
    assert_same(got, outputs_and_gradients(lambda: [F.softplus(x + bias)], [x, bias]), 1e-8)


def test_the_sum_is_not_rounded_to_bfloat16():
    """A small step would lose its bias: x is widened first, and the gradient comes back in x's dtype."""
    x, bias = leaf(2, 5, 6, dtype=torch.bfloat16), leaf(6, dtype=torch.float32)
    got = outputs_and_gradients(lambda: [softplus(x, bias)], [x, bias])
    wide = x.detach().float().requires_grad_()
    want = outputs_and_gradients(lambda: [F.softplus(wide + bias)], [wide, bias])
    assert [v.dtype for v in got] == [torch.float32, torch.bfloat16, torch.float32]
    assert_same(got[:1] + got[2:], want[:1] + want[2:], 1e-6)
    assert_same([got[1].float()], [want[1]], 2**-8)


def test_gradients_hold_where_the_step_vanishes():
    """sigmoid is read from the output, which at -100 is 1e-44 in float32: no NaN, no gradient to speak of."""
    x = torch.tensor([[-200.0, -100.0, -20.0, 200.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(softplus(x, torch.zeros(4)).sum(), x)
    assert torch.allclose(dx, torch.sigmoid(x), rtol=1e-5, atol=1e-40)
