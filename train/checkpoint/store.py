"""The checkpoints of one run: save, find the newest, keep the last few."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from model.weights.files import CheckpointError
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from train.checkpoint.capture import saved_fragments, saved_shapes
from train.checkpoint.retention import retain, sweep
from train.checkpoint.transaction import commit, open_newest, set_aside
from train.engine import Engine
from train.parallel import Mesh

Resume = Literal["auto", "required", "never"]


class Store:
    """root: `runs/NAME/checkpoints`. keep_last: good checkpoints that stay. say: where lines for the user go, called on
    rank 0 alone."""

    def __init__(self, root: Path, mesh: Mesh, keep_last: int, say: Callable[[str], None]) -> None:
        self.root, self.mesh, self.keep_last, self.say = root, mesh, keep_last, say

    def newest(self, resume: Resume) -> Checkpoint | None:
        """The newest valid checkpoint, to resume from, its hashes verified; None to start fresh.

        resume: "auto" starts fresh only when no checkpoint exists, "required" never does, "never" refuses to go on
        with a run that has one. Damaged checkpoints newer than the valid one are set aside, with a warning. Raises
        CheckpointError when there are only damaged ones (they stay where they are), ValueError when `resume` is not
        met.
        """
        for line in self.mesh.first(lambda: sweep(self.root)) or []:
            self.say(f"checkpoints/{line}")
        damaged: list[Path] = []

        def warn(path: Path, error: CheckpointError) -> None:
            damaged.append(path)
            if self.mesh.main:
                self.say(f"warning: {error}")

        checkpoint = open_newest(self.root, self.mesh, damaged=warn)
        if checkpoint is None and resume == "required":
            raise ValueError(f"checkpoints.resume: got 'required', but {self.root} holds no checkpoint")
        if checkpoint is not None and resume == "never":
            raise ValueError(
                f"checkpoints.resume: got 'never', but {checkpoint.folder} exists; wants another name, or resume 'auto'"
            )
        # Only now that an older one is known to be valid: a start that finds none must find none the next time too.
        for path in damaged:
            aside = self.mesh.first(partial(set_aside, path))
            if aside is not None:
                self.say(f"warning: checkpoints/{path.name} is set aside as {aside.name}, an older one is used")
        return checkpoint

    def save(self, engine: Engine, tokens: int, extra: dict[str, Any]) -> Path:
        """Commits a checkpoint on all ranks, then deletes those too old to keep."""
        fragments = list(saved_fragments(engine))
        folder = commit(
            self.root,
            tokens,
            self.mesh,
            write=lambda partial: write_rank_files(partial, self.mesh.rank, fragments),
            shapes=saved_shapes(engine),
            extra=extra,
            bytes_needed=sum(values.numel() * values.element_size() for _, values in fragments),
        )
        self.mesh.first(lambda: retain(self.root, self.keep_last))
        return folder
