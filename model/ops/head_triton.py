"""The softmax of the head as Triton kernels over rows of logits, in place: each logit read once forward and read and
written once backward. All is float32 inside.

Legend: n tokens, V vocabulary (rows may be padded beyond it); a program takes one token, W logits at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time


@triton.jit
def _log_sum_exp(logits, lse, V, row, W: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    top = tl.full((W,), float("-inf"), tl.float32)
    total = tl.zeros((W,), tl.float32)
    for start in range(0, V, W):
        c = start + tl.arange(0, W)
        v = tl.load(logits + i * row + c, mask=c < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, v)
        # A lane that has seen no logit yet has -inf for both, whose difference is no number.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(v - higher))
        top = higher
    best = tl.max(top, 0)
    tl.store(lse + i, best + tl.log(tl.sum(total * tl.exp(top - best), 0)))


@triton.jit
def _softmax_slope(logits, lse, share, own, target, V, width, row, W: tl.constexpr):
    """width: of the rows; from V on they become 0."""
    i, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    at, by, back, aim = tl.load(lse + i), tl.load(share + i), tl.load(own + i), tl.load(target + i)
    v = tl.load(logits + i * row + c, mask=c < V, other=float("-inf")).to(tl.float32)
    d = by * tl.exp(v - at) - tl.where(c == tl.maximum(aim, 0), back, 0.0)
    tl.store(logits + i * row + c, tl.where(c < V, d, 0.0).to(logits.dtype.element_ty), mask=c < width)


class TritonSoftmax:
    """As `model.ops.head.Softmax` wants it."""

    padded = True

    def log_sum_exp(self, logits: Tensor, V: int, out: Tensor) -> None:
        with torch.cuda.device_of(logits):
            _log_sum_exp[(len(logits),)](logits, out, V, logits.stride(0), W=BLOCK, num_warps=8)

    def softmax_slope(self, logits: Tensor, V: int, lse: Tensor, share: Tensor, own: Tensor, target: Tensor) -> None:
        with torch.cuda.device_of(logits):
            (n, width), row = logits.shape, logits.stride(0)
            grid = (n, triton.cdiv(width, BLOCK))
            _softmax_slope[grid](logits, lse, share, own, target, V, width, row, W=BLOCK, num_warps=8)
