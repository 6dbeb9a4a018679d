"""What ranks tell each other inside a forward and backward pass: an `Axis` of the mesh, and differentiable collectives.

Every gradient is a part of a sum over ranks: where ranks hold the same value, each has the part of its gradient that
its own use of it gave. So the gradient of a sum whose result all ranks use is the sum of theirs, and so on.

Legend: B batch rows, T tokens.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.context import chunk_bounds


@dataclass(frozen=True)
class Axis:
    """Ranks of the mesh that differ in one coordinate. rank, size: this rank's place among them. ranks: their numbers
    in the world. group: theirs; one rank alone may have none."""

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None


class _Spoken(threading.local):
    axis, what = "", ""


_SPOKEN = _Spoken()


@contextmanager
def speaking(axis: str, what: str = "") -> Iterator[None]:
    """What is sent meanwhile belongs to this axis, whose ranks may also be those of another. what: a name for it,
    instead of the operation's."""
    before = spoken()
    _SPOKEN.axis, _SPOKEN.what = axis, what or before[1]
    try:
        yield
    finally:
        _SPOKEN.axis, _SPOKEN.what = before


def spoken() -> tuple[str, str]:
    """The axis and name that this thread's messages have now; "" where nobody said."""
    return _SPOKEN.axis, _SPOKEN.what


def all_reduce(axis: Axis, x: Tensor) -> Tensor:
    """The sum over the ranks, in new memory."""
    total = x.clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        with speaking(axis.name):
            dist.all_reduce(total, group=axis.group)
    return total


def all_gather(axis: Axis, x: Tensor) -> Tensor:
    """(...) -> (ranks, ...)."""
    if axis.size == 1:
        return x[None]
    out = x.new_empty(axis.size, *x.shape)
    with speaking(axis.name):
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=axis.group)
    return out


def reduce_scatter(axis: Axis, x: Tensor) -> Tensor:
    """(ranks, ...) -> (...), this rank's part of the sum."""
    if axis.size == 1:
        return x[0]
    out = x.new_empty(x.shape[1:])
    with speaking(axis.name):
        dist.reduce_scatter_tensor(out.view(-1), x.contiguous().view(-1), group=axis.group)
    return out


