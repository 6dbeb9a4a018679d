"""Where each ZeRO stage keeps weights, gradients and optimizer states: one class a stage, one face for `Engine`.

These classes know the inside of DeepSpeed 0.19.8's optimizers and import nothing of it. A *local* parameter is
flattened in C order; a *shard* is a range `[start, stop)` of it that this rank owns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.params import Table
from train.collectives import Axis
from train.health import GradientFragment
from train.parallel import Mesh

WEIGHT = "weight"

Fill = Callable[[Tensor, str, str, int], None]
"""`(flat tensor, logical name, kind, start)`: fills the tensor with saved values of a local parameter from `start`."""


class Shard(NamedTuple):
    """Elements `[start, stop)` of a local parameter at `offset` of `home`, the tensor that the optimizer steps."""

    name: str
    start: int
    stop: int
    home: Tensor
    offset: int

    def of(self, like_home: Tensor) -> Tensor:
        """The shard's elements, flat, of a tensor that is laid out like `home`."""
        return like_home.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


class Stage(ABC):
    """What `Engine` asks of a ZeRO stage.

    engine: the DeepSpeed engine. reduce_dtype: of gradient sums over ranks, where the table names none. holders: the
    ranks that hold the same part of a parameter and share its sums and states. trained, frozen: the shards of this
    rank; over all ranks each element of each parameter is in one shard.
    """

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        self.engine, self.zero, self.mesh = engine, engine.optimizer, mesh
        self.names: dict[nn.Parameter, str] = {p: name for name, p in engine.module.named_parameters()}
        self.holders = {p: mesh.replica if table[name].experts else mesh.shard for p, name in self.names.items()}
        self.reduce_dtypes = {p: table[name].comm_dtype or reduce_dtype for p, name in self.names.items()}
        self.trained = list(self.trained_shards())
        self.frozen = list(self.frozen_shards())

    @abstractmethod
    def homes(self) -> list[Tensor]:
        """The tensors that the optimizer steps."""

    @abstractmethod
    def trained_shards(self) -> Iterator[Shard]: ...

    @abstractmethod
    def gradients(self) -> Iterator[GradientFragment]: ...

    def held_gradients(self) -> Iterator[GradientFragment]:
        """Views of all that this rank has of the summed gradients: what it owns, or more."""
        return self.gradients()

    @abstractmethod
    def scale(self, factor: float) -> None: ...

    @abstractmethod
    def forget_gradients(self) -> None: ...

    def frozen_shards(self) -> Iterator[Shard]:
        return (even_shard(p, name, self.holders[p]) for p, name in self.names.items() if not p.requires_grad)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; after the last, gradients are summed over ranks and micro-batches."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def restored(self) -> list[Shard]:
        """The ranges whose optimizer states this rank holds."""
        return self.trained

    def load_weights(self, fill: Fill) -> None:
        """Restores the weights, whole on every rank where every rank holds them whole."""
        for parameter, name in self.names.items():
            fill(parameter.detach().view(-1), name, WEIGHT, 0)


