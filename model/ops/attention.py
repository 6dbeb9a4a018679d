"""Causal attention, full or in a sliding window, with grouped key/value heads and documents; rotary positions.

    y_i = sum_j softmax_j(s_ij) v_j     over j <= i, i - j < window, j in i's document
    s_ij = scale q_i . k_j,  or c tanh(scale q_i . k_j / c) under a cap c     (Gemma 2, arXiv 2408.00118)

The plain-torch path goes block by block over the queries, each against the span of keys it can see, with a backward
that recomputes the probabilities: no tensor grows with T x T. Scores and softmax are float32 (products of bfloat16
numbers are exact there); probabilities are rounded to the input's dtype for their matmuls, as flash kernels do.

Legend: B batch, T tokens, L cached tokens, S = L + T keys, H query heads, K key/value heads, R = H/K, P head dim.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.attention_native import attention_native
from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import LOG2_E, Scratch, exp2_, wide_dtype
from model.ops.native import NATIVE_DTYPES, native_ready
from model.ops.rope import RopeScaling, frequencies

BLOCK = 128  # queries at a time; 64 measures alike, 256 is slower in a window

_ALL = frozenset({"documents", "past", "window", "cap"})
declare(
    "attention",
    Backend(
        "flash_attn",
        _ALL,  # what is past by keys put before the row's: see `_packed_keys`
        HALVES,
        {"head_dim": range(1, 257)},  # what is no multiple of 8 it pads itself
        module="flash_attn",
        device="cuda",
        capability=(8, 0),
    ),
    Backend(
        "torch_varlen",  # flash attention as torch brings it
        _ALL - {"cap"},
        HALVES,
        {"head_dim": range(8, 257, 8)},
        device="cuda",
        capability=(8, 0),
    ),
    Backend("native", _ALL, NATIVE_DTYPES, device="cpu", ready=native_ready),
    Backend("torch", _ALL),
    Backend("reference", _ALL),
)


@dataclass(frozen=True)
class Past:
    """Keys and values of the tokens before the row: k, v (B, L, K, P), of which the last `length` (B,) are valid."""

    k: Tensor
    v: Tensor
    length: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    bounds: Tensor | None = None,
    scale: float | None = None,
    cap: float | None = None,
    past: Past | None = None,
    backend: str | None = None,
) -> Tensor:
    """q: (B, T, H, P). k, v: (B, T, K, P), K divides H. window: tokens a query sees, itself included; None: all.

    documents: (B, T) int32, non-decreasing: a query sees its own document only; index 0 continues `past`. bounds: the
    `document_bounds` of `documents`, for callers that have them (to find them is to wait for the device). scale: of the
    scores, 1/sqrt(P) unless given. cap: bound of the scores, None for none. Returns (B, T, H, P). A change in one
    document leaves the outputs and gradients of the others bit-identical.
    """
    assert q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} query heads do not divide into {k.shape[2]} key/value heads"
    assert window is None or window > 0, "a window holds at least the token itself"
    assert cap is None or cap > 0, "a cap bounds both signs"
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    given = {"documents": documents, "past": past, "window": window, "cap": cap}
    needs = [name for name, value in given.items() if value is not None]
    sizes = {"head_dim": q.shape[-1]}
    prefer = "torch" if past is not None and q.shape[1] == 1 else None  # decoding: no block of queries
    name = choose("attention", backend, needs=needs, sizes=sizes, prefer=prefer, dtype=q.dtype, device=q.device).name
    if name in ("flash_attn", "torch_varlen"):
        keys = _Keys.of(k, v, documents, bounds, past)
        return _flash(q, keys, window, scale, cap) if name == "flash_attn" else _torch_varlen(q, keys, window, scale)
    k, v, document, limit = _with_past(q, k, v, documents, past, window)
    if name == "reference":
        return attention_reference(q, k, v, document, limit, scale, cap)
    if name == "native":
        return attention_native(q, k, v, document, limit, scale, cap)
    if document is None and cap is None and limit == k.shape[1]:  # only the future is hidden: torch's own kernel
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    return _BlockAttention.apply(q, k, v, document, limit, scale, cap)


def _with_past(q, k, v, documents, past: Past | None, window: int | None):
    """Keys and values with the cached ones before them, the document of each key (None: all the same one; -1: not a
    valid cache entry), and how many keys a query can see at most."""
    B, T = q.shape[:2]
    if past is None:
        return k, v, documents, min(window or T, T)
    L = past.k.shape[1]
    slots = torch.arange(L, device=q.device)
    cached = torch.where(slots >= L - past.length[:, None], 0, -1).to(torch.int32)
    if documents is None:
        documents = torch.zeros(B, T, dtype=torch.int32, device=q.device)
    k, v = torch.cat([past.k.to(k.dtype), k], 1), torch.cat([past.v.to(v.dtype), v], 1)
    return k, v, torch.cat([cached, documents.to(torch.int32)], 1), min(window or L + T, L + T)


def _hidden(document: Tensor | None, queries: range, keys: range, limit: int, device: torch.device) -> Tensor:
    """(1 or B, 1, 1, queries, keys) bool: the query does not see the key. Both ranges count keys, cache included."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)
    hidden = (j > i) | (i - j >= limit)
    if document is not None:
        mine = document[:, queries.start : queries.stop, None]
        hidden = hidden | (mine != document[:, None, keys.start : keys.stop])
    return hidden.view(-1, 1, 1, len(queries), len(keys))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, limit: int, scale: float, cap: float | None = None
) -> Tensor:
    """All T x S scores at once: the oracle. document: (B, S) or None, of the keys; queries are the last T of them."""
    wide = wide_dtype(q.dtype)
    T, S, R = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.to(wide).repeat_interleave(R, 2), v.to(wide).repeat_interleave(R, 2)
    scores = scale * torch.einsum("bihp,bjhp->bhij", q.to(wide), k)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    hidden = _hidden(document, range(S - T, S), range(S), limit, q.device)[:, 0]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhp->bihp", weights, v).to(q.dtype)


