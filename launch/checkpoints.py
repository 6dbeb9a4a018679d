"""The checkpoints of a run as its owner sees them: list, show, prune, average."""

import math
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hybrid import parameter_count
from model.weights.files import CheckpointError
from model.weights.reader import Checkpoint
from train.checkpoint.average import average, exponential, uniform
from train.checkpoint.retention import Retention, retain
from train.checkpoint.transaction import BROKEN, discover, open_newest, remove_tree, tokens_of
from train.lock import RunLock


def open_one(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, or the newest of the run there. Raises ValueError when there is none."""
    checkpoint = Checkpoint(folder) if (folder / "manifest.json").exists() else open_newest(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"run: {folder} holds no checkpoint yet, wants one saved by braid train")
    return checkpoint


def summaries(root: Path) -> list[dict[str, Any]]:
    """One plain dict for each checkpoint, oldest first; `problem` is None for a good one."""
    rows = []
    for path in reversed(discover(root)):
        row: dict[str, Any] = {"name": path.name, "tokens": tokens_of(path), "step": None, "mib": None}
        row |= {"bits_per_byte": None, "problem": None}
        try:
            checkpoint = Checkpoint(path)
            checkpoint.check_sizes()
            row["step"] = checkpoint.extra.get("clock", {}).get("step")
            row["mib"] = checkpoint.manifest.totals["bytes"] / 2**20
            row["bits_per_byte"] = (checkpoint.extra.get("validation") or {}).get("bits_per_byte")
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader."""
    if not rows:
        return "no checkpoints"
    lines = [f"{'checkpoint':22} {'step':>9} {'tokens':>16} {'MiB':>11} {'bits/byte':>9}  state"]
    for row in rows:
        step = "" if row["step"] is None else f"{row['step']:,}"
        size = "" if row["mib"] is None else f"{row['mib']:,.1f}"
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        state = "good" if row["problem"] is None else f"damaged: {row['problem']}"
        lines.append(f"{row['name']:22} {step:>9} {row['tokens']:>16,} {size:>11} {bits:>9}  {state}")
    return "\n".join(lines)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds, as plain values."""
    extra, totals = checkpoint.extra, checkpoint.manifest.totals
    config = ModelConfig.from_dict(extra["model"])
    facts: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "step": extra["clock"]["step"],
        "tokens": extra["clock"]["tokens"],
        "run": extra["recipe"]["name"],
        "stack": config.stack,
        "parameters": parameter_count(config),
        "validation": extra.get("validation"),
        "data": extra["stream"]["fingerprint"],
        "samples read": extra["stream"].get("sample"),
        "samples skipped": extra["stream"].get("skipped"),
        "tokenizer": extra["tokenizer"]["sha256"],
        "files": totals["files"],
        "bytes": totals["bytes"],
    }
    for kind in checkpoint.kinds():
        names = checkpoint.names(kind)
        elements = sum(math.prod(checkpoint.shape(name, kind)) for name in names)
        facts[kind] = f"{len(names):,} tensors, {elements:,} elements"
    if "averaged" in extra:
        facts["averaged"] = extra["averaged"]
    return facts


def tensor_lines(checkpoint: Checkpoint) -> list[str]:
    lines = []
    for kind in checkpoint.kinds():
        for name in checkpoint.names(kind):
            dtype = str(checkpoint.dtype(name, kind)).removeprefix("torch.")
            lines.append(f"{kind}  {name}  {list(checkpoint.shape(name, kind))}  {dtype}")
    return lines


def prune(run: Path, policy: Retention, *, broken: bool, dry_run: bool) -> list[Path]:
    """Deletes, with the run's lock held, what `policy` lets go, and on request what was set aside. Raises RunLocked
    when the run is training."""
    root = run / "checkpoints"
    aside = sorted(root.glob(f"{BROKEN}*")) if broken else []
    if dry_run:
        return [*policy.doomed(root), *aside]
    with RunLock(run):
        gone = retain(root, policy)
        for path in aside:
            remove_tree(path)
    return [*gone, *aside]


def average_run(run: Path, last: int | None, ema: float | None, output: Path | None) -> Checkpoint:
    """Averages the newest `last` good checkpoints (None: all). Raises ValueError when there are fewer than two."""
    if last is not None and last < 2:
        raise ValueError(f"--last: got {last}, wants at least 2 checkpoints")
    good = []
    for path in discover(run / "checkpoints"):
        try:
            checkpoint = Checkpoint(path)
            checkpoint.check_sizes()
        except CheckpointError:
            continue
        good.append(checkpoint)
    chosen = list(reversed(good[:last]))
    if len(chosen) < (last or 2):
        raise ValueError(f"--last: {run} has {len(good)} good checkpoints, wants {last or 2} or more")
    shares = uniform(len(chosen)) if ema is None else exponential(len(chosen), ema)
    name = f"averaged-last-{len(chosen)}" if ema is None else f"averaged-ema-{ema:g}"
    return Checkpoint(average(chosen, shares, output or run / name))
