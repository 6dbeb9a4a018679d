"""The chunked form of SSD in C++ (`cpp/ssd.cpp`): the algorithm of `ssd_chunked.py`, with every intermediate of a chunk
in the cache. Matmuls take numbers of x's dtype and add in float32.

Legend: b batch, T tokens, G groups, H heads, P head dim, N state, Q tokens of a chunk; P and N are filled up to
multiples of 32 inside.
"""

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
    arguments = (dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), None if D is None else D.float())
    index = None if documents is None else documents.to(torch.int32).contiguous()
    return _NativeSSD.apply(x, *arguments, index, initial_state.float(), padded(min(chunk or CHUNK, T)))


class _NativeSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, index, initial_state, chunk: int):
        inputs = with_heads(x), dt.contiguous(), A, with_heads(B), with_heads(C), D, index
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        chunks = -(-T // chunk)
        state = initial_state.clone(memory_format=torch.contiguous_format)
        states = torch.empty(b, H, chunks, padded(N), padded(P), dtype=x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype)
        room = _room(x, chunks * chunk, G, N)
        sizes = b, T, G, H // G, P, N, chunk
        run_native("ssd_forward", x.dtype, *_inputs(inputs), state, y, states, *room, *sizes)
        ctx.save_for_backward(*inputs, states)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        *inputs, states = ctx.saved_tensors
        x, dt, _, B, C, D, _ = inputs
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        chunk, chunks, dy = ctx.chunk, states.shape[2], with_heads(dy)
        d_state = d_final.clone(memory_format=torch.contiguous_format)
        room = _room(x, chunks * chunk, G, N)
        dx, dB, dC = (torch.empty(v.shape, dtype=v.dtype) for v in (x, B, C))
        d_dt, dA, dD = torch.empty_like(dt), dt.new_empty(b, chunks, H), dt.new_empty(b, chunks, H)
        before = (*with_strides(dy), states, d_state, torch.empty_like(states), *room, dt.new_empty(b, H, chunks))
        sizes = b, T, G, H // G, P, N, chunk
        run_native("ssd_backward", x.dtype, *_inputs(inputs), *before, dx, d_dt, dB, dC, dA, dD, *sizes)
        return dx, d_dt, dA.sum((0, 1)), dB, dC, None if D is None else dD.sum((0, 1)), None, d_state, None


def _room(x: Tensor, tokens: int, G: int, N: int) -> tuple[Tensor, Tensor]:
    """For the decays of all tokens, and for B or C turned."""
    b, _, H, _ = x.shape
    decays = torch.empty(b, H, 2, tokens, dtype=torch.float64)
    return decays, torch.empty(b, G, padded(N), tokens, dtype=x.dtype)


def _inputs(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | int | None, ...]:
    """x, dt, A, B, C, D, index as the loops take them: x, B and C with the strides of a row and of a token."""
    x, dt, A, B, C, D, index = inputs
    assert x is not None and B is not None and C is not None
    return *with_strides(x), dt, A, *with_strides(B), *with_strides(C), D, index
