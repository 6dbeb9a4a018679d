"""Random packed rows for benchmarks, with the shape of real data: pieces by Zipf's law, documents by a log-normal.

Legend: T tokens per row.
"""

import numpy as np

from data.mixture import IGNORE, Sample
from data.stream import Batch, collate

DOCUMENT_LOG_MEAN, DOCUMENT_LOG_SPREAD = 7.5, 1.4
"""Of document lengths in tokens: a mean of 4,800 and a median of 1,800, as in the quickstart's corpus."""
ZIPF_SHIFT = 2.7


class PackedRows:
    """An endless stream of batches, the same for the same seed.

    vocab_size: of the tokens. length: T. rows: of a micro-batch. micro_batches: of a step. pool: number of different
    rows; after those the first comes again.
    """

    def __init__(
        self, vocab_size: int, length: int, rows: int, micro_batches: int = 1, *, pool: int = 64, seed: int = 0
    ) -> None:
        generator = np.random.default_rng(seed)
        weights = 1 / (np.arange(vocab_size) + ZIPF_SHIFT)
        size = pool * length
        tokens = generator.choice(vocab_size, size + 1, p=weights / weights.sum())
        starts = np.zeros(size + 1, dtype=bool)
        at = 0
        while at <= size:
            starts[at] = True
            at += max(1, round(generator.lognormal(DOCUMENT_LOG_MEAN, DOCUMENT_LOG_SPREAD)))
        targets = np.where(starts[1:], IGNORE, tokens[1:])
        columns = (column.reshape(pool, length) for column in (tokens[:-1], targets, starts[:-1]))
        self.samples = [Sample(*row) for row in zip(*columns, strict=True)]
        self.rows, self.micro_batches, self.at = rows, micro_batches, 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        return [self._batch() for _ in range(self.micro_batches)]

    def _batch(self) -> Batch:
        indices = [(self.at + row) % len(self.samples) for row in range(self.rows)]
        self.at += self.rows
        return collate([self.samples[index] for index in indices], indices)
