"""The causal depthwise convolution as Triton kernels, with documents and a state at once.

    y_t = act(bias + sum_d weight[k-1-d] x_{t-d})        d = 0 .. k-1, over the x_{t-d} of t's document

One kernel forward and one backward, which computes the pre-activation again. Sums are float32; the weight's gradient
is a sum of partial sums added by torch: no atomics, the same bits in every run.

Legend: B batch, T tokens, C channels, k taps; a program takes TP tokens of CP channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS, CHANNELS = 32, 32  # per program


@triton.jit
def _inputs(x, state, b, t, c, T, C, x_b, x_t, TAPS: tl.constexpr, HAS_STATE: tl.constexpr):
    """The inputs at tokens t, (TP, CP) float32: before the row the state's, zeros where there are none."""
    inside = (c < C)[None, :]
    at = x + b * x_b + t.to(tl.int64)[:, None] * x_t + c[None, :]
    v = tl.load(at, mask=((t >= 0) & (t < T))[:, None] & inside, other=0)
    v = v.to(tl.float32)
    if HAS_STATE:
        at = state + (b * (TAPS - 1) + t + TAPS - 1)[:, None] * C + c[None, :]
        v += tl.load(at, mask=((t < 0) & (t > -TAPS))[:, None] & inside, other=0).to(tl.float32)
    return v


@triton.jit
def _documents(documents, b, t, T, HAS_DOCUMENTS: tl.constexpr):
    """The documents of tokens t: 0 before the row."""
    if HAS_DOCUMENTS:
        return tl.load(documents + b * T + t, mask=(t >= 0) & (t < T), other=0)
    else:
        return t * 0


