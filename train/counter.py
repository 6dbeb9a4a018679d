"""Counts what a rank sends: every collective of torch.distributed while it is open, whoever calls it.

    with count_traffic(mesh) as sent:
        train_step(run)
    sent.bytes          # {"shard": {"all_reduce": 1_048_576.0}, "tensor": {...}, "control": {...}}

Convention: the bytes that leave this rank in the ring algorithms, with n ranks in the group. The tensor of an
all_gather is its result, that of a reduce_scatter its input.

    all_reduce                                        2 (n - 1) / n  of the tensor
    all_gather, reduce_scatter                          (n - 1) / n  of the tensor
    broadcast, reduce, gather, scatter                  (n - 1) / n  of the tensor, the mean over the ring
    all_to_all                                        what goes to other ranks
    send                                              all of it

It watches torch's `ProcessGroup`, through which DeepSpeed goes too; so nothing is slower but the calls themselves, by
microseconds. Axes of the same ranks share a group: what says so by `speaking` is counted under its own axis, all else
(DeepSpeed) under the last of `AXES` that has the group, second copies of weights under `hpz`. Groups outside the mesh
(a checkpoint's thread) are left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from train.collectives import spoken
from train.parallel import Mesh

AXES = ("world", "data", "replica", "expert", "context", "tensor", "shard")

SETTLED = 3
"""The step of a process from which on every step sends the same: ZeRO 3 learns the order of the modules in the first
two micro-batches."""

Traffic = dict[str, dict[str, float]]
"""Bytes by axis and operation."""


@dataclass
class Sent:
    """bytes: by axis and operation. calls: how many collectives."""

    bytes: Traffic = field(default_factory=dict)
    calls: int = 0

    def add(self, axis: str, operation: str, bytes_: float) -> None:
        self.calls += 1
        if bytes_:
            own = self.bytes.setdefault(axis, {})
            own[operation] = own.get(operation, 0.0) + bytes_


@contextmanager
def count_traffic(mesh: Mesh, hpz: dist.ProcessGroup | None = None) -> Iterator[Sent]:
    """Counts what this rank sends to the ranks of `mesh` until the context ends. hpz: the group that shares a second
    copy of the weights, if any."""
    axes = {getattr(mesh, name).group: name for name in AXES if name != "world"} | {hpz: "hpz"}
    groups = {dist.group.WORLD: "world"} | {group: name for group, name in axes.items() if group is not None}
    sent = Sent()

    def watched(method: Callable[..., Any], operation: str, measure: Measure) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group in groups:
                axis, what = spoken()
                sent.add(axis or groups[group], what or operation, measure(group, *args, **kwargs))
            return method(group, *args, **kwargs)

        return call

    methods = {name: method for name, method in vars(dist.ProcessGroup).items() if name in WATCHED}
    try:
        for name in methods:
            setattr(dist.ProcessGroup, name, watched(getattr(dist.ProcessGroup, name), *WATCHED[name]))
        yield sent
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)


Measure = Callable[..., float]
"""`measure(group, *arguments of the method)`: bytes that leave this rank."""


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _around(times: int, argument: int) -> Measure:
    """Each rank passes the tensor on, but for its n-th part, `times` times."""

    def measure(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> float:
        n = group.size()
        return times * (n - 1) * _bytes(args[argument]) / n

    return measure


def _whole(group: dist.ProcessGroup, tensors: Any, *args: Any, **kwargs: Any) -> float:
    return float(_bytes(tensors))


def _to_others(group: dist.ProcessGroup, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> float:
    """all_to_all: a list with a tensor for each rank, or one tensor with the rows of each rank in `args[1]`."""
    rank, n = group.rank(), group.size()
    if not isinstance(inputs, Tensor):
        return float(_bytes(inputs) - _bytes(inputs[rank]))
    rows = args[1] if len(args) > 1 else kwargs.get("input_split_sizes")
    own = rows[rank] * _bytes(inputs[:1]) if rows else _bytes(inputs) / n
    return _bytes(inputs) - own


def _nothing(*args: Any, **kwargs: Any) -> float:
    return 0.0


_once_result, _once_input = _around(1, 0), _around(1, 1)
WATCHED: dict[str, tuple[str, Measure]] = {
    "allreduce": ("all_reduce", _around(2, 0)),
    "allreduce_coalesced": ("all_reduce", _around(2, 0)),
    "allgather": ("all_gather", _once_result),
    "allgather_coalesced": ("all_gather", _once_result),
    "_allgather_base": ("all_gather", _once_result),
    "all_gather_single": ("all_gather", _once_result),
    "all_gather_single_coalesced": ("all_gather", _once_result),
    "allgather_into_tensor_coalesced": ("all_gather", _once_result),
    "reduce_scatter": ("reduce_scatter", _once_input),
    "_reduce_scatter_base": ("reduce_scatter", _once_input),
    "reduce_scatter_single": ("reduce_scatter", _once_input),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _once_input),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _once_input),
    "broadcast": ("broadcast", _once_result),
    "reduce": ("reduce", _once_result),
    "gather": ("gather", lambda group, outputs, inputs, *rest: (group.size() - 1) / group.size() * _bytes(inputs)),
    "scatter": ("scatter", _once_result),
    "alltoall": ("all_to_all", _to_others),
    "alltoall_base": ("all_to_all", _to_others),
    "all_to_all_single": ("all_to_all", _to_others),
    "send": ("send", _whole),
    "barrier": ("barrier", _nothing),
}
"""Methods of torch's ProcessGroup, by the name of what they do. (The newest torch has renamed some.)"""
