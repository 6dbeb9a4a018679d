"""The transaction: a checkpoint exists whole or not at all, whatever dies, fills up or fails on any rank.

Everything is written into `.partial-NAME`; the manifest comes last, when every rank's files are on the disk; one
rename makes the checkpoint. Names carry the token count, so the newest is found without a pointer.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from model.weights.files import CheckpointError, sync_folder, write_durably
from model.weights.manifest import FileRecord, Manifest, TensorKey
from model.weights.reader import Checkpoint
from model.weights.writer import OVERHEAD_BYTES

T = TypeVar("T")
NAME = re.compile(r"tokens-(\d{12,})")
PARTIAL, REPLACED, BROKEN = ".partial-", ".replaced-", ".broken-"
POINTER = "latest"


class Group(Protocol):
    """The ranks that save together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks."""
        ...

    def barrier(self) -> None: ...


class Alone:
    """The group of a single process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None


def name_of(tokens: int) -> str:
    return f"tokens-{tokens:012d}"


def tokens_of(path: Path) -> int:
    """The token count in the name of a checkpoint folder."""
    return int(path.name.removeprefix("tokens-"))


def commit(
    root: Path,
    tokens: int,
    group: Group,
    *,
    write: Callable[[Path], list[FileRecord]],
    shapes: Mapping[TensorKey, tuple[int, ...]],
    extra: dict[str, Any],
    bytes_needed: int,
    stage: Callable[[str], None] = lambda name: None,
    confirm: Callable[[], None] = lambda: None,
) -> Path:
    """Saves one checkpoint together; every rank of `group` calls this and gets the same outcome.

    root: `runs/NAME/checkpoints`, on a file system that all ranks share. tokens: position on the token clock, the
    checkpoint's name. write: writes this rank's fragments into the folder given to it. shapes, extra: of the manifest,
    read on rank 0. bytes_needed: of this rank's tensors. stage: told the name of each step before it is taken.
    confirm: called on rank 0 before the checkpoint gets its name; raises when this job must not write here.
    Returns the checkpoint's folder. Raises CheckpointError with the same message on all ranks when any of them fails;
    older checkpoints stay as they were.
    """
    name = name_of(tokens)
    partial, final = root / f"{PARTIAL}{name}", root / name
    lead = group.rank == 0

    def prepare() -> None:
        stage("folder")
        if lead:
            root.mkdir(parents=True, exist_ok=True)
            remove_tree(partial)
            partial.mkdir()

    def write_files() -> list[FileRecord]:
        stage("write")
        records = write(partial)
        stage("written")
        return records

    def publish() -> None:
        if not lead:
            return
        stage("manifest")
        manifest = Manifest.from_records((record for part in written for record in part), shapes, extra)
        manifest.save(partial)
        _check_visible(partial)
        sync_folder(partial)
        confirm()
        _swap(root, name, stage)

    try:
        needed = sum(agree(group, f"checkpoint {name}", lambda: _reserve(bytes_needed)))
        agree(group, f"checkpoint {name}", lambda: _check_space(root, needed, stage))
        agree(group, f"checkpoint {name}", prepare)
        written = agree(group, f"checkpoint {name}", write_files)
        agree(group, f"checkpoint {name}", publish)
    except CheckpointError:
        if lead:
            remove_tree(partial, ignore_errors=True)
        raise
    if lead:
        stage("pointer")
        _point(root, name)
        remove_tree(root / f"{REPLACED}{name}", ignore_errors=True)
    return final


