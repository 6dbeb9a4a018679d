"""What a layer is told besides its input: documents, positions, clock, noise and the collectives of the mesh.

Legend: B batch rows, T tokens in a row, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.ops.attention import document_bounds
from model.params import WHOLE, Place, stable_seed


def chunk_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Tokens `[start, stop)` of a row of `length` that rank `rank` of `size` has."""
    return length * rank // size, length * (rank + 1) // size


@dataclass(frozen=True)
class Documents:
    """Where packed documents begin.

    starts: (B, T) bool, True at the first token of a document. index: (B, T) int32, how many documents have begun in
    the row up to and including the token; tokens with equal index belong together, and index 0 continues what the
    carried state holds. positions: (B, T) int64, distance from the document's first token.
    """

    starts: Tensor
    index: Tensor
    positions: Tensor
    single: bool
    """No document begins inside a row (a start at its first token aside): kernels may take their simpler path."""

    @cached_property
    def bounds(self) -> Tensor:
        """Where documents begin, and the end, over the flattened rows (`document_bounds`): found once for all layers,
        because the host waits for the device."""
        return document_bounds(self.index)

    def chunk(self, rank: int, size: int) -> "Documents":
        """The documents in one of the chunks that `chunk_bounds` cuts rows into: positions as in the whole row, index 0
        for what goes on from the chunk before."""
        if size == 1:
            return self
        low, high = chunk_bounds(self.starts.shape[1], rank, size)
        starts = self.starts[:, low:high]
        index = starts.cumsum(1, dtype=torch.int32)
        return Documents(starts, index, self.positions[:, low:high], not bool(starts[:, 1:].any()))

    @staticmethod
    def from_starts(starts: Tensor, position: Tensor | None = None) -> "Documents":
        """starts: (B, T) bool. position: (B,) int64, the position that the first token has if it starts nothing."""
        T = starts.shape[1]
        index = starts.cumsum(1, dtype=torch.int32)
        steps = torch.arange(T, device=starts.device).expand_as(starts)
        last_start = torch.where(starts, steps, -1).cummax(1).values
        offset = torch.zeros_like(steps[:, :1]) if position is None else position[:, None]
        positions = torch.where(last_start >= 0, steps - last_start, steps + offset)
        return Documents(starts, index, positions, not bool(starts[:, 1:].any()))


