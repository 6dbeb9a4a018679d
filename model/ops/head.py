"""The output head and its loss, fused: per-token negative log-likelihood without ever holding all the logits.

    logits = hidden weight^T        nll_t = logsumexp(logits_t) - logits_t[target_t] (+ z_loss logsumexp^2)

Legend: B batch, T tokens, n tokens of all rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK = 2**22  # logits at a time: 16 MiB in float32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """hidden: (B, T, D). weight: (V_padded, D), of which the rows from `vocab_size` on are padding: they have no
    probability and no gradient. targets: (B, T) int64, IGNORE (-100) where nothing is predicted. dtype: of the matmuls,
    hidden's unless given; the softmax is float32. z_loss: weight of logsumexp^2, added to each token's loss.

    Returns (B, T) float32 (float64 for a float64 dtype), 0 where ignored. The backward computes the logits again,
    chunk by chunk of tokens, so that any gradient per token is exact.
    """
    assert 0 < vocab_size <= weight.shape[0], f"vocab_size {vocab_size} for a weight of {weight.shape[0]} rows"
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype or hidden.dtype, z_loss)


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
    def forward(ctx, hidden, weight, targets, vocab_size: int, dtype: torch.dtype, z_loss: float):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        h, w, t = hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight[:vocab_size].to(dtype), targets.flatten()
        lse = torch.empty(t.shape, dtype=wide, device=h.device)
        nll = torch.empty_like(lse)
        for rows in _chunks(len(t), vocab_size):
            logits = (h[rows] @ w.t()).to(wide)
            torch.logsumexp(logits, -1, out=lse[rows])
            nll[rows] = lse[rows] - logits.gather(1, t[rows].clamp(min=0)[:, None]).squeeze(1)
        if z_loss:
            nll.addcmul_(lse, lse, value=z_loss)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.vocab_size, ctx.dtype, ctx.z_loss = vocab_size, dtype, z_loss
        return nll.masked_fill_(t == IGNORE, 0).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nll):
        hidden, weight, targets, lse = ctx.saved_tensors
        dtype, vocab_size, wide = ctx.dtype, ctx.vocab_size, lse.dtype
        h, w, t = hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight[:vocab_size].to(dtype), targets.flatten()
        g = d_nll.flatten().to(wide).masked_fill(t == IGNORE, 0)
        share = g * (1 + 2 * ctx.z_loss * lse)  # of the softmax; the target's own term keeps g
        dh = torch.empty(hidden.shape, dtype=hidden.dtype, device=h.device)
        dw = torch.zeros(weight.shape, dtype=wide, device=h.device)
        for rows in _chunks(len(t), vocab_size):
            d = (h[rows] @ w.t()).to(wide)
            d.sub_(lse[rows, None]).clamp_(max=0).exp_().mul_(share[rows, None])
            d.scatter_add_(1, t[rows].clamp(min=0)[:, None], -g[rows, None])
            d = d.to(dtype)
            dh.view(-1, dh.shape[-1])[rows] = d @ w
            dw[:vocab_size] += d.t() @ h[rows]
        return dh, dw.to(weight.dtype), None, None, None, None


def _chunks(n: int, vocab_size: int) -> list[slice]:
    size = max(16, CHUNK // vocab_size)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
