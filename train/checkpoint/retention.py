"""Retention: which checkpoints to keep, and deletion that a kill cannot leave half done."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.weights.files import CheckpointError, sync_folder
from model.weights.reader import Checkpoint
from train.checkpoint.transaction import PARTIAL, REPLACED, discover, leftovers, remove_tree, tokens_of

DELETING = ".deleting-"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last` good ones; the first of every `every_tokens` tokens (None: no others);
    the `best` ones by validation loss. Nothing newer than a kept last one goes."""

    last: int
    every_tokens: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        wants = "wants a positive number"
        if self.last < 1:
            raise ValueError(f"checkpoints.keep_last: got {self.last}, wants at least 1")
        if self.every_tokens is not None and self.every_tokens < 1:
            raise ValueError(f"checkpoints.keep_every_tokens: got {self.every_tokens}, {wants}, or none")
        if self.best < 0:
            raise ValueError(f"checkpoints.keep_best: got {self.best}, {wants}, or 0")

    def doomed(self, root: Path) -> list[Path]:
        """What may go, newest first. A checkpoint is good when its manifest is valid and its files have their sizes;
        damaged ones count for nothing, so the only good one always stays."""
        found = discover(root)
        good = {path: checkpoint for path in found if (checkpoint := _good(path)) is not None}
        if len(good) <= self.last:
            return []
        last = list(good)[self.last - 1]
        kept = set(found[: found.index(last) + 1]) | self._milestones(list(good)) | self._best(good)
        return [path for path in found if path not in kept]

    def _milestones(self, good: list[Path]) -> set[Path]:
        """The oldest good checkpoint of every span of `every_tokens` tokens, the first span aside."""
        spans: dict[int, Path] = {}
        if self.every_tokens is not None:
            for path in good:  # the newest first: older ones replace it
                spans[tokens_of(path) // self.every_tokens] = path
        return {path for span, path in spans.items() if span > 0}

    def _best(self, good: dict[Path, Checkpoint]) -> set[Path]:
        losses = {path: (checkpoint.extra.get("validation") or {}).get("loss") for path, checkpoint in good.items()}
        judged = sorted((loss, tokens_of(path), path) for path, loss in losses.items() if loss is not None)
        return {path for _, _, path in judged[: self.best]}


def retain(root: Path, policy: Retention, stage: Callable[[str], None] = lambda name: None) -> list[Path]:
    """Deletes what `policy` lets go; called on one rank, after a commit, or with the run's lock held.

    stage: told the name of each step before it is taken. Returns what was deleted; what cannot be is a warning, for
    the run is worth more than the room.
    """
    deleted = []
    for path in policy.doomed(root):
        try:
            _delete(path, stage)
        except OSError as error:
            warnings.warn(f"{path}: cannot be deleted: {error.strerror}", stacklevel=2)
            break
        deleted.append(path)
    return deleted


def _delete(path: Path, stage: Callable[[str], None]) -> None:
    stage("retire")
    doomed = path.with_name(f"{DELETING}{path.name}")
    remove_tree(doomed)
    path.rename(doomed)
    sync_folder(path.parent)
    stage("delete")
    remove_tree(doomed)


def sweep(root: Path) -> list[str]:
    """Clears what a killed save or deletion left, on one rank, before the run begins and with its lock held.

    A checkpoint that was about to be replaced gets its name back; half-written and half-deleted folders go. Returns
    one line for the log about each.
    """
    lines = []
    for path in leftovers(root):
        original = root / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not original.exists() and not path.is_symlink():
            path.rename(original)
            lines.append(f"{path.name}: restored, its replacement was never committed")
        else:
            remove_tree(path)
            why = "partial checkpoint of a killed save" if path.name.startswith(PARTIAL) else "unfinished deletion"
            lines.append(f"{path.name}: removed ({why})")
    if lines:
        sync_folder(root)
    return lines


def _good(path: Path) -> Checkpoint | None:
    try:
        checkpoint = Checkpoint(path)
        checkpoint.check_sizes()
    except CheckpointError:
        return None
    return checkpoint
