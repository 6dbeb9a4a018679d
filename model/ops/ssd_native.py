"""The chunked form of SSD with its elementwise work in C++ (`native.cpp`): the matmuls, and so the numbers, are those
of `ssd_chunked.py`, what lies between them is read and written once.

Legend: b batch, T tokens, G groups, R heads per group, H = G R, P head dim, N state, Q tokens of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.blockwise import Scratch, least_exponent
from model.ops.native import run_native
from model.ops.ssd_chunked import Decay, dot, segment_sum, spans_of, state_first, state_last

CHUNK = 128


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
    """Arguments and results as in `model.ops.ssd.ssd`; x float32 or bfloat16. chunk: None takes what is fast."""
    b, T, H, P = x.shape
    if initial_state is None:
        initial_state = torch.zeros(b, H, P, B.shape[-1])
    arguments = (dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), None if D is None else D.float())
    return _NativeSSD.apply(x, *arguments, documents, initial_state.float(), min(chunk or CHUNK, T))


class _Chunk:
    """One chunk: its matmuls, and the loops on its part of the row."""

    def __init__(self, x: Tensor, B: Tensor, C: Tensor, decay: Decay, span: slice, room: Scratch) -> None:
        self.x, self.decay, self.room = x, decay, room
        self.b, self.T, self.H, self.P = x.shape
        self.G, self.N = B.shape[2:]
        self.start, self.Q = span.start, span.stop - span.start
        self.Bg, self.Cg = B[:, span].transpose(1, 2), C[:, span].transpose(1, 2)
        self.CB = self.dot("CB", self.Cg, self.Bg.transpose(2, 3))
        self.index = None if decay.single else decay.index.to(torch.int32)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.b, self.T, self.start, self.Q, self.G, self.H // self.G

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        run_native(name, self.x.dtype, *arguments)

    def dot(self, name: str, v: Tensor, w: Tensor) -> Tensor:
        return dot(self.room, name, v, w)

    def new(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.room(name, shape, dtype or self.x.dtype)

    def lay(self, name: str, v: Tensor, first: Tensor | None, second: Tensor) -> tuple[Tensor, Tensor]:
        """first v heads first (b, H, Q, P), and second first v groups first (b, G, Q, R P)."""
        heads = self.new(f"{name} heads", self.b, self.H, self.Q, self.P)
        groups = self.new(f"{name} groups", self.b, self.G, self.Q, self.H // self.G * self.P)
        self.call("ssd_lay", v, *v.stride()[:2], first, second, heads, groups, *self.sizes, self.P)
        return heads, groups

    def mask(self) -> Tensor:
        M = self.new("M", self.b, self.H, self.Q, self.Q)
        self.call("ssd_mask", self.CB, self.decay.cs, self.index, M, *self.sizes)
        return M

    def step(self, state: Tensor, through: Tensor, vg: Tensor, wg: Tensor, narrow: Tensor, *sums: Tensor) -> None:
        """state (b, G, N, R, P) = through state + sum over tokens of v (b, G, Q, N) (outer) w (b, G, Q, R P), and its
        copy in x's dtype. through: (b, G, R), of a wider tensor. sums: see `ssd_state` in native.cpp."""
        into, other = self.dot("into_state", vg.transpose(2, 3), wg), sums or (None, None)
        sizes = (self.b, self.G, self.N, self.H // self.G, self.P)
        self.call("ssd_state", state, into, through, through.stride(0), narrow, *other, *sizes)


class _NativeSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, documents, initial_state, chunk: int):
        ctx.chunk, x, dt = chunk, _laid(x), dt.contiguous()
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        spans, room = spans_of(T, chunk), Scratch(x.device)
        decay = Decay.of(dt * A, G, documents, chunk)
        state = state_first(initial_state, G)
        states = torch.empty(len(spans) + 1, b, G, N, H // G * P, dtype=x.dtype)
        states[0] = state.flatten(3)
        y = torch.empty(x.shape, dtype=x.dtype)
        for number, span in enumerate(spans):
            c = _Chunk(x, B, C, decay, span, room)
            dtx, left = c.lay("x", x, dt, decay.leave)
            within = c.dot("M_v", c.mask(), dtx)
            before = c.dot("C_S", c.Cg, states[number])
            c.call("ssd_output", within, before, decay.enter, x, *x.stride()[:2], D, y, *c.sizes, P)
            c.step(state, decay.through[:, number], c.Bg, left, states[number + 1])
        ctx.save_for_backward(x, dt, A, B, C, D, documents, states)
        return y, state_last(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, D, documents, states = ctx.saved_tensors
        b, T, H, P = x.shape
        G, dy, room = B.shape[2], _laid(dy), Scratch(x.device)
        log_decay = dt * A
        decay = Decay.of(log_decay, G, documents, ctx.chunk)
        dx, dB, dC = (torch.empty(v.shape, dtype=v.dtype) for v in (x, B, C))
        d_dt, d_enter, d_leave, dyx = (torch.empty_like(dt) for _ in range(4))
        dcs = torch.empty_like(dt)
        d_state = state_first(d_final, G)  # of the state that leaves the chunk
        dS_out = d_state.flatten(3).to(x.dtype, copy=True)
        d_through = torch.empty(b, G, H // G)
        for number, span in reversed(list(enumerate(spans_of(T, ctx.chunk)))):
            c = _Chunk(x, B, C, decay, span, room)
            S_in = states[number]
            dtx, left = c.lay("x", x, dt, decay.leave)
            dyh, entered = c.lay("dy", dy, None, decay.enter)

            dM, M = c.dot("dM", dyh, dtx.transpose(2, 3)), c.new("M", b, H, c.Q, c.Q)
            dCB, slopes = c.new("dCB", *c.CB.shape), c.new("slopes", b, H, c.Q, dtype=torch.float32)
            c.call("ssd_mask_backward", c.CB, decay.cs, c.index, dM, M, dCB, slopes, *c.sizes)
            within = c.dot("M_v", M.transpose(2, 3), dyh)
            after, before = c.dot("B_dS", c.Bg, dS_out), c.dot("C_S", c.Cg, S_in)
            read = (within, after, before, decay.enter, decay.leave, dt, D, x, *x.stride()[:2], dy, *dy.stride()[:2])
            c.call("ssd_output_backward", *read, dx, d_dt, d_enter, d_leave, dyx, *c.sizes, P)

            dCg = c.dot("dC", entered, S_in.transpose(2, 3))
            dC[:, span] = dCg.add_(c.dot("into_BC", dCB, c.Bg)).transpose(1, 2)
            dBg = c.dot("dB", left, dS_out.transpose(2, 3))
            dB[:, span] = dBg.add_(c.dot("into_BC", dCB.transpose(2, 3), c.Cg)).transpose(1, 2)
            torch.add(slopes.transpose(1, 2), d_enter[:, span], out=dcs[:, span]).sub_(d_leave[:, span])
            c.step(d_state, decay.through[:, number], c.Cg, entered, dS_out, S_in, d_through)
            dcs[:, span.stop - 1] += d_leave[:, span].sum(1).add_(d_through.flatten(1))
        d_log_decay = segment_sum(dcs, decay.key, ctx.chunk, reverse=True)
        d_log_decay.masked_fill_(log_decay < least_exponent(dt.dtype), 0)
        dA = (d_log_decay * dt).sum((0, 1))
        d_dt.addcmul_(d_log_decay, A)
        dD = None if D is None else dyx.sum((0, 1))
        return dx, d_dt, dA, dB, dC, dD, None, state_last(d_state), None


def _laid(x: Tensor) -> Tensor:
    """x (b, T, H, P) with the elements of a token side by side."""
    whole = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if whole else x.contiguous()
