"""Blocks of rows: as large as the cache on a CPU, as large as memory allows on an accelerator."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.ops.blockwise import ACCELERATOR_BLOCK, rows_at_once
from model.ops.conv import causal_conv
from model.ops.head import linear_cross_entropy
from model.ops.norm import gated_rms_norm, rms_norm, swiglu
from tests.model.ops.support import Largest

B, T, D = 4, 2048, 512  # 16 blocks of a CPU


class Count(TorchDispatchMode):
    """Counts the operations that are run: on an accelerator, the launches."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(run, device: str, tokens: int) -> int:
    """Of forward and backward over x (B, tokens, D) and a weight (D, 4)."""
    x, w = (torch.zeros(*shape, device=device).requires_grad_() for shape in ((B, tokens, D), (D, 4)))
    with Count() as count:
        torch.autograd.grad(run(x, w).sum(), x)
    return count.operations


def documents(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: rms_norm(x, w[:, 0], 1e-5),
        lambda x, w: gated_rms_norm(x, x, w[:, 0], 1e-5),
        lambda x, w: swiglu(x, x),
        lambda x, w: causal_conv(x, w, None, documents=documents(x), activation="silu")[0],
    ],
    ids=["rms_norm", "gated_rms_norm", "swiglu", "causal_conv"],
)
def test_an_accelerator_gets_few_launches(run):
    """Off the CPU ("meta" stands for CUDA) a long row costs no more launches than a short one, and waits for nothing:
    a value read on the host fails on meta."""
    assert operations(run, "meta", T) == operations(run, "meta", 4)
    assert operations(run, "cpu", T) > operations(run, "cpu", 4)


def test_logits_stay_bounded_on_an_accelerator():
    """Whatever the batch, the head holds one block of float32 logits, not tokens x vocabulary."""
    tokens, V = 16_384, 32_768
    hidden = torch.zeros(1, tokens, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(V, 8, device="meta")
    with Largest() as record:
        nll = linear_cross_entropy(hidden, weight, torch.zeros(1, tokens, device="meta").long(), vocab_size=V)
        torch.autograd.grad(nll.sum(), hidden)
    assert record.elements[torch.float32] == ACCELERATOR_BLOCK < tokens * V // 4


def test_rows_at_once():
    """A row wider than a block is taken alone; the CPU's block is the op's own."""
    assert rows_at_once(torch.device("cpu"), 100, 250) == 2
    assert rows_at_once(torch.device("cpu"), 1000, 250) == 1
    assert rows_at_once(torch.device("cuda", 1), 2**20, 250) == 64
