"""Groups of ranks without torch.distributed: real processes joined by pipes, and threads."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from model.weights.writer import write_rank_files
from tests.model.weights.layouts import simple_items, simple_shapes
from train.checkpoint.transaction import Group, commit

PROCESSES = multiprocessing.get_context("fork")


class PipeGroup:
    """A star of pipes around rank 0. A rank that dies breaks its pipe, and so ends the others."""

    def __init__(self, rank: int, links: list[Connection]) -> None:
        self.rank, self.size, self._links = rank, len(links) + 1 if rank == 0 else 2, links

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 0:
            values = [value, *[link.recv() for link in self._links]]
            for link in self._links:
                link.send(values)
            return values
        self._links[0].send(value)
        return self._links[0].recv()

    def barrier(self) -> None:
        self.gather(None)


class ThreadGroup:
    """Ranks as threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._values = rank, size, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self.barrier()
        values = list(self._values)
        self.barrier()
        return values

    def barrier(self) -> None:
        self._barrier.wait(30)


def on_threads(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Runs `work` on every rank; returns results, or the exceptions that were raised."""
    barrier = threading.Barrier(size)
    values: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, size, barrier, values))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def on_two_processes(work: Callable[[Group], object]) -> list[int]:
    """Runs `work` on two forked processes; returns their exit codes (negative for a signal)."""
    ends = PROCESSES.Pipe()
    children = [PROCESSES.Process(target=_child, args=(work, rank, ends), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    for end in ends:
        end.close()
    for child in children:
        child.join(60)
    return [child.exitcode or 0 for child in children]


def _child(work: Callable[[Group], object], rank: int, ends: tuple[Connection, Connection]) -> None:
    torch.set_num_threads(1)
    ends[1 - rank].close()
    try:
        work(PipeGroup(rank, [ends[rank]]))
    except Exception:
        os._exit(1)
    os._exit(0)


def values_at(tokens: int) -> dict[str, torch.Tensor]:
    """Weights that tell which checkpoint they come from."""
    return {"w": torch.full((16, 4), float(tokens)), "b": torch.arange(10.0) + tokens}


def save(root: Path, tokens: int, group: Group, **options: Any) -> Path:
    """Commits `values_at(tokens)`, shared between the ranks."""
    values = values_at(tokens)
    items = simple_items(values, group.rank, group.size)
    defaults: dict[str, Any] = {
        "write": lambda folder: write_rank_files(folder, group.rank, items),
        "bytes_needed": 1000,
    }
    defaults |= {"shapes": simple_shapes(values), "extra": {"tokens": tokens}}
    return commit(root, tokens, group, **(defaults | options))


def die_at(wanted: str) -> Callable[[str], None]:
    """A stage callback that kills its process without warning."""

    def stage(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return stage
