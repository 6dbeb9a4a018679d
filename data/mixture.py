"""The order of data as a pure function: `(seed, epoch, mixture, global sample index) -> tokens`.

    mixture = Mixture([WeightedShards(web, 3.0), WeightedShards(code, 1.0)], sequence_length=4096, seed=0)
    sample = mixture.sample(123_456_789)

Per epoch of a source its documents are permuted, joined and cut into rows of T inputs, row r predicting tokens
r*T + 1 to r*T + T of the joined documents; the rows are permuted too. So an epoch predicts each token once (the first
of a document excepted: nothing precedes it). Sources take turns by a rule that keeps every prefix of the order within
a few rows of the weights.

Legend: T sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data.files import DataError, fingerprint_of
from data.permutation import Shuffle, key_of, permutation
from data.shards import ShardSet

IGNORE = -100
"""The target where there is nothing to predict."""

WEIGHT_UNITS = 1 << 32
CACHED_EPOCHS = 8


class Sample(NamedTuple):
    """tokens: (T,) int64. targets: (T,) int64, IGNORE at a document's last token and at padding. starts: (T,) bool,
    True where a document begins; padding is a document of its own."""

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class WeightedShards:
    """weight: share of the rows that come from here, relative to the other sources'."""

    shards: ShardSet
    weight: float


class Rows:
    """Documents of a shard set, joined in a given order and cut into rows; the last row is padded.

    order: document numbers, each at most once, (D,) int64.
    """

    def __init__(self, shards: ShardSet, order: np.ndarray, sequence_length: int) -> None:
        self._shards, self._order, self._length = shards, order, sequence_length
        self._ends = np.cumsum(shards.lengths[order])
        self.tokens = int(self._ends[-1]) if len(order) else 0
        self.count = -(-max(self.tokens - 1, 0) // sequence_length)

    def row(self, number: int) -> Sample:
        assert 0 <= number < self.count
        T = self._length
        begin = number * T
        ids, starts = self._window(begin, min(begin + T + 1, self.tokens))
        inputs = min(len(ids), T)
        tokens = np.full(T, self._shards.pad, dtype=np.int64)
        targets = np.full(T, IGNORE, dtype=np.int64)
        begins = np.zeros(T, dtype=bool)
        tokens[:inputs], begins[:inputs] = ids[:inputs], starts[:inputs]
        predicted = len(ids) - 1
        targets[:predicted] = np.where(starts[1:], IGNORE, ids[1:])
        if inputs < T:
            begins[inputs] = True
        return Sample(tokens, targets, begins)

    def _window(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) of the joined documents and where among them documents begin."""
        ids, starts = np.empty(end - begin, dtype=np.int64), np.zeros(end - begin, dtype=bool)
        place = int(np.searchsorted(self._ends, begin, side="right"))
        at = begin
        while at < end:
            document = int(self._order[place])
            first = int(self._ends[place]) - int(self._shards.lengths[document])
            part = self._shards.tokens(document, at - first, end - first)
            ids[at - begin : at - begin + len(part)] = part
            starts[at - begin] |= at == first
            at, place = at + len(part), place + 1
        return ids, starts


class Turns:
    """Which of several weighted sources a sample comes from, and the how-manieth of that source it is.

    The first source takes sample i of n when round(i * w) rises there; the others share the rest by the same rule. All
    in integers, so that any index is answered exactly and at once.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        self._units = [max(1, round(weight / total * WEIGHT_UNITS)) for weight in weights]

    def locate(self, index: int) -> tuple[int, int]:
        rest = sum(self._units)
        for source, units in enumerate(self._units):
            before, after = _rounded(index, units, rest), _rounded(index + 1, units, rest)
            if after > before:
                return source, before
            index, rest = index - before, rest - units
        raise AssertionError("the last source takes what is left")


def _rounded(count: int, units: int, of: int) -> int:
    return (2 * count * units + of) // (2 * of)


class Mixture:
    """The order of one phase of training.

    sources: weighted shard sets made by the same tokenizer. phase: number of the phase; another phase draws another
    order. Raises DataError for weights that are not positive, different tokenizers and rows longer than a source.
    """

    def __init__(self, sources: Sequence[WeightedShards], *, sequence_length: int, seed: int, phase: int = 0) -> None:
        _check(sources, sequence_length)
        self.sources, self.sequence_length, self.seed, self.phase = tuple(sources), sequence_length, seed, phase
        self._turns = Turns([source.weight for source in sources])
        self._rows = [-(-(source.shards.total_tokens - 1) // sequence_length) for source in sources]
        self._epoch = lru_cache(CACHED_EPOCHS)(self._build_epoch)

    def sample(self, index: int) -> Sample:
        """The row with global index `index`, from 0 without end."""
        source, epoch, row = self.locate(index)
        rows, shuffle = self._epoch(source, epoch)
        return rows.row(shuffle(row))

    def locate(self, index: int) -> tuple[int, int, int]:
        """(source, epoch of that source, row within the epoch, before rows are permuted)."""
        source, count = self._turns.locate(index)
        return source, *divmod(count, self._rows[source])

    def rows_per_epoch(self, source: int) -> int:
        return self._rows[source]

    def describe(self) -> dict[str, Any]:
        """What decides the order, as plain values; folders are only for people to read."""
        return {
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "phase": self.phase,
            "sources": [
                {"folder": str(source.shards.folder), "data": source.shards.fingerprint, "weight": source.weight}
                for source in self.sources
            ],
        }

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders, wherever the data lies."""
        description = self.describe()
        for source in description["sources"]:
            del source["folder"]
        return fingerprint_of(description)

    def _build_epoch(self, source: int, epoch: int) -> tuple[Rows, Shuffle]:
        shards = self.sources[source].shards
        key = (self.seed, self.phase, shards.fingerprint, epoch)
        order = permutation(shards.documents, key_of("documents", *key))
        return Rows(shards, order, self.sequence_length), Shuffle(self._rows[source], key_of("rows", *key))


def _check(sources: Sequence[WeightedShards], sequence_length: int) -> None:
    if not sources:
        raise DataError("data: got no source, wants at least one")
    if sequence_length <= 0:
        raise DataError(f"sequence_length: got {sequence_length}, wants a positive number of tokens")
    first = sources[0].shards
    for source in sources:
        shards = source.shards
        if not 0 < source.weight < float("inf"):
            raise DataError(f"weight: got {source.weight} for {shards.folder}, wants a positive number")
        if shards.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            names = f"{first.folder} and {shards.folder}"
            raise DataError(f"data: {names} were made by different tokenizers, wants one for all sources")
        if shards.total_tokens <= sequence_length:
            raise DataError(
                f"sequence_length: got {sequence_length}, longer than the {shards.total_tokens:,} tokens of "
                f"{shards.folder} ({shards.split}); wants at most {shards.total_tokens - 1}, or more data"
            )
