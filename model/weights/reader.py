"""Reading: any box or flat range of a logical tensor, whatever layout wrote it, from verified files only."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.params import Box, LocalLayout, box_numel, box_shape
from model.weights.container import DTYPES, Slots
from model.weights.files import CHUNK_BYTES, CheckpointError, RegularFile, byte_view
from model.weights.fragments import boxes_of_range, flat_index, intersect, pieces_in, strides_of
from model.weights.manifest import Entry, Manifest, StoredTensor

OPEN_FILES = 32
SMALL_BYTES = 16 << 10
"""A gap that is cheaper to read over than to skip."""


class Checkpoint:
    """A checkpoint folder.

    The manifest is validated here; a data file is verified (size and SHA-256) before its first byte is used, once for
    each Checkpoint, and verified again if it has changed since. Raises CheckpointError naming the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._verified: dict[str, tuple[int, ...]] = {}
        self._open: OrderedDict[str, tuple[RegularFile, Slots]] = OrderedDict()

    @property
    def extra(self) -> dict[str, Any]:
        """What the writer stored beside the tensors."""
        return self.manifest.extra

    def names(self, kind: str) -> list[str]:
        return [name for found, name in self.manifest.tensors if found == kind]

    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.manifest.tensors})

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Of the logical tensor."""
        return self._tensor(name, kind).shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return DTYPES[self._tensor(name, kind).dtype]

    def check_sizes(self) -> None:
        """Raises CheckpointError unless every file is there with its size: cheap, and no proof of its contents."""
        for name in self.manifest.files:
            with RegularFile(self.folder / name) as file:
                self._check_size(name, file)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Sizes and hashes of the named files (all by default); those verified before and unchanged are not reread."""
        for name in self.manifest.files if names is None else names:
            with RegularFile(self.folder / name) as file:
                self._verify_file(name, file)

    def trust(self, names: Iterable[str]) -> None:
        """Counts files as verified that another rank has verified; the sizes are checked here."""
        for name in names:
            with RegularFile(self.folder / name) as file:
                self._check_size(name, file)
                self._verified[name] = file.identity

    def read(self, name: str, kind: str, box: Box | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)`, in C order inside `box` (the whole tensor by default), as a flat CPU tensor of the
        stored dtype."""
        tensor = self._tensor(name, kind)
        whole = tuple((0, n) for n in tensor.shape)
        box = whole if box is None else box
        if len(box) != len(whole) or any(
            not 0 <= low <= high <= n for (low, high), (_, n) in zip(box, whole, strict=True)
        ):
            raise CheckpointError(f"{self.folder}: {kind} {name!r} has shape {tensor.shape}, asked for box {box}")
        stop = box_numel(box) if stop is None else stop
        assert 0 <= start <= stop <= box_numel(box), f"range [{start}, {stop}) outside {box}"
        flat = torch.empty(stop - start, dtype=DTYPES[tensor.dtype])
        self._fill(flat, tensor, box, start, stop)
        return flat

    def read_into(
        self, local: Tensor, name: str, kind: str, layout: LocalLayout, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `local`, the flat range `[start, stop)` of a rank's local tensor (by default as many elements as
        `local` has), with every piece that the layout holds there, owned or copied; padding becomes zero.

        local: contiguous, on any device. Floating-point values are converted to its dtype; other dtypes must match.
        """
        tensor = self._tensor(name, kind)
        stored = DTYPES[tensor.dtype]
        if local.dtype != stored and not (local.dtype.is_floating_point and stored.is_floating_point):
            raise CheckpointError(f"{self.folder}: {kind} {name!r} is {stored}, cannot be read as {local.dtype}")
        if any(len(p.box) != len(tensor.shape) or not _inside(p.box, tensor.shape) for p in layout.pieces):
            raise CheckpointError(f"{self.folder}: {kind} {name!r} has shape {tensor.shape}, the layout reaches beyond")
        flat = local.detach().view(-1)
        stop = start + flat.numel() if stop is None else stop
        assert flat.numel() == stop - start, f"{flat.numel()} elements for the range [{start}, {stop})"
        pieces = list(pieces_in(layout, start, stop))
        if sum(high - low for _, low, high in pieces) < flat.numel():
            flat.zero_()
        for piece, low, high in pieces:
            target = flat[low - start : high - start]
            self._fill(target, tensor, piece.box, low - piece.offset, high - piece.offset)

    def close(self) -> None:
        """Closes the files kept open between reads; reading again opens them again."""
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def _tensor(self, name: str, kind: str) -> StoredTensor:
        found = self.manifest.tensors.get((kind, name))
        if found is None:
            raise CheckpointError(f"{self.folder}: holds no {kind} {name!r}")
        return found

    def _check_size(self, name: str, file: RegularFile) -> None:
        expected = self.manifest.files[name].size
        if file.size != expected:
            raise CheckpointError(f"{file.path}: has {file.size} bytes, the manifest says {expected}")

    def _verify_file(self, name: str, file: RegularFile) -> None:
        self._check_size(name, file)
        if self._verified.get(name) == file.identity:
            return
        expected = self.manifest.files[name].sha256
        found = file.sha256()
        if found != expected:
            raise CheckpointError(f"{file.path}: has SHA-256 {found}, the manifest says {expected}")
        self._verified[name] = file.identity

    def _slots(self, name: str) -> tuple[RegularFile, Slots]:
        """A verified file, kept open so that it stays the one that was verified."""
        if name not in self._open:
            file = RegularFile(self.folder / name)
            self._verify_file(name, file)
            self._open[name] = file, Slots(file)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(name)
        return self._open[name]

    def _fill(self, target: Tensor, tensor: StoredTensor, box: Box, start: int, stop: int) -> None:
        """Copies elements `[start, stop)` of `box` from every entry that holds some of them into flat `target`."""
        wanted = list(boxes_of_range(box, start, stop))
        for entry in tensor.entries:
            if intersect(entry.box, box) is None:
                continue
            for held in boxes_of_range(entry.box, entry.start, entry.stop):
                for part in wanted:
                    common = intersect(held, part)
                    if common is not None:
                        self._copy(target, tensor.dtype, entry, common, box, start)

    def _copy(self, target: Tensor, dtype: str, entry: Entry, common: Box, box: Box, start: int) -> None:
        file, slots = self._slots(entry.file)
        itemsize = DTYPES[dtype].itemsize
        base = slots.find(entry.key, dtype, entry.stop - entry.start)
        source_strides, target_strides = strides_of(box_shape(entry.box)), strides_of(box_shape(box))
        for part in _readable(common, source_strides, itemsize):
            first, span = _span(entry.box, part)
            buffer = torch.empty(span, dtype=DTYPES[dtype])
            file.read_into(byte_view(buffer), base + (first - entry.start) * itemsize)
            to, _ = _span(box, part)
            shape = box_shape(part)
            view = target.as_strided(shape, target_strides, target.storage_offset() + to - start)
            view.copy_(buffer.as_strided(shape, source_strides))


def _inside(box: Box, shape: tuple[int, ...]) -> bool:
    return all(0 <= low <= high <= n for (low, high), n in zip(box, shape, strict=True))


def _span(frame: Box, part: Box) -> tuple[int, int]:
    """First position of `part` in the flattened `frame`, and the number of elements up to its last."""
    first = flat_index(frame, tuple(low for low, _ in part))
    last = flat_index(frame, tuple(high - 1 for _, high in part))
    return first, last - first + 1


def _readable(box: Box, strides: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Halves `box` until each part lies in a bounded, mostly wanted run of bytes."""
    span = 1 + sum((high - low - 1) * stride for (low, high), stride in zip(box, strides, strict=True))
    numel, size = box_numel(box), span * itemsize
    if span == 1 or (size <= CHUNK_BYTES and (span <= 2 * numel or size <= SMALL_BYTES)):
        yield box
        return
    axis = next(axis for axis, (low, high) in enumerate(box) if high - low > 1)
    low, high = box[axis]
    middle = (low + high) // 2
    for half in ((low, middle), (middle, high)):
        yield from _readable((*box[:axis], half, *box[axis + 1 :]), strides, itemsize)
