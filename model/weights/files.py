"""Files of a checkpoint: only regular ones are opened, reads are complete or an error, writes are made durable."""

import ctypes
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

from torch import Tensor

CHUNK_BYTES = 16 << 20
"""How much of a file is in memory at once."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or trusted; the message names the file and what is wrong with it."""


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy; valid while the tensor lives."""
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


class Digest:
    """SHA-256 of what `update` gets, taken in a thread of its own while the caller reads or compares the next part.

    A part may be changed only after the second `update` that follows it: two buffers in turn are enough.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def update(self, part: memoryview | bytes) -> None:
        self._wait()
        self._pending = self._thread.submit(self._sha.update, part)

    def hexdigest(self) -> str:
        self._wait()
        self._thread.shutdown()
        return self._sha.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def buffers(size: int) -> Iterator[memoryview]:
    """Two buffers in turn for parts of a file of `size` bytes."""
    return cycle([memoryview(bytearray(min(CHUNK_BYTES, size))) for _ in range(2)])


class RegularFile:
    """A regular file opened for reading: no link is followed, no FIFO or device is opened.

    identity: device, inode, size and time of the last change; equal identities mean that the file was not touched.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self.path = path
        try:
            before = os.lstat(path)
            if not stat.S_ISREG(before.st_mode):
                raise CheckpointError(f"{path}: is {_kind_of(before.st_mode)}, wants a regular file")
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) != (before.st_dev, before.st_ino):
            self.close()
            raise CheckpointError(f"{path}: was exchanged while it was opened")
        self.size = found.st_size
        self.identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from the bytes at `offset`. Raises CheckpointError when the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + CHUNK_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                wanted = offset + len(buffer)
                raise CheckpointError(f"{self.path}: ends at byte {offset + done}, wants at least {wanted}")
            done += count

    def read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return data

    def sha256(self) -> str:
        """Of the whole file, in bounded memory."""
        digest = Digest()
        for offset, buffer in zip(range(0, self.size, CHUNK_BYTES), buffers(self.size), strict=False):
            part = buffer[: min(CHUNK_BYTES, self.size - offset)]
            self.read_into(part, offset)
            digest.update(part)
        return digest.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close

    def __enter__(self) -> "RegularFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kind_of(mode: int) -> str:
    names = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def create_file(path: Path) -> int:
    """A new, empty file opened for writing; an existing one, a link included, is an error."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_fully(fd: int, data: memoryview) -> None:
    """All of `data` at the file's position: an interrupted or short write goes on where it stopped."""
    while len(data):
        count = os.write(fd, data[:CHUNK_BYTES])
        if count == 0:
            raise OSError(0, "a write of 0 bytes")
        data = data[count:]


def write_durably(path: Path, data: bytes) -> None:
    """A new file that is on the disk when this returns (its folder's entry follows with `sync_folder`)."""
    fd = create_file(path)
    try:
        write_fully(fd, memoryview(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes created, renamed and removed names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
