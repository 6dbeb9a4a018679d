"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2) as Triton kernels, with documents and states.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t + D x_t

A row is cut into chunks of L tokens, which run side by side: each first computes its state from zeros, these are
passed from chunk to chunk, and then each chunk runs again from the right state. Backward does the same from the right
to the left with the gradient of the state, and computes the states within a chunk again, a few tokens at a time; so
only one state per chunk is saved. Sums over channels and chunks are partial sums added by torch: no atomics, the same
bits in every run. Everything is float32 inside.

Legend: B batch, T tokens, C channels, N state, K chunks; k names a chunk, `c` and `n` are a program's channels and
states. Tiles are (N, channels), so that neighbouring threads read neighbouring channels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LN_2 = tl.constexpr(math.log(2))
CHANNELS = 32  # per program
# Tokens per chunk, whole STEPS: between these N, so that one number is saved per token and channel.
SHORTEST, LONGEST = 16, 64
STEPS = tl.constexpr(4)  # tokens whose states backward holds in registers at once
AHEAD = tl.constexpr(4)  # chunks whose states are read at once before they are passed on


@triton.jit
def _continues(documents, b, t, T, HAS_DOCUMENTS: tl.constexpr):
    """Whether the token's document is that of the token before it, or of the initial state; true past the end."""
    if HAS_DOCUMENTS:
        here = tl.load(documents + b * T + t, mask=t < T, other=0)
        before = tl.load(documents + b * T + t - 1, mask=(t > 0) & (t < T), other=0)
        return here == before
    else:
        return True


@triton.jit
def _tokens(x, dt, b, t, c, T, C, x_b, x_t):
    """x and dt of a token, (channels,) float32; zeros past the end, which leave a state as it is."""
    inside = c < tl.where(t < T, C, 0)
    xt = tl.load(x + b * x_b + tl.cast(t, tl.int64) * x_t + c, mask=inside, other=0).to(tl.float32)
    dtt = tl.load(dt + (b * T + t) * C + c, mask=inside, other=0)
    return xt, dtt


@triton.jit
def _vector(v, b, t, n, T, N, v_b, v_t):
    """B or C of a token, (N, 1) float32."""
    inside = n < tl.where(t < T, N, 0)
    return tl.load(v + b * v_b + tl.cast(t, tl.int64) * v_t + n, mask=inside, other=0).to(tl.float32)[:, None]


@triton.jit
def _step(h, A2, x, dt, B, continues, HAS_DOCUMENTS: tl.constexpr):
    """The state after a token."""
    kept = tl.exp2(A2 * dt[None, :]) * h
    if HAS_DOCUMENTS:
        kept = tl.where(continues, kept, 0.0)
    return kept + B * (dt * x)[None, :]


