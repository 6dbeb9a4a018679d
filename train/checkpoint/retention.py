"""Retention: which checkpoints to keep, and deletion that a kill cannot leave half done."""

import warnings
from collections.abc import Callable
from pathlib import Path

from model.weights.files import CheckpointError, sync_folder
from model.weights.reader import Checkpoint
from train.checkpoint.transaction import PARTIAL, REPLACED, discover, leftovers, remove_tree

DELETING = ".deleting-"


def retain(root: Path, keep_last: int, stage: Callable[[str], None] = lambda name: None) -> list[Path]:
    """Deletes what is older than the newest `keep_last` good checkpoints; called on one rank, after a commit.

    A checkpoint is good when its manifest is valid and its files have their sizes. Damaged ones count for nothing: the
    only good checkpoint is never deleted, nor is anything newer than it. stage: told the name of each step before it
    is taken. Returns what was deleted; what cannot be is a warning, for the run is worth more than the room.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoints.keep_last: {keep_last}, wants at least 1")
    deleted, good = [], 0
    for path in discover(root):
        if good >= keep_last:
            try:
                _delete(path, stage)
            except OSError as error:
                warnings.warn(f"{path}: cannot be deleted: {error.strerror}", stacklevel=2)
                break
            deleted.append(path)
        elif _is_good(path):
            good += 1
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


def _is_good(path: Path) -> bool:
    try:
        Checkpoint(path).check_sizes()
    except CheckpointError:
        return False
    return True
