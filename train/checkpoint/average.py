"""Weight averaging: the mean of several checkpoints of one run as a checkpoint of the same format, without optimizer
states (Stochastic Weight Averaging, arXiv 1803.05407; LAWA, arXiv 2209.14981)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.params import box_numel
from model.weights.files import CheckpointError
from model.weights.fragments import Fragment
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from train.checkpoint.capture import BUFFER
from train.checkpoint.transaction import Alone, commit, tokens_of
from train.zero import WEIGHT

CHUNK_ELEMENTS = 1 << 24
FILE_BYTES = 512 << 20
"""Of a file, at most: so much is in memory until it is read back."""


def uniform(count: int) -> list[float]:
    """Shares of the plain mean."""
    return [1 / count] * count


def exponential(count: int, decay: float) -> list[float]:
    """Shares of the exponential moving average that begins at the oldest, oldest first."""
    if not 0 < decay < 1:
        raise ValueError(f"--ema: got {decay}, wants a decay above 0 and below 1")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def average(checkpoints: Sequence[Checkpoint], shares: Sequence[float], root: Path) -> Path:
    """Commits the weighted mean of the weights as `root/tokens-N`, N of the newest; returns that folder.

    checkpoints: of one model, oldest first, their files hashed here. shares: of each, summing to 1. Sums are float64;
    memory is bounded by a chunk. What is no floating-point number, and buffers, are the newest's. Raises
    CheckpointError when one is damaged or of another model.
    """
    newest = checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.extra["model"] != newest.extra["model"]:
            raise CheckpointError(f"{checkpoint.folder}: is of another model than {newest.folder}")
        checkpoint.verify()
    kept = [(kind, name) for kind in (WEIGHT, BUFFER) for name in newest.names(kind)]
    shapes = {(kind, name): newest.shape(name, kind) for kind, name in kept}
    sizes = [newest.dtype(name, kind).itemsize * _numel(shapes[kind, name]) for kind, name in kept]
    origin = [{"checkpoint": c.folder.name, "share": share} for c, share in zip(checkpoints, shares, strict=True)]
    return commit(
        root,
        tokens_of(newest.folder),
        Alone(),
        write=lambda folder: write_rank_files(folder, 0, _means(checkpoints, shares, shapes), FILE_BYTES),
        shapes=shapes,
        extra=newest.extra | {"averaged": origin, "validation": None},
        bytes_needed=sum(sizes),
    )


def _means(
    checkpoints: Sequence[Checkpoint], shares: Sequence[float], shapes: dict[tuple[str, str], tuple[int, ...]]
) -> Iterator[tuple[Fragment, Tensor]]:
    newest = checkpoints[-1]
    for (kind, name), shape in shapes.items():
        dtype, box = newest.dtype(name, kind), tuple((0, n) for n in shape)
        for start in range(0, _numel(shape), CHUNK_ELEMENTS):
            span = start, min(start + CHUNK_ELEMENTS, _numel(shape))
            if kind == BUFFER or not dtype.is_floating_point:
                mean = newest.read(name, kind, None, *span)
            else:
                mean = torch.zeros(span[1] - span[0], dtype=torch.float64)
                for checkpoint, share in zip(checkpoints, shares, strict=True):
                    mean.add_(checkpoint.read(name, kind, None, *span), alpha=share)
            yield Fragment(name, kind, "", box, *span), mean.to(dtype)


def _numel(shape: tuple[int, ...]) -> int:
    return box_numel(tuple((0, n) for n in shape))
