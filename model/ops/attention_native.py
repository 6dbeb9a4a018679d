"""Attention by blocks in C++ (`cpp/attention.cpp`), for the CPU. Matmuls take numbers of the input's dtype and add in
float32; probabilities are rounded to it for theirs, as flash kernels do.

Legend: see `attention.py`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.native import padded, run_native, with_heads, with_strides

BLOCK = 64
"""Queries and keys of a block, in the C++ too."""


def attention_native(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, limit: int, scale: float, cap: float | None
) -> Tensor:
    """Arguments and result as of `attention_reference`; float32 or bfloat16."""
    index = None if document is None else document.to(torch.int32).contiguous()
    return _NativeAttention.apply(q, k, v, index, limit, float(scale), float(cap or 0))


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, document, limit: int, scale: float, cap: float):
        q, k, v = (with_heads(x) for x in (q, k, v))
        B, T, H, P = q.shape
        S, K = k.shape[1:3]
        y, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, T, dtype=torch.float32)
        blocks = torch.empty(2, B, K, -(-S // BLOCK) * BLOCK, padded(P), dtype=q.dtype)
        ctx.sizes = B, T, S, K, H // K, P, limit, scale, cap
        given = *with_strides(q), *with_strides(k), *with_strides(v), document, y, lse
        run_native("attention_forward", q.dtype, *given, blocks[0], blocks[1], _lows(B, T), *ctx.sizes)
        ctx.save_for_backward(q, k, v, document, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, document, y, lse = ctx.saved_tensors
        (B, T, H, P), S, dy = q.shape, k.shape[1], with_heads(dy)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        each = torch.empty(2, B, H, S, padded(P), dtype=torch.float32)
        given = *with_strides(q), *with_strides(k), *with_strides(v), document, y, lse, *with_strides(dy)
        run_native("attention_backward", q.dtype, *given, dq, dk, dv, each[0], each[1], _lows(B, T), *ctx.sizes)
        return dq, dk, dv, None, None, None, None


def _lows(B: int, T: int) -> Tensor:
    """Room for the first key that each query sees."""
    return torch.empty(B, T + BLOCK, dtype=torch.int32)
