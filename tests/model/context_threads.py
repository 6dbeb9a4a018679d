"""Context ranks as threads of one process: the collectives of the mesh in plain torch, through which autograd sees.

`run_chunks` runs a module on the chunks of whole rows and puts its outputs together. The threads only run forward: the
graph that they build is one, and its backward pass is the caller's.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from model.context import Context, Documents, LayerOutput, SingleProcess, chunk_bounds


class _Meeting:
    """Where the threads show each other what they have."""

    def __init__(self, size: int) -> None:
        self.barrier, self.shown = threading.Barrier(size, timeout=60), [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.shown[rank] = value
        self.barrier.wait()
        everyone = list(self.shown)
        self.barrier.wait()  # nobody shows more before all have looked
        return everyone


class ThreadRank(SingleProcess):
    """One of the context ranks."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self.meeting, self.context_rank, self.context_size = meeting, rank, size

    def halo(self, x: Tensor, tokens: int, row: int) -> Tensor:
        left = self.meeting.exchange(self.context_rank, x)[: self.context_rank]
        nothing = x.new_zeros(x.shape[0], tokens, *x.shape[2:])
        return torch.cat([nothing, *left], 1)[:, -tokens:]

    def prefix(self, decay: Tensor, state: Tensor) -> Tensor:
        entering = torch.zeros_like(state)
        for decay_of, state_of in self.meeting.exchange(self.context_rank, (decay, state))[: self.context_rank]:
            entering = decay_of * entering + state_of
        return entering

    def gather_over_context(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.context_rank, x))


def run_chunks(module: Callable[..., LayerOutput], x: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The outputs (B, T, D) of `module(x, ctx)` on so many context ranks, and the sum of its losses."""
    meeting, row, grad = _Meeting(size), x.shape[1], torch.is_grad_enabled()
    documents = Documents.from_starts(starts)

    def run(rank: int) -> LayerOutput:
        low, high = chunk_bounds(row, rank, size)
        mesh, mine = ThreadRank(meeting, rank, size), documents.chunk(rank, size)
        with torch.set_grad_enabled(grad):
            try:
                return module(x[:, low:high], Context(mine, dtype=x.dtype, mesh=mesh, row=row))
            except BaseException:
                meeting.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as threads:
        outputs = [future.result() for future in [threads.submit(run, rank) for rank in range(size)]]
    losses = [loss for output in outputs for loss in (output.losses or {}).values()]
    return torch.cat([output.y for output in outputs], 1), sum(losses, x.new_zeros(()))
