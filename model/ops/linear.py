"""A projection without bias, `y = x W^T`, and the matmuls of its gradients.

On a CPU whose processor multiplies bfloat16 in pairs, and has no AMX, they are loops in C++ (`cpp/matmul.cpp`): they
read the float32 weight itself, so that no copy in bfloat16 is made and kept for the backward, and give its gradient in
float32 as it was summed. Everywhere else they are torch's.

Legend: n rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import Backend, choose, declare
from model.ops.native import NATIVE_DTYPES, asks_native, native_ready, run_native, with_rows

PAIRS = range(2, 2**62, 2)

declare(
    "linear",
    Backend("torch", frozenset()),
    Backend(
        "native",
        frozenset(),
        frozenset({torch.bfloat16}),
        {"inputs": PAIRS, "outputs": PAIRS},
        device="cpu",
        ready=native_ready,
    ),
)

FEW = 1024
"""Rows below which laying out the weight takes as long as the loops gain, or longer."""
COLUMNS, SPAN = 64, 256
"""Of `cpp/matmul.cpp`: the columns of a panel, and the rows that it goes through."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: (..., I). weight: (O, I), of x's dtype or float32, which is rounded to x's. Returns (..., O) in x's dtype;
    the gradient of the weight comes in the weight's dtype."""
    if takes_native(x.numel() // max(1, x.shape[-1]), weight, x.dtype):
        return _NativeLinear.apply(x, weight)
    return F.linear(x, weight.to(x.dtype))


def takes_native(rows: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether matmuls of so many rows of `dtype` with a weight (O, I) go to the loops."""
    if weight.dtype not in NATIVE_DTYPES:
        return False
    prefer = "native" if rows >= FEW and weight.device.type == "cpu" and multiplies_pairs() else None
    sizes = {"outputs": weight.shape[0], "inputs": weight.shape[1]}
    return choose("linear", sizes=sizes, prefer=prefer, dtype=dtype, device=weight.device).name == "native"


class _NativeLinear(torch.autograd.Function):
    # The parameter itself is saved, as F.linear does: under ZeRO-3 it is gathered again before backward.

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return native_matmul(x.reshape(-1, x.shape[-1]), weight, turned=True).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = native_matmul(rows, weight, turned=False).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = torch.empty(weight.shape, dtype=torch.float32)
            native_weight_slope(rows, x.reshape(-1, x.shape[-1]), dw, add=False)
            dw = dw.to(weight.dtype)
        return dx, dw


def native_matmul(x: Tensor, weight: Tensor, *, turned: bool, out: Tensor | None = None) -> Tensor:
    """x weight^T if turned, else x weight. x: (n, K) bfloat16, K even. weight: float32 or bfloat16, (N, K) if turned,
    else (K, N). Returns (n, N) bfloat16: `out`, contiguous, if it is given."""
    x, weight = _pairs_in_rows(x), with_rows(weight.detach())
    n, K = x.shape
    N = weight.shape[0 if turned else 1]
    y = torch.empty(n, N, dtype=torch.bfloat16) if out is None else out
    if n == 0:
        return y
    panels = torch.empty(-(-N // COLUMNS), K // 2, COLUMNS, dtype=torch.int32)
    factors = x, x.stride(0), weight, weight.stride(0), int(turned)
    run_native("matmul", weight.dtype, *factors, y, N, panels, n, K, N)
    return y


def native_weight_slope(dy: Tensor, x: Tensor, dw: Tensor, *, add: bool) -> None:
    """dw = dy^T x, or that is added to it. dy: (n, O), x: (n, I), bfloat16. dw: (O, I) float32, contiguous."""
    assert dw.is_contiguous() and dw.dtype == torch.float32
    dy, x = with_rows(dy), with_rows(x)
    (n, outputs), inputs = dy.shape, x.shape[1]
    panels = torch.empty(-(-n // SPAN), -(-inputs // COLUMNS), SPAN // 2, COLUMNS, dtype=torch.int32)
    run_native("weight_slope", x.dtype, dy, dy.stride(0), x, x.stride(0), dw, panels, n, outputs, inputs, int(add))


def _pairs_in_rows(x: Tensor) -> Tensor:
    """x with rows that lie an even number of elements apart, of which the elements lie side by side."""
    x = with_rows(x)
    return x if x.stride(0) % 2 == 0 else x.contiguous()


def multiplies_pairs() -> bool:
    """Whether the loops are the faster ones on this processor."""
    return asks_native("multiplies_pairs")
