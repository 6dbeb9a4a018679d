"""What a checkpoint of a run holds, as fragments of logical tensors, and how an engine gets it back.

Weights (frozen ones too), optimizer states, persistent buffers and the number of optimizer steps. Each rank gives the
elements that it owns; any layout takes what it needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.params import LocalLayout, local_layout
from model.weights.files import CheckpointError
from model.weights.fragments import Fragment, fragments_of, whole_layout
from model.weights.manifest import TensorKey
from model.weights.reader import Checkpoint
from train.engine import OPTIMIZER, Engine
from train.zero import WEIGHT

BUFFER = "buffer"
STEPS: TensorKey = ("scalar", "optimizer_steps")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, by name; empty ones hold nothing to save."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set and buffer.numel()
    }


def layouts(engine: Engine) -> dict[str, LocalLayout]:
    """Where each logical parameter lies in this rank's local tensor."""
    mesh = engine.mesh
    return {name: local_layout(spec, mesh.place) for name, spec in engine.table.items()}


def saved_shapes(engine: Engine) -> dict[TensorKey, tuple[int, ...]]:
    """`(kind, name)` -> logical shape of everything that the ranks together save."""
    shapes: dict[TensorKey, tuple[int, ...]] = {STEPS: ()}
    for name, spec in engine.table.items():
        for kind in [WEIGHT, *engine.state_kinds(name)]:
            shapes[kind, name] = tuple(spec.shape)
    for name, buffer in persistent_buffers(engine.module).items():
        shapes[BUFFER, name] = tuple(buffer.shape)
    return shapes


def saved_fragments(engine: Engine) -> Iterator[tuple[Fragment, Tensor]]:
    """What this rank saves: fragments and their flat values, which are views into the engine."""
    layout = layouts(engine)
    for name, start, stop, values in engine.owned():
        for kind, value in values.items():
            for fragment, low, high in fragments_of(name, kind, layout[name], start, stop):
                yield fragment, value[low - start : high - start]
    if engine.mesh.main:
        kind, name = STEPS
        yield from _whole(kind, name, torch.tensor(engine.steps))
        for name, buffer in persistent_buffers(engine.module).items():
            yield from _whole(BUFFER, name, buffer)


def _whole(kind: str, name: str, value: Tensor) -> Iterator[tuple[Fragment, Tensor]]:
    for fragment, _, _ in fragments_of(name, kind, whole_layout(tuple(value.shape))):
        yield fragment, value.detach().reshape(-1)


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Gives `engine` the saved weights, optimizer states, buffers and step counter, whatever layout saved them.

    Raises CheckpointError, before anything changes, when the checkpoint is of another model.
    """
    check_same_model(engine, checkpoint)
    layout = layouts(engine)

    def fill(flat: Tensor, name: str, kind: str, start: int) -> None:
        checkpoint.read_into(flat, name, kind, layout[name], start, start + flat.numel())

    kind, name = STEPS
    engine.load(fill, int(checkpoint.read(name, kind).item()))
    for name, buffer in persistent_buffers(engine.module).items():
        checkpoint.read_into(buffer, name, BUFFER, whole_layout(tuple(buffer.shape)))


def check_same_model(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError naming the first tensor that one of the two lacks or shapes differently."""
    wanted = saved_shapes(engine)
    ours = [kind for kind in checkpoint.kinds() if kind in (WEIGHT, BUFFER, STEPS[0]) or kind.startswith(OPTIMIZER)]
    found = {(kind, name): checkpoint.shape(name, kind) for kind in ours for name in checkpoint.names(kind)}
    for kind, name in sorted(wanted.keys() | found.keys()):
        shape, stored = wanted.get((kind, name)), found.get((kind, name))
        if shape != stored:
            has = "nothing" if stored is None else f"shape {list(stored)}"
            wants = "nothing" if shape is None else f"shape {list(shape)}"
            raise CheckpointError(f"{checkpoint.folder}: {kind} {name!r}: the checkpoint has {has}, the model {wants}")