@triton.jit
def _convolved(
    x, weight, bias, documents, state, y, T, C, x_b, x_t,
    TAPS: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """y (B, T, C)."""
    c, t = tl.program_id(0) * CP + tl.arange(0, CP), tl.program_id(1) * TP + tl.arange(0, TP)
    b = tl.program_id(2).to(tl.int64)
    here = _documents(documents, b, t, T, HAS_DOCUMENTS)
    h = tl.zeros((TP, CP), tl.float32)
    if HAS_BIAS:
        h += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
    for d in tl.static_range(TAPS):
        w = tl.load(weight + c * TAPS + (TAPS - 1 - d), mask=c < C, other=0).to(tl.float32)
        v = _inputs(x, state, b, t - d, c, T, C, x_b, x_t, TAPS, HAS_STATE)
        same = _documents(documents, b, t - d, T, HAS_DOCUMENTS) == here
        h += w[None, :] * tl.where(same[:, None], v, 0.0)
    if SILU:
        h *= tl.sigmoid(h)
    out = y + (b * T + t)[:, None] * C + c[None, :]
    tl.store(out, h.to(y.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _gradients(
    x, weight, bias, documents, state, dy, dx, d_state, d_weight, d_bias, T, C, x_b, x_t, dy_b, dy_t,
    TAPS: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """dx (B, T, C) and, as its tokens before the row, d_state (B, k-1, C); d_weight (B, programs, k, C) and d_bias
    (B, programs, C), sums of a program's tokens. Token t gets from the k outputs that it reaches, t .. t+k-1."""
    c, i = tl.program_id(0) * CP + tl.arange(0, CP), tl.program_id(1)
    t = i * TP + tl.arange(0, TP)
    if HAS_STATE:
        t -= TAPS - 1
    b = tl.program_id(2).to(tl.int64)
    # All that those outputs read: the inputs at t-k+1 .. t+k-1, and the taps by distance.
    inputs, index, taps = (), (), ()
    for e in tl.static_range(2 * TAPS - 1):
        inputs += (_inputs(x, state, b, t + (e - TAPS + 1), c, T, C, x_b, x_t, TAPS, HAS_STATE),)
        index += (_documents(documents, b, t + (e - TAPS + 1), T, HAS_DOCUMENTS),)
    for d in tl.static_range(TAPS):
        taps += (tl.load(weight + c * TAPS + (TAPS - 1 - d), mask=c < C, other=0).to(tl.float32)[None, :],)
    part = (b * tl.num_programs(1) + i) * C
    total = tl.zeros((TP, CP), tl.float32)
    for j in tl.static_range(TAPS):  # the output at t+j
        there = (t + j >= 0) & (t + j < T)
        at = dy + b * dy_b + (t + j).to(tl.int64)[:, None] * dy_t + c[None, :]
        dh = tl.load(at, mask=there[:, None] & (c < C)[None, :], other=0).to(tl.float32)
        if SILU:
            h = tl.zeros((TP, CP), tl.float32)
            if HAS_BIAS:
                h += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
            for d in tl.static_range(TAPS):
                same = index[TAPS - 1 + j - d] == index[TAPS - 1 + j]
                h += taps[d] * tl.where(same[:, None], inputs[TAPS - 1 + j - d], 0.0)
            gate = tl.sigmoid(h)
            dh *= gate * (1 + h * (1 - gate))
        same = index[TAPS - 1] == index[TAPS - 1 + j]
        total += taps[j] * tl.where(same[:, None], dh, 0.0)
        if j == 0:
            if HAS_BIAS:
                tl.store(d_bias + part + c, tl.sum(dh, 0), mask=c < C)
            for d in tl.static_range(TAPS):
                same = index[TAPS - 1 - d] == index[TAPS - 1]
                tap = tl.sum(dh * tl.where(same[:, None], inputs[TAPS - 1 - d], 0.0), 0)
                tl.store(d_weight + (part * TAPS + (TAPS - 1 - d) * C) + c, tap, mask=c < C)
    inside = (c < C)[None, :]
    at = dx + (b * T + t)[:, None] * C + c[None, :]
    tl.store(at, total.to(dx.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & inside)
    if HAS_STATE:
        at = d_state + (b * (TAPS - 1) + t + TAPS - 1)[:, None] * C + c[None, :]
        tl.store(at, total.to(d_state.dtype.element_ty), mask=(t < 0)[:, None] & inside)


def causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x (B, T, C) in float32, bfloat16 or float16 -> y (B, T, C) in x's dtype. Arguments as in `causal_conv`; the
    gradients of x, weight, bias and state are those of the same map."""
    return _CausalConv.apply(x, weight, bias, documents, state, activation == "silu")


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, documents, state, silu: bool):
        ctx.types = (weight.dtype, None if bias is None else bias.dtype, None if state is None else state.dtype)
        x, weight = _rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        documents = None if documents is None else documents.to(torch.int32).contiguous()
        state = None if state is None else state.to(x.dtype).contiguous()  # as the other paths round it
        ctx.options = {
            "TAPS": weight.shape[1],
            "TP": TOKENS,
            "CP": CHANNELS,
            "SILU": silu,
            "HAS_BIAS": bias is not None,
            "HAS_DOCUMENTS": documents is not None,
            "HAS_STATE": state is not None,
        }
        B, T, C = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(C, CHANNELS), triton.cdiv(T, TOKENS), B)
        with torch.cuda.device_of(x):
            _convolved[grid](x, weight, bias, documents, state, y, T, C, *x.stride()[:2], **ctx.options)
        ctx.save_for_backward(x, weight, bias, documents, state)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, documents, state = ctx.saved_tensors
        (B, T, C), k, dy = x.shape, weight.shape[1], _rows(dy)
        grid = (triton.cdiv(C, CHANNELS), triton.cdiv(T + (0 if state is None else k - 1), TOKENS), B)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight = torch.empty(B, grid[1], k, C, dtype=torch.float32, device=x.device)
        d_bias = None if bias is None else torch.empty(B, grid[1], C, dtype=torch.float32, device=x.device)
        weight_type, bias_type, state_type = ctx.types
        d_state = None if state is None else torch.empty(B, k - 1, C, dtype=state_type, device=x.device)
        with torch.cuda.device_of(x):
            _gradients[grid](
                x, weight, bias, documents, state, dy, dx, d_state, d_weight, d_bias,
                T, C, *x.stride()[:2], *dy.stride()[:2], **ctx.options,
            )  # fmt: skip
        d_weight = d_weight.sum((0, 1)).t().to(weight_type)
        return dx, d_weight, None if d_bias is None else d_bias.sum((0, 1)).to(bias_type), None, d_state, None


def _rows(v: Tensor) -> Tensor:
    """The same, its channels next to each other; rows and tokens may lie apart, as in a slice of a projection."""
    return v if v.stride(-1) == 1 else v.contiguous()
