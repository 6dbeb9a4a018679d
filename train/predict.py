"""Time of a step on machines that nobody here has run it on: a cost model over the traffic formulas.

    step = compute + exposed communication + optimizer

`python -m train.predict` prints the table of `train/README.md`: the 8B hybrid on nodes of eight H100s. Every number
that is not computed from the recipe is an attribute of `Machine`, and is an assumption.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from model.hybrid import forward_flops
from model.layers.base import Costs
from train.config import load_recipe
from train.layout import check_layout
from train.parallel import Sizes
from train.traffic import FLOAT, Job, local_numel, step_traffic

RECIPE = Path(__file__).parents[1] / "launch/recipes/mamba2-hybrid-8b.toml"
WORLDS = (8, 64, 512, 1024)
LAYOUTS = (
    (1, Sizes(tensor=2)),
    (1, Sizes(tensor=4)),
    (1, Sizes(tensor=8)),
    (2, Sizes(tensor=2)),
    (3, Sizes()),
    (3, Sizes(tensor=2)),
    (3, Sizes(context=2)),
    (1, Sizes(tensor=4, context=2)),
)
"""ZeRO stage and sizes, for the table."""
ASKED = {
    "sum_over_tensor": ("tensor", "all_reduce"),
    "halo": ("context", "send"),
    "prefix": ("context", "all_gather"),
    "gather_over_context": ("context", "all_gather"),
    "at_experts": ("expert", "all_to_all"),
}
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """H100 SXM data sheet: dense bfloat16 FLOP/s, memory and its bandwidth, NVLink and one 400 Gbit/s InfiniBand port a
    GPU, each way. NCCL's own tuning table (LL128): seconds that a collective and each of its hops take. Assumed:
    efficiency, the part of the peak that forward and backward reach with all their elementwise work; link_efficiency,
    the part of a link's bandwidth that a collective reaches; overlap, the part of the compute time behind which
    communication that may overlap does hide; reserved_bytes, for CUDA, NCCL and fragments."""

    flops: float = 989e12
    memory_bytes: float = 80e9
    memory_bandwidth: float = 3.35e12
    node: int = 8
    nvlink: float = 450e9
    infiniband: float = 50e9
    start_s: float = 14e-6
    nvlink_hop_s: float = 1.9e-6
    infiniband_hop_s: float = 4e-6
    efficiency: float = 0.45
    link_efficiency: float = 0.8
    overlap: float = 0.8
    reserved_bytes: float = 6e9

    def bandwidth(self, ranks: tuple[int, ...]) -> float:
        """Bytes a second that leave a rank in a collective over these ranks. Rings that cross nodes have a port for
        each of their ranks in a node."""
        within = sum(rank // self.node == ranks[0] // self.node for rank in ranks)
        link = self.nvlink if within == len(ranks) else min(self.nvlink, within * self.infiniband)
        return link * self.link_efficiency

    def latency(self, ranks: tuple[int, ...], operation: str) -> float:
        """Seconds of a collective without bytes: a ring's, of an all_reduce a tree's up and down."""
        nodes = len({rank // self.node for rank in ranks})
        near, far = len(ranks) - nodes, nodes if nodes > 1 else 0
        if operation == "all_reduce":
            near, far = 2 * near // nodes, 2 * math.ceil(math.log2(nodes))
        return self.start_s + near * self.nvlink_hop_s + far * self.infiniband_hop_s


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step of `job`. compute: forward, backward and recomputation of the slowest rank. exposed:
    communication that nothing hides. optimizer: its pass over the states. memory_bytes: of a rank, at most."""

    job: Job
    compute: float
    exposed: float
    optimizer: float
    memory_bytes: float
    flops: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def tokens_per_s(self) -> float:
        return self.job.rows_per_step * self.job.sequence_length / self.step

    def mfu(self, machine: Machine) -> float:
        return self.flops / (self.step * self.job.world * machine.flops)


def predict(job: Job, machine: Machine = Machine()) -> Prediction:
    """The last rank decides: of context ranks it has the tokens with the most keys to see."""
    rank = job.world - 1
    context, tokens = job.sizes.context, job.rows_per_step * job.sequence_length
    flops = 3 * tokens * _flops(job, (job.sequence_length + 1) / 2)
    slowest = tokens * _flops(job, job.sequence_length * (1 - 1 / (2 * context)))
    again = len(job.recomputed) / len(job.model.blocks)
    compute = (3 + again) * slowest / (job.world * machine.flops * machine.efficiency)
    numel = local_numel(job, rank)
    states = sum(numel.values()) / (job.axis("shard", rank).size if job.zero_stage else 1)
    return Prediction(
        job,
        compute,
        _exposed(job, rank, compute, (2 + again) / (3 + again), machine),
        7 * FLOAT * states / machine.memory_bandwidth,  # reads weight, gradient and moments, writes all but one
        _memory(job, rank) + machine.reserved_bytes,
        flops,
    )


def _flops(job: Job, keys: float) -> float:
    """Of a token's forward pass, where a query of full attention sees so many keys on average."""
    return forward_flops(job.model, job.sequence_length, lambda window: keys if window is None else min(keys, window))


