"""Random tensors, random ways to lay them out on ranks, and checkpoints written so, for the tests of the format."""

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.params import Block, Constant, LocalLayout, ParamSpec, Place, Split, local_layout
from model.weights.fragments import Fragment, fragments_of
from model.weights.manifest import FileRecord, Manifest
from model.weights.writer import MAX_FILE_BYTES, write_rank_files

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.int64)


@dataclass(frozen=True)
class Sample:
    """A logical tensor, how it may be split, and its values."""

    name: str
    spec: ParamSpec
    values: Tensor


def random_samples(generator: random.Random, count: int) -> list[Sample]:
    return [_random_sample(generator, f"layers.{index}.weight") for index in range(count)]


def _random_sample(generator: random.Random, name: str) -> Sample:
    tail = generator.choice([(), (generator.randint(1, 12),), (1, 4), (generator.randint(1, 5), 3)])
    kind = generator.choice(["rows", "columns", "blocks", "whole"])
    pad = generator.choice([1, 1, 8])
    if kind == "columns" and tail:
        units = tail[0]
        spec = _spec((generator.randint(1, 9), *tail), split=Split(1, units, units))
    elif kind == "blocks":
        blocks = tuple(_random_block(generator, f"b{index}") for index in range(generator.randint(1, 4)))
        spec = _spec((sum(block.rows for block in blocks), *tail), blocks=blocks, pad_rows=pad)
    elif kind == "rows":
        units = generator.randint(1, 9)
        spec = _spec((units * generator.randint(1, 4), *tail), split=Split(0, units, units), pad_rows=pad)
    else:
        spec = _spec((generator.randint(1, 20), *tail))
    values = torch.arange(spec.numel).view(spec.shape) % 251
    return Sample(name, spec, values.to(generator.choice(DTYPES)))


def _random_block(generator: random.Random, name: str) -> Block:
    units = generator.randint(1, 4)
    split = generator.choice([None, Split(0, units, units), Split(0, units, units * generator.randint(1, 4))])
    return Block(name, units * generator.randint(1, 3), split)


def _spec(shape: tuple[int, ...], blocks: tuple[Block, ...] = (), split: Split | None = None, pad_rows: int = 1):
    return ParamSpec(shape, Constant(0.0), blocks=blocks, split=split, pad_rows=pad_rows)


def local_tensor(values: Tensor, layout: LocalLayout) -> Tensor:
    """What a rank with this layout holds: its pieces by plain indexing, padding filled with a value that must not
    reach the disk."""
    flat = torch.full((math.prod(layout.shape),), 77, dtype=values.dtype)
    for piece in layout.pieces:
        part = values[tuple(slice(low, high) for low, high in piece.box)]
        flat[piece.offset : piece.offset + piece.numel] = part.flatten()
    return flat.view(layout.shape)


def random_cuts(generator: random.Random, total: int, parts: int) -> list[tuple[int, int]]:
    """[0, total) cut at random places; parts may be empty."""
    cuts = [0, *sorted(generator.randint(0, total) for _ in range(parts - 1)), total]
    return list(pairwise(cuts))


def write_random(
    folder: Path, generator: random.Random, samples: list[Sample], max_file_bytes: int = MAX_FILE_BYTES
) -> Manifest:
    """Writes samples as a random number of tensor ranks times data ranks that own random flat ranges."""
    tensor_size, data_size = generator.randint(1, 4), generator.randint(1, 3)
    items: dict[int, list[tuple[Fragment, Tensor]]] = {rank: [] for rank in range(tensor_size * data_size)}
    for sample in samples:
        for tensor_rank in range(tensor_size):
            layout = local_layout(sample.spec, Place(tensor_rank, tensor_size))
            local = local_tensor(sample.values, layout).flatten()
            for data_rank, (start, stop) in enumerate(random_cuts(generator, local.numel(), data_size)):
                for fragment, low, high in fragments_of(sample.name, "weight", layout, start, stop):
                    items[tensor_rank * data_size + data_rank].append((fragment, local[low:high]))
    records: list[FileRecord] = []
    for rank, mine in items.items():
        records += write_rank_files(folder, rank, mine, max_file_bytes)
    manifest = Manifest.from_records(records, {("weight", s.name): s.spec.shape for s in samples}, {"tokens": 7})
    manifest.save(folder)
    return manifest


def write_simple(folder: Path, values: dict[str, Tensor], extra: dict | None = None) -> Manifest:
    """Whole tensors, written by rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    records = write_rank_files(folder, 0, simple_items(values))
    manifest = Manifest.from_records(records, simple_shapes(values), extra or {})
    manifest.save(folder)
    return manifest


def simple_items(values: dict[str, Tensor], rank: int = 0, size: int = 1) -> list[tuple[Fragment, Tensor]]:
    """The share of `rank` of `size` in whole tensors: equal flat ranges."""
    items = []
    for name, value in values.items():
        box = tuple((0, n) for n in value.shape)
        start, stop = rank * value.numel() // size, (rank + 1) * value.numel() // size
        if start < stop:
            items.append((Fragment(name, "weight", "", box, start, stop), value.flatten()[start:stop]))
    return items


def simple_shapes(values: dict[str, Tensor]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {("weight", name): tuple(value.shape) for name, value in values.items()}
