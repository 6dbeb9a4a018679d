"""Muon for braids: the matrices of a model step along their orthogonalised momentum, all else by AdamW.

    m <- mu m + (1 - mu) g        d = (1 - mu) g + mu m (Nesterov), or m
    w <- w - lr decay w - lr s(rows, columns) NS(d)        for each named block of each matrix

NS is a Newton-Schulz iteration with the singular vectors of d and singular values near 1 (Keller Jordan,
https://kellerjordan.github.io/posts/muon). With s = 0.2 sqrt(max(rows, columns)) an update has about the size of one by
AdamW, so one learning rate and one decay serve both (Moonlight, arXiv 2502.16982, section 2.2).

A matrix is what the parameter table says it is, block by block: `z`, `x`, `B`, `C` and `dt` of Mamba-2's `in_proj`, the
queries, keys and values of attention, gate and up of an MLP and each expert's share of a fused weight are matrices
apart. Embedding, head, convolutions and vectors are none.

Every data-parallel rank holds every matrix and its momentum. Newton-Schulz, which is nearly all of the work, is done
once for each matrix: the matrices are dealt to the ranks by cost, and each rank broadcasts what it has made. Under
tensor parallelism a matrix is put together from its pieces first, and its logical shape decides. All ranks apply the
same bits.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from model.params import WHOLE, ParamSpec, Place, local_layout
from train.collectives import Axis
from train.reading import require

ADAMW_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum",)
"""Optimizer states that have one value an element."""

ZERO_STAGES = (0,)
"""The ZeRO stages under which a rank has whole matrices; the others flatten optimizer groups and cut them."""

ALONE = Axis("alone", 0, 1, (0,))

BATCH_ELEMENTS = 1 << 26
"""Elements that are orthogonalised, and that travel, at a time."""

SMALLEST_NORM = 1e-7
"""Of a matrix that is to be orthogonalised; smaller ones stay small."""


@dataclass(frozen=True)
class MuonConfig:
    """Muon for matrices, AdamW for all else. learning_rate: the peak, which the schedule multiplies. momentum: decay of
    the mean gradient. nesterov: look one step ahead. weight_decay: of the parameters that the table marks as decaying,
    times the learning rate alone. adjustment: "match_rms" multiplies the learning rate of a matrix by
    0.2 sqrt(max(rows, columns)), "original" by sqrt(max(1, rows / columns)). ns_steps, ns_coefficients: of
    X <- a X + (b A + c A A) X with A = X X^T. ns_dtype: of that iteration, "auto" for bfloat16 on a GPU and float32 on
    a CPU. adamw_learning_rate: peak for all else, none for the same. betas, eps: of AdamW."""

    learning_rate: float
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    adjustment: Literal["match_rms", "original"] = "match_rms"
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    adamw_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    kind: Literal["muon"] = "muon"

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number that is not negative")
        require(self.ns_steps > 0, "ns_steps", self.ns_steps, "a positive integer")
        ok = len(self.ns_coefficients) == 3 and all(map(math.isfinite, self.ns_coefficients))
        require(ok, "ns_coefficients", list(self.ns_coefficients), "three finite numbers")
        rate = self.adamw_learning_rate
        require(rate is None or rate > 0, "adamw_learning_rate", rate, "a positive number, or none")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(ok, "betas", list(self.betas), "two numbers in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "a positive number")

    def factor(self, shape: tuple[int, int]) -> float:
        """What the learning rate of a matrix is multiplied by."""
        rows, columns = shape
        return 0.2 * math.sqrt(max(shape)) if self.adjustment == "match_rms" else math.sqrt(max(1, rows / columns))

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of the iteration."""
        if self.ns_dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return torch.float32 if self.ns_dtype == "float32" else torch.bfloat16


def is_matrix(spec: ParamSpec) -> bool:
    """Whether Muon orthogonalises the parameter."""
    return spec.update == "matrix" and len(spec.shape) == 2


def initial_state(parameter: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer state before the first step: a step counter, and zeros of the parameter's shape by name."""
    states = {name: torch.zeros_like(parameter, requires_grad=False) for name in names}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **states}


