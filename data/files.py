"""Files that are either whole or absent, and hashes of them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK_BYTES = 8 << 20
"""How much of a file is in memory at once."""


class DataError(ValueError):
    """Data that cannot be found, read, prepared or trusted; the message says which, why and what would be right."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises DataError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of plain values that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def fingerprint_of(value: Any) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: Path, value: Any) -> None:
    write_durably(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises DataError when the file is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: is damaged (no JSON: {error})") from None


def write_durably(path: Path, content: bytes) -> None:
    """Writes through a temporary name: after a kill the file is there with all of `content`, or as it was before."""
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    commit_file(temporary, path)


def temporary_name(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def commit_file(temporary: Path, path: Path) -> None:
    """Gives a file that is already on disk its final name, durably."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go when the process dies. Raises DataError when it is held."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise DataError(f"{folder}: is being prepared by {owner}; wait for it, or choose another folder") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