def document_bounds(documents: Tensor) -> Tensor:
    """documents: (B, T), as above -> (documents of all rows + 1,) int32: where each begins, counted over the flattened
    rows, and B T. The host waits for the device to know how many there are."""
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    begins = torch.cat([first, documents[:, 1:] != documents[:, :-1]], 1).flatten()
    return torch.cat([begins, first[0]]).nonzero().flatten().to(torch.int32)


@dataclass(frozen=True)
class _Keys:
    """Keys and values as kernels for packed sequences take them, whose last query sees the last key of its sequence.

    k, v: (B, T, K, P), or (n, K, P) where there is a past. queries, keys: `document_bounds`, of the queries and of the
    keys; None for whole rows. longest: keys of a sequence, at most.
    """

    k: Tensor
    v: Tensor
    queries: Tensor | None
    keys: Tensor | None
    longest: int

    @staticmethod
    def of(k: Tensor, v: Tensor, documents: Tensor | None, bounds: Tensor | None, past: Past | None) -> "_Keys":
        B, T = k.shape[:2]
        if bounds is None and documents is not None:
            bounds = document_bounds(documents)
        if past is None:
            return _Keys(k, v, bounds, bounds, T)
        if bounds is None:
            bounds = _row_bounds(B, T, k.device)
        L, length = past.k.shape[1], past.length.clamp(max=past.k.shape[1])
        if documents is not None:
            length = length * (documents[:, 0] == 0)
        # The keys that somebody sees come first, in their order; the others belong to no sequence, and kernels leave
        # their gradients as they found them.
        seen = torch.arange(L + T, device=k.device) >= L - length[:, None]
        order = seen.flatten().logical_not().to(torch.uint8).argsort(stable=True)
        there = seen.flatten()[order][:, None, None]
        pairs = ((past.k, k), (past.v, v))
        k, v = (torch.where(there, torch.cat([a.to(b.dtype), b], 1).flatten(0, 1)[order], 0) for a, b in pairs)
        # A sequence has the past of every row that began before its end.
        before = F.pad(length.cumsum(0), (1, 0))
        keys = (bounds + before[(bounds + T - 1) // T]).to(torch.int32)
        return _Keys(k, v, bounds, keys, L + T)


def _row_bounds(B: int, T: int, device: torch.device) -> Tensor:
    return torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)


def _flash(q, keys: _Keys, window: int | None, scale: float, cap: float | None = None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    visible = (-1, -1) if window is None else (window - 1, 0)
    # Its backward adds in any order unless told otherwise.
    options = {"softmax_scale": scale, "causal": True, "window_size": visible, "deterministic": True}
    if cap is not None:
        options["softcap"] = cap
    if keys.queries is None:
        return flash_attn_func(q, keys.k, keys.v, **options)
    rows = (x if x.dim() == 3 else x.flatten(0, 1) for x in (q, keys.k, keys.v))
    # Upper bounds of lengths: the exact ones would have to be waited for.
    ends = keys.queries, keys.keys, q.shape[1], keys.longest
    return flash_attn_varlen_func(*rows, *ends, **options).view(q.shape)


def _torch_varlen(q, keys: _Keys, window: int | None, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, _ = q.shape
    rows = _row_bounds(B, T, q.device) if keys.queries is None else keys.queries
    ends = rows if keys.keys is None else keys.keys
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    queries, k, v = (x if x.dim() == 3 else x.flatten(0, 1) for x in (q, keys.k, keys.v))
    if k.shape[1] != H:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    out: Any = varlen_attn(queries, k, v, rows, ends, T, keys.longest, **options)
    return out.view(q.shape)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, document, limit: int, scale: float, cap: float | None):
        B, T, H, P = q.shape
        S, K = k.shape[1:3]
        wide = wide_dtype(q.dtype)
        kh, vh = _keys_first(k, wide), _keys_first(v, v.dtype)
        out = torch.empty(B, T, H, P, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, K, H // K, T, dtype=wide, device=q.device)
        masks, room = _Masks(document, limit, wide, q.device), Scratch(q.device)
        for rows, queries, span in _blocks(T, S, limit):
            visible, bias = masks.of(queries, span)
            qh = _heads_first(q[:, rows], K).to(wide) * (scale * LOG2_E if cap is None else scale / cap)
            scores = _dot(qh, kh[:, :, span].transpose(2, 3), room, "scores")
            if cap is not None:
                scores.tanh_().mul_(cap * LOG2_E)
            scores.add_(bias)
            top = scores.amax(-1, keepdim=True)
            weights = exp2_(scores.sub_(top)).mul_(visible)
            total = weights.sum(-1, keepdim=True)
            lse[..., rows] = total.log2().add_(top).squeeze(-1)
            y = _dot(_narrow(weights, q.dtype, room, "weights"), vh[:, :, span], room, "y")
            out[:, rows] = _tokens_first(y / total)
        ctx.save_for_backward(q, k, v, document, out, lse)
        ctx.limit, ctx.scale, ctx.cap = limit, scale, cap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, document, out, lse = ctx.saved_tensors
        T, (S, K), wide = q.shape[1], k.shape[1:3], lse.dtype
        kh, vh = _keys_first(k, k.dtype), _keys_first(v, v.dtype)
        kw = kh.to(wide)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(kh.shape, dtype=wide, device=q.device) for _ in range(2))
        masks, room = _Masks(document, ctx.limit, wide, q.device), Scratch(q.device)
        for rows, queries, span in _blocks(T, S, ctx.limit):
            visible, _ = masks.of(queries, span)
            qh, dyh = _heads_first(q[:, rows], K), _heads_first(dy[:, rows], K)
            slope, factor = None, ctx.scale * LOG2_E if ctx.cap is None else ctx.scale / ctx.cap
            scores = _dot(qh.to(wide) * factor, kw[:, :, span].transpose(2, 3), room, "scores")
            if ctx.cap is not None:
                slope = torch.mul(scores.tanh_(), scores, out=room("slope", scores.shape, wide)).neg_().add_(1)
                scores.mul_(ctx.cap * LOG2_E)
            weights = exp2_(scores.sub_(lse[..., rows, None])).mul_(visible)
            delta = (dyh.to(wide) * _heads_first(out[:, rows], K)).sum(-1, keepdim=True)
            dv[:, :, span].add_(_over_queries(_narrow(weights, q.dtype, room, "weights"), dyh, room))
            d_weights = _dot(dyh, vh[:, :, span].transpose(2, 3), room, "d_weights")
            d_scores = room("d_scores", weights.shape, wide).copy_(d_weights).sub_(delta).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = _narrow(d_scores, q.dtype, room, "weights")
            dk[:, :, span].add_(_over_queries(d_scores, qh, room), alpha=ctx.scale)
            dq[:, rows] = _tokens_first(_dot(d_scores, kh[:, :, span], room, "dq").mul_(ctx.scale))
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), None, None, None, None


def _blocks(T: int, S: int, limit: int) -> Iterator[tuple[slice, range, slice]]:
    """Blocks of queries: their rows, the same counted among the keys, and the span of keys that they can see."""
    for start in range(S - T, S, BLOCK):
        queries = range(start, min(start + BLOCK, S))
        first = max(0, start - limit + 1) // 32 * 32  # matmuls like aligned slices
        yield slice(start - (S - T), queries.stop - (S - T)), queries, slice(first, queries.stop)


class _Masks:
    """visible (1 or B, 1, 1, n, keys), 1 or 0, and the bias that keeps hidden keys from the maximum.

    Hidden weights are multiplied by 0 after the exponential, whose argument `exp2_` bounds.
    """

    def __init__(self, document: Tensor | None, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self.document, self.limit, self.dtype, self.device = document, limit, dtype, device
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, queries: range, span: slice) -> tuple[Tensor, Tensor]:
        # Without documents, a mask depends on relative places only.
        key = (len(queries), span.stop - span.start)
        if self.document is not None or key not in self.known:
            hidden = _hidden(self.document, queries, range(span.start, span.stop), self.limit, self.device)
            visible = (~hidden).to(self.dtype)
            self.known = {key: (visible, (visible - 1).mul_(1e30))}
        return self.known[key]


def _keys_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S, K, P) -> (B, K, S, P), contiguous."""
    B, S, K, P = x.shape
    return torch.empty(B, K, S, P, dtype=dtype, device=x.device).copy_(x.transpose(1, 2))


def _heads_first(x: Tensor, K: int) -> Tensor:
    """(B, n, H, P) -> (B, K, R, n, P), contiguous."""
    return x.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _tokens_first(x: Tensor) -> Tensor:
    """(B, K, R, n, P) -> (B, n, H, P)."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _dot(x: Tensor, y: Tensor, room: Scratch, name: str) -> Tensor:
    """(B, K, R, n, a) @ (B, K, a, c) -> (B, K, R, n, c): the R heads of a group are rows of one matmul."""
    out = room(name, (*x.shape[:-1], y.shape[-1]), x.dtype)
    torch.bmm(x.reshape(-1, x.shape[2] * x.shape[3], x.shape[4]), y.flatten(0, 1), out=out.flatten(2, 3).flatten(0, 1))
    return out