def agree(group: Group, what: str, action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns all results, or raises the same CheckpointError on every rank."""
    fault, result = None, None
    try:
        result = action()
    except Exception as error:
        # Whatever went wrong here, the other ranks wait for a verdict.
        fault = error
    text = None if fault is None else _describe(fault)
    outcomes = group.gather((text, result))
    faults = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text is not None]
    if faults:
        others = f" (and {len(faults) - 1} other ranks)" if len(faults) > 1 else ""
        raise CheckpointError(f"{what}: rank {faults[0][0]}: {faults[0][1]}{others}") from fault
    return [result for _, result in outcomes]


def discover(root: Path) -> list[Path]:
    """Checkpoint folders by name, newest first; links, partial folders and other names are left out."""
    found = []
    for path in _entries(root):
        match = NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def leftovers(root: Path) -> list[Path]:
    """What a killed save or deletion left behind; `retention.sweep` clears it."""
    return [path for path in _entries(root) if path.name.startswith((PARTIAL, REPLACED, ".deleting-"))]


def open_newest(
    root: Path,
    group: Group | None = None,
    damaged: Callable[[Path, CheckpointError], None] | None = None,
    before_step: int | None = None,
    only: str | None = None,
) -> Checkpoint | None:
    """The newest checkpoint, agreed on by all ranks, which share the work of hashing its files; None when there is
    none at all.

    damaged: called on every rank with each checkpoint that cannot be trusted, before the next older one is tried, when
    no rank has a file of it open; without it, or when no older one is left, CheckpointError names the file.
    before_step: pass over those taken at that step or later. only: consider the one of this name.
    """
    group = group or Alone()
    candidates = agree(group, str(root), lambda: [path.name for path in discover(root) if only in (None, path.name)])[0]
    fault = None
    for name in candidates:

        def attempt(path: Path = root / name) -> Checkpoint:
            checkpoint = Checkpoint(path)
            checkpoint.check_sizes()
            checkpoint.verify(sorted(checkpoint.manifest.files)[group.rank :: group.size])
            return checkpoint

        try:
            checkpoint = _agree_on(group, f"checkpoint {name}", attempt)
            agree(group, f"checkpoint {name}", functools.partial(checkpoint.trust, checkpoint.manifest.files))
        except CheckpointError as error:
            fault = error
            if damaged is None:
                raise
            damaged(root / name, error)
            continue
        if before_step is None or checkpoint.extra["clock"]["step"] < before_step:
            return checkpoint
    if fault is not None and before_step is None:
        raise fault
    return None


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to `.broken-NAME` so that its name is free; returns the new path."""
    for number in range(1000):
        target = path.with_name(f"{BROKEN}{path.name}" + (f"-{number}" if number else ""))
        if not os.path.lexists(target):
            path.rename(target)
            sync_folder(path.parent)
            return target
    raise CheckpointError(f"{path}: {path.parent} is full of {BROKEN}{path.name}-* folders, delete some")


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    """Removes a folder that may not exist. A link, or a link in it, is removed, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=ignore_errors)


def _agree_on(group: Group, what: str, attempt: Callable[[], Checkpoint]) -> Checkpoint:
    """`agree` for a result that stays on its rank."""
    mine: list[Checkpoint] = []
    agree(group, what, lambda: mine.append(attempt()))
    return mine[0]


def _reserve(bytes_needed: int) -> int:
    return bytes_needed + OVERHEAD_BYTES


def _check_space(root: Path, needed: int, stage: Callable[[str], None]) -> None:
    stage("preflight")
    existing = next(path for path in (root, *root.parents) if path.exists())
    stats = os.statvfs(existing)
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise CheckpointError(
            f"{root}: {free / 2**20:,.1f} MiB free, the checkpoint needs {needed / 2**20:,.1f} MiB; "
            "make room or keep fewer checkpoints"
        )


def _check_visible(partial: Path) -> None:
    """Rank 0 sees every file with its size: the folder is one that all ranks share."""
    try:
        Checkpoint(partial).check_sizes()
    except CheckpointError as error:
        raise CheckpointError(f"{error} (do all ranks share this file system?)") from error


def _swap(root: Path, name: str, stage: Callable[[str], None]) -> None:
    """Renames the partial folder to its final name. A checkpoint that has the name already is moved out of the way
    first and removed at the end; a kill in between is undone by `retention.sweep`."""
    partial, final, replaced = root / f"{PARTIAL}{name}", root / name, root / f"{REPLACED}{name}"
    stage("rename")
    if os.path.lexists(final):
        remove_tree(replaced)
        final.rename(replaced)
        stage("replaced")
    try:
        partial.rename(final)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(final)
        raise
    stage("renamed")
    sync_folder(root)


def _point(root: Path, name: str) -> None:
    """Updates `latest`, a hint for people: nothing reads it, so a failure here fails nothing."""
    temporary = root / f".{POINTER}"
    try:
        temporary.unlink(missing_ok=True)
        write_durably(temporary, f"{name}\n".encode())
        temporary.replace(root / POINTER)
        sync_folder(root)
    except OSError:
        temporary.unlink(missing_ok=True)


def _entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
