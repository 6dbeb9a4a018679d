"""The output head and its loss, fused: per-token negative log-likelihood without ever holding all the logits.

    logits = hidden weight^T        nll_t = logsumexp(logits_t) - logits_t[target_t] (+ z_loss logsumexp^2)

Legend: B batch, T tokens, n tokens of all rows, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import LOG2_E, exp2_, rows_at_once, wide_dtype
from model.ops.linear import native_matmul, native_weight_gradient, takes_native
from model.ops.native import NATIVE_DTYPES, native_ready, run_native

declare(
    "head",
    Backend("triton", frozenset(), HALVES | {torch.float32}, module="triton", device="cuda", capability=(8, 0)),
    Backend("native", frozenset(), NATIVE_DTYPES, device="cpu", ready=native_ready),
    Backend("torch", frozenset()),
)

IGNORE = -100
CHUNK = 2**23  # logits at a time on a CPU: 16 MiB in bfloat16
TILE = 128  # tokens: matmuls take whole tiles of them


@dataclass(frozen=True)
class VocabularyPart:
    """The part of the vocabulary that a tensor rank holds: its first id, and how to gather (n,) of all ranks into
    (ranks, n)."""

    first: int
    gather: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    part: VocabularyPart | None = None,
) -> Tensor:
    """hidden: (B, T, D). weight: (V_padded, D), of which the rows from `vocab_size` on are padding: they have no
    probability and no gradient. targets: (B, T) int64, IGNORE (-100) where nothing is predicted. dtype: of the matmuls,
    hidden's unless given; the softmax is float32. z_loss: weight of logsumexp^2, added to each token's loss.

    part: weight and vocab_size are of this rank's part of the vocabulary, hidden and targets the same on all ranks.
    Each returns the loss over the whole vocabulary, and the gradient of hidden is a part of a sum over ranks.

    Returns (B, T) float32 (float64 for a float64 dtype), 0 where ignored. Any gradient per token is exact: the backward
    computes the logits again, chunk by chunk of tokens. On a CPU, where that costs more than memory does, the forward
    takes the gradients of the sum while it has the logits; a backward that weighs all tokens alike scales those.
    """
    assert 0 < vocab_size <= weight.shape[0], f"vocab_size {vocab_size} for a weight of {weight.shape[0]} rows"
    ahead = (
        hidden.device.type == "cpu"
        and part is None
        and torch.is_grad_enabled()
        and hidden.requires_grad
        and weight.requires_grad
    )
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype or hidden.dtype, z_loss, part, ahead)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float = 0.0
) -> Tensor:
    """All logits at once, in the input's dtype: the oracle."""
    logits = (hidden @ weight[:vocab_size].t()).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)
    penalty = z_loss * logits.logsumexp(-1).square().view(targets.shape)
    return nll + penalty.masked_fill(targets == IGNORE, 0)


