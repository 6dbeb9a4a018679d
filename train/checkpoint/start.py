"""Starting a run from the weights of another: curricula, longer contexts, deeper stacks, grown vocabularies.

Every parameter of the new model must be accounted for, and every tensor of the old one: what has no counterpart is
named in the recipe or refused.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.params import LocalLayout, Piece, Table
from model.weights.fragments import pieces_in, whole_layout
from model.weights.manifest import MANIFEST
from model.weights.reader import Checkpoint
from train.checkpoint.capture import BUFFER, STEPS, layouts, persistent_buffers
from train.checkpoint.transaction import open_newest
from train.engine import OPTIMIZER, Engine
from train.parallel import Mesh
from train.reading import require
from train.zero import WEIGHT


@dataclass(frozen=True)
class StartConfig:
    """Where a run that has no checkpoint of its own gets its weights.

    checkpoint: a checkpoint's folder or a run, "" to begin with drawn values. rename: new name -> old name, of a
    parameter or of all that begin with it ("blocks.4" -> "blocks.2"); several new ones may share an old one. new:
    patterns (*) of parameters that keep their drawn values. grown: patterns of parameters with more rows than the old
    ones; the first rows are the old ones, the others keep their drawn values. unused: patterns of old parameters that
    are left behind. optimizer: take optimizer states too; those of new values are zero.
    """

    checkpoint: str = ""
    rename: Mapping[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    optimizer: bool = True

    def __post_init__(self) -> None:
        given = bool(self.rename or self.new or self.grown or self.unused)
        require(bool(self.checkpoint) or not given, "checkpoint", repr(self.checkpoint), "the run to start from")

    def old_name(self, name: str) -> str:
        """The name in the checkpoint of the parameter `name`: by the longest prefix that is renamed."""
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            prefix = ".".join(parts[:count])
            if prefix in self.rename:
                return ".".join([self.rename[prefix], *parts[count:]])
        return name


def plan(table: Table, checkpoint: Checkpoint, config: StartConfig) -> dict[str, str | None]:
    """New name -> old name, None for what keeps its drawn values.

    Raises ValueError naming the first parameter, new or old, that is not accounted for, and any pattern that nothing
    matches.
    """
    where = checkpoint.folder
    sources: dict[str, str | None] = {}
    for name, spec in table.items():
        if _matches(name, config.new):
            sources[name] = None
            continue
        old = config.old_name(name)
        if old not in checkpoint.names(WEIGHT):
            raise ValueError(
                f"start.new: {where} has no {old!r}; wants {name!r} (or a pattern of it) here, or a start.rename"
            )
        shape, wanted = checkpoint.shape(old, WEIGHT), tuple(spec.shape)
        if _matches(name, config.grown):
            if spec.blocks or shape[1:] != wanted[1:] or shape[0] > wanted[0]:
                raise ValueError(f"start.grown: {name!r} has shape {list(wanted)}, cannot grow out of {list(shape)}")
        elif shape != wanted:
            raise ValueError(f"start: {name!r} has shape {list(wanted)}, {old!r} in {where} has {list(shape)}")
        sources[name] = old
    left = [name for name in checkpoint.names(WEIGHT) if name not in sources.values()]
    for name in left:
        if not _matches(name, config.unused):
            raise ValueError(f"start.unused: nothing takes {name!r} of {where}; wants it (or a pattern of it) here")
    declared = (("new", config.new, table), ("grown", config.grown, table), ("unused", config.unused, left))
    for key, patterns, names in declared:
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"start.{key}: nothing matches {pattern!r}")
    return sources


def start_from(engine: Engine, checkpoint: Checkpoint, config: StartConfig) -> dict[str, str | None]:
    """Gives `engine`, whose initial values are drawn, what the checkpoint has for it; returns the plan.

    Raises ValueError, before anything changes, when the plan does not work out.
    """
    sources = plan(engine.table, checkpoint, config)
    if config.optimizer:
        _check_states(engine, checkpoint, sources)
    layout = layouts(engine)

    def fill(flat: Tensor, name: str, kind: str, start: int) -> None:
        old = sources[name]
        states = kind != WEIGHT
        if states:
            flat.zero_()
        has = old is not None and (kind, old) in checkpoint.manifest.tensors
        if old is None or not has or (states and not config.optimizer):
            return
        rows = checkpoint.shape(old, kind)[0]
        _read(flat, checkpoint, old, kind, _first_rows(layout[name], rows), start)

    kind, name = STEPS
    steps = int(checkpoint.read(name, kind).item()) if config.optimizer else 0
    engine.load(fill, steps)
    for name, buffer in persistent_buffers(engine.module).items():
        if (BUFFER, name) in checkpoint.manifest.tensors and checkpoint.shape(name, BUFFER) == tuple(buffer.shape):
            checkpoint.read_into(buffer, name, BUFFER, whole_layout(tuple(buffer.shape)))
    return sources


def _check_states(engine: Engine, checkpoint: Checkpoint, sources: Mapping[str, str | None]) -> None:
    """Raises ValueError when no optimizer states were saved, or those of another kind of optimizer."""
    saved: dict[str, set[str]] = {}
    for kind in checkpoint.kinds():
        for trained in checkpoint.names(kind) if kind.startswith(OPTIMIZER) else ():
            saved.setdefault(trained, set()).add(kind)
    for name, old in sources.items():
        if old is None or (saved and old not in saved):
            continue  # new, or frozen before: its states are zero
        for kind in engine.state_kinds(name):
            if kind not in saved.get(old, ()):
                raise ValueError(f"start.optimizer: {checkpoint.folder} has no {kind} of {old!r}; wants false")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _first_rows(layout: LocalLayout, rows: int) -> LocalLayout:
    """The layout with its pieces cut to the first `rows` rows of the logical tensor."""
    pieces = []
    for piece in layout.pieces:
        (low, high), *rest = piece.box
        if low < rows:
            pieces.append(Piece(piece.block, ((low, min(high, rows)), *rest), piece.offset, piece.copies, piece.owner))
    return LocalLayout(layout.shape, tuple(pieces))


def _read(flat: Tensor, checkpoint: Checkpoint, name: str, kind: str, layout: LocalLayout, start: int) -> None:
    """Fills the part of `flat` that the layout's pieces cover; the rest stays."""
    stop = start + flat.numel()
    saved = torch.empty_like(flat)
    checkpoint.read_into(saved, name, kind, layout, start, stop)
    for _, low, high in pieces_in(layout, start, stop):
        flat[low - start : high - start] = saved[low - start : high - start]


def open_start(config: StartConfig, mesh: Mesh) -> Checkpoint:
    """The checkpoint that `config` names, its files hashed by the ranks together. Raises ValueError for none."""
    path = Path(config.checkpoint)
    root = path.parent if (path / MANIFEST).is_file() else path / "checkpoints"
    found = open_newest(root, mesh, only=path.name if root == path.parent else None)
    if found is None:
        raise ValueError(f"start.checkpoint: got {config.checkpoint!r}, which holds no checkpoint; wants a run, or one")
    return found
