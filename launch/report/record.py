"""What a run has written down, read once and thinned to what a page can draw."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.metrics import read_json_lines

SERIES = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu")
"""Columns of metrics.jsonl that are drawn."""

POINTS = 1200
"""Points of a drawn curve, at most; each stands for equally many steps and keeps their mean, least and greatest."""

MARKED = {
    "resumed": "resumed",
    "update_skipped": "update skipped",
    "spike": "loss spike",
    "rolled_back": "rolled back",
    "stopping": "stopped by a signal",
}
"""Events that are marked on the curves, and what they are called."""

MARKS = 400
"""Marks on a run's curves, at most."""


@dataclass(frozen=True)
class Curves:
    """Rows of metrics.jsonl in groups. steps, tokens: of the last row of each group. mean, low, high: by series, over
    the numbers that are finite; None where there is none. rows: before thinning. lost: rows whose loss is no number."""

    steps: list[int]
    tokens: list[int]
    mean: dict[str, list[float | None]]
    low: dict[str, list[float | None]]
    high: dict[str, list[float | None]]
    rows: int
    lost: int


@dataclass(frozen=True)
class RunRecord:
    """name: shown, unique on the page. recipe: resolved, {} when it is not there. evaluations: of `braid eval`, oldest
    first."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    curves: Curves
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == kind]

    @property
    def last(self) -> dict[str, float | None]:
        """The newest finite value of each series."""
        values = self.curves.mean.items()
        return {name: next((v for v in reversed(series) if v is not None), None) for name, series in values}

    @property
    def status(self) -> str:
        step = self.curves.steps[-1]
        if any(event["step"] == step for event in self.of("finished")):
            return "finished"
        return "stopped" if any(event["step"] == step for event in self.of("stopping")) else "not finished"


def read_run(folder: Path, name: str) -> RunRecord:
    """Raises ValueError when the folder has no metrics, or a file in it is no JSON."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"report: {folder} has no metrics.jsonl, wants a run that has trained at least one step")
    rows = _columns(path)
    if not len(rows["step"]):
        raise ValueError(f"report: {path} has no complete line yet, wants a run that has trained at least one step")
    recipe = folder / "recipe.json"
    evaluations = [_json(path) for path in sorted((folder / "eval").glob("tokens-*.json"))]
    samples = folder / "samples.md"
    return RunRecord(
        name,
        folder,
        _json(recipe) if recipe.is_file() else {},
        thin(rows),
        read_json_lines(folder / "events.jsonl"),
        evaluations,
        samples.read_text(encoding="utf-8", errors="replace") if samples.is_file() else "",
    )


def names(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, with as much of its path as tells it from the others."""
    chosen = [folder.resolve() for folder in folders]
    longest = max(len(folder.parts) for folder in chosen)
    for count in range(1, longest + 1):
        found = ["/".join(folder.parts[-count:]) for folder in chosen]
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"report: got {folders[0]} twice, wants each run once")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path} is no JSON: {error}") from None


def _columns(path: Path) -> dict[str, np.ndarray]:
    """The drawn columns, one float64 array each, read line by line; an unfinished last line is left out."""
    columns: dict[str, list[float]] = {name: [] for name in ("step", "tokens", *SERIES)}
    for number, line in enumerate(_complete_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"report: {path}: line {number} is no JSON") from None
        for name, column in columns.items():
            value = row.get(name)
            column.append(np.nan if value is None else value)
    return {name: np.array(column, dtype=np.float64) for name, column in columns.items()}


def _complete_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def thin(rows: dict[str, np.ndarray], points: int = POINTS) -> Curves:
    """Groups of equally many rows, `points` of them at most."""
    count = len(rows["step"])
    edges = np.unique(np.linspace(0, count, min(count, points) + 1).round().astype(int))
    starts, ends = edges[:-1], edges[1:] - 1
    mean, low, high = ({name: _listed(values) for name, values in part.items()} for part in _groups(rows, starts))
    return Curves(
        steps=rows["step"][ends].astype(int).tolist(),
        tokens=rows["tokens"][ends].astype(int).tolist(),
        mean=mean,
        low=low,
        high=high,
        rows=count,
        lost=int((~np.isfinite(rows["loss"])).sum()),
    )


def _groups(rows: dict[str, np.ndarray], starts: np.ndarray) -> tuple[dict[str, np.ndarray], ...]:
    """Mean, least and greatest finite value of each group of each series; NaN where a group has none."""
    mean, low, high = {}, {}, {}
    for name in SERIES:
        values = rows[name]
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite.astype(int), starts)
        sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
        mean[name] = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
        empty = counts == 0
        low[name] = np.where(empty, np.nan, np.minimum.reduceat(np.where(finite, values, np.inf), starts))
        high[name] = np.where(empty, np.nan, np.maximum.reduceat(np.where(finite, values, -np.inf), starts))
    return mean, low, high


def _listed(values: np.ndarray) -> list[float | None]:
    """With seven digits, which no eye tells from all of them; None for NaN."""
    return [None if np.isnan(value) else float(f"{value:.7g}") for value in values]


def marks(record: RunRecord) -> list[dict[str, Any]]:
    """Events to mark: step and label, thinned evenly when there are too many."""
    found = [event for event in record.events if event.get("event") in MARKED and "step" in event]
    keep = found[:: max(1, -(-len(found) // MARKS))]
    return [{"step": event["step"], "label": MARKED[event["event"]]} for event in keep]
