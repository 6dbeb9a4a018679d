"""Grouped matmul: consecutive rows of x belong to groups, each with a matrix of its own (the experts of an MoE layer).

    y_i = x_i W_g^T        for the rows i of group g

Legend: n rows, E groups, I inputs, O outputs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import Backend, choose, declare

declare(
    "grouped_matmul",
    # torch's own takes rows and matrices whose strides are multiples of 16 bytes.
    Backend(
        "torch_grouped_mm",
        frozenset(),
        frozenset({torch.bfloat16}),
        {"inputs": range(8, 2**31, 8), "outputs": range(8, 2**31, 8)},
        device="cuda",
        capability=(9, 0),
    ),
    Backend("torch", frozenset()),
    Backend("reference", frozenset()),
)


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str | None = None) -> Tensor:
    """x: (n, I), sorted by group. weight: (E, O, I) in x's dtype. counts: (E,) int64, rows of each group; they may add
    up to less than n: what is left over gives zeros. Returns (n, O)."""
    groups, outputs, inputs = weight.shape
    assert x.shape[1] == inputs and counts.shape == (groups,), f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    sizes = {"inputs": inputs, "outputs": outputs}
    name = choose("grouped_matmul", backend, sizes=sizes, dtype=x.dtype, device=x.device).name
    if name == "reference":
        return grouped_matmul_reference(x, weight, counts)
    if name == "torch_grouped_mm":
        return _torch_grouped_mm(x, weight, counts)
    return _Grouped.apply(x, weight, counts.tolist())


def grouped_matmul_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Row by row."""
    group = torch.repeat_interleave(torch.arange(len(weight), device=x.device), counts)
    y = torch.einsum("ni,noi->no", x[: len(group)], weight[group])
    return torch.cat([y, y.new_zeros(len(x) - len(group), weight.shape[1])])


class _Grouped(torch.autograd.Function):
    """One matmul a group, straight into the result: no slices to be put together again."""

    @staticmethod
    def forward(ctx, x, weight, counts: list[int]):
        y = x.new_empty(len(x), weight.shape[1])
        for group, rows in _spans(counts):
            torch.mm(x[rows], weight[group].t(), out=y[rows])
        y[sum(counts) :] = 0
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        for group, rows in _spans(ctx.counts):
            torch.mm(dy[rows], weight[group], out=dx[rows])
            torch.mm(dy[rows].t(), x[rows], out=dw[group])
        dx[sum(ctx.counts) :] = 0
        return dx, dw, None


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """Every group with its rows; a group without rows has a gradient of zeros, which a matmul over none gives."""
    spans, at = [], 0
    for group, count in enumerate(counts):
        spans.append((group, slice(at, at + count)))
        at += count
    return spans


def _torch_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    ends = counts.cumsum(0).to(torch.int32)
    y = grouped(x, weight.transpose(1, 2), offs=ends)
    known = torch.arange(len(x), device=x.device) < ends[-1]
    return torch.where(known[:, None], y, 0)
