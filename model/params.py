"""The parameter table: what a layer kind declares about its weights, and everything that follows from it.

A layer kind lists its parameters once, as `ParamSpec`s. Initialisation, tensor-parallel slices, optimizer groups, the
multiplicities of the gradient norm, checkpoint fragments and parameter counts are all read from that list.

A *logical* tensor is the whole weight, independent of any layout. Each tensor-parallel rank holds a *local* tensor: the
concatenation, along axis 0, of its `Piece`s of the logical tensor, then padding rows that belong to nobody.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Box = tuple[tuple[int, int], ...]
"""Half-open `(start, stop)` per axis, in the coordinates of the logical tensor."""

INIT_CHUNK_ELEMENTS = 1 << 20


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_numel(box: Box) -> int:
    return math.prod(box_shape(box))


class Place(NamedTuple):
    """Where a rank stands among those that hold parts of one copy of the weights.

    rank, size: of tensor parallelism. expert_rank, expert_size: of expert parallelism.
    """

    rank: int = 0
    size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


WHOLE = Place()


class Init(Protocol):
    """How initial values are drawn: float32, on the CPU, from the given generator."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Constant:
    value: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Normal:
    std: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std


@dataclass(frozen=True)
class Uniform:
    """Uniform in `[low, high)`; `log` stores the logarithm of the value drawn (Mamba-2's `A_log`)."""

    low: float
    high: float
    log: bool = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        value = torch.rand(shape, generator=generator) * (self.high - self.low) + self.low
        return value.log() if self.log else value


@dataclass(frozen=True)
class InverseSoftplusLogUniform:
    """Bias `b` with `softplus(b)` log-uniform in `[low, high]`, at least `floor` (Mamba's `dt_bias`)."""

    low: float
    high: float
    floor: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        span = math.log(self.high) - math.log(self.low)
        step = torch.exp(torch.rand(shape, generator=generator) * span + math.log(self.low)).clamp(min=self.floor)
        return step + torch.log(-torch.expm1(-step))


@dataclass(frozen=True)
class Split:
    """A block divides along `axis` into `units` equal, indivisible units (heads, groups, channels, vocabulary rows).

    The `leaders` (query heads, SSM heads, channels) are dealt to the tensor ranks as evenly as they go; a rank holds
    each unit that one of its leaders uses. With fewer units than leaders (grouped B and C, grouped key/value heads)
    neighbouring ranks may hold copies of one unit, whose gradients are then summed over its holders.
    """

    axis: int
    units: int
    leaders: int

    def bounds(self, rank: int, size: int) -> tuple[int, int]:
        """Units `[start, stop)` held by `rank` of `size`."""
        first, last = rank * self.leaders // size, (rank + 1) * self.leaders // size
        return first * self.units // self.leaders, -(-last * self.units // self.leaders)

    def holders(self, unit: int, size: int) -> tuple[int, int]:
        """`(lowest rank, number of ranks)` that hold `unit`."""
        ranks = [r for r in range(size) if self.bounds(r, size)[0] <= unit < self.bounds(r, size)[1]]
        return ranks[0], len(ranks)


def split_evenly(axis: int, units: int) -> Split:
    return Split(axis, units, units)


@dataclass(frozen=True)
class Block:
    """A named run of `rows` rows (axis 0) of a logical tensor; `split=None` replicates it on every tensor rank."""

    name: str
    rows: int
    split: Split | None = None


@dataclass(frozen=True)
class ParamSpec:
    """One weight of one layer.

    shape: logical shape. init: initial values. blocks: named runs along axis 0 (the fused `z | x | B | C | dt`); when
    empty, the whole tensor is one block that splits by `split`. decay: subject to weight decay. update: what an
    optimizer may take it for (only a "matrix" may be orthogonalised, block by block). dtype: of storage. comm_dtype: of
    its gradient's reduction, None for the recipe's. pad_rows: each tensor rank pads its rows to a multiple of this;
    padding is no part of the logical tensor. frozen: takes no gradient. used: the part of it that serves one token (the
    chosen of many experts), for counts of active parameters. experts: the blocks are those of so many experts, in
    order, which are dealt to the expert-parallel ranks in equal runs; 0 for a weight that every one of those holds.
    """

    shape: tuple[int, ...]
    init: Init
    blocks: tuple[Block, ...] = ()
    split: Split | None = None
    decay: bool = True
    update: Literal["matrix", "embedding", "convolution", "vector"] = "matrix"
    dtype: torch.dtype = torch.float32
    comm_dtype: torch.dtype | None = None
    pad_rows: int = 1
    frozen: bool = False
    used: float = 1.0
    experts: int = 0

    def __post_init__(self) -> None:
        if self.blocks:
            assert sum(block.rows for block in self.blocks) == self.shape[0], f"blocks do not fill {self.shape}"
            assert self.split is None, "a tensor with blocks splits block by block"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def named_blocks(self) -> tuple[Block, ...]:
        return self.blocks or (Block("", self.shape[0], self.split),)


