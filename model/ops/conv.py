"""Causal depthwise convolution over time, as shifted multiply-adds, restarting at each document.

    y_t = act(bias + sum_d weight[k-1-d] x_{t-d})        d = 0 .. k-1, over the x_{t-d} of t's document

Legend: B batch, T tokens, C channels, k taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import rows_at_once, wide_dtype
from model.ops.native import NATIVE_DTYPES, native_ready, run_native, with_rows, with_strides

_ALL = frozenset({"documents", "state", "documents with state"})
declare(
    "conv",
    Backend(
        "causal_conv1d",
        # Both at once it refuses before version 1.7; since then it gives the state to the row's first document,
        # whatever its index.
        _ALL - {"documents with state"},
        HALVES | {torch.float32},
        {"taps": range(2, 5), "channels": range(8, 2**31, 8)},
        module="causal_conv1d",
        device="cuda",
    ),
    Backend(
        "triton",
        _ALL,
        HALVES | {torch.float32},
        {"taps": range(1, 17)},
        module="triton",
        device="cuda",
        capability=(8, 0),
    ),
    Backend(
        "native",
        _ALL,  # a state as tokens put before the row
        NATIVE_DTYPES,
        {"taps": range(1, 17)},
        device="cpu",
        ready=native_ready,
    ),
    Backend("torch", _ALL),
    Backend("reference", _ALL),
)
BLOCK = 2**18  # elements at a time on a CPU: what stays in a core's cache


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    documents: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x: (B, T, C). weight: (C, k). bias: (C,) or None. activation: "silu" or None. One token after a state is a
    `causal_conv_step`.

    documents: (B, T) int32, non-decreasing: a tap never reads another document; index 0 continues `state`, the k-1
    inputs before the row, (B, k-1, C), zeros where there were none. Sums are float32. Returns y (B, T, C) in x's
    dtype, and, if `return_state`, the last k-1 inputs of the last token's document.
    """
    assert activation in (None, "silu"), f"no activation {activation!r}; use 'silu' or None"
    k = weight.shape[1]
    if state is None:
        given = {"documents": documents is not None}
    else:
        assert state.shape == (x.shape[0], k - 1, x.shape[2]), f"state has shape {tuple(state.shape)}"
        given = {"state": True, "documents with state": documents is not None}
    needs = [name for name, wanted in given.items() if wanted]
    sizes = {"taps": k, "channels": x.shape[2]}
    prefer = "torch" if state is not None and x.shape[1] == 1 else None  # decoding: one token
    name = choose("conv", backend, needs=needs, sizes=sizes, prefer=prefer, dtype=x.dtype, device=x.device).name
    if state is not None and name == prefer:
        before = state if documents is None else torch.where((documents == 0)[..., None], state, 0)
        y, after = causal_conv_step(x[:, 0], weight, bias, before, activation)
        return y[:, None], after if return_state else None
    if name == "reference":
        y = causal_conv_reference(x, weight, bias, documents, state, activation)
    elif name == "causal_conv1d":
        y = _causal_conv1d(x, weight, bias, documents, state, activation)
    elif name == "triton":
        from model.ops.conv_triton import causal_conv_triton

        y = causal_conv_triton(x, weight, bias, documents, state, activation)
    elif name == "native" and state is not None:
        # As tokens of index 0 before the row, whose outputs nobody wants.
        index = None if documents is None else _padded_index(x, k, documents)
        y = _NativeConv.apply(_padded(x, k, state), weight, bias, index, activation == "silu")[:, k - 1 :]
    elif name == "native":
        y = _NativeConv.apply(x, weight, bias, documents, activation == "silu")
    else:
        y = _CausalConv.apply(x, weight, bias, documents, state, activation == "silu")
    return y, _next_state(x, k, documents, state) if return_state else None


def _next_state(x: Tensor, k: int, documents: Tensor | None, state: Tensor | None) -> Tensor:
    padded, index = _padded(x, k, state), _padded_index(x, k, documents)
    taps = slice(padded.shape[1] - (k - 1), None)
    return torch.where((index[:, taps] == index[:, -1:])[..., None], padded[:, taps], 0)


