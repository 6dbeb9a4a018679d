"""What a run of tokens does to the state of SSD, without its outputs: S -> through S + state.

    leave_t = exp(sum over i > t of dt_i A)        state = sum_t leave_t dt_t x_t (outer) B_t
    through = exp(sum over all t of dt_t A)        if no document begins in the run, else 0

over the tokens t of the run's last document. One of the four matmuls of a scan; with it context ranks know what enters
their chunk before they scan it. The sums start at the end, so that each is of the document's own tokens, and as
accurate as its exponential is large.

Legend: b batch, T tokens, G groups, R heads per group, H = G R heads, P head dim, N state.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.blockwise import wide_dtype

BLOCK = 256  # tokens of a matmul, whose result is added to others in the wide dtype


def ssd_summary(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as in `model.ops.ssd.ssd`. Returns through (b, H, 1, 1) and state (b, H, P, N), in float32 (float64 for
    float64 x); matmuls run in x's dtype."""
    wide = wide_dtype(x.dtype)
    through, state = _Summary.apply(x, dt.to(wide), A.to(wide), B.to(x.dtype), documents)
    return through[..., None, None], state


class _Summary(torch.autograd.Function):
    """Saves its inputs only."""

    @staticmethod
    def forward(ctx, x, dt, A, B, documents):
        through, leave = _decays(dt, A, documents)
        b, _, H, P = x.shape
        G, N = B.shape[2:]
        state = dt.new_zeros(b, G, N, H // G * P)
        for span in _spans(x):
            left = (x[:, span] * (dt[:, span] * leave[:, span])[..., None]).to(x.dtype)
            state += _dot(_by_group(B[:, span]).transpose(2, 3), _by_group(left, B))
        ctx.save_for_backward(x, dt, A, B, documents)
        return through, state.transpose(2, 3).reshape(b, H, P, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_through, d_state):
        x, dt, A, B, documents = ctx.saved_tensors
        through, leave = _decays(dt, A, documents)
        G = B.shape[2]
        # (b, H, P, N) -> (b, G, N, R P)
        slope = d_state.unflatten(1, (G, -1)).flatten(2, 3).transpose(2, 3).to(x.dtype)
        dx, dB = torch.empty_like(x), torch.empty_like(B)
        d_leave, d_dt = torch.empty_like(dt), torch.empty_like(dt)
        for span in _spans(x):
            weight = dt[:, span] * leave[:, span]
            left = (x[:, span] * weight[..., None]).to(x.dtype)
            dB[:, span] = _dot(_by_group(left, B), slope.transpose(2, 3)).transpose(1, 2)
            d_left = _dot(_by_group(B[:, span]), slope).transpose(1, 2).reshape(left.shape).to(dt.dtype)
            dx[:, span] = d_left * weight[..., None]
            d_weight = (d_left * x[:, span]).sum(-1)
            d_dt[:, span] = d_weight * leave[:, span]
            d_leave[:, span] = d_weight * weight  # times leave: of its logarithm
        d_log = F.pad(d_leave.cumsum(1)[:, :-1], (0, 0, 1, 0)) + (d_through * through)[:, None]
        return dx, d_dt.addcmul_(d_log, A), (d_log * dt).sum((0, 1)), dB, None


def _decays(dt: Tensor, A: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """through (b, H), leave (b, T, H)."""
    log_decay = dt * A
    after = F.pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    last = documents[:, -1:]
    leave = torch.where((documents == last)[..., None], after.exp(), 0)
    return torch.where(last == 0, (after[:, 0] + log_decay[:, 0]).exp(), 0), leave


def _spans(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, x.shape[1], BLOCK))


def _by_group(v: Tensor, like: Tensor | None = None) -> Tensor:
    """(b, q, G, N) -> (b, G, q, N); (b, q, H, P), grouped as `like` is -> (b, G, q, R P)."""
    return (v if like is None else v.unflatten(2, (like.shape[2], -1)).flatten(3)).transpose(1, 2)


def _dot(v: Tensor, w: Tensor) -> Tensor:
    """(b, G, m, n) @ (b, G, n, p). A batch of one is up to 3 times as fast as a plain matmul."""
    return v @ w if v.shape[:2].numel() > 1 else torch.mm(v[0, 0], w[0, 0])[None, None]
