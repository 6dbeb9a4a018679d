"""Convolution, scan and gated norm of Mamba-2 on a CPU, as one op (`mamba2.py`): the loops of their own ops, but the
backward writes each gradient where that of the projection has it, instead of putting that together from slices.

Legend: B batch, T tokens, H heads, P head dim, G groups, N state, I = H P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.conv import native_conv, native_conv_backward
from model.ops.norm import native_norm, native_norm_backward
from model.ops.ssd_native import Scan, native_chunk, native_scan, native_scan_backward


class NativeMamba2(torch.autograd.Function):
    """Arguments as those of `mamba2.conv_scan_norm`, in their order; documents int32. backward: whether there is to be
    one."""

    @staticmethod
    def forward(ctx, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, eps, documents, options, backward):
        parts = _Parts(projected, len(A), **options)
        mixed = native_conv(parts.xBC, conv_weight, conv_bias, documents, silu=True)
        positive = F.softplus(parts.dt.float() + dt_bias)
        scan = Scan(*parts.scanned(mixed), parts.bounded(positive), A, D, documents)
        chunk = native_chunk(mixed.shape[1])
        y, states = native_scan(scan, None, chunk, backward)
        out, scale = native_norm(y.flatten(2), parts.z, norm_weight, eps, parts.groups, parts.gate, projected.dtype)
        ctx.save_for_backward(
            projected, conv_weight, conv_bias, A, D, norm_weight, documents, mixed, positive, states, y, scale
        )
        ctx.options, ctx.chunk = options, chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        projected, conv_weight, conv_bias, A, D, norm_weight, documents, mixed, positive, *made = ctx.saved_tensors
        states, y, scale = made
        parts = _Parts(projected, len(A), **ctx.options)
        d_projected, d_mixed, dy = (torch.empty_like(v) for v in (projected, mixed, y))
        slopes = _Parts(d_projected, len(A), **ctx.options)
        norm = y.flatten(2), parts.z, norm_weight, scale, parts.gate, d_out
        d_norm_weight = native_norm_backward(*norm, dy.flatten(2), slopes.z)
        scan = Scan(*parts.scanned(mixed), parts.bounded(positive), A, D, documents)
        d_inputs = slopes.scanned(d_mixed)
        d_dt, dA, dD = native_scan_backward(scan, states, ctx.chunk, dy, None, *d_inputs)
        d_weight, d_bias = native_conv_backward(
            parts.xBC, conv_weight, conv_bias, documents, d_mixed, slopes.xBC, silu=True
        )
        d_dt *= torch.neg(positive).expm1_().neg_()  # softplus' slope, 1 - exp(-softplus)
        if parts.dt_limit is not None:
            d_dt *= scan.dt == positive
        slopes.dt.copy_(d_dt)
        return d_projected, d_weight, d_bias, d_dt.sum((0, 1)), dA, dD, d_norm_weight, None, None, None, None


class _Parts:
    """z, xBC and dt of a projection (B, T, 2 I + 2 G N + H), views of it, and how they are read."""

    def __init__(
        self,
        projected: Tensor,
        H: int,
        *,
        head_dim: int,
        groups: int,
        dt_limit: tuple[float, float] | None,
        norm_before_gate: bool,
    ) -> None:
        inner = H * head_dim
        channels = projected.shape[-1] - inner - H
        self.z, self.xBC, self.dt = projected.split([inner, channels, H], -1)
        self.heads, self.groups, self.N = (H, head_dim), groups, (channels - inner) // 2 // groups
        self.dt_limit, self.gate = dt_limit, 2 if norm_before_gate else 1

    def bounded(self, step: Tensor) -> Tensor:
        return step if self.dt_limit is None else step.clamp(*self.dt_limit)

    def scanned(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, H, P), B and C (B, T, G, N) of what the convolution gives, views of it."""
        sizes = self.heads[0] * self.heads[1], self.groups * self.N, self.groups * self.N
        x, B, C = mixed.split(sizes, -1)
        return x.unflatten(-1, self.heads), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))
