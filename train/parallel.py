"""The mesh: which ranks there are, the device of this one, and what they tell each other.

Every rank is a data-parallel rank; tensor parallelism has size 1, so the collectives that layers ask for do nothing.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from train.mistakes import describe
from train.network import choose_interface

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")


class Mesh:
    """The process group and this rank's place in it; also the `Collectives` of `model/context.py`.

    rank, size: of data parallelism. device: where this rank computes. tensor_rank, tensor_size: of tensor parallelism.
    """

    tensor_rank = 0
    tensor_size = 1

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    @property
    def main(self) -> bool:
        """This rank writes what only one rank may write."""
        return self.rank == 0

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up `x` over the data ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def sum(self, value: float) -> float:
        """Sum over the data ranks in float64."""
        return self.sum_(torch.tensor(value, dtype=torch.float64)).item()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.sum(float(flag)) > 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; returns this rank's result.

        An error on any rank is raised on all of them, so that all end with the same words and none waits.
        """
        try:
            result, error = action(), None
        except Exception as caught:
            error = caught
        words = self.gather(None if error is None else describe(error) or repr(error))
        if error is not None:
            raise error
        if any(words):
            raise ValueError(next(filter(None, words)))
        return result

    def first(self, action: Callable[[], T]) -> T | None:
        """`together`, on rank 0 alone; None elsewhere."""
        return self.together(lambda: action() if self.main else None)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.sum(0.0)

    def beside(self) -> "Beside":
        """The same ranks for a second thread, so that its words and the training's do not meet; made by all ranks."""
        return Beside(self.rank, self.size, dist.new_group(backend="gloo") if self.size > 1 else None)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()  # after an error other ranks may be waiting, and closing would wait for them


class Beside:
    """A process group over all ranks that talks over the CPU, for one thread of each."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        values: list[T] = [value] * self.size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.gather(None)


def choose_device(device: str = "auto") -> torch.device:
    """The device of this rank: `cuda` (by LOCAL_RANK) or `cpu`; `auto` takes cuda where there is one.

    Raises ValueError for another name, or when CUDA is asked for and not there.
    """
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, wants one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no CUDA device here; wants auto or cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"device: LOCAL_RANK={local_rank}, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", local_rank)


def open_mesh(device: str = "auto", *, timeout_s: float = 1800, interface: str | None = None) -> Mesh:
    """Joins the ranks that torchrun or srun started, or is the only one.

    Tensors on a GPU travel by NCCL, those on the CPU by gloo, in one process group. A collective that takes longer
    than `timeout_s` fails. interface: the network interface to talk through, see `train/network.py`.
    """
    chosen = choose_device(device)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _ranks_of_slurm()
    choose_interface(interface)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Mesh(chosen)


def _ranks_of_slurm() -> None:
    """Gives the tasks of an srun step the variables that torchrun would have set.

    Raises ValueError when the step has several tasks and MASTER_ADDR or MASTER_PORT is not exported.
    """
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or size == 1:
        return
    for key, what in (("MASTER_ADDR", "the host of task 0"), ("MASTER_PORT", "a free port on it")):
        if key not in os.environ:
            raise ValueError(f"{key}: not set, wants {what}, exported before srun starts its {size} tasks")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = str(size)