def _padded(x: Tensor, k: int, state: Tensor | None) -> Tensor:
    """The inputs with the k-1 before them: (B, k-1+T, C)."""
    if state is None:
        state = x.new_zeros(x.shape[0], k - 1, x.shape[2])
    return torch.cat([state.to(x.dtype), x], 1)


def _padded_index(x: Tensor, k: int, documents: Tensor | None) -> Tensor:
    """The documents of those inputs; what the state holds is of index 0."""
    if documents is None:
        return torch.zeros(x.shape[0], k - 1 + x.shape[1], dtype=torch.int32, device=x.device)
    return F.pad(documents, (k - 1, 0))


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token: x (B, C), state (B, k-1, C) -> (y (B, C), new state)."""
    taps = torch.cat([state.to(x.dtype), x[:, None]], 1)
    wide = wide_dtype(x.dtype)
    y = (taps.to(wide) * weight.t().to(wide)).sum(1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), taps[:, 1:]


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The equation, tap by tap over the whole row."""
    T, k = x.shape[1], weight.shape[1]
    wide = wide_dtype(x.dtype)
    padded, index = _padded(x, k, state).to(wide), _padded_index(x, k, documents)
    y = torch.zeros(x.shape, dtype=wide, device=x.device) if bias is None else bias.to(wide).expand(x.shape)
    for d in range(k):
        there = slice(k - 1 - d, k - 1 - d + T)
        same = (index[:, there] == index[:, k - 1 :])[..., None]
        y = y + weight[:, k - 1 - d].to(wide) * torch.where(same, padded[:, there], 0)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


class _CausalConv(torch.autograd.Function):
    """Saves its inputs only: the pre-activation is computed again, block by block of tokens."""

    @staticmethod
    def forward(ctx, x, weight, bias, documents, state, silu: bool):
        wide = wide_dtype(x.dtype)
        row = _Row(x, weight.to(wide), None if bias is None else bias.to(wide), documents, state)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for span in row.spans():
            h = row.convolve(span, row.inputs(span), row.same(span))
            y[:, span].copy_(F.silu(h, inplace=True) if silu else h)
        ctx.save_for_backward(x, weight, bias, documents, state)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, documents, state = ctx.saved_tensors
        wide, k = wide_dtype(x.dtype), weight.shape[1]
        row = _Row(x, weight.to(wide), None if bias is None else bias.to(wide), documents, state)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        taps = row.taps
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(taps[0])
        # A block's taps reach k-1 tokens back, into the block before it, which comes next.
        reached = x.new_zeros(x.shape[0], k - 1, x.shape[2], dtype=wide)
        for span in reversed(row.spans()):
            inputs, same, n = row.inputs(span), row.same(span), span.stop - span.start
            dh = dy[:, span].to(wide)
            if ctx.silu:
                dh = torch.ops.aten.silu_backward(dh, row.convolve(span, inputs, same))
            d_bias += dh.sum((0, 1))
            d_inputs = torch.zeros_like(inputs)
            d_inputs[:, n:] += reached
            for d in range(k):
                there = slice(k - 1 - d, k - 1 - d + n)
                masked = dh if d == 0 or same is None else dh * same[d - 1]
                d_taps[d] += (masked * inputs[:, there]).sum((0, 1))
                d_inputs[:, there].addcmul_(masked, taps[d])
            dx[:, span] = d_inputs[:, k - 1 :]
            reached = d_inputs[:, : k - 1]
        d_weight = d_taps.flip(0).t().to(weight.dtype)
        d_state = None if state is None else reached.to(state.dtype)
        return dx, d_weight, None if bias is None else d_bias.to(bias.dtype), None, d_state, None