Table = Mapping[str, ParamSpec]


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor as it lies in a rank's local tensor.

    offset: first element in the flattened local tensor, where the box lies contiguous in C order. copies: how many
    tensor ranks hold this box. owner: this rank is the one that writes it and counts it in the gradient norm.
    """

    block: str
    box: Box
    offset: int
    copies: int
    owner: bool

    @property
    def numel(self) -> int:
        return box_numel(self.box)


@dataclass(frozen=True)
class LocalLayout:
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def local_layout(spec: ParamSpec, place: Place = WHOLE) -> LocalLayout:
    """Where the pieces of a logical tensor lie in the local tensor of a rank."""
    pieces: list[Piece] = []
    tail = tuple((0, n) for n in spec.shape[1:])
    local_tail, row, offset, rows = spec.shape[1:], 0, 0, 0
    held = _held_blocks(spec, place)
    for index, block in enumerate(spec.named_blocks()):
        if index not in held:
            row += block.rows
            continue
        for box, copies, owner in _block_boxes(block, row, tail, place.rank, place.size):
            pieces.append(Piece(block.name, box, offset, copies, owner))
            offset += box_numel(box)
            rows += box[0][1] - box[0][0]
            local_tail = box_shape(box)[1:]
        row += block.rows
    padded = -(-rows // spec.pad_rows) * spec.pad_rows
    return LocalLayout((padded, *local_tail), tuple(pieces))


def local_rows(spec: ParamSpec, place: Place) -> dict[str, int]:
    """Rows of each named block in the local tensor of a rank, 0 for those of other ranks' experts; padding is left
    out."""
    rows = dict.fromkeys((block.name for block in spec.named_blocks()), 0)
    for piece in local_layout(spec, place).pieces:
        (start, stop), *_ = piece.box
        rows[piece.block] += stop - start
    return rows


def _held_blocks(spec: ParamSpec, place: Place) -> range:
    """Indices of the blocks that an expert rank holds: all, of a weight that is not made of experts."""
    blocks = len(spec.named_blocks())
    if not spec.experts:
        return range(blocks)
    rank, size = place.expert_rank, place.expert_size
    assert spec.experts % size == 0, f"{spec.experts} experts do not divide over {size} ranks"
    return range(blocks * rank // size, blocks * (rank + 1) // size)


def _block_boxes(block: Block, row: int, tail: Box, rank: int, size: int) -> Iterator[tuple[Box, int, bool]]:
    """The boxes of one block on one rank, one for each run of units with the same holders."""
    whole = ((row, row + block.rows), *tail)
    split = block.split
    if split is None:
        yield whole, size, rank == 0
        return
    low, high = whole[split.axis]
    unit, rest = divmod(high - low, split.units)
    assert rest == 0, f"block {block.name!r}: {split.units} units do not divide {high - low}"
    start, stop = split.bounds(rank, size)
    assert split.axis == 0 or split.units == split.leaders, "only rows can be shared between tensor ranks"
    while start < stop:
        if split.units == split.leaders:
            end, holders = stop, (rank, 1)
        else:
            holders, end = split.holders(start, size), start + 1
            while end < stop and split.holders(end, size) == holders:
                end += 1
        span = (low + start * unit, low + end * unit)
        yield (*whole[: split.axis], span, *whole[split.axis + 1 :]), holders[1], holders[0] == rank
        start = end


def allocate(spec: ParamSpec, device: torch.device | str | None = None, place: Place = WHOLE) -> nn.Parameter:
    """An uninitialised parameter of the local shape."""
    data = torch.empty(local_layout(spec, place).shape, dtype=spec.dtype, device=device)
    return nn.Parameter(data, requires_grad=not spec.frozen)


def allocate_table(
    module: nn.Module, table: Table, device: torch.device | str | None = None, place: Place = WHOLE
) -> None:
    """Registers every parameter of `table` on `module`, this rank's part of it; `a.weight` goes to the submodule
    `a`."""
    for name, spec in table.items():
        *path, leaf = name.split(".")
        owner = module.get_submodule(".".join(path)) if path else module
        owner.register_parameter(leaf, allocate(spec, device, place))


@torch.no_grad()
def initialise(param: Tensor, name: str, spec: ParamSpec, seed: int, place: Place = WHOLE) -> None:
    """Fills a local tensor with the initial values of its pieces, the same in every layout and on every device.

    Values are drawn in chunks of rows of the logical tensor from generators keyed by `(seed, name, chunk)`; a rank
    draws only the chunks that its rows touch. Padding rows are zero.
    """
    layout = local_layout(spec, place)
    flat = torch.zeros(math.prod(layout.shape), dtype=torch.float32)
    for piece in layout.pieces:
        flat[piece.offset : piece.offset + piece.numel] = draw_box(name, spec, piece.box, seed).flatten()
    param.copy_(flat.view(layout.shape))


def draw_box(name: str, spec: ParamSpec, box: Box, seed: int) -> Tensor:
    """Initial values of one box of a logical tensor: float32 of the box's shape."""
    row_numel = math.prod(spec.shape[1:])
    chunk = max(1, INIT_CHUNK_ELEMENTS // row_numel)
    (first, last), *columns = box
    parts = []
    for index in range(first // chunk, -(-last // chunk)):
        start, stop = index * chunk, min((index + 1) * chunk, spec.shape[0])
        generator = torch.Generator().manual_seed(stable_seed(seed, name, index))
        rows = spec.init.draw((stop - start, *spec.shape[1:]), generator)
        rows = rows[max(first, start) - start : min(last, stop) - start]
        parts.append(rows[(slice(None), *(slice(low, high) for low, high in columns))])
    return torch.cat(parts)


def stable_seed(*key: object) -> int:
    """A 63-bit seed that depends on nothing but `key`: the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def count_parameters(table: Table) -> int:
    """Number of logical parameters (padding excluded)."""
    return sum(spec.numel for spec in table.values())


def count_active(table: Table) -> int:
    """Number of those that serve one token."""
    return round(sum(spec.numel * spec.used for spec in table.values()))
