"""The checkpoints of one run: save, find the newest, keep the last few."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from model.weights.files import CheckpointError
from model.weights.fragments import Fragment
from model.weights.manifest import TensorKey
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from train.checkpoint.background import Commit, Staging
from train.checkpoint.capture import saved_fragments, saved_shapes
from train.checkpoint.retention import Retention, retain, sweep
from train.checkpoint.transaction import Group, commit, discover, open_newest, set_aside, tokens_of
from train.engine import Engine
from train.parallel import Mesh

Resume = Literal["auto", "required", "never"]


class Saved(NamedTuple):
    """A committed checkpoint. step: when its state was taken."""

    step: int
    folder: Path


class Store:
    """root: `runs/NAME/checkpoints`. keep: which checkpoints stay. say: where lines for the user go, called on
    rank 0 alone. aside: write while training goes on, which takes host memory for one more copy of the state.
    confirm: called on rank 0 just before a checkpoint gets its name; raises when the run folder has been lost."""

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        keep: Retention,
        say: Callable[[str], None],
        *,
        aside: bool = True,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.mesh, self.keep, self.say, self.confirm = root, mesh, keep, say, confirm
        self._staging = Staging() if aside else None
        self._group: Group = mesh.beside() if aside else mesh
        self._pending: tuple[int, Commit] | None = None

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

    def save(self, engine: Engine, step: int, tokens: int, extra: dict[str, Any]) -> Saved | None:
        """Takes the state as it is now and begins to save it, on all ranks, when the save before is done.

        Returns the save before, if it was not reported yet. Raises CheckpointError when that one failed.
        """
        before = self.settle()
        fragments, shapes = list(saved_fragments(engine)), saved_shapes(engine)
        if self._staging is not None:
            fragments = self._staging.copy(fragments)
        work = partial(self._commit, fragments, shapes, tokens, extra)
        self._pending = step, Commit(work, thread=self._staging is not None)
        return before

    def _commit(
        self,
        fragments: list[tuple[Fragment, Tensor]],
        shapes: dict[TensorKey, tuple[int, ...]],
        tokens: int,
        extra: dict[str, Any],
    ) -> Path:
        """Commits a checkpoint on all ranks, then deletes those too old to keep."""
        folder = commit(
            self.root,
            tokens,
            self._group,
            write=lambda partial: write_rank_files(partial, self.mesh.rank, fragments),
            shapes=shapes,
            extra=extra,
            bytes_needed=sum(values.numel() * values.element_size() for _, values in fragments),
            confirm=self.confirm,
        )
        if self.mesh.main:
            retain(self.root, self.keep)
        self._group.barrier()
        return folder

    def back_to(self, step: int) -> Checkpoint | None:
        """The newest valid checkpoint taken before `step`, None when there is none; newer ones are set aside then."""
        found = open_newest(self.root, self.mesh, damaged=lambda path, error: None, before_step=step)
        if found is None:
            return None
        for path in self.mesh.together(lambda: discover(self.root)):
            if tokens_of(path) > tokens_of(found.folder):
                self.mesh.first(partial(set_aside, path))
        return found

    def poll(self) -> Saved | None:
        """The save that every rank has finished since it was last asked for, if any; the same answer on every rank.

        Raises CheckpointError, on every rank, when it failed.
        """
        if self._pending is None or self.mesh.any(not self._pending[1].done):
            return None
        return self.settle()

    def settle(self) -> Saved | None:
        """Waits for the save on its way; otherwise like `poll`."""
        if self._pending is None:
            return None
        (step, save), self._pending = self._pending, None
        return Saved(step, save.result())

    def close(self) -> None:
        """Waits for the save on its way, and says what came of it: a run that fails may still keep it."""
        try:
            saved = self.settle()
            line = None if saved is None else f"checkpoints/{saved.folder.name} is committed"
        except CheckpointError as error:
            line = f"warning: {error}"
        if line is not None and self.mesh.main:
            self.say(line)