class _LinearCrossEntropy(torch.autograd.Function):
    # The parameter itself is saved, as F.linear does: under ZeRO-3 it is gathered again before backward.

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size: int, dtype: torch.dtype, z_loss: float, part, ahead: bool):
        wide = wide_dtype(dtype)
        h = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        t = targets.flatten().contiguous()  # they may be one column of wider rows
        t, away = _local_targets(t, vocab_size, part)
        lse = torch.empty(t.shape, dtype=wide, device=h.device)
        nll = torch.empty_like(lse)
        fast = _softmax(choose("head", dtype=dtype, device=h.device).name)
        w = _multiplied(weight, vocab_size, fast).to(dtype)
        matmuls = _Matmuls(h, w)
        gradients = _Gradients(hidden, weight, matmuls, wide) if ahead else None
        for rows, raw, logits in _chunks(len(t), w, wide, fast):
            matmuls.logits(rows, raw)
            aimed = raw.gather(1, t[rows].clamp(min=0)[:, None]).squeeze(1).to(wide)
            if fast is not None:
                fast.log_sum_exp(raw, vocab_size, lse[rows])
            else:
                assert logits is not None
                top = logits.copy_(raw).amax(-1, keepdim=True)
                total = exp2_(logits.sub_(top).mul_(LOG2_E)).sum(-1, keepdim=True)
                lse[rows] = total.log_().add_(top).squeeze(1)
            nll[rows] = aimed
            if gradients is not None:
                valid = (t[rows] != IGNORE).to(wide)
                share = valid * (1 + 2 * z_loss * lse[rows])
                _slope(fast, raw, logits, vocab_size, lse[rows], share, valid, t[rows])
                gradients.add(rows, raw)
        if part is not None and away is not None:
            lse = part.gather(lse).logsumexp(0)
            nll = part.gather(nll.masked_fill_(away, 0)).sum(0)
        nll = torch.sub(lse, nll, out=nll)
        if z_loss:
            nll.addcmul_(lse, lse, value=z_loss)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.vocab_size, ctx.dtype, ctx.z_loss, ctx.fast, ctx.part = vocab_size, dtype, z_loss, fast, part
        ctx.of_sum = None if gradients is None else (gradients.dh, gradients.dw)
        return nll.view(targets.shape).masked_fill_(targets == IGNORE, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nll):
        hidden, weight, targets, lse = ctx.saved_tensors
        dtype, vocab_size, wide, fast = ctx.dtype, ctx.vocab_size, lse.dtype, ctx.fast
        t = targets.flatten().contiguous()
        g = d_nll.flatten().to(wide)
        of_sum, ctx.of_sum = ctx.of_sum, None
        if of_sum is not None and (factor := _common(g[t != IGNORE])) is not None:
            dh, dw = of_sum
            return dh.mul_(factor), dw.mul_(factor).to(weight.dtype), *[None] * 6
        h = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        w = _multiplied(weight, vocab_size, fast).to(dtype)
        g = g.masked_fill(t == IGNORE, 0)
        share = g * (1 + 2 * ctx.z_loss * lse)  # of the softmax; the target's own term keeps g
        t, away = _local_targets(t, vocab_size, ctx.part)
        if away is not None:
            g = g.masked_fill(away, 0)
        matmuls = _Matmuls(h, w)
        gradients = _Gradients(hidden, weight, matmuls, wide)
        for rows, raw, d in _chunks(len(t), w, wide, fast):
            matmuls.logits(rows, raw)
            _slope(fast, raw, d, vocab_size, lse[rows], share[rows], g[rows], t[rows])
            gradients.add(rows, raw)
        return gradients.dh, gradients.dw.to(weight.dtype), *[None] * 6


class _Matmuls:
    """Of h (n, D) and w (V, D), in one dtype; for chunks of tokens."""

    def __init__(self, h: Tensor, w: Tensor) -> None:
        self.h, self.w = h, w
        self.native = takes_native(_tokens_at_once(len(h), w), w, h.dtype)

    def logits(self, rows: slice, out: Tensor) -> None:
        if self.native:
            native_matmul(self.h[rows], self.w, transposed=True, out=out)
        else:
            torch.mm(self.h[rows], self.w.t(), out=out)

    def hidden_gradient(self, d: Tensor) -> Tensor:
        """d: the gradient of these rows' logits, (n, V)."""
        return native_matmul(d, self.w, transposed=False) if self.native else d @ self.w

    def add_weight_gradient(self, rows: slice, d: Tensor, dw: Tensor) -> None:
        """dw: (V, D) in float32 or float64."""
        if self.native:
            native_weight_gradient(d, self.h[rows], dw, add=True)
            return
        torch.mm(d.t(), self.h[rows], out=self._product)
        if self._addend is not self._product:
            self._addend.copy_(self._product)
        dw += self._addend

    @cached_property
    def _product(self) -> Tensor:
        return torch.empty_like(self.w)

    @cached_property
    def _addend(self) -> Tensor:
        # Adding a narrower dtype, torch would widen it into fresh memory on a CPU, which takes longer than the sum.
        wide = wide_dtype(self.w.dtype)
        widened = self.w.device.type == "cpu" and self.w.dtype != wide
        return torch.empty_like(self.w, dtype=wide) if widened else self._product


