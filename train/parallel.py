"""The mesh: which ranks there are, how they share a model and its batches, and what they tell each other.

rank = (data rank x context ranks + context rank) x tensor ranks + tensor rank

axis     its ranks                                              they have
data     differ in the rows of the batch                        other rows
context  differ in the chunk of each row                        the same rows, other tokens of them
tensor   neighbours, best within one host                       the same tokens, other parts of the weights
shard    data x context: ZeRO's group                           one part of the weights, whose gradients they add
expert   neighbours among data ranks                            other experts of the MoE layers
replica  those of `shard` with the same experts                 one set of experts, whose gradients they add
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.params import Place
from train.collectives import (
    Axis,
    Enter,
    Gather,
    Halo,
    Leave,
    Prefix,
    Total,
    all_gather,
    at_experts,
    gather_tokens,
    speaking,
)
from train.mistakes import describe
from train.network import choose_interface

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
CONTROL = "control"
"""What ranks tell each other about a step beside its tensors: counts, losses, digests, mistakes, that one stops."""
APART = ("context", "tensor", "expert")
"""Axes whose process group is no other's, even where the same ranks are: a layer that waits for its neighbours must not
queue behind the gradients that travel meanwhile."""


@dataclass(frozen=True)
class Sizes:
    """How many ranks share what; the data ranks are what is left of the world. tensor: the weights of a layer. context:
    the tokens of a row. expert: of the data ranks, so many share the experts of MoE layers."""

    tensor: int = 1
    context: int = 1
    expert: int = 1

    @property
    def least(self) -> int:
        """The smallest world that they fill."""
        return self.tensor * self.context * self.expert

    def data(self, world: int) -> int:
        """Number of data ranks. Raises ValueError when the sizes do not fill a world of so many ranks."""
        ranks = self.tensor * self.context
        if world % ranks:
            nearest = max(ranks, round(world / ranks) * ranks)
            raise ValueError(
                f"parallel: got tensor={self.tensor} x context={self.context}, which does not divide the {world} ranks "
                f"of this run; wants {nearest} ranks, or tensor x context = {_nearest_divisor(world, ranks)}"
            )
        data = world // ranks
        if data % self.expert:
            raise ValueError(
                f"parallel.expert: got {self.expert}, which does not divide the {data} data ranks; "
                f"wants {_nearest_divisor(data, self.expert)}"
            )
        return data


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return min(divisors, key=lambda candidate: (abs(candidate - wanted), candidate))


class Mesh:
    """The process groups and this rank's place in them; also the `Collectives` of `model/context.py`.

    rank, size: in the world. device: where this rank computes. data, context, tensor, shard, expert, replica: the axes
    above. What `sum_`, `gather` and their like say, they say among all ranks.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes = Sizes(),
        *,
        backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        axes = axis_ranks(self.rank, self.size, sizes)
        groups = _make_groups(self.size, sizes, backend, timeout)
        self.data, self.context, self.tensor, self.shard, self.expert, self.replica = (
            Axis(name, ranks.index(self.rank), len(ranks), ranks, groups.get((name in APART, ranks)))
            for name, ranks in axes.items()
        )
        self.place = Place(self.tensor.rank, self.tensor.size, self.expert.rank, self.expert.size)
        self.context_rank, self.context_size = self.context.rank, self.context.size

    @property
    def shape(self) -> str:
        """Its axes in words, "2 data x 4 tensor ranks", where there are others than data ranks; else ""."""
        axes = (self.data, self.context, self.tensor)
        words = " x ".join(f"{axis.size} {axis.name}" for axis in axes)
        experts = f", {self.expert.size} of them sharing experts" if self.expert.size > 1 else ""
        return words + " ranks" + experts if self.size > self.data.size or experts else ""

    @property
    def tells_rows(self) -> bool:
        """Of the ranks that have the same rows, this one counts them."""
        return self.tells_tokens and self.context.rank == 0

    @property
    def tells_tokens(self) -> bool:
        """Of the ranks that have the same tokens, this one counts them."""
        return self.tensor.rank == 0

    @property
    def main(self) -> bool:
        """This rank writes what only one rank may write."""
        return self.rank == 0

    def enter(self, x: Tensor, length: int) -> Tensor:
        return Enter.apply(x, self.tensor, length) if self.tensor.size > 1 else x

    def leave(self, y: Tensor) -> Tensor:
        return Leave.apply(y, self.tensor) if self.tensor.size > 1 else y

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        return Total.apply(x, self.tensor) if self.tensor.size > 1 else x

    def gather_over_tensor(self, x: Tensor) -> Tensor:
        return all_gather(self.tensor, x)

    def halo(self, x: Tensor, tokens: int, row: int) -> Tensor:
        return Halo.apply(x, self.context, tokens, row)

    def prefix(self, decay: Tensor, state: Tensor) -> Tensor:
        return Prefix.apply(decay, state, self.context)

    def gather_over_context(self, x: Tensor) -> Tensor:
        return Gather.apply(x, self.context) if self.context.size > 1 else x[None]

    def at_experts(self, x: Tensor, counts: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return at_experts(self.expert, x, counts, run) if self.expert.size > 1 else run(x, counts)

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up `x` over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            with speaking("world"):
                dist.all_reduce(x)
        return x

    def tell(self, x: Tensor) -> Tensor:
        """`sum_` of what is only written down."""
        with speaking("world", CONTROL):
            return self.sum_(x)

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Adds up `x` over the data ranks, in place."""
        if self.data.size > 1:
            with speaking("data"):
                dist.all_reduce(x, group=self.data.group)
        return x

    def whole_rows(self, x: Tensor, row: int) -> Tensor:
        """(B, T) of this rank's chunk of rows of length `row` -> (B, row), without a gradient."""
        return gather_tokens(self.context, x.detach(), row)

    def sum(self, value: float) -> float:
        """Sum over all ranks in float64."""
        with speaking("world", CONTROL):
            return self.sum_(torch.tensor(value, dtype=torch.float64)).item()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.sum(float(flag)) > 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            with speaking("world", CONTROL):
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
        if kind is None or self.size == 1:
            self.close()  # after an error other ranks may be waiting, and closing would wait for them


def axis_ranks(rank: int, world: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The ranks of each axis that `rank` is one of, by the axis's name, in their order."""
    data, context, tensor = sizes.data(world), sizes.context, sizes.tensor
    d, c, t = rank // (context * tensor), rank // tensor % context, rank % tensor
    first = d // sizes.expert * sizes.expert

    def at(d: int, c: int, t: int) -> int:
        return (d * context + c) * tensor + t

    return {
        "data": tuple(at(i, c, t) for i in range(data)),
        "context": tuple(at(d, i, t) for i in range(context)),
        "tensor": tuple(at(d, c, i) for i in range(tensor)),
        "shard": tuple(at(i, j, t) for i in range(data) for j in range(context)),
        "expert": tuple(at(i, c, t) for i in range(first, first + sizes.expert)),
        "replica": tuple(at(i, j, t) for i in range(d % sizes.expert, data, sizes.expert) for j in range(context)),
    }


def _make_groups(
    world: int, sizes: Sizes, backend: str | None, timeout: timedelta | None
) -> dict[tuple[bool, tuple[int, ...]], dist.ProcessGroup | None]:
    """By whether it is apart and its ranks, a process group for each set of ranks that is an axis of some rank: all
    ranks make all of them, in one order, as torch wants it. A rank alone needs none, but where DeepSpeed asks for
    ZeRO's and the experts'."""
    axes = [axis_ranks(rank, world, sizes) for rank in range(world)]
    asked = ("shard", "replica")
    wanted = dict.fromkeys(
        (name in APART, ranks) for own in axes for name, ranks in own.items() if len(ranks) > 1 or name in asked
    )
    whole = (False, tuple(range(world)))
    return {
        key: dist.group.WORLD if key == whole else dist.new_group(list(key[1]), timeout=timeout, backend=backend)
        for key in wanted
    }


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


def open_mesh(
    device: str = "auto", sizes: Sizes = Sizes(), *, timeout_s: float = 1800, interface: str | None = None
) -> Mesh:
    """Joins the ranks that torchrun or srun started, or is the only one.

    Tensors on a GPU travel by NCCL, those on the CPU by gloo, in one process group. A collective that takes longer
    than `timeout_s` fails. interface: the network interface to talk through, see `train/network.py`. Raises ValueError
    when the world is not one that `sizes` can fill, or rank 0 can't have MASTER_PORT.
    """
    chosen = choose_device(device)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _ranks_of_slurm()
    choose_interface(interface)
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ValueError(
                f"MASTER_PORT: something else listens to {os.environ['MASTER_PORT']} on this host; wants a free port, "
                "the same for every rank"
            ) from error
    else:
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Mesh(chosen, sizes, backend=backend, timeout=timeout)


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
