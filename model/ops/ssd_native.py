"""The chunked form of SSD in C++ (`cpp/ssd.cpp`): the algorithm of `ssd_chunked.py`, with what is computed of a chunk
and a head in the cache. Matmuls take numbers of the dtype of x and add in float32.

Legend: b batch, T tokens, G groups, H heads, P head dim, N state, Q tokens of a chunk; P and N are filled up to
multiples of 32 inside.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.native import padded, run_native, with_heads, with_strides

CHUNK = 64


def ssd_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    initial_state: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `model.ops.ssd.ssd`; x float32 or bfloat16. chunk: None takes what is fast, another
    number is taken to the next multiple of 32."""
    b, T, H, P = x.shape
    if initial_state is None:
        initial_state = torch.zeros(b, H, P, B.shape[-1])
    inputs = x, B.to(x.dtype), C.to(x.dtype), dt.float(), A.float(), None if D is None else D.float()
    index = None if documents is None else documents.to(torch.int32).contiguous()
    return _NativeSSD.apply(*inputs, index, initial_state.float(), native_chunk(T, chunk), torch.is_grad_enabled())


class _NativeSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, B, C, dt, A, D, index, initial_state, chunk: int, backward: bool):
        scan = Scan(with_heads(x), with_heads(B), with_heads(C), dt.contiguous(), A, D, index)
        state = initial_state.clone(memory_format=torch.contiguous_format)
        y, states = native_scan(scan, state, chunk, backward)
        ctx.save_for_backward(*scan, states)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        *inputs, states = ctx.saved_tensors
        scan = Scan(*inputs)
        d_state = d_final.clone(memory_format=torch.contiguous_format)
        dx, dB, dC = (torch.empty(v.shape, dtype=v.dtype) for v in (scan.x, scan.B, scan.C))
        slopes = native_scan_backward(scan, states, ctx.chunk, with_heads(dy), d_state, dx, dB, dC)
        return dx, dB, dC, *slopes, None, d_state, None, None


class Scan(NamedTuple):
    """What the loops read. x (b, T, H, P), B, C (b, T, G, N): as `with_heads` gives them. dt (b, T, H), A, D (H,):
    float32, contiguous. documents: (b, T) int32, contiguous."""

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor | None
    documents: Tensor | None

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        x, B, C, dt, A, D, documents = self
        return *with_strides(x), dt, A, *with_strides(B), *with_strides(C), D, documents

    def sizes(self, chunk: int) -> tuple[int, ...]:
        (b, T, H, P), (G, N) = self.x.shape, self.B.shape[2:]
        return b, T, G, H // G, P, N, chunk

    def room(self, chunks: int, chunk: int) -> tuple[Tensor, Tensor]:
        """For the decays, and for B or C turned."""
        (b, _, H, _), (G, N) = self.x.shape, self.B.shape[2:]
        decays = torch.empty(b, H, 2, chunks * chunk, dtype=torch.float64)
        return decays, torch.empty(b, G, chunks, padded(N), chunk, dtype=self.x.dtype)


def native_chunk(T: int, chunk: int | None = None) -> int:
    """Tokens per chunk of rows of T: what is fast, or the next multiple of 32 of another number."""
    return padded(min(chunk or CHUNK, T))


def native_scan(scan: Scan, state: Tensor | None, chunk: int, backward: bool) -> tuple[Tensor, Tensor | None]:
    """The scan outside autograd. state: (b, H, P, N) float32, contiguous; it becomes the last one. None: zeros, and
    nobody wants the last one. Returns y and, if there is to be a backward, the states that enter the chunks, as panels
    (`cpp/tiles.h`)."""
    b, T, H, P = scan.x.shape
    G, N = scan.B.shape[2:]
    chunks = -(-T // chunk)
    y = torch.empty(scan.x.shape, dtype=scan.x.dtype)
    states = torch.empty(b, H, chunks, padded(N), padded(P), dtype=scan.x.dtype) if backward else None
    rows_C = torch.empty(b, G, chunks, chunk, padded(N), dtype=scan.x.dtype)
    room = *scan.room(chunks, chunk), rows_C, torch.empty(b, G, chunks, chunk, chunk, dtype=torch.float32)
    run_native("ssd_forward", y.dtype, *scan.arguments(), state, y, states, *room, *scan.sizes(chunk))
    return y, states


def native_scan_backward(
    scan: Scan, states: Tensor, chunk: int, dy: Tensor, d_state: Tensor | None, dx: Tensor, dB: Tensor, dC: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`d_state`, of the last state, becomes that of the first; None as in `native_scan`. Fills dx, dB and dC, which lie
    as `with_heads` has it; returns the gradients of dt, A and D."""
    b, _, H, _ = scan.x.shape
    chunks = states.shape[2]
    d_dt, dA, dD = torch.empty_like(scan.dt), *(scan.dt.new_empty(b, chunks, H) for _ in range(2))
    room = torch.empty_like(states), *scan.room(chunks, chunk), scan.dt.new_empty(b, H, chunks)
    read = *scan.arguments(), *with_strides(dy), states, d_state
    into = *with_strides(dx), d_dt, *with_strides(dB), *with_strides(dC), dA, dD
    run_native("ssd_backward", dy.dtype, *read, *room, *into, *scan.sizes(chunk))
    return d_dt, dA.sum((0, 1)), None if scan.D is None else dD.sum((0, 1))