@dataclass(frozen=True)
class NoiseKey:
    """Randomness of a step as a pure function of (seed, step, layer, global sample, position).

    samples: (B,) int64 on the CPU, the global index of each row, so that noise does not depend on how rows are dealt to
    ranks.
    """

    seed: int
    step: int
    samples: Tensor | None = None

    def uniform(self, layer: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform float32 noise in [0, 1) of shape (B, *shape) on the CPU, drawn row by row."""
        assert self.samples is not None, "noise needs the global sample index of each row"
        rows = []
        for sample in self.samples.tolist():
            generator = torch.Generator().manual_seed(stable_seed(self.seed, self.step, layer, sample, name))
            rows.append(torch.rand(shape, generator=generator))
        return torch.stack(rows)


class Collectives(Protocol):
    """What the stack and its layers may ask of the other ranks. `model/` names the operations; the mesh in `train/`
    provides them.

    Tensor ranks share the weights of a layer. Between layers each of them has its own run of the tokens (sequence
    parallelism); a layer sees all tokens and its outputs on the ranks are parts of a sum. So every gradient of a weight
    is a part of a sum over the ranks that hold it. Context ranks share the tokens of a row: a layer sees the row's
    chunk of its rank and asks for what lies to the left of it.
    """

    place: Place
    """This rank's part of the weights."""
    context_rank: int
    context_size: int

    def enter(self, x: Tensor, length: int) -> Tensor:
        """Into a layer: (B, own tokens, ...) -> (B, length, ...), the tokens of all tensor ranks."""
        ...

    def leave(self, y: Tensor) -> Tensor:
        """Out of a layer: (B, T, ...), a part of a sum -> (B, own tokens, ...), the sum over tensor ranks."""
        ...

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        """Inside a layer: the sum over the tensor ranks, for all of them; so is its gradient."""
        ...

    def gather_over_tensor(self, x: Tensor) -> Tensor:
        """(...) -> (tensor ranks, ...), without a gradient."""
        ...

    def halo(self, x: Tensor, tokens: int, row: int) -> Tensor:
        """(B, T, ...) of this rank's chunk of rows of length `row` -> (B, tokens, ...), what the row has before it;
        zeros where it has nothing."""
        ...

    def prefix(self, decay: Tensor, state: Tensor) -> Tensor:
        """The state that enters this rank's chunk: S, after S <- decay S + state, from zero, over the chunks to the
        left. decay, state: of one dtype, those of this rank's chunk; decay broadcasts against state."""
        ...

    def gather_over_context(self, x: Tensor) -> Tensor:
        """(...) -> (context ranks, ...)."""
        ...

    def at_experts(self, x: Tensor, counts: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`run(x, counts)` where the experts are. x: (n, D), rows sorted by expert. counts: (E,) int64, rows of each;
        what they leave over of n belongs to none and gives zeros. run: takes the rows of all ranks for the experts of
        this one, sorted by expert, then by sender, and the counts of those experts; returns a row for each row."""
        ...


class SingleProcess:
    """The collectives of one process: nothing to do."""

    place: Place = WHOLE
    context_rank, context_size = 0, 1

    def enter(self, x: Tensor, length: int) -> Tensor:
        return x

    def leave(self, y: Tensor) -> Tensor:
        return y

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        return x

    def gather_over_tensor(self, x: Tensor) -> Tensor:
        return x[None]

    def halo(self, x: Tensor, tokens: int, row: int) -> Tensor:
        return x.new_zeros(x.shape[0], tokens, *x.shape[2:])

    def prefix(self, decay: Tensor, state: Tensor) -> Tensor:
        return torch.zeros_like(state)

    def gather_over_context(self, x: Tensor) -> Tensor:
        return x[None]

    def at_experts(self, x: Tensor, counts: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return run(x, counts)


@dataclass(frozen=True)
class Context:
    """Everything a layer may read besides `x` and its own state.

    documents: boundaries and positions. dtype: compute dtype of matmuls and convolutions. tokens: the token clock at
    the start of the step. layer: index of the layer in the stack, parallel branches counted one by one. noise: key of
    the step's randomness. embedding: (B, T, D), the embedding's output, for kinds that read it (of tensor ranks, each
    its own tokens, as between layers). mesh: the collectives. row: length of the whole row, of which a context rank has
    a chunk. carry: the caller wants the state after the last token.
    """

    documents: Documents
    dtype: torch.dtype = torch.float32
    tokens: int = 0
    layer: int = 0
    noise: NoiseKey | None = None
    embedding: Tensor | None = None
    mesh: Collectives = field(default_factory=SingleProcess)
    row: int = 0
    carry: bool = False

    def at(self, layer: int) -> "Context":
        return replace(self, layer=layer)

    def enter(self, x: Tensor) -> Tensor:
        """Into a layer, see `Collectives`."""
        return self.mesh.enter(x, self.documents.starts.shape[1])

    @property
    def spread(self) -> bool:
        """The tokens of a row lie on several context ranks."""
        return self.mesh.context_size > 1

    def before(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """What a context rank's chunk has to its left, as the state of a layer has it: the last `tokens` of x (B, T,
        ...) before the chunk, (B, L, ...), and how many of them belong to the document that goes on, (B,). L is
        `tokens`, or all that the row has there if that is less."""
        size = self.mesh.context_size
        first, most = (chunk_bounds(self.row, rank, size)[0] for rank in (self.mesh.context_rank, size - 1))
        tokens = min(tokens, most)  # the same on all ranks, which tell each other as much
        slots = min(tokens, first)
        left = self.mesh.halo(x, tokens, self.row)[:, tokens - slots :]
        return left, self.documents.positions[:, 0].clamp(max=slots)


class LayerOutput(NamedTuple):
    """What a layer returns. A named tuple, because ZeRO-3's hooks find tensors in tuples but not in dataclasses.

    y: (B, T, D). state: after the last token when `ctx.carry`, else None; a tuple of tensors. losses: scalars, summed
    over the row's valid tokens, to be added to the training loss with their weight already applied. metrics: detached
    scalars. counts: float64 vectors or scalars, detached, that add up over micro-batches and ranks; after the optimizer
    step the layer's `adjust`, if it has one, is told their sums.
    """

    y: Tensor
    state: Any = None
    losses: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None
    counts: dict[str, Tensor] | None = None
