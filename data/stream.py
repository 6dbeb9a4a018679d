"""Batches of a mixture, dealt to ranks; where it stands is one integer.

    stream = BatchStream(mixture, rows_per_step=8, micro_rows=2, rank=0, size=2)
    batches = stream.next_step()          # this rank's share of the next global batch

A global batch is `rows_per_step` rows in sample order. Each rank takes a contiguous share, so any number of ranks reads
the same global batch.

Legend: b rows of a micro-batch, T sequence length.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import DataError
from data.mixture import IGNORE, Mixture, Sample

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    tokens: (b, T) int64. targets: (b, T) int64, IGNORE where there is nothing to predict. starts: (b, T) bool, where
    documents begin. samples: (b,) int64, global sample index of each row.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor
    samples: Tensor

    @property
    def valid(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets != IGNORE).sum())


def collate(samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
    """Rows to a batch. indices: global sample index of each row."""
    tokens, targets, starts = (torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))
    return Batch(tokens, targets, starts, torch.tensor(indices, dtype=torch.int64))


class BatchStream:
    """An endless stream of global batches, as one rank sees it.

    rows_per_step: rows of a global batch, a multiple of `size`. micro_rows: rows of a micro-batch, at most.
    """

    def __init__(self, mixture: Mixture, *, rows_per_step: int, micro_rows: int, rank: int = 0, size: int = 1) -> None:
        if rows_per_step <= 0 or rows_per_step % size:
            raise DataError(f"rows_per_step: got {rows_per_step}, wants a positive multiple of the {size} ranks")
        if micro_rows <= 0:
            raise DataError(f"micro_rows: got {micro_rows}, wants a positive number of rows")
        assert 0 <= rank < size
        self.mixture, self.rows_per_step, self.micro_rows = mixture, rows_per_step, micro_rows
        self.rank, self.size = rank, size
        self.sample = 0
        self._skipped: list[tuple[int, int]] = []

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch: the same number on every rank."""
        indices, self.sample = self._next_indices()
        share = self.rows_per_step // self.size
        mine = indices[self.rank * share : (self.rank + 1) * share]
        groups = [mine[start : start + self.micro_rows] for start in range(0, share, self.micro_rows)]
        return [collate([self.mixture.sample(index) for index in group], group) for group in groups]

    def skip(self, start: int, stop: int) -> None:
        """Leaves out samples [start, stop) from now on (a range that spoiled the training, say)."""
        if not 0 <= start < stop:
            raise DataError(f"skip: got samples {start} to {stop}, wants 0 <= start < stop")
        self._skipped = sorted([*self._skipped, (start, stop)])

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the same on every rank."""
        return {
            "sample": self.sample,
            "phase": self.mixture.phase,
            "skipped": [list(span) for span in self._skipped],
            "fingerprint": self.mixture.fingerprint,
            "mixture": self.mixture.describe(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, on any number of ranks. Raises DataError when it is of another order."""
        if state["fingerprint"] != self.mixture.fingerprint:
            raise DataError(_difference(state["mixture"], self.mixture.describe()))
        self.sample = int(state["sample"])
        self._skipped = [(int(start), int(stop)) for start, stop in state["skipped"]]

    def _next_indices(self) -> tuple[list[int], int]:
        indices: list[int] = []
        at = self.sample
        while len(indices) < self.rows_per_step:
            stop = next((stop for start, stop in self._skipped if start <= at < stop), None)
            if stop is None:
                indices.append(at)
                at += 1
            else:
                at = stop
        return indices, at


def _difference(saved: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in ("sequence_length", "seed", "phase"):
        if saved[key] != ours[key]:
            return f"{key}: got {ours[key]}, but the run was saved with {saved[key]}; the order of data would change"
    return (
        f"data: the run was trained on {_named(saved)}, this is {_named(ours)}; "
        "wants the same data (it may lie elsewhere) with the same weights"
    )


def _named(mixture: dict[str, Any]) -> str:
    sources = mixture["sources"]
    return " + ".join(f"{s['folder']} (fingerprint {s['data'][:12]}, weight {s['weight']:g})" for s in sources)


def row_digests(batches: Sequence[Batch]) -> list[bytes]:
    """One digest of the token ids of every row, in the order of the rows."""
    rows = (row for batch in batches for row in batch.tokens.cpu().numpy().astype("<i8"))
    return [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest() for row in rows]


def combine(digests: Sequence[bytes]) -> str:
    """The hash of a global batch from all its rows' digests in sample order (ranks in order), in hexadecimal."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[: 2 * DIGEST_BYTES]