class _Gradients:
    """Sums over chunks of tokens: dh like hidden, dw like the weight but in `wide`."""

    def __init__(self, hidden: Tensor, weight: Tensor, matmuls: _Matmuls, wide: torch.dtype) -> None:
        self.matmuls = matmuls
        self.dh = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        self.dw = torch.zeros(weight.shape, dtype=wide, device=hidden.device)

    def add(self, rows: slice, d: Tensor) -> None:
        """d: the gradient of these rows' logits, (n, V) in the operands' dtype."""
        self.dh.view(-1, self.dh.shape[-1])[rows] = self.matmuls.hidden_gradient(d)
        self.matmuls.add_weight_gradient(rows, d, self.dw[: len(self.matmuls.w)])


def _slope(
    fast: "Softmax | None",
    raw: Tensor,
    room: Tensor | None,
    V: int,
    lse: Tensor,
    share: Tensor,
    own: Tensor,
    target: Tensor,
) -> None:
    """The logits `raw` become share softmax(logits), less `own` at the target. room: as large, float32, unless fast."""
    if fast is not None:
        fast.softmax_slope(raw, V, lse, share, own, target)
        return
    assert room is not None
    exp2_(room.copy_(raw).sub_(lse[:, None]).mul_(LOG2_E)).mul_(share[:, None])
    room.scatter_add_(1, target.clamp(min=0)[:, None], -own[:, None])
    raw.copy_(room)


def _common(values: Tensor) -> Tensor | None:
    """The one value that all of them have, 0 of none; None where they differ."""
    if len(values) == 0:
        return values.new_zeros(())
    return values[0] if bool((values == values[0]).all()) else None


def _local_targets(t: Tensor, vocab_size: int, part: VocabularyPart | None) -> tuple[Tensor, Tensor | None]:
    """Targets as rows of this rank's part, and where they lie in another's; those are clamped into the part."""
    if part is None:
        return t, None
    local = t - part.first
    return local.clamp(0, vocab_size - 1), (local < 0) | (local >= vocab_size)


class Softmax(Protocol):
    """Works on rows of logits (n, V or more) in the matmul's dtype, of which the first V stand for tokens.

    padded: it takes more.
    """

    padded: bool

    def log_sum_exp(self, logits: Tensor, V: int, out: Tensor) -> None:
        """Into out, (n,) float32."""

    def softmax_slope(self, logits: Tensor, V: int, lse: Tensor, share: Tensor, own: Tensor, target: Tensor) -> None:
        """The logits become share softmax(logits), less `own` at the target, and 0 from V on; lse, share and own (n,)
        float32."""


class _NativeSoftmax:
    padded = False

    def log_sum_exp(self, logits: Tensor, V: int, out: Tensor) -> None:
        run_native("log_sum_exp", logits.dtype, logits, out, *logits.shape)

    def softmax_slope(self, logits: Tensor, V: int, lse: Tensor, share: Tensor, own: Tensor, target: Tensor) -> None:
        run_native("softmax_slope", logits.dtype, logits, lse, share, own, target, *logits.shape)


def _softmax(name: str) -> Softmax | None:
    """None: in plain torch, on a copy of the logits in float32."""
    if name == "triton":
        from model.ops.head_triton import TritonSoftmax

        return TritonSoftmax()
    return _NativeSoftmax() if name == "native" else None


def _multiplied(weight: Tensor, vocab_size: int, fast: Softmax | None) -> Tensor:
    """The rows of the weight that take part in matmuls. The padding does where the softmax can leave it out: a GPU's
    matmul of an odd number of rows takes kernels that load one number at a time, five times as slow."""
    return weight if fast is not None and fast.padded else weight[:vocab_size]


def _tokens_at_once(n: int, w: Tensor) -> int:
    size = max(16, rows_at_once(w.device, len(w), CHUNK))
    if size > TILE:
        size -= size % TILE
    return min(n, size)


def _chunks(
    n: int, w: Tensor, wide: torch.dtype, fast: Softmax | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows of tokens with room for their logits, in the matmul's dtype and, unless the softmax is `fast` and takes
    those, in the softmax's: the same memory each time, because the first touch of fresh memory takes longer than the
    work on it."""
    V, size = len(w), _tokens_at_once(n, w)
    raw = torch.empty(size, V, dtype=w.dtype, device=w.device)
    logits = None if fast else torch.empty(size, V, dtype=wide, device=w.device)
    for start in range(0, n, size):
        m = min(size, n - start)
        yield slice(start, start + m), raw[:m], None if logits is None else logits[:m]
