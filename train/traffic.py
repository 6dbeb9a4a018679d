"""What a rank sends in one step, as formulas: bytes by axis and operation, from the parameter table, the layers'
messages and the recipe's numbers. `train/counter.py` counts the same on the wire, by the same convention, and a test
holds the two together; the planner has no others.

Of n ranks, a rank sends 2 (n - 1) / n of what an all_reduce sums and (n - 1) / n of what an all_gather gives or a
reduce_scatter takes. Where ranks differ (uneven chunks, heads that do not divide) the numbers are of the rank asked
for. They hold from the third step of a process on, when ZeRO 3 knows the order of the modules.

Legend: b rows of a rank in a step, L tokens of a row that it has, D width, t tensor ranks.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from data.stream import DIGEST_BYTES
from model.config import ModelConfig
from model.context import chunk_bounds
from model.hybrid import Precision, model_table
from model.layers.base import Message
from model.params import Place, Table, local_layout
from train.collectives import Axis, halo_spans
from train.config import Recipe
from train.counter import Traffic
from train.engine import Placement, ZeroOptions
from train.gathers import gathers, turns_of
from train.muon import MuonConfig, is_matrix, matrices_of, workers_of
from train.optim import OptimizerConfig
from train.parallel import Sizes, axis_ranks
from train.shared import shared_elements

FLOAT = 4
"""Bytes of float32, in which weights lie and travel."""
REPORTED = 16
"""Numbers that a layer reports in a step, at most, its experts' loads aside."""


