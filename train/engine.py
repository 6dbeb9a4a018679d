"""The training engine: any module under ZeRO 0, 1, 2 or 3 by DeepSpeed. The only file that imports deepspeed.

Parameters are stored in float32 and the model casts them itself, so DeepSpeed's bf16, fp16 and autocast stay off, as
do its clipping and its overflow checks: gradients are sums over ranks, their norm is taken in `train/health.py`, and
what is applied is what was computed, at any stage and on any number of ranks. What differs between stages is in
`train/zero.py`.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.params import Table
from train.health import GradientFragment
from train.optim import (
    OptimizerConfig,
    build_optimizer,
    check_stage,
    elementwise_state,
    initialise_state,
    parameter_groups,
    state_names,
)
from train.parallel import Mesh
from train.reading import ConfigError, require
from train.shared import SharedGradients
from train.zero import WEIGHT, Fill, Offloaded3, Offloaded12, Shard, Stage, Stage0, Stage3, Stage12

STAGES: dict[int, type[Stage]] = {0: Stage0, 1: Stage12, 2: Stage12, 3: Stage3}
OFFLOADED: dict[int, type[Stage]] = {1: Offloaded12, 2: Offloaded12, 3: Offloaded3}
REDUCE_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

OPTIMIZER = "optimizer/"
"""Kinds of saved values are `weight` and `optimizer/<name of the state>`."""


@dataclass(frozen=True)
class ZeroOptions:
    """Sizes in elements; they decide speed and memory, never results.

    reduce_bucket: gradients that travel together. gather_bucket: weights that travel together after a step (ZeRO 1-2).
    prefetch: weights gathered ahead of their use (ZeRO 3). persistent: parameters up to this size stay gathered
    (ZeRO 3). live: weights gathered at any one time (ZeRO 3). sub_group: weights stepped at a time (ZeRO 3).
    """

    reduce_bucket: int = 50_000_000
    gather_bucket: int = 100_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    live: int = 1_000_000_000
    sub_group: int = 100_000_000


@dataclass(frozen=True)
class Placement:
    """Where states lie and when gradients travel; decides speed and memory, never results.

    offload_optimizer: master weights, moments and the gradients of a step lie in host memory and are stepped there
    (ZeRO 1-3). hpz_ranks: neighbouring ranks that keep a second copy of the weights among themselves, so that only the
    first gather after a step leaves their group (ZeRO 3; hpZ, arXiv 2306.10209, section 3.2); with as many ranks as the
    run has, or none, there is no second copy. overlap: gradients are summed over ranks while the backward pass goes on
    (ZeRO 1-3), None for where there is CUDA.
    """

    offload_optimizer: bool = False
    hpz_ranks: int | None = None
    overlap: bool | None = None

    def check(self, zero_stage: int) -> None:
        """Raises ValueError for what a ZeRO stage cannot do."""
        offload, ranks = self.offload_optimizer, self.hpz_ranks
        require(not offload or zero_stage > 0, "offload_optimizer", offload, "false, or zero_stage 1, 2 or 3")
        require(ranks is None or zero_stage == 3, "hpz_ranks", ranks, "none, or zero_stage 3")
        require(ranks is None or ranks > 1, "hpz_ranks", ranks, "2 or more ranks, or none")
        require(not self.overlap or zero_stage > 0, "overlap", self.overlap, "false or none, or zero_stage 1, 2 or 3")

    def group_size(self, size: int) -> int:
        """Of `size` ranks, how many keep a second copy of the weights among themselves; 1 for no such copy."""
        return self.hpz_ranks if self.hpz_ranks is not None and self.hpz_ranks < size else 1

    def words(self, size: int) -> str:
        """What is in force on `size` ranks, to be said after the ZeRO stage."""
        offload = ", optimizer in host memory" if self.offload_optimizer else ""
        group = self.group_size(size)
        return offload + (f", weights twice in groups of {group}" if group > 1 else "")

    def check_ranks(self, size: int) -> None:
        """Raises ConfigError unless groups of `hpz_ranks` fill `size` ranks."""
        group = self.group_size(size)
        if size % group:
            below = max(ranks for ranks in range(1, group) if size % ranks == 0)
            nearest = f"{below}" if below > 1 else "none"
            raise ConfigError("parallel.hpz_ranks", f"got {group}, wants a divisor of the {size} ranks: {nearest}")


class Owned(NamedTuple):
    """Saved values of elements `[start, stop)` of a local parameter: kind -> flat view."""

    name: str
    start: int
    stop: int
    values: dict[str, Tensor]


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for `device`, quiet.

    No compiled op of DeepSpeed is used, so none is offered: otherwise its first process group probes every op and
    builds a shared-memory collective with g++, which takes half a minute and can hang on a stale lock. Nor is its own
    Muon, whose functions are compiled where they are defined: that would import Inductor into every rank.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    assert get_accelerator().device_name() == device.type, "deepspeed was imported before, for another device"
    deepspeed.ops.__compatible_ops__ = {}
    compiler.compile = lambda: compiler.dummy_decorator
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)
    return deepspeed


class DeepSpeedMesh:
    """The mesh as DeepSpeed asks for it (its `mpu`): ZeRO's group is the shard axis, its model parallelism the tensor
    axis."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self.mesh.shard.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.mesh.shard.ranks)

    def get_data_parallel_rank(self) -> int:
        return self.mesh.shard.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.shard.size

    def get_model_parallel_group(self) -> Any:
        return self.mesh.tensor.group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size


