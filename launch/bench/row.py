"""What a benchmark is: two functions that measure the same thing, ours and a peer's, and how to read their numbers."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """One round. value: in the row's unit. facts: plain values that go with it, as the row's `derive` wants them."""

    value: float
    facts: Mapping[str, Any] = {}


Measure = Callable[[bool], Iterator[Reading]]
"""`measure(quick)`: sets up at its first `next`, then yields one reading a round, for ever. It runs in a process of its
own, so it must be a function of a module's top level; what it imports, it imports inside."""


@dataclass(frozen=True)
class Side:
    """One side of a measured row. values: its readings, in the order of the rounds. typical: the round that stands for
    all. facts: those of its reading."""

    values: Sequence[float]
    typical: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.values[self.typical]

    @property
    def spread(self) -> list[float]:
        """[lowest, highest]."""
        return [min(self.values), max(self.values)]


def _nothing_more(ours: Side, peer: Side | None) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """A benchmark.

    measures: one sentence. higher_is_better: False for seconds and bytes. peer_name: what ours is compared with.
    needs: modules that the peer needs. absent: what else of it is missing, in words. note: what a reader must know to
    judge the comparison. derive: further keys of the result, from both sides (the peer's is None where it is not
    installed). warmup: rounds that are thrown away. cuda: it needs a GPU, whose memory holds one side at a time.
    """

    name: str
    measures: str
    ours: Measure
    peer: Measure
    peer_name: str
    unit: str = "tokens/s"
    higher_is_better: bool = True
    needs: tuple[str, ...] = ()
    absent: Callable[[], list[str]] = list
    note: str = ""
    derive: Callable[[Side, Side | None], dict[str, Any]] = _nothing_more
    warmup: int = 1
    cuda: bool = False

    @property
    def missing(self) -> list[str]:
        """What the peer needs and is not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None] + self.absent()

    def ratio(self, ours: float, peer: float) -> float:
        """How many times better ours is: above 1 is better, whichever way the unit points."""
        return ours / peer if self.higher_is_better else peer / ours
