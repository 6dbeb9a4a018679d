"""The step of a selective scan: softplus(x + bias) in float32, with a backward that needs its output alone.

    s = softplus(x + b)        ds/dx = sigmoid(x + b) = 1 - exp(-s)

The scan keeps its step for backward anyway, so that this op keeps nothing more; autograd's softplus keeps x + b, which
is as large.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.blockwise import rows_at_once, wide_dtype

BLOCK = 2**17  # elements at a time on a CPU: what stays in a core's cache with its temporaries


def softplus(x: Tensor, bias: Tensor) -> Tensor:
    """x: (..., D). bias: (D,). Returns float32 (..., D), float64 for float64 x."""
    return _Softplus.apply(x, bias)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        wide = wide_dtype(x.dtype)
        s = torch.empty(x.shape, dtype=wide, device=x.device)
        rows, out, b = x.reshape(-1, x.shape[-1]), s.view(-1, x.shape[-1]), bias.to(wide)
        size = rows_at_once(x.device, x.shape[-1], BLOCK)
        for block, into in zip(rows.split(size), out.split(size), strict=True):
            into.copy_(F.softplus(block.to(wide) + b))
        ctx.save_for_backward(s)
        ctx.dtypes = x.dtype, bias.dtype
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, ds):
        (s,) = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
        d_bias = torch.zeros(s.shape[-1], dtype=s.dtype, device=s.device)
        size = rows_at_once(s.device, s.shape[-1], BLOCK)
        flat = (v.reshape(-1, s.shape[-1]).split(size) for v in (s, ds, dx))
        for block, upstream, into in zip(*flat, strict=True):
            slope = torch.neg(block).expm1_().mul_(upstream).neg_()
            into.copy_(slope)
            d_bias += slope.sum(0)
        return dx, d_bias.to(bias_dtype)
