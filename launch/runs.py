"""What a finished or running training left in its folder, opened for those who use it."""

from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from model.hybrid import HybridLM, Precision
from model.load import load_model
from model.weights.reader import Checkpoint
from train.checkpoint.transaction import discover, open_newest


def find_checkpoint(run: Path, name: str) -> Path:
    """The folder of a run's checkpoint. Raises ValueError when the run has none of this name."""
    folder = run / "checkpoints" / name
    if (folder / "manifest.json").is_file():
        return folder
    there = ", ".join(path.name for path in discover(run / "checkpoints")) or "none"
    raise ValueError(f"--checkpoint: got {name!r}, wants one of {run / 'checkpoints'}: {there}")


def load_run(
    run: Path, precision: Precision = Precision(), device: torch.device | None = None
) -> tuple[HybridLM, Tokenizer, Checkpoint]:
    """The model of a run's newest checkpoint and its tokenizer, checked to be the one that it was trained with.

    run: a run folder, or one checkpoint folder of it. device: cuda where there is one by default. Raises ValueError
    when either is missing or does not match.
    """
    if not run.is_dir():
        raise ValueError(f"run: {run} is no folder, wants a run such as runs/quickstart")
    single = (run / "manifest.json").exists()
    checkpoint = Checkpoint(run) if single else open_newest(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"run: {run} holds no checkpoint yet, wants one saved by braid train")
    saved = checkpoint.extra["tokenizer"]
    path = checkpoint.folder.parents[1] / saved["file"]
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != saved["sha256"]:
        raise ValueError(
            f"tokenizer: {path} has SHA-256 {tokenizer.sha256[:12]}, the run was trained with {saved['sha256'][:12]}"
        )
    chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(checkpoint, precision, chosen).store_as_computed(), tokenizer, checkpoint