def orthogonalise(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """U S' V^T for each U S V^T of `x` (..., rows, columns), with S' about 1, by Newton-Schulz in the dtype of `x`."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    y = wide.reshape(-1, *wide.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.view(wide.shape)
    return y.mT if tall else y


class Part(NamedTuple):
    """A piece of a matrix on this rank. owner: of the tensor ranks that hold it, this one speaks for it."""

    rows: slice
    columns: slice
    owner: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Matrix:
    """A named block of a parameter: a matrix of its own.

    shape: of the logical block. start, stop: where its parts lie, one after the other, in this rank's flattened
    parameter. everywhere: every data-parallel rank holds it; False for an expert of some.
    """

    parameter: Any
    shape: tuple[int, int]
    start: int
    stop: int
    parts: tuple[Part, ...]
    everywhere: bool

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz step."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)

    def local(self, like_parameter: Tensor) -> Tensor:
        """This rank's elements, flat, of a tensor that is laid out like the parameter."""
        return like_parameter.view(-1)[self.start : self.stop]

    def fill(self, whole: Tensor, local: Tensor) -> None:
        """Writes the parts that this rank owns into the matrix."""
        parts = local.split([math.prod(part.shape) for part in self.parts])
        for part, values in zip(self.parts, parts, strict=True):
            if part.owner:
                whole[part.rows, part.columns] = values.view(part.shape)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's elements of the matrix, flat."""
        return torch.cat([whole.new_empty(0), *(whole[part.rows, part.columns].flatten() for part in self.parts)])


def matrices_of(parameter: Any, spec: ParamSpec, place: Place) -> Iterator[Matrix]:
    """The matrices of a parameter of which this rank, or another one of its tensor-parallel group, holds a part.

    parameter: None where shapes are all that is wanted. place: of this rank.
    """
    group = [place._replace(rank=rank) for rank in range(place.size)]
    held = {piece.block for other in group for piece in local_layout(spec, other).pieces}
    mine = defaultdict(list)
    for piece in local_layout(spec, place).pieces:
        mine[piece.block].append(piece)
    row, blocks = 0, spec.named_blocks()
    for block in blocks:
        if block.name in held:
            parts = []
            for piece in mine[block.name]:
                (top, bottom), (left, right) = piece.box
                parts.append(Part(slice(top - row, bottom - row), slice(left, right), piece.owner))
            start = mine[block.name][0].offset if parts else 0
            stop = start + sum(math.prod(part.shape) for part in parts)
            shape = (block.rows, spec.shape[1])
            yield Matrix(parameter, shape, start, stop, tuple(parts), everywhere=len(held) == len(blocks))
        row += block.rows


def deal(costs: Sequence[int], size: int) -> list[int]:
    """Which of `size` ranks does each of some jobs: the dearest first, each to the rank with the least to do."""
    load, dealt = [0] * size, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        dealt[job] = min(range(size), key=load.__getitem__)
        load[dealt[job]] += costs[job]
    return dealt


def workers_of(matrices: Sequence[Matrix], shard: Axis, tensor: Axis) -> list[tuple[int, int]]:
    """For each matrix the shard and the tensor rank that orthogonalise it."""
    workers = [(shard.rank, 0)] * len(matrices)
    for everywhere, size in ((True, shard.size * tensor.size), (False, tensor.size)):
        chosen = [i for i, matrix in enumerate(matrices) if matrix.everywhere == everywhere]
        for i, worker in zip(chosen, deal([matrices[i].cost for i in chosen], size), strict=True):
            at, part = divmod(worker, tensor.size)
            workers[i] = (at if everywhere else shard.rank, part)
    return workers


def in_runs(items: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """`items` in order, in runs whose sizes add up to `limit` at most, or of one item."""
    run: list[int] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run


class Muon(torch.optim.Optimizer):
    """Muon over the matrices of `groups`, AdamW over the rest.

    groups: of `train/optim.py: parameter_groups`. shard: the ranks that hold the same matrices, which share the work.
    tensor: the ranks that hold parts of one matrix, at `place`. Every rank must call `step`, with a gradient for every
    matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: MuonConfig,
        *,
        shard: Axis = ALONE,
        tensor: Axis = ALONE,
        place: Place = WHOLE,
    ) -> None:
        assert (place.rank, place.size) == (tensor.rank, tensor.size), f"{place} is not the place of {tensor}"
        self.config, self.shard, self.tensor = config, shard, tensor
        super().__init__([part for group in groups for part in _split(group)], {"lr": config.learning_rate})
        self.matrices = [
            matrix
            for group in self.param_groups
            if group["matrices"]
            for parameter, spec in zip(group["params"], group["specs"], strict=True)
            for matrix in matrices_of(parameter, spec, place)
        ]
        self.workers = workers_of(self.matrices, shard, tensor)
        for group in self.param_groups:
            for parameter in group["params"]:
                names = MUON_STATES if group["matrices"] else ADAMW_STATES
                self.state[parameter] = initial_state(parameter, names)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for group in self.param_groups:
            if group["matrices"]:
                self._decay_and_average(group)
            else:
                self._step_by_adamw(group)
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        for i, update in self._updates():
            matrix = self.matrices[i]
            rate = rates[matrix.parameter] * self.config.factor(matrix.shape)
            matrix.local(matrix.parameter).add_(update, alpha=-rate)

    def _decay_and_average(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            state = self.state[parameter]
            state["step"] += 1
            state["momentum"].lerp_(parameter.grad, 1 - self.config.momentum)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _step_by_adamw(self, group: dict[str, Any]) -> None:
        config, members = self.config, [p for p in group["params"] if p.grad is not None]
        ratio = 1.0 if config.adamw_learning_rate is None else config.adamw_learning_rate / config.learning_rate
        states = [self.state[p] for p in members]
        adamw(
            members,
            [p.grad for p in members],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=group["params"][0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=group["lr"] * ratio,
            weight_decay=group["weight_decay"],
            eps=config.eps,
            maximize=False,
        )

    def _updates(self) -> Iterator[tuple[int, Tensor]]:
        """(index of a matrix, this rank's elements of its orthogonalised direction, flat), for all that it holds."""
        own: dict[int, Tensor] = {}
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, matrix in enumerate(self.matrices):
            if self.workers[i][0] == self.shard.rank:
                by_shape[matrix.shape].append(i)
        for shape, members in by_shape.items():
            for run in in_runs(members, [math.prod(shape)] * len(members), BATCH_ELEMENTS):
                own |= dict(zip(run, self._orthogonalised(shape, run), strict=True))
        for i in [i for i in own if self.shard.size == 1 or not self.matrices[i].everywhere]:
            yield i, own.pop(i)
        if self.shard.size > 1:
            yield from self._exchanged(own)

    def _orthogonalised(self, shape: tuple[int, int], run: list[int]) -> Iterator[Tensor]:
        """This rank's elements of the orthogonalised directions of matrices of one shape, on all tensor ranks."""
        config, device = self.config, self.matrices[run[0]].parameter.device
        whole = torch.zeros(len(run), *shape, dtype=config.dtype(device), device=device)
        for values, i in zip(whole, run, strict=True):
            self.matrices[i].fill(values, self._direction(self.matrices[i]))
        if self.tensor.size == 1:
            whole = orthogonalise(whole, config.ns_steps, config.ns_coefficients)
        else:  # each element comes from one rank, so the sums are exact
            dist.all_reduce(whole, group=self.tensor.group)
            mine = [n for n, i in enumerate(run) if self.workers[i][1] == self.tensor.rank]
            done = orthogonalise(whole[mine], config.ns_steps, config.ns_coefficients)
            whole = whole.zero_().index_copy_(0, torch.tensor(mine, device=device, dtype=torch.long), done)
            dist.all_reduce(whole, group=self.tensor.group)
        return (self.matrices[i].take(values) for values, i in zip(whole, run, strict=True))

    def _direction(self, matrix: Matrix) -> Tensor:
        momentum = matrix.local(self.state[matrix.parameter]["momentum"])
        if not self.config.nesterov:
            return momentum
        assert matrix.parameter.grad is not None, "a step takes a gradient of every matrix"
        return matrix.local(matrix.parameter.grad).lerp(momentum, self.config.momentum)

    def _exchanged(self, own: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """What each rank of the shard group has made, from it to all."""
        for rank in range(self.shard.size):
            theirs = [i for i, matrix in enumerate(self.matrices) if matrix.everywhere and self.workers[i][0] == rank]
            for run in in_runs(theirs, [self.matrices[i].numel for i in theirs], BATCH_ELEMENTS):
                device = self.matrices[run[0]].parameter.device
                sizes = [self.matrices[i].numel for i in run]
                if rank == self.shard.rank:
                    flat = torch.cat([own.pop(i) for i in run])
                else:
                    flat = torch.empty(sum(sizes), dtype=self.config.dtype(device), device=device)
                dist.broadcast(flat, group=self.shard.group, group_src=rank)
                yield from zip(run, flat.split(sizes), strict=True)


def _split(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The matrices of an optimizer group and the rest of it, as groups; an empty one is left out."""
    for matrices in (True, False):
        members = [i for i, spec in enumerate(group["specs"]) if is_matrix(spec) == matrices]
        if members:
            lists = {key: [group[key][i] for i in members] for key in ("params", "names", "specs")}
            yield {**group, **lists, "matrices": matrices}