def even_shard(parameter: nn.Parameter, name: str, axis: Axis) -> Shard:
    """This rank's even part of a parameter that every rank holds whole."""
    start, stop = (parameter.numel() * rank // axis.size for rank in (axis.rank, axis.rank + 1))
    return Shard(name, start, stop, parameter, start)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "gradients exist from the last backward to the step"
    return parameter.grad


class Stage0(Stage):
    """Everything on every rank. Gradients are summed here, after the last micro-batch."""

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        super().__init__(engine, table, mesh, reduce_dtype)
        engine.enable_backward_allreduce = False

    def homes(self) -> list[Tensor]:
        return [p for p in self.names if p.requires_grad]

    def trained_shards(self) -> Iterator[Shard]:
        return (even_shard(p, name, self.holders[p]) for p, name in self.names.items() if p.requires_grad)

    def restored(self) -> list[Shard]:
        return [Shard(self.names[p], 0, p.numel(), p, 0) for p in self.names if p.requires_grad]

    def backward(self, loss: Tensor, last: bool) -> None:
        super().backward(loss, last)
        if last:
            self._reduce([p for p in self.names if p.requires_grad])

    def _reduce(self, trained: list[nn.Parameter]) -> None:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for axis in (self.mesh.shard, self.mesh.replica):
            held = [p for p in trained if self.holders[p] is axis]
            for bucket in self._buckets(held) if axis.size > 1 else ():
                dtype = self.reduce_dtypes[bucket[0]]
                flat = torch.cat([gradient_of(p).view(-1).to(dtype) for p in bucket])
                dist.all_reduce(flat, group=axis.group)
                for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    gradient_of(parameter).view(-1).copy_(part)

    def _buckets(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Neighbours with one dtype, about a bucket's worth of elements at a time."""
        limit = self.engine.zero_reduce_bucket_size()
        for _, same in groupby(parameters, self.reduce_dtypes.__getitem__):
            bucket: list[nn.Parameter] = []
            for parameter in same:
                if bucket and sum(p.numel() for p in bucket) + parameter.numel() > limit:
                    yield bucket
                    bucket = []
                bucket.append(parameter)
            yield bucket

    def gradients(self) -> Iterator[GradientFragment]:
        for shard in self.trained:
            yield GradientFragment(shard.name, shard.start, shard.stop, shard.of(gradient_of(shard.home)))

    def held_gradients(self) -> Iterator[GradientFragment]:
        for parameter, name in self.names.items():
            if parameter.requires_grad:
                yield GradientFragment(name, 0, parameter.numel(), gradient_of(parameter).view(-1))

    def scale(self, factor: float) -> None:
        torch._foreach_mul_([gradient_of(p) for p in self.names if p.requires_grad], factor)

    def forget_gradients(self) -> None:
        for parameter in self.names:
            parameter.grad = None


class Stage12(Stage):
    """Optimizer states and a master copy of the weights sharded; at stage 2 gradients too.

    DeepSpeed flattens each optimizer group, pads it and cuts it into one equal partition for each rank that holds it.
    """

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        super().__init__(engine, table, mesh, reduce_dtype)
        reduce_each_in_its_dtype(self.zero, self.reduce_dtypes)
        if self.zero.overlap_comm and not self.zero.partition_gradients:
            reduce_what_is_left(self.zero)

    def homes(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def trained_shards(self) -> Iterator[Shard]:
        for group in range(len(self.homes())):
            size = self.zero.partition_size[group]
            (rank,) = {self.holders[parameter].rank for parameter in self.zero.round_robin_bit16_groups[group]}
            first, last = rank * size, (rank + 1) * size
            members = zip(
                self.zero.round_robin_bit16_groups[group], self.zero.round_robin_bit16_offsets[group], strict=True
            )
            for parameter, offset in members:
                start, stop = max(offset, first), min(offset + parameter.numel(), last)
                if start < stop:
                    home = self.homes()[group]
                    yield Shard(self.names[parameter], start - offset, stop - offset, home, start - first)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.zero.clear_backward_seen_flag()
        super().backward(loss, last)

    def gradients(self) -> Iterator[GradientFragment]:
        for group, home in enumerate(self.homes()):
            at_offset = {shard.offset: shard for shard in self.trained if shard.home is home}
            offset = 0
            for value in self.zero.averaged_gradients[group]:
                if shard := at_offset.get(offset):
                    assert value.numel() == shard.stop - shard.start
                    yield GradientFragment(shard.name, shard.start, shard.stop, value.reshape(-1))
                offset += value.numel()

    def scale(self, factor: float) -> None:
        for values in self.zero.averaged_gradients.values():
            torch._foreach_mul_(list(values), factor)

    def forget_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero.micro_step_id = -1
        for group in range(len(self.homes())):
            self.zero.averaged_gradients[group] = None

    def load_weights(self, fill: Fill) -> None:
        super().load_weights(fill)
        whole = {name: parameter for parameter, name in self.names.items()}
        for shard in self.trained:
            shard.of(shard.home).copy_(whole[shard.name].view(-1)[shard.start : shard.stop])


class Stage3(Stage):
    """Everything sharded: each parameter is padded and cut into one equal partition a rank.

    DeepSpeed divides gradients by the number of ranks, which is undone after the last micro-batch: exact for a power
    of two, else within one rounding. It keeps the last gradient of a parameter that a step does not use, so they are
    zeroed after every step.
    """

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        super().__init__(engine, table, mesh, reduce_dtype)
        reduce_each_in_its_dtype(self.zero, self.reduce_dtypes)
        for dtype, bucket in self.zero.ipg_buckets.items():
            if bucket.buffer is None:
                bucket.buffer = torch.empty(self.zero.reduce_bucket_size, dtype=dtype, device=mesh.device)

    def homes(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def trained_shards(self) -> Iterator[Shard]:
        for home, members in zip(self.homes(), self.zero.fp16_groups, strict=True):
            offset = 0
            for parameter in members:
                yield from self._shard(parameter, home, offset)
                offset += parameter.partition_numel()

    def frozen_shards(self) -> Iterator[Shard]:
        frozen: list[Any] = [p for p in self.names if not p.requires_grad]
        for parameter in frozen:
            yield from self._shard(parameter, parameter.ds_tensor, 0)

    def _shard(self, parameter: Any, home: Tensor, offset: int) -> Iterator[Shard]:
        size, numel = parameter.partition_numel(), parameter.ds_numel
        start, stop = (min(rank * size, numel) for rank in (self.mesh.shard.rank, self.mesh.shard.rank + 1))
        if start < stop:
            yield Shard(self.names[parameter], start, stop, home, offset)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.zero.clear_backward_seen_flag()
        super().backward(loss, last)
        if last and self.mesh.shard.size > 1:
            self.zero.grad_partitions_flat_buffer.mul_(self.mesh.shard.size)

    def gradients(self) -> Iterator[GradientFragment]:
        gradients = {
            self.names[parameter]: value
            for group, members in enumerate(self.zero.fp16_groups)
            for parameter, value in zip(members, self.zero.averaged_gradients[group], strict=True)
        }
        for shard in self.trained:
            value = gradients[shard.name][: shard.stop - shard.start]
            yield GradientFragment(shard.name, shard.start, shard.stop, value)

    def scale(self, factor: float) -> None:
        self.zero.grad_partitions_flat_buffer.mul_(factor)

    def forget_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}
        for bucket in self.zero.ipg_buckets.values():
            bucket.clear_params()
        self.zero.grad_partitions_flat_buffer.zero_()

    def load_weights(self, fill: Fill) -> None:
        self.zero._partition_all_parameters()
        parameters: list[Any] = list(self.names)
        for parameter in parameters:
            parameter.ds_secondary_tensor = None  # hpZ's copy is of the old weights
        for shard in self.trained + self.frozen:
            fill(shard.of(shard.home), shard.name, WEIGHT, shard.start)
        for group in range(len(self.homes())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)  # what is gathered may be a copy of `home`


class Offloaded12(Stage12):
    """ZeRO 1 and 2 with master weights, moments and summed gradients in host memory.

    After the last micro-batch DeepSpeed copies a gradient into the `grad` of its partition, if that micro-batch used
    the parameter; what earlier ones left is in a buffer a parameter, which it never clears. Its own norm and overflow
    search, which make the host wait for each parameter, are switched off.
    """

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        super().__init__(engine, table, mesh, reduce_dtype)
        self.zero.compute_grad_norm = False
        self.zero.set_norm_for_param_grad_in_gpu = _nothing
        self.zero.update_offload_overflow_tracker_for_param_grad = _nothing
        self.parameters = {name: parameter for parameter, name in self.names.items()}

    def backward(self, loss: Tensor, last: bool) -> None:
        super().backward(loss, last)
        if last:
            self.zero._wait_for_offload_copies()
            for shard in self.trained:
                if (sums := self._earlier(shard)) is not None:
                    shard.of(gradient_of(shard.home)).copy_(sums[shard.start : shard.stop])

    def _earlier(self, shard: Shard) -> Tensor | None:
        """Sums over the micro-batches of this step, flat; None for a parameter that none but the last one used."""
        key = self.zero.get_param_id(self.parameters[shard.name])
        return self.zero.accumulated_grads_in_cpu[key] if key in self.zero._offload_accumulated_param_ids else None

    def gradients(self) -> Iterator[GradientFragment]:
        for shard in self.trained:
            yield GradientFragment(shard.name, shard.start, shard.stop, shard.of(gradient_of(shard.home)))

    def scale(self, factor: float) -> None:
        torch._foreach_mul_([gradient_of(home) for home in self.homes()], factor)

    def forget_gradients(self) -> None:
        super().forget_gradients()
        self.zero.reset_cpu_buffers()
        self.zero._offload_accumulated_param_ids.clear()
        kept = [gradient_of(home) for home in self.homes()] + list(self.zero.accumulated_grads_in_cpu.values())
        torch._foreach_zero_(kept)


class Offloaded3(Stage3):
    """ZeRO 3 with master weights, moments and summed gradients in host memory.

    The gradient that the optimizer reads is the buffer in which micro-batches add up, where DeepSpeed would copy the
    one into the other.
    """

    def __init__(self, engine: Any, table: Table, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        super().__init__(engine, table, mesh, reduce_dtype)
        parts = self.zero.grad_partitions_flat_buffer.split([home.numel() for home in self.homes()])
        for home, part in zip(self.homes(), parts, strict=True):
            home.grad = part

    def gradients(self) -> Iterator[GradientFragment]:
        for shard in self.trained:
            yield GradientFragment(shard.name, shard.start, shard.stop, shard.of(gradient_of(shard.home)))

    def forget_gradients(self) -> None:
        super().forget_gradients()
        self.zero.reset_cpu_buffers()


def reduce_what_is_left(zero: Any) -> None:
    """Makes ZeRO 1 with overlap sum every gradient over ranks: DeepSpeed does so when the last micro-batch reaches the
    parameter, and forgets those that only earlier ones used."""
    finish = zero.overlapping_partition_gradients_reduce_epilogue

    def reduce_and_finish() -> None:
        waiting = {key for bucket in zero.ipg_buckets.values() for *_, key in bucket.params}
        for group, members in enumerate(zero.bit16_groups):
            for parameter in members:
                key = zero.get_param_id(parameter)
                reduced = zero.params_already_reduced[key] or key in waiting
                if not reduced and zero.get_gradient_for_reduction(parameter) is not None:
                    zero.setup_buckets()
                    zero.reduce_ready_partitions_and_remove_grads(parameter, group)
        finish()

    zero.overlapping_partition_gradients_reduce_epilogue = reduce_and_finish


def _nothing(parameter: Tensor) -> None:
    pass


def reduce_each_in_its_dtype(zero: Any, dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    """Makes DeepSpeed's bucketed reduction take its dtype from `dtypes`, parameter by parameter."""
    for dtype in set(dtypes.values()) - set(zero.ipg_buckets):
        zero.ipg_buckets[dtype] = type(next(iter(zero.ipg_buckets.values())))()
    zero.get_param_comm_dtype = dtypes.__getitem__
