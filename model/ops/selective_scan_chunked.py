"""The selective scan in plain torch, block by block, with a backward of its own that recomputes instead of saving.

The state of one token is too small to keep a processor busy and the states of a row are too large to keep, so a row
goes through in blocks of Q tokens, of a few rows and channels, whose states fill a part of the cache:

    a = exp(dt A), H = (dt x) B     whole blocks at once
    H_t += a_t H_{t-1}              one addition of products per token
    y = C H                         one matmul per block

Decays are exponentials of one token's dt A, so that none overflows however long the row is. Saved for backward: the
inputs and the state that enters each block. Backward computes a block's states again, then walks it in reverse:

    G_t = C_t dy_t + a_{t+1} G_{t+1}         gradient of H_t
    W_t = G_t a_t H_{t-1}                    gradient of dt_t A: gives those of dt and A

Isolation between documents is exact: a_t is 0 where token t begins a document.

Legend: B batch, T tokens, C channels, N state; q, b, c: tokens, rows and channels of a block. States are (N, C): the
long axis last, along which everything is elementwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.blockwise import ACCELERATOR_BLOCK, LOG2_E, exp2_, least_exponent, wide_dtype

STEP = 2**15  # elements of the states of one token of a block, on a CPU
BLOCK = 2**19  # elements of the states of a block, on a CPU; three such tensors are at work in backward
LONGEST = 128  # tokens of a block


def selective_scan_chunked(
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
    """Arguments and results as in `model.ops.selective_scan.selective_scan`. chunk: tokens of a block, None for what
    was measured to be fast; the result does not depend on it."""
    wide = wide_dtype(x.dtype)
    inputs = [x, dt.to(wide), A.to(wide), B, C, None if D is None else D.to(wide)]
    differentiable = [v for v in (*inputs, initial_state) if v is not None and v.requires_grad]
    keep = torch.is_grad_enabled() and bool(differentiable)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=wide)
    return _Scan.apply(*inputs, documents, initial_state.to(wide), chunk, keep)


@dataclass(frozen=True)
class _Part:
    """A run of rows and of channels, which goes through all tokens by itself."""

    rows: slice
    channels: slice

    def of(self, v: Tensor, span: slice) -> Tensor:
        """(B, T, C) -> (q, b, c), a view."""
        return v[self.rows, span, self.channels].transpose(0, 1)


def _on_cpu(x: Tensor) -> bool:
    """Where calls cost little, caches decide, and a look at the numbers costs no wait."""
    return x.device.type == "cpu"


def _parts(x: Tensor, N: int) -> Iterator[_Part]:
    B, _, C = x.shape
    step = STEP if _on_cpu(x) else B * C * N
    c = min(C, max(1, step // N))
    b = min(B, max(1, step // (N * c)))
    for row in range(0, B, b):
        for channel in range(0, C, c):
            yield _Part(slice(row, min(row + b, B)), slice(channel, min(channel + c, C)))


def _block_tokens(x: Tensor, N: int) -> int:
    B, T, C = x.shape
    step, block = (min(STEP, B * C * N), BLOCK) if _on_cpu(x) else (B * C * N, ACCELERATOR_BLOCK)
    return max(1, min(LONGEST, T, block // step))


def _continues(documents: Tensor) -> Tensor:
    """(B, T) bool: the token sees the state before it. Index 0 continues the state that was passed in."""
    before = torch.cat([torch.zeros_like(documents[:, :1]), documents[:, :-1]], 1)
    return documents == before


class _Block:
    """The memory of the blocks of one shape, which stays warm from block to block, and its views, made once.

    x, dtx, y: (q, b, c), the latter for results. dt: the same, a view of the call's own. a: (q, b, N, c), decays. H:
    (q + 1, b, N, c), states, the one that enters first. G: (q, b, N, c), their gradients, and dy: for backward alone.
    Flat: with tokens and rows as one dimension of matmuls.
    """

    dt: Tensor

    def __init__(self, shape: tuple[int, int, int, int], wide: torch.dtype, device: torch.device, back: bool) -> None:
        q, b, N, c = shape
        self.x, self.dtx, self.y = (torch.empty(q, b, c, dtype=wide, device=device) for _ in range(3))
        self.a = torch.empty(shape, dtype=wide, device=device)
        self.H = torch.empty(q + 1, b, N, c, dtype=wide, device=device)
        self.before, self.after = self.H[:-1], self.H[1:]
        self.first, self.last = self.H[0], self.H[-1]
        self.flat_H, self.flat_y = self.after.view(q * b, N, c), self.y.view(q * b, 1, c)
        decays, states = self.a.unbind(0), self.H.unbind(0)
        self.steps = list(zip(states[1:], decays, states[:-1], strict=True))
        if back:
            self.G, self.dy = torch.empty_like(self.a), torch.empty_like(self.x)
            self.flat_G, self.flat_dy = self.G.view(q * b, N, c), self.dy.view(q * b, 1, c)
            self.flat_a, self.flat_dtx = self.a.view(q * b, N, c), self.dtx.view(q * b, 1, c)
            self.ones = self.a.new_ones(1, 1, N).expand(q * b, 1, N)
            slopes = self.G.unbind(0)
            self.steps_back = list(zip(slopes[:-1], decays[1:], slopes[1:], strict=True))[::-1]

    def scan(self, B: Tensor) -> None:
        """H after H[0]. B: (q, b, N)."""
        torch.mul(self.dtx[:, :, None], B[..., None], out=self.after)
        for state, decay, before in self.steps:
            state.addcmul_(decay, before)

    def scan_back(self, C: Tensor, d_after: Tensor) -> None:
        """G. C: (q, b, N). d_after: (b, N, c), the gradient of the last state that later blocks ask for."""
        torch.mul(self.dy[:, :, None], C[..., None], out=self.G)
        self.G[-1] += d_after
        for slope, decay, after in self.steps_back:
            slope.addcmul_(decay, after)

    def over_channels(self, v: Tensor, states: Tensor) -> Tensor:
        """Sum over the channels of v (q b, 1, c) states (q b, N, c): (q, b, N)."""
        # As a row times a transposed matrix: a tenth of the time of the matrix times a column.
        return torch.bmm(v, states.transpose(1, 2)).view(self.a.shape[:3])

    def into_dt_and_A(self, A: Tensor, d_dt: Tensor, dA: Tensor) -> None:
        """W, from which it writes d_dt (q, b, c) and adds to dA (N, c). y holds the gradient of dt x. Uses up a, G and
        dtx."""
        W = self.G.mul_(self.a).mul_(self.before)
        torch.mul(W, A, out=self.a)
        torch.bmm(self.ones, self.flat_a, out=self.flat_dtx)  # a sum over N, faster than `sum`
        d_dt.copy_(self.dtx.addcmul_(self.y, self.x))
        dA += W.mul_(self.dt[:, :, None]).sum((0, 1))


class _Rows:
    """What the blocks of a call share. bounded: no decay is so strong that `exp2_` would bound it."""

    def __init__(self, x, dt, A, B, C, documents: Tensor | None, chunk: int, back: bool = False) -> None:
        self.x, self.dt, self.wide, self.chunk, self.back = x, dt, dt.dtype, chunk, back
        self.B, self.C = (v.to(self.wide).transpose(0, 1) for v in (B, C))  # (T, B, N)
        self.A = A.t().contiguous()  # (N, C)
        self.exponents = self.A * LOG2_E
        self.continues = None if documents is None else _continues(documents)
        self.on_cpu = _on_cpu(x)
        # What is not a number is not above the bound.
        self.bounded = self.on_cpu and bool(dt.amax() * self.A.amin() > least_exponent(self.wide))
        self.blocks: dict[tuple[int, int, int, int], _Block] = {}
        self.spans = [slice(start, min(start + chunk, x.shape[1])) for start in range(0, x.shape[1], chunk)]

    def broken(self, part: _Part) -> set[int]:
        """The blocks inside which a document of these rows begins; elsewhere than on a CPU, where a look costs a wait,
        all of them."""
        if self.continues is None:
            return set()
        if not self.on_cpu:
            return set(range(len(self.spans)))
        begins = ~self.continues[part.rows].all(0)
        return set((begins.nonzero().flatten() // self.chunk).tolist())

    def block(self, part: _Part, span: slice, broken: bool, state: Tensor) -> _Block:
        """The block after `state` (b, N, c): inputs, decays, states. Overwrites the block before it."""
        x = part.of(self.x, span)
        q, b, c = x.shape
        shape = (q, b, self.A.shape[0], c)
        block = self.blocks.get(shape)
        if block is None:
            block = self.blocks[shape] = _Block(shape, self.wide, x.device, self.back)
        block.first.copy_(state)
        block.x.copy_(x)
        block.dt = part.of(self.dt, span)
        torch.mul(block.x, block.dt, out=block.dtx)
        torch.mul(block.dt[:, :, None], self.exponents[:, part.channels], out=block.a)
        if self.bounded:
            block.a.exp2_()
        else:
            exp2_(block.a)
        if broken:
            assert self.continues is not None
            block.a.mul_(self.continues[part.rows, span].t()[..., None, None])
        block.scan(self.B[span, part.rows])
        return block

    def flat(self, v: Tensor, part: _Part, span: slice) -> Tensor:
        """(T, B, N) -> (q b, 1, N)."""
        return v[span, part.rows].reshape(-1, 1, v.shape[2])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, documents, initial_state, chunk: int | None, keep: bool):
        (b, T, c), N = x.shape, A.shape[1]
        chunk = min(chunk or _block_tokens(x, N), T)
        rows = _Rows(x, dt, A, B, C, documents, chunk)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        entering = torch.empty(len(rows.spans) if keep else 0, b, N, c, dtype=dt.dtype, device=x.device)
        final = torch.empty(b, c, N, dtype=dt.dtype, device=x.device)
        for part in _parts(x, N):
            broken = rows.broken(part)
            state = initial_state[part.rows, part.channels].transpose(1, 2)
            for number, span in enumerate(rows.spans):
                block = rows.block(part, span, number in broken, state)
                if keep:
                    entering[number, part.rows, :, part.channels] = block.first
                torch.bmm(rows.flat(rows.C, part, span), block.flat_H, out=block.flat_y)
                if D is not None:
                    block.y.addcmul_(block.x, D[part.channels])
                part.of(y, span).copy_(block.y)
                state = block.last
            final[part.rows, part.channels] = state.transpose(1, 2)
        ctx.save_for_backward(x, dt, A, B, C, D, documents, entering)
        ctx.chunk = chunk
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, D, documents, entering = ctx.saved_tensors
        rows = _Rows(x, dt, A, B, C, documents, ctx.chunk, back=True)
        numbered = list(enumerate(rows.spans))
        dx, d_dt = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt))
        dA, dB, dC = (torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in (rows.A, rows.B, rows.C))
        dD = None if D is None else torch.zeros_like(D)
        d_initial = torch.empty(d_final.shape, dtype=dt.dtype, device=dt.device)
        for part in _parts(x, A.shape[1]):
            broken = rows.broken(part)
            d_state = d_final[part.rows, part.channels].transpose(1, 2).clone(memory_format=torch.contiguous_format)
            for number, span in reversed(numbered):
                block = rows.block(part, span, number in broken, entering[number, part.rows, :, part.channels])
                block.dy.copy_(part.of(dy, span))
                block.scan_back(rows.C[span, part.rows], d_state)
                dC[span, part.rows] += block.over_channels(block.flat_dy, block.flat_H)
                dB[span, part.rows] += block.over_channels(block.flat_dtx, block.flat_G)
                torch.bmm(rows.flat(rows.B, part, span), block.flat_G, out=block.flat_y)  # of dt x
                torch.mul(block.G[0], block.a[0], out=d_state)
                block.into_dt_and_A(rows.A[:, part.channels], part.of(d_dt, span), dA[:, part.channels])
                block.y.mul_(block.dt)
                if D is not None and dD is not None:
                    block.y.addcmul_(block.dy, D[part.channels])
                    dD[part.channels] += block.dy.mul_(block.x).sum((0, 1))
                part.of(dx, span).copy_(block.y)
            d_initial[part.rows, part.channels] = d_state.transpose(1, 2)
        dB, dC = dB.transpose(0, 1).to(B.dtype), dC.transpose(0, 1).to(C.dtype)
        return dx, d_dt, dA.t(), dB, dC, dD, None, d_initial, None, None