def _over_queries(weights: Tensor, x: Tensor, room: Scratch) -> Tensor:
    """(B, K, R, n, keys), (B, K, R, n, P) -> (B, K, keys, P)."""
    B, K, R, n, keys = weights.shape
    out = room("over_queries", (B, K, keys, x.shape[-1]), x.dtype)
    torch.bmm(weights.view(B * K, R * n, keys).transpose(1, 2), x.view(B * K, R * n, -1), out=out.flatten(0, 1))
    return out


def _narrow(x: Tensor, dtype: torch.dtype, room: Scratch, name: str) -> Tensor:
    return room(name, x.shape, dtype).copy_(x)


def rotary(
    x: Tensor, positions: Tensor, theta: float, dims: int | None = None, scaling: RopeScaling | None = None
) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) in float32: x (B, T, H, P), positions (B, T) -> x's dtype.

    Dimension i of the first half of the rotated dimensions turns with its partner in the second half, by the angle
    position * theta^(-2i/dims). dims: how many of the P dimensions turn, the first ones; all unless given. scaling:
    other frequencies for longer contexts.
    """
    dims = x.shape[-1] if dims is None else dims
    assert dims % 2 == 0 and dims <= x.shape[-1], f"cannot turn {dims} of {x.shape[-1]} dimensions in pairs"
    wide = wide_dtype(x.dtype)
    angle = positions[..., None].to(wide) * frequencies(theta, dims, scaling, wide, x.device)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """The transpose of a rotation turns back, so the backward needs the angles only."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    y[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y