def _exposed(job: Job, rank: int, compute: float, backward: float, machine: Machine) -> float:
    """backward: part of the compute time. What ZeRO sends hides behind compute: gradients behind the backward pass (at
    stage 1 that of the last micro-batch), at stage 3 weights behind all of it; all else is waited for."""
    calls = _calls(job)
    seconds = {
        (axis, operation): bytes_ / machine.bandwidth(ranks)
        + calls[axis, operation] * machine.latency(ranks, operation)
        for axis, operations in step_traffic(job, rank).items()
        for operation, bytes_ in operations.items()
        for ranks in [job.axis(axis, rank).ranks]
    }
    hiding = {0: 0.0, 1: backward / job.micro_batches, 2: backward, 3: 1.0}[job.zero_stage] * compute
    hidden = {"all_reduce", "reduce_scatter"} | ({"all_gather"} if job.zero_stage == 3 else set())
    may_hide = sum(
        s for (axis, operation), s in seconds.items() if axis in ("shard", "replica") and operation in hidden
    )
    return sum(seconds.values()) - min(may_hide, machine.overlap * hiding)


def _calls(job: Job) -> Counter[tuple[str, str]]:
    """About how many collectives a step has; of ZeRO's, one for each full bucket."""
    again, micro = {place: place in job.recomputed for place in range(len(job.model.blocks))}, job.micro_batches
    calls = Counter({("world", "all_reduce"): 2})
    for place, letters in enumerate(job.model.blocks):
        calls["tensor", "all_gather"] += micro * (2 + again[place])
        calls["tensor", "reduce_scatter"] += micro * 2
        for message in (message for letter in letters for message in job.messages(letter, 0)):
            axis, operation = ASKED[message.ask]
            calls[axis, operation] += micro * (2 + again[place])
    numel = sum(local_numel(job, 0).values())
    reduced = math.ceil(numel / job.options.reduce_bucket) * (micro if job.zero_stage > 1 else 1)
    calls["shard", "reduce_scatter" if job.zero_stage == 3 else "all_reduce"] += reduced
    passes = 1 + len(job.recomputed) / len(again)
    gathered = math.ceil(passes * numel / job.options.prefetch) * micro
    calls["shard", "all_gather"] += gathered if job.zero_stage == 3 else 2
    return calls


# ---- memory ----


def _memory(job: Job, rank: int) -> float:
    """States, buckets and gathered weights of ZeRO; activations of a micro-batch."""
    numel, n = sum(local_numel(job, rank).values()), job.axis("shard", rank).size
    largest = max(local_numel(job, rank).values())
    options, bucket = job.options, 2 * FLOAT * min(job.options.reduce_bucket, numel)  # one fills while one travels
    held = {
        0: 16 * numel,
        1: 8 * numel + 16 * numel / n,  # weights and gradients; the partition's master, moments, summed gradient
        2: 4 * numel + 16 * numel / n + bucket,
        3: 20 * numel / n + FLOAT * min(options.live, numel) + bucket,
    }[job.zero_stage]
    casts = 2 * job.precision.compute.itemsize * largest  # of the weight in use, and its gradient
    return held + casts + _activations(job, rank)


def _activations(job: Job, rank: int) -> float:
    """What the blocks keep, between blocks alone where they are recomputed, and the most that one block needs."""
    sizes, config = job.sizes, job.model
    tokens = min(job.micro_batch_rows, job.rows) * job.sequence_length / sizes.context
    compute = job.precision.compute.itemsize
    between = tokens * config.d_model * job.precision.residual.itemsize / sizes.tensor
    blocks = [
        tokens * sum(_costs(job, letter).saved_bytes(compute) for letter in b) / sizes.tensor for b in config.blocks
    ]
    kept = sum(size for place, size in enumerate(blocks) if place not in job.recomputed)
    return between * len(blocks) + kept + 2 * max(blocks)


def _costs(job: Job, letter: str) -> Costs:
    length = job.sequence_length
    return job.model.layers[letter].costs(job.model.dims, length, lambda window: (length + 1) / 2)


# ---- the table ----


def predictions(job: Job, machine: Machine) -> Iterator[Prediction]:
    """Of `LAYOUTS` on `WORLDS`, those that are allowed and fit; the fastest first."""
    for world in WORLDS:
        found = []
        for stage, sizes in LAYOUTS:
            data = world // (sizes.tensor * sizes.context)
            if job.rows_per_step % data:
                continue
            check_layout(job.model, sizes, sequence_length=job.sequence_length, zero_stage=stage)
            predicted = predict(replace(job, world=world, sizes=sizes, zero_stage=stage), machine)
            if predicted.memory_bytes <= machine.memory_bytes:
                found.append(predicted)
        yield from sorted(found, key=lambda predicted: predicted.step)


HEADS = (
    *("GPUs", "data x context x tensor", "ZeRO", "micro-batches", "memory GiB", "compute s", "exposed s", "step s"),
    *("tokens/s a GPU", "MFU"),
)


def table(recipe: Path = RECIPE, machine: Machine = Machine()) -> str:
    """Markdown."""
    job = Job.of(load_recipe(recipe), WORLDS[0])
    lines = [
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
    ]
    for found in predictions(job, machine):
        sizes, world = found.job.sizes, found.job.world
        shape = f"{sizes.data(world)} x {sizes.context} x {sizes.tensor}"
        cells = [f"{world:,}", shape, f"{found.job.zero_stage}", f"{found.job.micro_batches}"]
        cells += [
            f"{found.memory_bytes / GIB:.0f}",
            f"{found.compute:.2f}",
            f"{found.exposed:.2f}",
            f"{found.step:.2f}",
        ]
        cells += [f"{found.tokens_per_s / world:,.0f}", f"{found.mfu(machine):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1]) if len(sys.argv) > 1 else RECIPE))
