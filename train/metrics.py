"""The run's record: `metrics.jsonl`, `events.jsonl`, the progress bar and Weights & Biases.

A line of `metrics.jsonl` is one step. A resumed run drops the lines of steps that it is about to take again, so that
the file is always the record of one uninterrupted curve; what happened to the run on the way is in `events.jsonl`.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO
from uuid import uuid4

from tqdm import tqdm

from data.files import write_durably


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one line in one write, so that a kill leaves at most an unfinished last line. Numbers that are not finite
    become null: JSON has no others."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; an unfinished last one (the writer was killed) is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrites the file with the complete lines that `keep` takes; returns how many it dropped."""
    records = read_json_lines(path)
    kept = [record for record in records if keep(record)]
    write_durably(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return len(records) - len(kept)


class LogLines:
    """A progress bar's file that ends each of its states with a newline: srun and pagers wait for the end of a line."""

    encoding = "utf-8"

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.file.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.file.flush()


class Metrics:
    """Writes what a step measured. Ranks other than 0 hold a silent one (`folder=None`).

    folder: the run folder. total_tokens: length of the run. done_tokens, step: where it begins or resumes. wandb: an
    open Weights & Biases run, or None.
    """

    def __init__(
        self, folder: Path | None, *, total_tokens: int, done_tokens: int, step: int, wandb: Any = None
    ) -> None:
        self.folder, self.wandb = folder, wandb
        self.total_tokens, self.done_tokens = total_tokens, done_tokens
        self.bar: tqdm | None = None
        if folder is not None:
            keep_lines(folder / "events.jsonl", lambda record: True)
            dropped = keep_lines(folder / "metrics.jsonl", lambda record: record["step"] <= step)
            if dropped:
                self.event("metrics_dropped", step=step, lines=dropped)

    def step(self, record: dict[str, Any]) -> None:
        """One training step."""
        if self.folder is None:
            return
        append_json_line(self.folder / "metrics.jsonl", record)
        self.bar = self.bar or self._open_bar()
        shown = {"loss": f"{record['loss']:.3f}", "tok/s": f"{record['tokens_per_s']:,.0f}"}
        self.bar.set_postfix(shown | {"MFU": f"{record['mfu']:.1%}"}, refresh=False)
        self.bar.update(record["tokens"] - self.bar.n)
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])

    def rewind(self, step: int, tokens: int) -> None:
        """The run goes back to `step`: later lines are dropped, as a resumed run drops them."""
        if self.folder is not None:
            dropped = keep_lines(self.folder / "metrics.jsonl", lambda record: record["step"] <= step)
            self.event("metrics_dropped", step=step, lines=dropped)
            self.close_bar()
            self.done_tokens = tokens

    def close_bar(self) -> None:
        """The steps are done; what is said from here on stands below the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _open_bar(self) -> tqdm:
        """On a terminal it moves twice a second; in a log file a line is written every ten seconds."""
        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else 10.0
        return tqdm(
            file=sys.stderr if terminal else LogLines(sys.stderr),
            total=self.total_tokens,
            initial=self.done_tokens,
            unit="tok",
            unit_scale=True,
            smoothing=0.05,
            mininterval=interval,
            maxinterval=interval,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} tokens [{elapsed}<{remaining}{postfix}]",
        )

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened to the run: resumed, saved, skipped an update, stopped."""
        if self.folder is None:
            return
        append_json_line(self.folder / "events.jsonl", {"event": kind, "time": time.time()} | fields)
        if self.wandb is not None and kind == "validation":
            self.wandb.log({f"validation/{name}": value for name, value in fields.items()}, step=fields["step"])

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """The newest event of this kind (rank 0 only)."""
        records = [] if self.folder is None else read_json_lines(self.folder / "events.jsonl")
        return next((record for record in reversed(records) if record["event"] == kind), None)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar (rank 0 only)."""
        if self.folder is not None:
            tqdm.write(line)
            sys.stdout.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_bar()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)


def open_wandb(
    project: str, mode: Literal["online", "offline"], name: str, folder: Path, config: dict[str, Any]
) -> Any:
    """A Weights & Biases run that a resumed job continues; `mode="offline"` needs no network.

    Raises ValueError when the package is missing.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("logging.wandb: the package is not installed, wants pip install 'braid[wandb]'") from None
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid4().hex[:8])
    return wandb.init(
        project=project, mode=mode, name=name, id=identity.read_text(), resume="allow", dir=str(folder), config=config
    )