def all_to_all(axis: Axis, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """(rows, ...) -> (rows, ...): the first `sent[0]` rows go to rank 0 and so on; `received` are those from each."""
    out = x.new_empty(sum(received), *x.shape[1:])
    with speaking(axis.name):
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


def gather_tokens(axis: Axis, x: Tensor, length: int) -> Tensor:
    """(B, own tokens, ...) -> (B, length, ...): the tokens of all ranks, which `chunk_bounds` deals to them."""
    if axis.size == 1:
        return x
    longest = -(-length // axis.size)
    if length % axis.size == 0:
        return all_gather(axis, x).movedim(0, 1).flatten(1, 2)
    padded = x.new_zeros(x.shape[0], longest, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    parts = all_gather(axis, padded)
    bounds = (chunk_bounds(length, rank, axis.size) for rank in range(axis.size))
    return torch.cat([part[:, : stop - start] for part, (start, stop) in zip(parts, bounds, strict=True)], 1)


def scatter_tokens(axis: Axis, y: Tensor) -> Tensor:
    """(B, T, ...) -> (B, own tokens, ...): the sum over ranks of this rank's tokens."""
    if axis.size == 1:
        return y
    length = y.shape[1]
    if length % axis.size == 0:
        return reduce_scatter(axis, y.unflatten(1, (axis.size, -1)).movedim(1, 0))
    parts = y.new_zeros(axis.size, y.shape[0], -(-length // axis.size), *y.shape[2:])
    for rank, part in enumerate(parts):
        start, stop = chunk_bounds(length, rank, axis.size)
        part[:, : stop - start] = y[:, start:stop]
    start, stop = chunk_bounds(length, axis.rank, axis.size)
    return reduce_scatter(axis, parts)[:, : stop - start]


def halo_spans(axis: Axis, tokens: int, row: int) -> list[tuple[int, int, int, int]]:
    """Who sends what for `halo`: `(sender, receiver, start, stop)`, ranks of the axis and tokens of the row."""
    spans = []
    for receiver in range(axis.size):
        first = chunk_bounds(row, receiver, axis.size)[0]
        for sender in range(receiver):
            low, high = chunk_bounds(row, sender, axis.size)
            start = max(low, first - tokens)
            if start < high:
                spans.append((sender, receiver, start, high))
    return spans


def _deliver(axis: Axis, parcels: list[tuple[int, int, Tensor]]) -> None:
    """Sends and receives all at once. parcels: `(sender, receiver, tensor)`; the tensor is sent, or filled."""
    waits = []
    for sender, receiver, value in parcels:
        if axis.rank == sender:
            waits.append(dist.P2POp(dist.isend, value, axis.ranks[receiver], axis.group))
        else:
            waits.append(dist.P2POp(dist.irecv, value, axis.ranks[sender], axis.group))
    with speaking(axis.name):
        for wait in dist.batch_isend_irecv(waits) if waits else ():
            wait.wait()


class Halo(torch.autograd.Function):
    """(B, T, ...) of a rank's chunk of rows of length `row` -> (B, tokens, ...), what lies before it, on one rank or on
    several; zeros where the row has nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, tokens: int, row: int) -> Tensor:
        ctx.axis, ctx.tokens, ctx.row, ctx.shape = axis, tokens, row, x.shape
        out = x.new_zeros(x.shape[0], tokens, *x.shape[2:])
        own, parcels, filled = chunk_bounds(row, axis.rank, axis.size)[0], [], []
        for sender, receiver, start, stop in halo_spans(axis, tokens, row):
            if axis.rank == sender:
                parcels.append((sender, receiver, x[:, start - own : stop - own].contiguous()))
            elif axis.rank == receiver:
                target = out[:, tokens + start - own : tokens + stop - own]
                filled.append((target, torch.empty_like(target, memory_format=torch.contiguous_format)))
                parcels.append((sender, receiver, filled[-1][1]))
        _deliver(axis, parcels)
        for target, value in filled:
            target.copy_(value)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        axis, tokens = ctx.axis, ctx.tokens
        own, parcels, added = chunk_bounds(ctx.row, axis.rank, axis.size)[0], [], []
        dx = d.new_zeros(ctx.shape)
        for sender, receiver, start, stop in halo_spans(axis, tokens, ctx.row):
            if axis.rank == receiver:
                part = d[:, tokens + start - own : tokens + stop - own].contiguous()
                parcels.append((receiver, sender, part))
            elif axis.rank == sender:
                target = dx[:, start - own : stop - own]
                added.append((target, torch.empty_like(target, memory_format=torch.contiguous_format)))
                parcels.append((receiver, sender, added[-1][1]))
        _deliver(axis, parcels)
        for target, value in added:
            target.add_(value)
        return dx, None, None, None


def _gather_pair(axis: Axis, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`all_gather` of two tensors of one dtype, in one message."""
    both = all_gather(axis, torch.cat([v.flatten(), w.flatten()]))
    return both[:, : v.numel()].unflatten(1, v.shape), both[:, v.numel() :].unflatten(1, w.shape)


class Prefix(torch.autograd.Function):
    """What is left of the states of the chunks to the left: S_r = decay_{r-1} S_{r-1} + state_{r-1}, from S_0 = 0.

    decay: broadcasts against `state` from the left. All decays and states are gathered, and each rank goes through
    those before it. The gradient is the same scan from the right, over the gathered gradients of the S_r:

        G_r = dS_{r+1} + decay_{r+1} G_{r+1}        d state_r = G_r        d decay_r = sum of G_r S_r

    Kept for it are the rank's own decay and S_r, not what the others gathered, so that memory does not grow with the
    number of ranks.
    """

    @staticmethod
    def forward(ctx, decay: Tensor, state: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        decays, states = _gather_pair(axis, decay, state)
        entering = torch.zeros_like(state, memory_format=torch.contiguous_format)
        for rank in range(axis.rank):
            entering.mul_(decays[rank]).add_(states[rank])
        ctx.save_for_backward(decay, entering)
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        decay, entering = ctx.saved_tensors
        decays, slopes = _gather_pair(ctx.axis, decay, d)
        slope = torch.zeros_like(entering)
        for rank in range(ctx.axis.size - 1, ctx.axis.rank, -1):
            slope.mul_(decays[rank]).add_(slopes[rank])
        return (slope * entering).sum_to_size(decay.shape), slope, None


class Enter(torch.autograd.Function):
    """`gather_tokens`, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, length: int) -> Tensor:
        ctx.axis = axis
        return gather_tokens(axis, x, length)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return scatter_tokens(ctx.axis, d), None, None


class Leave(torch.autograd.Function):
    """`scatter_tokens`."""

    @staticmethod
    def forward(ctx, y: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, y.shape[1]
        return scatter_tokens(axis, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return gather_tokens(ctx.axis, d, ctx.length), None


class Total(torch.autograd.Function):
    """The sum over ranks, for all of them."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(axis, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return all_reduce(ctx.axis, d), None


class Gather(torch.autograd.Function):
    """`all_gather`, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(axis, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return reduce_scatter(ctx.axis, d), None


class Exchange(torch.autograd.Function):
    """Rows to the ranks that they are for: (rows sent, ...) -> (rows received, ...), in the order of their senders; the
    gradients go the way back. sent, received: rows to and from each rank; none at all is a number like any other."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return all_to_all(axis, x, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return all_to_all(ctx.axis, d, ctx.received, ctx.sent), None, None, None


def at_experts(axis: Axis, x: Tensor, counts: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`Collectives.at_experts` over the ranks of `axis`, of which each has an equal run of the experts.

    Three exchanges forward: the counts, so that every rank knows what it will receive (on a GPU the host waits for them
    once), the rows, and what `run` made of them; backward the last two again. Only rows of an expert travel. All ranks
    take part in all of them, whatever they have to send, and the order of every sum is fixed.

    A rank sends in a step, for each MoE layer, with R the choices (k of each of its tokens, dropped ones left out) for
    experts of other ranks and S those of other ranks for its own,

        2 (R + S) D bytes(compute dtype)  +  micro-batches x 8 E (ranks - 1) / ranks        bytes,

    R = S = k tokens (ranks - 1) / ranks where experts are chosen evenly; blocks that are recomputed send their forward
    half, (R + S) D and the counts, once more.
    """
    own = counts.view(axis.size, -1).contiguous()  # (ranks, experts of each)
    theirs = torch.empty_like(own)
    with speaking(axis.name):
        dist.all_to_all_single(theirs, own, group=axis.group)
    sent, received = torch.stack([own, theirs]).sum(2).tolist()
    rows = Exchange.apply(x[: sum(sent)], axis, sent, received)
    expert = torch.arange(own.shape[1], device=x.device).repeat(axis.size)
    order = expert.repeat_interleave(theirs.flatten(), output_size=len(rows)).argsort(stable=True)
    y = run(rows[order], theirs.sum(0))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    y = Exchange.apply(y[back], axis, received, sent)
    return torch.cat([y, y.new_zeros(len(x) - len(y), *y.shape[1:])]) if len(y) < len(x) else y
