"""Measures a row: both sides alive at once, each in a fresh process of the same environment, asked in turn.

A round is one reading of ours, then one of the peer's, while the other process waits; so what else the machine does
meets both, and the ratio is steadier than either number.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

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


class Worker:
    """One side in its process. name: for messages."""

    def __init__(self, name: str, measure: Measure, quick: bool, variables: Mapping[str, str]) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        reference = f"{measure.__module__}:{measure.__qualname__}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.bench.worker", reference, *(["quick"] if quick else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BRAID_DEBUG", "") not in ("", "0") else self._stderr,
            env=dict(variables),
            text=True,
        )

    def reading(self) -> Reading:
        """One more reading. Raises SideFailed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideFailed(f"{self.name}: died with exit code {self._process.wait()}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        return Reading(float(answer["value"]), answer["facts"])

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({said})" if said else ""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._stderr.close()


@dataclass(frozen=True)
class Result:
    """A measured row. peer: None where it is not installed."""

    row: Row
    ours: Side
    peer: Side | None

    @property
    def ratio(self) -> float | None:
        """That of the medians."""
        return None if self.peer is None else self.row.ratio(self.ours.median, self.peer.median)

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
            "ours": self.ours.median,
            "peer": None if peer is None else peer.median,
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


def measure(row: Row, rounds: int, quick: bool, say: Say) -> Result:
    """Both sides of a row, or ours alone where the peer is not installed. Raises SideFailed.

    rounds: readings of each side that count. quick: what the sides make of it is theirs. say: hears of progress.
    """
    variables = environment()
    readings: dict[str, list[Reading]] = {}
    with ExitStack() as stack:
        sides = {OURS: row.ours} | ({} if row.missing else {row.peer_name: row.peer})
        workers: list[Worker] = []
        for name, function in sides.items():
            say(f"{row.name}: {name}: setting up and warming up")
            worker = stack.enter_context(Worker(name, function, quick, variables))
            for _ in range(row.warmup):
                worker.reading()
            workers.append(worker)
            readings[name] = []
        for number in range(rounds):
            for worker in workers:
                readings[worker.name].append(worker.reading())
            values = ", ".join(f"{name} {taken[-1].value:,.4g}" for name, taken in readings.items())
            say(f"{row.name}: round {number + 1} of {rounds}: {values} {row.unit}")
    measured = {name: Side([r.value for r in taken], taken[-1].facts) for name, taken in readings.items()}
    return Result(row, measured[OURS], measured.get(row.peer_name))
