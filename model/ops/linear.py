"""A projection without bias, `y = x W^T`, and the matmuls of its gradients.

On a CPU whose processor multiplies bfloat16 in pairs, and has no AMX, they are loops in C++ (`cpp/matmul.cpp`): they
read the float32 weight itself, so that the backward keeps no copy of it in bfloat16, and give its gradient in float32
as it was summed. Everywhere else they are torch's.

Legend: n rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import Backend, choose, declare
from model.ops.native import NATIVE_DTYPES, native_fact, native_ready, run_native, with_rows

EVEN = range(2, 2**62, 2)

declare(
    "linear",
    Backend("torch", frozenset()),
    Backend(
        "native",
        frozenset(),
        frozenset({torch.bfloat16}),
        {"inputs": EVEN, "outputs": EVEN},
        device="cpu",
        ready=native_ready,
    ),
)

FEW = 1024
"""Rows below which laying out the weight takes as long as the loops gain, or longer."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: (..., I). weight: (O, I), rounded to x's dtype. Returns (..., O) in x's dtype; the weight's gradient comes in
    its own."""
    if weight.dtype not in NATIVE_DTYPES:
        weight = weight.to(x.dtype)
    rows, fits = x.numel() // max(1, x.shape[-1]), x.device == weight.device and x.shape[-1] == weight.shape[1]
    if fits and takes_native(rows, weight, x.dtype):
        return _NativeLinear.apply(x, weight)
    return F.linear(x, weight.to(x.dtype))


def takes_native(rows: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether matmuls of so many rows of `dtype` with a weight (O, I) go to the loops."""
    prefer = "native" if rows >= FEW and weight.device.type == "cpu" and native_is_faster() else None
    sizes = {"outputs": weight.shape[0], "inputs": weight.shape[1]}
    return choose("linear", sizes=sizes, prefer=prefer, dtype=dtype, device=weight.device).name == "native"


def native_is_faster() -> bool:
    """Whether the loops are, on this processor."""
    return bool(native_fact("matmul_is_faster"))


class _NativeLinear(torch.autograd.Function):
    # The parameter itself is saved, as the head does: under ZeRO-3 it is gathered again before backward.

    @staticmethod
    def forward(ctx, x, weight):
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        ctx.shape, ctx.dtype = x.shape, weight.dtype
        return native_matmul(x.reshape(-1, x.shape[-1]), weight, transposed=True).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = None
        rows = dy.reshape(-1, dy.shape[-1])
        if weight is not None:
            dx = native_matmul(rows, weight, transposed=False).view(ctx.shape)
        if x is not None:
            dw = dy.new_empty(dy.shape[-1], x.shape[-1], dtype=torch.float32)
            native_weight_gradient(rows, x.reshape(-1, x.shape[-1]), dw, add=False)
            dw = dw.to(ctx.dtype)
        return dx, dw


def native_matmul(x: Tensor, weight: Tensor, *, transposed: bool, out: Tensor | None = None) -> Tensor:
    """x weight^T if transposed, else x weight. x: (n, K) bfloat16, K even. weight: float32 or bfloat16, (N, K) if
    transposed, else (K, N). Returns (n, N) bfloat16: `out`, contiguous, if it is given."""
    x, weight = _pairs_in_rows(x), with_rows(weight.detach())
    n, K = x.shape
    N, summed = weight.shape if transposed else weight.shape[::-1]
    y = x.new_empty(n, N) if out is None else out
    assert x.dtype == y.dtype == torch.bfloat16 and y.is_contiguous()
    assert summed == K and K % 2 == 0 and y.shape == (n, N), f"x {n, K}, weight {tuple(weight.shape)}"
    columns = native_fact("matmul_columns")
    panels = x.new_empty(-(-N // columns), K // 2, columns, dtype=torch.int32)
    factors = x, x.stride(0), weight, weight.stride(0), int(transposed)
    run_native("matmul", weight.dtype, *factors, y, N, panels, n, K, N)
    return y


def native_weight_gradient(dy: Tensor, x: Tensor, dw: Tensor, *, add: bool) -> None:
    """dw = dy^T x, or that is added to it. dy: (n, O), x: (n, I), bfloat16. dw: (O, I) float32, contiguous."""
    dy, x = with_rows(dy), with_rows(x)
    (n, outputs), inputs = dy.shape, x.shape[1]
    assert dy.dtype == x.dtype == torch.bfloat16 and dw.dtype == torch.float32 and dw.is_contiguous()
    assert len(x) == n and dw.shape == (outputs, inputs), f"dy {n, outputs}, x {tuple(x.shape)}, dw {tuple(dw.shape)}"
    columns, span = native_fact("matmul_columns"), native_fact("matmul_span")
    panels = x.new_empty(-(-n // span), -(-inputs // columns), span // 2, columns, dtype=torch.int32)
    run_native("weight_gradient", x.dtype, dy, dy.stride(0), x, x.stride(0), dw, panels, n, outputs, inputs, int(add))


def _pairs_in_rows(x: Tensor) -> Tensor:
    """x with rows that lie an even number of elements apart, of which the elements lie side by side."""
    x = with_rows(x)
    return x if x.stride(0) % 2 == 0 else x.contiguous()
