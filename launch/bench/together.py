"""Benchmarks whose side is several processes: each round they all do one thing, and the slowest decides.

yield from rounds(2, "module:function", argument)     # function(rank, size, argument) yields once a round
"""

import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from launch.bench.row import Reading

Work = Callable[[int, int, Any], Iterator[None]]
"""`work(rank, size, argument)`: sets up at its first `next`, then does its share of a round at each further one."""


def rounds(size: int, work: str, argument: Any) -> Iterator[Reading]:
    """Seconds that `size` processes take for a round, from the word to the last answer."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as store:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, size, work, argument, store, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            _all(pipes)
            while True:
                begin = time.perf_counter()
                for pipe in pipes:
                    pipe.send(True)
                _all(pipes)
                yield Reading(time.perf_counter() - begin)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _all(pipes: list[Connection]) -> None:
    for rank, pipe in enumerate(pipes):
        answer = pipe.recv()
        if answer is not None:
            raise RuntimeError(f"rank {rank}: {answer}")


def _rank(rank: int, size: int, work: str, argument: Any, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}/ranks", rank=rank, world_size=size)
        module, name = work.split(":")
        share = getattr(importlib.import_module(module), name)(rank, size, argument)
        next(share)
        pipe.send(None)
        while pipe.recv():
            next(share)
            pipe.send(None)
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