def experts_name(mesh: Mesh) -> str:
    """By which DeepSpeed's registry knows the groups of this rank's experts."""
    return f"ep_size_{mesh.expert.size}_{'-'.join(map(str, mesh.replica.ranks))}"


@contextmanager
def experts_apart(
    deepspeed: Any, model: nn.Module, table: Table, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Iterator[None]:
    """While DeepSpeed sets up `model` under ZeRO 0, 1 or 2: what it must see to share experts' weights, their gradients
    and their states among the ranks that hold them (`mesh.replica`) instead of among all of ZeRO's group.

    DeepSpeed 0.19.8 does so when parameters say `allreduce = False` and `group_name`, their optimizer group says
    `moe` and `name`, its registry has process groups by that name, and the model has a layer of DeepSpeed's own MoE
    class: without that last one it adds up the gradients of different experts and gives rank 0's weights to all. So
    the model has such a layer, empty, until DeepSpeed has looked. Its forward pass, its gate and its checkpoints, which
    that class would also bring, are not used, nor is its averaging of experts' norms (`compute_grad_norm` is off).
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as registry

    class Sign(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = max(spec.experts for spec in table.values())

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there: the mesh's."""

    name = experts_name(mesh)
    registry._EXPERT_PARALLEL_GROUP[name] = mesh.expert.group
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.replica.group
    for key, parameter in model.named_parameters():
        if table[key].experts:
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if table[group["names"][0]].experts:
            group |= {"moe": True, "name": name}
    model.add_module("deepspeed_experts", Sign())
    try:
        yield
    finally:
        del model.deepspeed_experts


class Engine:
    """Trains `model` under a ZeRO stage.

    model: any module, with its initial values drawn. table: logical name -> spec, with the names of
    `model.named_parameters()`. optimizer: its config. zero_stage: 0 replicates everything, 1 shards optimizer states,
    2 also gradients, 3 also weights. reduce_dtype: of gradient sums over ranks, where the table names none. options,
    placement: what decides speed and memory alone.

    A step is: for each micro-batch `loss = ...engine(...)` and `backward(loss, last)`, then `gradients()` to judge
    them, then `apply` or `discard`.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        optimizer: OptimizerConfig,
        *,
        zero_stage: int,
        mesh: Mesh,
        reduce_dtype: torch.dtype = torch.float32,
        options: ZeroOptions = ZeroOptions(),
        placement: Placement = Placement(),
    ) -> None:
        if zero_stage not in STAGES:
            raise ValueError(f"zero_stage: got {zero_stage}, wants one of 0, 1, 2, 3")
        if reduce_dtype not in REDUCE_DTYPES:
            raise ValueError(f"reduce_dtype: got {reduce_dtype}, wants float32 or bfloat16")
        placement.check(zero_stage)
        placement.check_ranks(mesh.shard.size)
        assert placement.group_size(mesh.shard.size) == 1 or mesh.tensor.size == 1, "hpZ's groups are of all ranks"
        check_stage(optimizer, zero_stage)
        model.to(mesh.device)
        self.mesh, self.table, self.zero_stage, self._config = mesh, table, zero_stage, optimizer
        groups = parameter_groups(model.named_parameters(), table, optimizer.weight_decay)
        dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
        assert dtypes == {torch.float32}, f"trained parameters are stored in float32, got {dtypes}"
        self.optimizer = build_optimizer(optimizer, groups, shard=mesh.shard, tensor=mesh.tensor, place=mesh.place)
        numel = sum(parameter.numel() for parameter in model.parameters())
        self.shared = SharedGradients(table, mesh)
        config = deepspeed_config(zero_stage, mesh, reduce_dtype, options, placement, numel)
        deepspeed = import_deepspeed(mesh.device)
        self._gather, self._groups = deepspeed.zero.GatheredParameters, deepspeed.utils.groups
        with experts_apart(deepspeed, model, table, self.optimizer, mesh) if mesh.expert.size > 1 else nullcontext():
            self.deepspeed = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, mpu=DeepSpeedMesh(mesh)
            )[0]
        stages = OFFLOADED if placement.offload_optimizer else STAGES
        self.stage = stages[zero_stage](self.deepspeed, table, mesh, reduce_dtype)
        for home in self.stage.homes():
            initialise_state(self.optimizer, home)
        self._entered = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        self._depth = len(self._entered)

    @property
    def module(self) -> nn.Module:
        """The model, to be called as it is."""
        return self.deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, summed over ranks, to the gradients of this step.

        loss: this rank's share of the global loss, so that shares add up to it. last: no micro-batch follows.
        """
        self.stage.backward(loss, last)
        if last:
            self.shared.sum(self.stage.gradients(), self.stage.held_gradients())
        del self._entered[self._depth :]  # ZeRO-3 never leaves the modules whose recomputation stops early

    def gradients(self) -> Iterator[GradientFragment]:
        """The owned fragments of the summed gradients; over all ranks, each element of each parameter once."""
        return self.stage.gradients()

    def apply(self, learning_rate: float, scale: float = 1.0) -> None:
        """One optimizer step with the gradients times `scale`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if scale != 1.0:
            self.stage.scale(scale)
        self.deepspeed.step()
        assert self.deepspeed.was_step_applied(), "DeepSpeed refused an update that was found healthy"
        self.stage.forget_gradients()

    def discard(self) -> None:
        """Forgets the gradients of this step; weights, moments and step counter stay as they are."""
        self.stage.forget_gradients()

    def state_kinds(self, name: str) -> list[str]:
        """Kinds of the optimizer states that a parameter has, one value an element; none if it is frozen."""
        return [OPTIMIZER + key for key in state_names(self._config, self.table[name])]

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    def owned(self) -> Iterator[Owned]:
        """What this rank saves: weights and optimizer states; over all ranks, each element once."""
        for shard in self.stage.trained + self.stage.frozen:
            values = {WEIGHT: shard.of(shard.home)}
            values |= {OPTIMIZER + key: shard.of(state) for key, state in self._states(shard)}
            yield Owned(shard.name, shard.start, shard.stop, values)

    def _states(self, shard: Shard) -> Iterable[tuple[str, Tensor]]:
        trained = shard.home in self.optimizer.state
        return elementwise_state(self.optimizer, shard.home).items() if trained else ()

    @torch.no_grad()
    def load(self, fill: Fill, steps: int) -> None:
        """Restores every weight and optimizer state by `fill`, and the number of optimizer steps taken.

        Values may have been saved at any stage by any number of ranks.
        """
        self.stage.load_weights(fill)
        for shard in self.stage.restored():
            for key, state in self._states(shard):
                fill(shard.of(state), shard.name, OPTIMIZER + key, shard.start)
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)
        self.stage.forget_gradients()

    @torch.no_grad()
    def add(self, deltas: Mapping[str, Tensor]) -> None:
        """Adds to frozen parameters, by name; the same values on every rank."""
        parameters = dict(self.module.named_parameters())
        chosen = [parameters[name] for name in deltas]
        assert not any(parameter.requires_grad for parameter in chosen), "the optimizer holds what is trained"
        with self._gather(chosen, modifier_rank=0) if chosen and self.zero_stage == 3 else nullcontext():
            for parameter, delta in zip(chosen, deltas.values(), strict=True):
                parameter.add_(delta.to(parameter.device))

    @contextmanager
    def gathered(self, names: Iterable[str] | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Whole local parameters (all, or `names`) while the context lasts; every rank must enter it."""
        parameters = dict(self.module.named_parameters())
        chosen = {name: parameters[name] for name in (parameters if names is None else names)}
        with self._gather(list(chosen.values())) if self.zero_stage == 3 else nullcontext():
            yield {name: parameter.detach() for name, parameter in chosen.items()}

    @property
    def hpz(self) -> Any:
        """The process group that shares a second copy of the weights, None for none."""
        return self._groups._ZERO_PARAM_INTRA_PARALLEL_GROUP

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the module; of its process-wide groups those of hpZ, of which there can be one
        set, and those of this mesh's experts."""
        self.deepspeed.destroy()
        self._groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        for registry in (self._groups._EXPERT_PARALLEL_GROUP, self._groups._EXPERT_DATA_PARALLEL_GROUP):
            registry.pop(experts_name(self.mesh), None)
        self._entered.clear()


def deepspeed_config(
    stage: int, mesh: Mesh, reduce_dtype: torch.dtype, options: ZeroOptions, placement: Placement, numel: int
) -> dict[str, Any]:
    """The DeepSpeed config of a model with `numel` parameters: buckets fit it, all else is switched off."""
    bucket = max(1, min(options.reduce_bucket, numel))
    cuda = mesh.device.type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage > 0:  # copying gradients together pays where it overlaps; on a CPU it took half of ZeRO 1's step
        overlap = cuda if placement.overlap is None else placement.overlap
        # Stage 1 would reduce experts' gradients over ZeRO's group if it did not copy.
        zero |= {"overlap_comm": overlap, "contiguous_gradients": cuda or stage > 1 or mesh.expert.size > 1}
    if stage in (1, 2):
        norm = placement.offload_optimizer  # DeepSpeed wants it with offload, see `Offloaded12`
        zero |= {"allgather_bucket_size": options.gather_bucket // 2 * 2, "compute_grad_norm": norm}
    if stage == 3:
        zero |= {
            "sub_group_size": options.sub_group,
            "stage3_prefetch_bucket_size": options.prefetch,
            "stage3_param_persistence_threshold": options.persistent,
            "stage3_max_live_parameters": options.live,
            "stage3_max_reuse_distance": options.live,
            "zero_hpz_partition_size": placement.group_size(mesh.shard.size),
        }
    if placement.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": mesh.shard.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": REDUCE_DTYPES[reduce_dtype],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},
    }