class _NativeConv(torch.autograd.Function):
    """The same in one pass over the inputs, see `cpp/rows.cpp`."""

    @staticmethod
    def forward(ctx, x, weight, bias, documents, silu: bool):
        ctx.save_for_backward(x, weight, bias, documents)
        ctx.silu = silu
        return native_conv(x, weight, bias, documents, silu=silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, documents = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        return dx, *native_conv_backward(x, weight, bias, documents, dy, dx, silu=ctx.silu), None, None


def native_conv(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, *, silu: bool) -> Tensor:
    """`causal_conv` without a state, by the loops of `cpp/rows.cpp` and outside autograd."""
    y = torch.empty(x.shape, dtype=x.dtype)
    (x, taps, vector, index), sizes = _native_arguments(x, weight, bias, documents)
    run_native("conv_forward", x.dtype, x, *x.stride()[:2], taps, vector, index, y, *sizes, int(silu))
    return y


def native_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fills dx, of which the channels of a token lie side by side; returns the gradients of weight and bias."""
    (x, taps, vector, index), sizes = _native_arguments(x, weight, bias, documents)
    d_taps, d_bias = torch.empty_like(taps), None if vector is None else torch.empty_like(vector)
    rows = (*with_strides(x), taps, vector, index, *with_strides(with_rows(dy)), *with_strides(dx))
    run_native("conv_backward", x.dtype, *rows, d_taps, d_bias, *sizes, int(silu))
    d_weight = d_taps.flip(0).t().to(weight.dtype)
    return d_weight, None if bias is None or d_bias is None else d_bias.to(bias.dtype)


def _native_arguments(x, weight, bias, documents) -> tuple[tuple, tuple[int, ...]]:
    taps = weight.detach().float().t().flip(0).contiguous()  # (k, C), by distance
    vector = None if bias is None else bias.detach().float().contiguous()
    index = None if documents is None else documents.to(torch.int32).contiguous()
    return (with_rows(x), taps, vector, index), (*x.shape, len(taps))


class _Row:
    """The inputs by blocks of tokens, with what their taps reach."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, state: Tensor | None):
        self.x, self.bias, self.state, self.dtype = x, bias, state, weight.dtype
        self.taps = weight.t().flip(0).contiguous()  # (k, C), by distance
        self.k = weight.shape[1]
        self.index = None if documents is None else _padded_index(x, self.k, documents)

    def spans(self) -> list[slice]:
        B, T, C = self.x.shape
        size = max(self.k - 1, rows_at_once(self.x.device, B * C, BLOCK))
        return [slice(start, min(start + size, T)) for start in range(0, T, size)]

    def inputs(self, span: slice) -> Tensor:
        """(B, k-1+n, C): the inputs of the block and the k-1 before them."""
        reach = self.k - 1
        if span.start == 0:
            return _padded(self.x[:, : span.stop], self.k, self.state).to(self.dtype)
        return self.x[:, span.start - reach : span.stop].to(self.dtype)

    def same(self, span: slice) -> list[Tensor] | None:
        """For each distance d = 1 .. k-1 (B, n, 1): 1 where token t-d is of t's document, else 0; None if all are."""
        if self.index is None:
            return None
        reach = self.k - 1
        index = self.index[:, span.start : span.stop + reach]
        if index.device.type == "cpu" and bool((index[:, 0] == index[:, -1]).all()):  # elsewhere a look costs a wait
            return None
        n = span.stop - span.start
        pairs = (index[:, reach - d : reach - d + n] == index[:, reach:] for d in range(1, self.k))
        return [pair[..., None].to(self.dtype) for pair in pairs]

    def convolve(self, span: slice, inputs: Tensor, same: list[Tensor] | None) -> Tensor:
        n, reach = span.stop - span.start, self.k - 1
        h = inputs[:, reach:] * self.taps[0]
        if self.bias is not None:
            h += self.bias
        for d in range(1, self.k):
            x = inputs[:, reach - d : reach - d + n]
            h.addcmul_(x if same is None else x * same[d - 1], self.taps[d])
        return h


def _causal_conv1d(x, weight, bias, documents, state, activation) -> Tensor:
    # Documents and states want the layout with channels last, which x (B, T, C) seen as (B, C, T) has, at strides in
    # eights, as most slices of a projection have them. For others, `contiguous` would keep the strides of a wider
    # tensor where there is but one token or row.
    from causal_conv1d import causal_conv1d_fn

    row, token, channel = x.stride()
    if channel != 1 or row % 8 or token % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    x = x.transpose(1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    index = None if documents is None else documents.to(torch.int32).contiguous()
    before = None if state is None else state.to(x.dtype).contiguous().transpose(1, 2)
    y = causal_conv1d_fn(x, weight.to(x.dtype), bias, seq_idx=index, initial_states=before, activation=activation)
    return y.transpose(1, 2)