@triton.jit
def _chunk_states(
    x, dt, A2, B, documents, states, elapsed, T, C, N, K, x_b, x_t, B_b, B_t,
    NP: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """states (B, K, N, C): what a chunk makes of a state of zeros. elapsed (B, K, C): its sum of dt."""
    c, n = tl.program_id(0) * CP + tl.arange(0, CP), tl.arange(0, NP)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = n[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    A2_tile = tl.load(A2 + tile, mask=inside, other=0)
    h = tl.zeros((NP, CP), tl.float32)
    total = tl.zeros((CP,), tl.float32)
    for t in range(k * L, tl.minimum(k * L + L, T)):
        xt, dtt = _tokens(x, dt, b, t, c, T, C, x_b, x_t)
        Bt = _vector(B, b, t, n, T, N, B_b, B_t)
        h = _step(h, A2_tile, xt, dtt, Bt, _continues(documents, b, t, T, HAS_DOCUMENTS), HAS_DOCUMENTS)
        total += dtt
    tl.store(states + (b * K + k) * N * C + tile, h, mask=inside)
    tl.store(elapsed + (b * K + k) * C + c, total, mask=c < C)


@triton.jit
def _pass_states(
    states, elapsed, A2, documents, first, last, T, C, N, K,
    NP: tl.constexpr, CP: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds by what reaches it: states from `first` on, left to right; gradients of states
    with REVERSE, right to left. What comes out of the end goes to `last`. first, last: (B, N, C)."""
    c, n = tl.program_id(0) * CP + tl.arange(0, CP), tl.arange(0, NP)
    b = tl.program_id(1).to(tl.int64)
    tile = n[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    A2_tile = tl.load(A2 + tile, mask=inside, other=0)
    h = tl.zeros((NP, CP), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + b * N * C + tile, mask=inside, other=0)
    for i in range(0, K, AHEAD):
        added, totals, same = (), (), ()
        for j in tl.static_range(AHEAD):
            k = K - 1 - i - j if REVERSE else i + j
            limit = tl.where((k >= 0) & (k < K), C, 0)
            at = states + (b * K + k) * N * C + tile
            added += (tl.load(at, mask=(n < N)[:, None] & (c < limit)[None, :], other=0),)
            totals += (tl.load(elapsed + (b * K + k) * C + c, mask=c < limit, other=0),)
            if HAS_DOCUMENTS:
                end = tl.load(documents + b * T + tl.minimum(k * L + L, T) - 1, mask=limit > 0, other=0)
                before = tl.load(documents + b * T + k * L - 1, mask=(k > 0) & (limit > 0), other=0)
                same += (end == before,)
        tl.debug_barrier()  # a thread may write what another one reads
        for j in tl.static_range(AHEAD):
            k = K - 1 - i - j if REVERSE else i + j
            limit = tl.where((k >= 0) & (k < K), C, 0)
            tl.store(states + (b * K + k) * N * C + tile, h, mask=(n < N)[:, None] & (c < limit)[None, :])
            h *= tl.exp2(A2_tile * totals[j][None, :])
            if HAS_DOCUMENTS:
                h = tl.where(same[j], h, 0.0)
            h += added[j]
    tl.store(last + b * N * C + tile, h, mask=inside)


@triton.jit
def _outputs(
    x, dt, A2, B, C_, D, documents, states, y, T, C, N, K, x_b, x_t, B_b, B_t, C_b, C_t,
    NP: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """y (B, T, C) from the state that enters each chunk."""
    c, n = tl.program_id(0) * CP + tl.arange(0, CP), tl.arange(0, NP)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = n[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    A2_tile = tl.load(A2 + tile, mask=inside, other=0)
    h = tl.load(states + (b * K + k) * N * C + tile, mask=inside, other=0)
    skip = tl.zeros((CP,), tl.float32)
    if HAS_D:
        skip = tl.load(D + c, mask=c < C, other=0)
    for t in range(k * L, tl.minimum(k * L + L, T)):
        xt, dtt = _tokens(x, dt, b, t, c, T, C, x_b, x_t)
        Bt = _vector(B, b, t, n, T, N, B_b, B_t)
        h = _step(h, A2_tile, xt, dtt, Bt, _continues(documents, b, t, T, HAS_DOCUMENTS), HAS_DOCUMENTS)
        yt = tl.sum(h * _vector(C_, b, t, n, T, N, C_b, C_t), 0)
        if HAS_D:
            yt += skip * xt
        tl.store(y + (b * T + t) * C + c, yt.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def _chunk_gradients(
    dy, dt, A2, C_, documents, gradients, T, C, N, K, dy_b, dy_t, C_b, C_t,
    NP: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """gradients (B, K, N, C): of the state that enters a chunk, through the chunk's own outputs."""
    c, n = tl.program_id(0) * CP + tl.arange(0, CP), tl.arange(0, NP)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = n[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    A2_tile = tl.load(A2 + tile, mask=inside, other=0)
    g = tl.zeros((NP, CP), tl.float32)
    end = tl.minimum(k * L + L, T)
    for i in range(0, end - k * L):
        t = end - 1 - i
        dyt, dtt = _tokens(dy, dt, b, t, c, T, C, dy_b, dy_t)
        g += _vector(C_, b, t, n, T, N, C_b, C_t) * dyt[None, :]
        g *= tl.exp2(A2_tile * dtt[None, :])
        if HAS_DOCUMENTS:
            g = tl.where(_continues(documents, b, t, T, HAS_DOCUMENTS), g, 0.0)
    tl.store(gradients + (b * K + k) * N * C + tile, g, mask=inside)


@triton.jit
def _input_gradients(
    x, dt, A2, B, C_, D, documents, states, gradients, dy, dx, ddt, dA, dB, dC, dD,
    batch, T, C, N, K, x_b, x_t, B_b, B_t, C_b, C_t, dy_b, dy_t,
    NP: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs from the state that enters each chunk and the gradient of the one that leaves it.

    Right to left by STEPS tokens, whose states are computed again from the chunk's first. dA (B, K, N, C) and dD
    (B, K, C) are sums of a chunk's tokens; dB and dC (blocks of channels, B, T, N) of a program's channels.
    """
    block = tl.program_id(0)
    c, n = block * CP + tl.arange(0, CP), tl.arange(0, NP)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = n[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    A2_tile = tl.load(A2 + tile, mask=inside, other=0)
    entering = states + (b * K + k) * N * C + tile
    g = tl.load(gradients + (b * K + k) * N * C + tile, mask=inside, other=0)
    sum_A = tl.zeros((NP, CP), tl.float32)
    sum_D = tl.zeros((CP,), tl.float32)
    skip = tl.zeros((CP,), tl.float32)
    if HAS_D:
        skip = tl.load(D + c, mask=c < C, other=0)
    for part in range(0, L // STEPS):
        start = k * L + L - STEPS - part * STEPS
        h = tl.load(entering, mask=inside, other=0)
        for t in range(k * L, tl.minimum(start, T)):
            xt, dtt = _tokens(x, dt, b, t, c, T, C, x_b, x_t)
            Bt = _vector(B, b, t, n, T, N, B_b, B_t)
            h = _step(h, A2_tile, xt, dtt, Bt, _continues(documents, b, t, T, HAS_DOCUMENTS), HAS_DOCUMENTS)
        hs = (h,)
        for i in tl.static_range(STEPS):
            t = start + i
            xt, dtt = _tokens(x, dt, b, t, c, T, C, x_b, x_t)
            Bt = _vector(B, b, t, n, T, N, B_b, B_t)
            h = _step(h, A2_tile, xt, dtt, Bt, _continues(documents, b, t, T, HAS_DOCUMENTS), HAS_DOCUMENTS)
            hs += (h,)
        for i in tl.static_range(STEPS):
            t = start + STEPS - 1 - i
            xt, dtt = _tokens(x, dt, b, t, c, T, C, x_b, x_t)
            here = tl.where(t < T, C, 0)
            dyt = tl.load(dy + b * dy_b + tl.cast(t, tl.int64) * dy_t + c, mask=c < here, other=0).to(tl.float32)
            Bt, Ct = _vector(B, b, t, n, T, N, B_b, B_t), _vector(C_, b, t, n, T, N, C_b, C_t)
            at = ((block * batch + b) * T + t) * N + n
            tl.store(dC + at, tl.sum(hs[STEPS - i] * dyt[None, :], 1), mask=n < tl.where(t < T, N, 0))
            g += Ct * dyt[None, :]
            tl.store(dB + at, tl.sum(g * (dtt * xt)[None, :], 1), mask=n < tl.where(t < T, N, 0))
            through_B = tl.sum(g * Bt, 0)
            g *= tl.exp2(A2_tile * dtt[None, :])
            decayed = g * hs[STEPS - 1 - i]  # the gradient of the exponent
            if HAS_DOCUMENTS:
                continues = _continues(documents, b, t, T, HAS_DOCUMENTS)
                g = tl.where(continues, g, 0.0)
                decayed = tl.where(continues, decayed, 0.0)  # the other document's state may be infinite
            sum_A += decayed * dtt[None, :]
            ddtt = xt * through_B + tl.sum(decayed * A2_tile, 0) * LN_2
            dxt = dtt * through_B
            if HAS_D:
                dxt += skip * dyt
                sum_D += dyt * xt
            tl.store(dx + (b * T + t) * C + c, dxt.to(dx.dtype.element_ty), mask=c < here)
            tl.store(ddt + (b * T + t) * C + c, ddtt, mask=c < here)
    tl.store(dA + (b * K + k) * N * C + tile, sum_A, mask=inside)
    if HAS_D:
        tl.store(dD + (b * K + k) * C + c, sum_D, mask=c < C)


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x: (B, T, C) in float32, bfloat16 or float16. dt: (B, T, C) float32, positive. A: (C, N) float32, negative.
    B, C: (B, T, N). D: (C,) or None. documents: (B, T) int32, non-decreasing: a state never enters another document;
    index 0 continues `initial_state` (B, C, N) float32, zeros where there is none.

    Returns y (B, T, C) in x's dtype and the state after the last token (B, C, N) float32, both differentiable in all
    that is real. Saves its inputs and up to N = 64 one float32 number per token and channel.
    """
    return _SelectiveScan.apply(x, dt, A, B, C, D, documents, initial_state)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, documents, initial_state):
        ctx.dtypes = [None if v is None else v.dtype for v in (dt, A, B, C, D, initial_state)]
        x, dt, B, C = _rows(x), dt.float().contiguous(), _rows(B), _rows(C)
        documents = None if documents is None else documents.to(torch.int32).contiguous()
        D = None if D is None else D.float().contiguous()
        ctx.plan = plan = _Plan(x, A, documents)
        A2 = _states_first(A) / LN_2.value
        states, elapsed = plan.new(plan.K, plan.N, plan.C), plan.new(plan.K, plan.C)
        first = None if initial_state is None else _states_first(initial_state)
        last, y = plan.new(plan.N, plan.C), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        strides = [stride for v in (x, B, C) for stride in v.stride()[:2]]
        with torch.cuda.device_of(x):
            _chunk_states[plan.chunks](x, dt, A2, B, documents, states, elapsed, *plan.sizes, *strides[:4], **plan.tile)
            plan.pass_states(states, elapsed, A2, documents, first, last, reverse=False)
            _outputs[plan.chunks](
                x, dt, A2, B, C, D, documents, states, y, *plan.sizes, *strides, HAS_D=D is not None, **plan.tile
            )
        ctx.save_for_backward(x, dt, A2, B, C, D, documents, states, elapsed)
        ctx.set_materialize_grads(False)
        return y, last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_last):
        x, dt, A2, B, C, D, documents, states, elapsed = ctx.saved_tensors
        plan = ctx.plan
        dy = torch.zeros_like(x) if dy is None else _rows(dy)
        gradients, d_first = torch.empty_like(states), plan.new(plan.N, plan.C)
        last = None if d_last is None else _states_first(d_last)
        dx, ddt = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(dt)
        blocks = plan.chunks[0]
        dB, dC = (torch.empty(blocks, *B.shape, dtype=torch.float32, device=x.device) for _ in range(2))
        dA, dD = torch.empty_like(states), None if D is None else torch.empty_like(elapsed)
        strides = [stride for v in (x, B, C, dy) for stride in v.stride()[:2]]
        with torch.cuda.device_of(x):
            _chunk_gradients[plan.chunks](
                dy, dt, A2, C, documents, gradients, *plan.sizes, *strides[6:], *strides[4:6], **plan.tile
            )
            plan.pass_states(gradients, elapsed, A2, documents, last, d_first, reverse=True)
            _input_gradients[plan.chunks](
                x, dt, A2, B, C, D, documents, states, gradients, dy, dx, ddt, dA, dB, dC, dD,
                x.shape[0], *plan.sizes, *strides, HAS_D=D is not None, **plan.tile,
            )  # fmt: skip
        dt_type, A_type, B_type, C_type, D_type, state_type = ctx.dtypes
        return (
            dx,
            ddt.to(dt_type),
            dA.sum((0, 1)).t().to(A_type),
            dB.sum(0).to(B_type),
            dC.sum(0).to(C_type),
            None if dD is None else dD.sum((0, 1)).to(D_type),
            None,
            None if state_type is None else d_first.transpose(1, 2).to(state_type),
        )


class _Plan:
    """Sizes, grids and tiles of one call."""

    def __init__(self, x: Tensor, A: Tensor, documents: Tensor | None) -> None:
        self.batch, self.T, self.C = x.shape
        self.N, self.device = A.shape[1], x.device
        NP = triton.next_power_of_2(self.N)
        L = min(max(NP, SHORTEST), LONGEST)
        self.K = triton.cdiv(self.T, L)
        self.sizes = (self.T, self.C, self.N, self.K)
        blocks = triton.cdiv(self.C, CHANNELS)
        self.chunks, self.rows = (blocks, self.K, self.batch), (blocks, self.batch)
        self.tile = {
            "NP": NP,
            "CP": CHANNELS,
            "L": L,
            "HAS_DOCUMENTS": documents is not None,
            "num_warps": min(8, max(1, NP * CHANNELS // 512)),  # 16 numbers of a tile per thread
        }

    def new(self, *shape: int) -> Tensor:
        return torch.empty(self.batch, *shape, dtype=torch.float32, device=self.device)

    def pass_states(self, states, elapsed, A2, documents, first, last, *, reverse: bool) -> None:
        given = {"REVERSE": reverse, "HAS_FIRST": first is not None}
        _pass_states[self.rows](states, elapsed, A2, documents, first, last, *self.sizes, **given, **self.tile)


def _rows(v: Tensor) -> Tensor:
    """The same, its channels next to each other; rows and tokens may lie apart, as in a slice of a projection."""
    return v if v.stride(-1) == 1 else v.contiguous()


def _states_first(v: Tensor) -> Tensor:
    """(..., C, N) -> (..., N, C) float32."""
    return v.float().transpose(-1, -2).contiguous()
