"""Measures a row: both sides alive at once, each in a fresh process of the same environment, asked in turn.

A round is one reading of ours, then one of the peer's, while the other process waits; so what else the machine does
meets both, and the ratio is steadier than either number. On a GPU, whose memory may not hold both models and which
nobody shares, one side runs after the other, and a side that several rows have is measured once.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import IO, Any

from launch.bench.row import Measure, Reading, Row, Side
from launch.local import rank_environment

Say = Callable[[str], None]

OURS = "ours"
END_S = 20.0
"""How long a side may take to end."""


class SideFailed(RuntimeError):
    """One side raised an error or died; the message says which and why."""


def environment() -> dict[str, str]:
    """What both sides run in: that of a training rank, allocator settings included, without the Hugging Face hub."""
    return rank_environment(os.environ, 1) | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Worker:
    """One side in its process. name: for messages."""

    name: str
    process: subprocess.Popen[str]
    stderr: IO[str]

    def reading(self) -> Reading:
        """One more reading. Raises SideFailed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideFailed(f"{self.name}: died with exit code {self.process.wait()}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        return Reading(float(answer["value"]), answer["facts"])

    def _last_words(self) -> str:
        self.stderr.seek(0)
        said = [line.strip() for line in self.stderr if line.strip()]
        return f" ({said[-1]})" if said else ""


@contextmanager
def started(name: str, measure: Measure, quick: bool, variables: Mapping[str, str]) -> Iterator[Worker]:
    """The worker of one side, ended with the context: gently, or at once after an error."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "launch.bench.worker",
                f"{measure.__module__}:{measure.__qualname__}",
                *(["quick"] if quick else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BRAID_DEBUG", "") not in ("", "0") else stderr,
            env=dict(variables),
            text=True,
        )
        try:
            yield Worker(name, process, stderr)
        except BaseException:
            process.kill()
            raise
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Closes the worker's stdin and waits for its end."""
    try:
        process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Result:
    """A measured row. peer: None where it is not installed."""

    row: Row
    ours: Side
    peer: Side | None

    @property
    def ratio(self) -> float | None:
        """That of the typical round."""
        return None if self.peer is None else self.row.ratio(self.ours.value, self.peer.value)

    @property
    def ratios(self) -> list[float] | None:
        """[lowest, highest] ratio within a round."""
        if self.peer is None:
            return None
        pairs = [self.row.ratio(*pair) for pair in zip(self.ours.values, self.peer.values, strict=True)]
        return [min(pairs), max(pairs)]

    def to_dict(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """The row as `braid bench --json` prints it."""
        row, peer = self.row, self.peer
        return {
            "name": row.name,
            "ours": self.ours.value,
            "peer": None if peer is None else peer.value,
            "peer_name": row.peer_name if peer is not None else f"{row.peer_name} (not installed)",
            "unit": row.unit,
            "ratio": self.ratio,
            "higher_is_better": row.higher_is_better,
            "rounds": len(self.ours.values),
            "spread": {
                "ours": self.ours.spread,
                "peer": None if peer is None else peer.spread,
                "ratio": self.ratios,
            },
            **row.derive(self.ours, peer),
            "measures": row.measures,
            "note": row.note,
            "machine": dict(machine),
        }


def measure(row: Row, rounds: int, quick: bool, say: Say, known: dict[Measure, list[Reading]] | None = None) -> Result:
    """Both sides of a row, or ours alone where the peer is not installed. Raises SideFailed.

    rounds: readings of each side that count. quick: what the sides make of it is theirs. say: hears of progress. known:
    readings of sides on a GPU, of the rows before, to which this row's are added.
    """
    known = {} if known is None else known
    sides = {OURS: row.ours} | ({} if row.missing else {row.peer_name: row.peer})
    if not row.cuda:
        return _result(row, _turns(row, sides, rounds, quick, say))
    for name, side in sides.items():
        if side not in known:
            known[side] = _turns(row, {name: side}, rounds, quick, say)[name]
    return _result(row, {name: known[side] for name, side in sides.items()})


def _turns(row: Row, sides: Mapping[str, Measure], rounds: int, quick: bool, say: Say) -> dict[str, list[Reading]]:
    """`rounds` readings of each side, in turn."""
    variables = environment()
    readings: dict[str, list[Reading]] = {}
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name, function in sides.items():
            say(f"{row.name}: {name}: setting up and warming up")
            worker = stack.enter_context(started(name, function, quick, variables))
            for _ in range(row.warmup):
                worker.reading()
            workers.append(worker)
            readings[name] = []
        for number in range(rounds):
            for worker in workers:
                readings[worker.name].append(worker.reading())
            values = ", ".join(f"{name} {taken[-1].value:,.4g}" for name, taken in readings.items())
            say(f"{row.name}: round {number + 1} of {rounds}: {values} {row.unit}")
    return readings


def _result(row: Row, readings: Mapping[str, Sequence[Reading]]) -> Result:
    """The typical round is the one whose ratio is the median: on a busy machine the medians of the sides may come from
    different moments, and their quotient from none."""
    values = {name: [reading.value for reading in taken] for name, taken in readings.items()}
    scores = [row.ratio(*pair) for pair in zip(*values.values(), strict=True)] if len(values) > 1 else values[OURS]
    typical = scores.index(median_low(scores))
    sides = {name: Side(values[name], typical, taken[typical].facts) for name, taken in readings.items()}
    return Result(row, sides[OURS], sides.get(row.peer_name))
