"""The health of an update: gradient norm, clipping, and the refusal of updates that are not finite.

The norm is read from the gradient fragments that ranks own, with the table's multiplicities: of a logical weight each
element counts once, however it is cut, copied or padded.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.params import Table, local_layout
from train.parallel import Mesh

CHUNK_ELEMENTS = 1 << 15
"""Elements whose norm is taken in float32: few enough that rounding stays below 1e-6 of the whole."""


class TrainingHealthError(RuntimeError):
    """Training cannot go on: updates stay non-finite."""


class GradientFragment(NamedTuple):
    """Elements `[start, stop)` of the flattened local gradient of a parameter, owned by this rank."""

    name: str
    start: int
    stop: int
    value: Tensor


class HasGradients(Protocol):
    def gradients(self) -> Iterable[GradientFragment]: ...


def clip_coefficient(norm: float, limit: float) -> float:
    """What to multiply gradients by so that their norm is at most `limit`; 0 or less switches clipping off."""
    return limit / norm if 0 < limit < norm else 1.0


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares of a flat tensor: float32 over chunks, float64 over their norms; a float64 scalar."""
    whole = values.numel() // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    parts = values[:whole].view(-1, CHUNK_ELEMENTS), values[whole:].view(1, -1)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts if part.numel()]
    if not norms:
        return values.new_zeros((), dtype=torch.float64)
    return torch.cat(norms).double().square().sum()


class Health:
    """Watches the updates of a run.

    table: of the model. mesh: of the run. max_skipped: this many skipped updates in a row end the run.
    """

    def __init__(self, table: Table, mesh: Mesh, *, max_skipped: int) -> None:
        self.mesh, self.max_skipped, self.skipped = mesh, max_skipped, 0
        self.index = {name: number for number, name in enumerate(table)}
        self.counted = {
            name: joined(
                (piece.offset, piece.offset + piece.numel)
                for piece in local_layout(spec, mesh.place).pieces
                if piece.owner
            )
            for name, spec in table.items()
        }

    def norm(self, engine: HasGradients) -> float:
        """The global gradient norm: the same number on every rank, and in every layout up to rounding."""
        rows, squares = [], []
        for name, part in self._counted_parts(engine.gradients()):
            rows.append(self.index[name])
            squares.append(sum_of_squares(part))
        totals = torch.zeros(len(self.index), dtype=torch.float64, device=self.mesh.device)
        if rows:
            totals.index_add_(0, torch.tensor(rows, device=self.mesh.device), torch.stack(squares).to(totals.device))
        return math.sqrt(value) if (value := self.mesh.sum_(totals).sum().item()) >= 0 else math.nan

    def _counted_parts(self, gradients: Iterable[GradientFragment]) -> Iterator[tuple[str, Tensor]]:
        for name, start, stop, value in gradients:
            for low, high in self.counted[name]:
                first, last = max(start, low), min(stop, high)
                if first < last:
                    yield name, value[first - start : last - start]

    def admit(self, norm: float, step: int) -> bool:
        """Whether the update of `step` may be applied.

        Raises TrainingHealthError after `max_skipped` refusals in a row.
        """
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= self.max_skipped:
            raise TrainingHealthError(
                f"step {step}: gradient norm is {norm}, and {self.skipped} updates in a row were skipped; "
                "a lower learning rate, more warm-up or the data of these steps is where to look"
            )
        return False


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers, in fewer spans where one begins at the end of the one before."""
    fewer: list[tuple[int, int]] = []
    for start, stop in spans:
        if fewer and fewer[-1][1] == start:
            start = fewer.pop()[0]
        fewer.append((start, stop))
    return fewer
