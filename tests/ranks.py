"""Real processes with a gloo process group between them, for tests.

    results = run_ranks(work, 2, "argument")     # work("argument") on ranks 0 and 1; what each returned, by rank

`work` must be a function of a module (it is imported by the ranks). It finds RANK and WORLD_SIZE in the environment, as
torchrun would set them, and a current directory of the test's.
"""

import io
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Below what Linux gives to outgoing connections: a port that was free stays so until the one it is for listens to it.
PORTS = range(10000, 32768)


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens to, for processes that take no socket from us."""
    ports: list[int] = []
    with ExitStack() as probes:
        while len(ports) < number:
            port = random.SystemRandom().choice(PORTS)
            probe = probes.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def _rank_main(
    work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], pipe: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        answer = ("result", work(*arguments))
    except BaseException:
        answer = ("error", traceback.format_exc())
    message = io.BytesIO()
    torch.save(answer, message)  # by value: a pipe would send a file handle for each tensor, one after the other
    pipe.send_bytes(message.getbuffer())
    pipe.poll(None)  # other ranks may still need this one: the parent ends it


def run_ranks(
    work: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 120, gpus: str = ""
) -> list[Any]:
    """Calls `work(*arguments)` on `size` ranks, each a new process; returns what they returned, in rank order.
    gpus: what the ranks see of CUDA's devices. `work` opens the process group once: the store outlives it.

    Raises AssertionError with the traceback of the first rank that fails, or when the time is over.
    """
    context = multiprocessing.get_context("spawn" if gpus else "forkserver")
    # The server imports once, for the CPU, what takes each rank seconds to import.
    multiprocessing.set_forkserver_preload(["tests.imported"])
    # The ranks meet in a store of this process, as in that of torchrun: it chose its port itself and has it already.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(os.environ) | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
    ranks, pipes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        process = context.Process(target=_rank_main, args=(work, arguments, environment, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        assert ready, f"ranks {missing} gave no result in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                message = pipe.recv_bytes()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            # Any value may come, from a process that this one has started: nothing foreign is opened.
            kind, value = torch.load(io.BytesIO(message), weights_only=False)
            assert kind == "result", f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