@dataclass(frozen=True)
class Job:
    """What traffic depends on. world: ranks. rows_per_step: of the global batch. recompute: of all blocks, of none, or
    of those that hold a layer of these letters. optimizer: none for one that says nothing to other ranks. device:
    "cuda" or "cpu", on which Muon's dtype depends. The rest as in the recipe."""

    model: ModelConfig
    world: int
    rows_per_step: int
    sequence_length: int
    sizes: Sizes = field(default_factory=Sizes)
    zero_stage: int = 1
    micro_batch_rows: int = 1
    precision: Precision = field(default_factory=Precision)
    reduction: torch.dtype = torch.float32
    recompute: bool | str = False
    options: ZeroOptions = field(default_factory=ZeroOptions)
    placement: Placement = field(default_factory=Placement)
    optimizer: OptimizerConfig | None = None
    device: str = "cpu"

    @staticmethod
    def of(recipe: Recipe, world: int) -> "Job":
        training, parallel = recipe.training, recipe.parallel
        return Job(
            recipe.model,
            world,
            training.rows_per_step,
            training.sequence_length,
            sizes=parallel.sizes,
            zero_stage=parallel.zero_stage,
            micro_batch_rows=training.micro_batch_rows,
            precision=training.precision,
            reduction=training.reduction,
            recompute=training.checkpoint_blocks,
            options=parallel.buckets,
            placement=parallel.placement,
            optimizer=recipe.optimizer,
            device=parallel.device if parallel.device != "auto" or not torch.cuda.is_available() else "cuda",
        )

    @cached_property
    def table(self) -> Table:
        return model_table(self.model)

    @property
    def rows(self) -> int:
        """Rows of one rank in a step."""
        return self.rows_per_step // self.sizes.data(self.world)

    @property
    def micro_batches(self) -> int:
        return -(-self.rows // self.micro_batch_rows)

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """Places of the stack whose block runs again in the backward pass."""
        return self.model.recomputed(self.recompute)

    def axis(self, name: str, rank: int) -> Axis:
        """An axis of the mesh as `rank` sees it, without a process group; "hpz": the ranks that share a second copy of
        the weights."""
        group = self.placement.group_size(self.world)
        if name in ("world", "hpz"):
            first, size = (0, self.world) if name == "world" else (rank // group * group, group)
            ranks = tuple(range(first, first + size))
        else:
            ranks = axis_ranks(rank, self.world, self.sizes)[name]
        return Axis(name, ranks.index(rank), len(ranks), ranks)

    def place(self, rank: int) -> Place:
        tensor, expert = self.axis("tensor", rank), self.axis("expert", rank)
        return Place(tensor.rank, tensor.size, expert.rank, expert.size)

    def messages(self, letter: str, rank: int) -> list[Message]:
        """What a layer asks of other ranks in a forward pass."""
        return self.model.layers[letter].messages(replace(self.model.dims, place=self.place(rank)))


def step_traffic(job: Job, rank: int = 0, crossing: Mapping[int, float] | None = None) -> Traffic:
    """Bytes that `rank` sends in a step, by axis and operation; what is zero is left out.

    crossing: for each MoE layer, by its place among all layers, how many choices of tokens of this rank are for experts
    of others, and of others for its own, added up over the step; even routing where it is not given.
    """
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in (_activations(job, rank, crossing), _weights(job, rank), _norm(job, rank)):
        for axis, operation, bytes_ in part:
            if bytes_:
                total[axis][operation] += bytes_
    return {axis: dict(operations) for axis, operations in total.items()}


def control_limit(job: Job) -> float:
    """Bytes of `control` that a rank sends in a step, at most: numbers to write down and counts, in float64, and the
    rows' digests as Python objects, padded to the longest."""
    n, experts = job.world, sum(spec.experts for spec in job.table.values())
    numbers = REPORTED * len(job.model.stacked) + 2 * experts + REPORTED
    digests = 64 + (DIGEST_BYTES + 8) * job.rows + 8
    return 2 * (n - 1) / n * 8 * numbers + (n - 1) * digests


Parts = Iterator[tuple[str, str, float]]
"""Axis, operation, bytes."""


def _reduced(axis: Axis, bytes_: float) -> tuple[str, str, float]:
    return axis.name, "all_reduce", 2 * (axis.size - 1) * bytes_ / axis.size


def _gathered(axis: Axis, bytes_: float) -> tuple[str, str, float]:
    """bytes_: of one rank's part."""
    return axis.name, "all_gather", (axis.size - 1) * bytes_


def _scattered(axis: Axis, bytes_: float) -> tuple[str, str, float]:
    """bytes_: of one rank's part."""
    return axis.name, "reduce_scatter", (axis.size - 1) * bytes_


# ---- what passes between ranks inside the model ----


def _activations(job: Job, rank: int, crossing: Mapping[int, float] | None) -> Parts:
    tensor, context = job.axis("tensor", rank), job.axis("context", rank)
    low, high = chunk_bounds(job.sequence_length, context.rank, context.size)
    run = job.rows * -(-(high - low) // tensor.size) * job.model.d_model  # numbers that a rank has between layers
    compute, residual = job.precision.compute.itemsize, job.precision.residual.itemsize
    yield from _leaves(tensor, run * residual)  # the embedding
    yield from _enters(tensor, run * compute)  # the head
    wide = max(FLOAT, compute)
    yield _gathered(tensor, 2 * job.rows * (high - low) * wide)  # its logsumexp and the targets' logits
    layer = 0
    for place, letters in enumerate(job.model.blocks):
        again = place in job.recomputed
        parallel = len(letters) > 1
        yield from _enters(tensor, run * compute, again)
        yield from _leaves(tensor, run * (residual if parallel else compute))
        for letter in letters:
            for message in job.messages(letter, rank):
                sent = None if crossing is None else crossing.get(layer)
                yield from _MESSAGES[message.ask](job, rank, message, again, sent)
            layer += 1


def _enters(tensor: Axis, bytes_: float, again: bool = False) -> Parts:
    """Into a layer: all tokens are gathered, forward and where it is recomputed; the gradient is scattered."""
    yield _gathered(tensor, bytes_ * (1 + again))
    yield _scattered(tensor, bytes_)


def _leaves(tensor: Axis, bytes_: float) -> Parts:
    """Out of a layer: what is recomputed stops before it."""
    yield _scattered(tensor, bytes_)
    yield _gathered(tensor, bytes_)


def _bytes(job: Job, rank: int, message: Message) -> float:
    """Of the numbers that this rank has in a step."""
    size = {"compute": job.precision.compute.itemsize, "float32": FLOAT, "int64": 8}[message.dtype]
    context = job.axis("context", rank)
    low, high = chunk_bounds(job.sequence_length, context.rank, context.size)
    times = {"token": job.rows * (high - low), "row": job.rows, "batch": job.micro_batches}[message.per]
    return times * message.elements * max(size, job.precision.compute.itemsize)


def _ways(message: Message, again: bool) -> int:
    """How often it goes through a collective whose gradient goes the same way: forward, backward, recomputed."""
    return 1 + again + (message.dtype != "int64")


def _sum_over_tensor(job: Job, rank: int, message: Message, again: bool, _: float | None) -> Parts:
    yield _reduced(job.axis("tensor", rank), _ways(message, again) * _bytes(job, rank, message))


def _prefix(job: Job, rank: int, message: Message, again: bool, _: float | None) -> Parts:
    """A decay and a state of each rank, forward; their gradients, and the decays again, backward."""
    yield _gathered(job.axis("context", rank), _ways(message, again) * _bytes(job, rank, message))


def _gather_over_context(job: Job, rank: int, message: Message, again: bool, _: float | None) -> Parts:
    context, bytes_ = job.axis("context", rank), _bytes(job, rank, message)
    yield _gathered(context, (1 + again) * bytes_)
    if message.dtype != "int64":
        yield _scattered(context, bytes_)


def _halo(job: Job, rank: int, message: Message, again: bool, _: float | None) -> Parts:
    """Forward a rank sends its last tokens to the right, backward the gradient of what it had from the left."""
    context, row = job.axis("context", rank), job.sequence_length
    spans = halo_spans(context, row if message.reach is None else message.reach, row)
    right = sum(stop - start for sender, _, start, stop in spans if sender == context.rank)
    left = sum(stop - start for _, receiver, start, stop in spans if receiver == context.rank)
    low, high = chunk_bounds(row, context.rank, context.size)
    yield context.name, "send", (right * (1 + again) + left) * _bytes(job, rank, message) / (high - low)


def _at_experts(job: Job, rank: int, message: Message, again: bool, crossing: float | None) -> Parts:
    """Rows to the experts and back, and the same backward; ahead of them, their counts."""
    expert = job.axis("expert", rank)
    away = (expert.size - 1) / expert.size
    rows = 2 * away * _bytes(job, rank, message)
    if crossing is not None:
        rows = crossing * job.model.d_model * job.precision.compute.itemsize
    counts = away * message.ahead * 8 * job.micro_batches
    yield expert.name, "all_to_all", rows * (2 + again) + counts * (1 + again)


_MESSAGES = {
    "sum_over_tensor": _sum_over_tensor,
    "prefix": _prefix,
    "gather_over_context": _gather_over_context,
    "halo": _halo,
    "at_experts": _at_experts,
}
"""What each method of `Collectives` that a layer may ask for sends, backward and recomputation included."""


# ---- what passes between ranks for the weights ----


def local_numel(job: Job, rank: int) -> dict[str, int]:
    """Elements of a rank's part of each weight, padding included."""
    place = job.place(rank)
    return {name: math.prod(local_layout(spec, place).shape) for name, spec in job.table.items()}


def _weights(job: Job, rank: int) -> Parts:
    numel, world = local_numel(job, rank), job.axis("world", rank)
    holders = {
        name: job.axis("replica" if spec.experts and job.sizes.expert > 1 else "shard", rank)
        for name, spec in job.table.items()
    }
    yield _reduced(world, FLOAT * shared_elements(job.table, job.sizes.tensor))
    if job.zero_stage == 3:
        yield from _zero_3(job, numel, rank)
        return
    times = job.micro_batches if job.zero_stage == 2 else 1
    for name, spec in job.table.items():
        if not spec.frozen:
            size = (spec.comm_dtype or job.reduction).itemsize
            yield _reduced(holders[name], times * numel[name] * size)
    if job.zero_stage > 0:
        yield from _stepped(job, numel, holders)
    elif isinstance(job.optimizer, MuonConfig):
        yield from _muon(job, job.optimizer, rank)


def _stepped(job: Job, numel: Mapping[str, int], holders: Mapping[str, Axis]) -> Parts:
    """ZeRO 1 and 2: each rank steps its part of the weights of an optimizer group, and all gather the whole of it."""
    groups: dict[tuple[bool, bool], int] = defaultdict(int)
    axes: dict[tuple[bool, bool], Axis] = {}
    for name, spec in job.table.items():
        if not spec.frozen:
            group = bool(spec.experts), spec.decay
            groups[group] += numel[name]
            axes[group] = holders[name]
    for group, elements in groups.items():
        part = -(-elements // (2 * axes[group].size)) * 2  # DeepSpeed pads to two elements a rank
        yield _gathered(axes[group], FLOAT * part)


def _muon(job: Job, config: MuonConfig, rank: int) -> Parts:
    """Tensor ranks put the matrices together that their shard rank orthogonalises, and give the results to each other;
    then each shard rank has its results from the others."""
    shard, tensor = job.axis("shard", rank), job.axis("tensor", rank)
    specs = [spec for spec in job.table.values() if is_matrix(spec) and not spec.frozen]
    specs.sort(key=lambda spec: (bool(spec.experts), not spec.decay))  # the order of the optimizer's groups
    matrices = [matrix for spec in specs for matrix in matrices_of(None, spec, job.place(rank))]
    size = config.dtype(torch.device("cuda" if job.device == "cuda" else "cpu")).itemsize
    for matrix, (worker, _) in zip(matrices, workers_of(matrices, shard, tensor), strict=True):
        if worker == shard.rank:
            yield _reduced(tensor, 2 * math.prod(matrix.shape) * size)
        if matrix.everywhere:
            yield shard.name, "broadcast", (shard.size - 1) * matrix.numel * size / shard.size


def _zero_3(job: Job, numel: Mapping[str, int], rank: int) -> Parts:
    shard, hpz, options, table = job.axis("shard", rank), job.axis("hpz", rank), job.options, job.table
    kept = {name for name in table if numel[name] <= options.persistent}
    turns = turns_of(job.model, table, job.recomputed)
    found = gathers(numel, turns, kept=kept, live=options.live, prefetch=options.prefetch)
    for name, spec in table.items():
        part = -(-numel[name] // shard.size)  # each weight is padded to as many elements on each rank
        if not spec.frozen:
            yield _scattered(shard, job.micro_batches * part * (spec.comm_dtype or job.reduction).itemsize)
        times = 1 if name in kept else job.micro_batches * found[name]
        if spec.frozen:  # layers adjust it: gathered, and given to all by the first rank
            times += 1
            yield shard.name, "broadcast", (shard.size - 1) * numel[name] * FLOAT / shard.size
        yield _gathered(shard, (times if hpz.size == 1 else 1) * part * FLOAT)
        yield _gathered(hpz, (times - 1) * part * shard.size / hpz.size * FLOAT)  # from the second copy
    number = FLOAT if job.placement.offload_optimizer else 8  # DeepSpeed's own norm, one for each sub-group
    for axis in (shard, job.axis("tensor", rank)):
        yield _reduced(axis, number * _sub_groups(job, numel, shard))


def _sub_groups(job: Job, numel: Mapping[str, int], shard: Axis) -> int:
    """How many groups of weights ZeRO 3 steps one after the other."""
    count, groups = 0, defaultdict(list)
    for name, spec in job.table.items():
        if not spec.frozen:
            groups[bool(spec.experts), spec.decay].append(-(-numel[name] // shard.size))
    for parts in groups.values():
        size = 0
        for part in parts:
            size += part
            if size >= job.options.sub_group:
                count, size = count + 1, 0
        count += size > 0
    return count


def _norm(job: Job, rank: int) -> Parts:
    """The squares of the gradient norm, weight by weight, in float64."""
    yield _reduced(job.axis("world", rank), 8 * len(job.table))
