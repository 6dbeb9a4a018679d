"""Grouped matmul against the equation, row by row; empty groups, rows of no group."""

import pytest
import torch

from model.ops.grouped import grouped_matmul, grouped_matmul_reference
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [2, 3, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_equation(counts: list[int], dtype: torch.dtype):
    """Rows beyond the groups give zeros and get zeros; so do the matrices of empty groups."""
    x, w, sizes = leaf(9, 6, dtype=dtype), leaf(4, 5, 6, dtype=dtype), torch.tensor(counts)
    got = outputs_and_gradients(lambda: [grouped_matmul(x, w, sizes)], [x, w])
    want = outputs_and_gradients(lambda: [grouped_matmul_reference(x, w, sizes)], [x, w])
    assert_same(got, want, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])
    assert not got[0][sum(counts) :].any() and not got[1][sum(counts) :].any()


def test_gradients_by_differences():
    x, w = leaf(7, 3), leaf(3, 2, 3)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, torch.tensor([2, 0, 4])), (x, w))


def test_torchs_own_agrees():
    """What a GPU runs, here on the CPU, where it has no gradient of its own to compare."""
    from model.ops.grouped import _torch_grouped_mm

    x, w, sizes = (leaf(24, 16).detach().bfloat16(), leaf(3, 8, 16).detach().bfloat16(), torch.tensor([8, 0, 12]))
    ours = grouped_matmul(x, w, sizes)
    assert (_torch_grouped_mm(x, w, sizes).float() - ours.float()).abs().max() <= 2**-6 * ours.float().abs().max()
