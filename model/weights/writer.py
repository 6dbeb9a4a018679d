"""Writing: one rank streams the fragments that it owns into safetensors files, durable and read back.

Room for the header is reserved, the tensors follow as they come, and the header is filled in at the end. While a
file is brought to the disk it is read back, compared with the tensors byte by byte, and hashed: of a generator that
makes one tensor at a time, no more than a file's worth is in memory.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from model.weights.container import DTYPE_NAMES, HEADER_BYTES, LENGTH_BYTES, Header
from model.weights.files import (
    CHUNK_BYTES,
    CheckpointError,
    Digest,
    RegularFile,
    buffers,
    byte_view,
    create_file,
    sync_folder,
    write_fully,
)
from model.weights.fragments import Fragment
from model.weights.manifest import FileRecord

OVERHEAD_BYTES = LENGTH_BYTES + HEADER_BYTES
"""What a file takes beside its tensors."""
MAX_FILE_BYTES = 4 << 30
"""Reading one file back beside the writing of the next was tried: it takes a third longer than one after the other."""


def write_rank_files(
    folder: Path, rank: int, items: Iterable[tuple[Fragment, Tensor]], max_file_bytes: int = MAX_FILE_BYTES
) -> list[FileRecord]:
    """Writes `items` to `rank-RRRRR-NNN.safetensors` in `folder`; a new file begins when one would grow too large.

    items: each tensor holds the `fragment.numel` elements of its fragment, on any device. Files are flushed to the
    disk, read back and compared before this returns; a rank without items writes none. Raises CheckpointError, naming
    the file, when the disk is full or holds other bytes than were written.
    """
    records: list[FileRecord] = []
    writer: _FileWriter | None = None
    try:
        for fragment, flat in _parts(items, max_file_bytes):
            if writer is not None and not writer.has_room(fragment, flat):
                records.append(writer.finish())
                writer = None
            if writer is None:
                path = folder / f"rank-{rank:05d}-{len(records):03d}.safetensors"
                writer = _FileWriter(path, max_file_bytes)
            writer.add(fragment, flat)
        if writer is not None:
            records.append(writer.finish())
        sync_folder(folder)
    finally:
        if writer is not None:
            writer.close()
    return records


def _parts(items: Iterable[tuple[Fragment, Tensor]], max_file_bytes: int) -> Iterator[tuple[Fragment, Tensor]]:
    """The items as flat tensors, those too large for one file cut into parts that fit."""
    for fragment, tensor in items:
        assert tensor.numel() == fragment.numel, f"{fragment.key}: {tensor.numel()} elements for {fragment.numel}"
        flat = tensor.detach().reshape(-1)
        limit = max(1, (max_file_bytes - OVERHEAD_BYTES) // flat.element_size())
        if fragment.numel <= limit:
            yield fragment, flat
            continue
        for start in range(0, fragment.numel, limit):
            stop = min(start + limit, fragment.numel)
            yield fragment.part(start, stop), flat[start:stop]


class _FileWriter:
    """One safetensors file."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._header = Header()
        self._items: list[tuple[Fragment, str]] = []
        self._flats: list[Tensor] = []
        self._fd = -1
        with _named(path):
            self._fd = create_file(path)
            os.lseek(self._fd, OVERHEAD_BYTES, os.SEEK_SET)

    def has_room(self, fragment: Fragment, flat: Tensor) -> bool:
        size = flat.numel() * flat.element_size()
        fits = self._header.fits(fragment.key, DTYPE_NAMES[flat.dtype], flat.numel(), size)
        return fits and OVERHEAD_BYTES + self._header.data_bytes + size <= self._max_bytes

    def add(self, fragment: Fragment, flat: Tensor) -> None:
        with _named(self._path):
            for chunk in _chunks(flat):
                write_fully(self._fd, byte_view(chunk))
        self._flats.append(flat)
        dtype = DTYPE_NAMES[flat.dtype]
        self._header.append(fragment.key, dtype, flat.numel(), flat.numel() * flat.element_size())
        self._items.append((fragment, dtype))

    def finish(self) -> FileRecord:
        header = self._header.encode()
        with _named(self._path):
            os.lseek(self._fd, 0, os.SEEK_SET)
            write_fully(self._fd, memoryview(header))
            with ThreadPoolExecutor(1) as beside:
                flushed = beside.submit(os.fsync, self._fd)
                size = len(header) + self._header.data_bytes
                sha256 = self._read_back(header, size)
                flushed.result()
        self.close()
        return FileRecord(self._path.name, size, sha256, tuple(self._items))

    def _read_back(self, header: bytes, size: int) -> str:
        """SHA-256 of the file, once it is known to hold what was meant.

        What is read comes from this machine's page cache, while fsync brings it to the disk; fsync is believed.
        Dropping the cache first, to read from the disk, took a save from 1.1 to 1.6 times the bare writing; every load,
        and `braid verify`, reads the disk.
        """
        with RegularFile(self._path) as file:
            if file.size != size:
                raise CheckpointError(f"{self._path}: has {file.size} bytes after writing {size}")
            digest, offset = Digest(), len(header)
            if file.read(0, offset) != header:
                raise CheckpointError(f"{self._path}: reads back another header than was written")
            digest.update(header)
            for chunk, buffer in zip(chain.from_iterable(map(_chunks, self._flats)), buffers(size), strict=False):
                data = chunk.view(torch.uint8)
                part = buffer[: len(data)]
                file.read_into(part, offset)
                digest.update(part)
                if not torch.equal(torch.frombuffer(part, dtype=torch.uint8), data):
                    raise CheckpointError(f"{self._path}: reads back other bytes than were written, from {offset} on")
                offset += len(data)
            return digest.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    """Contiguous parts of a flat tensor on the CPU."""
    step = CHUNK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().contiguous()


class _named:
    """Turns an OSError inside into a CheckpointError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(f"{self._path}: cannot be written: {error.strerror}") from error
