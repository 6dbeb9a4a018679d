"""What a broken disk, a careless copy or a hostile file does to a checkpoint: refused by name, never used."""

import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import model.weights.writer as writer_module
from model.weights.files import CheckpointError
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from tests.model.weights.layouts import simple_items, write_simple

VALUES = {"a": torch.arange(1000.0), "b": torch.arange(64).view(8, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_simple(tmp_path / "saved", VALUES, {"clock": {"step": 3}})
    return tmp_path / "saved"


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_an_undamaged_checkpoint_passes(folder: Path) -> None:
    """Verification that refuses everything would look safe in the tests below."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    assert checkpoint.extra == {"clock": {"step": 3}}
    assert torch.equal(checkpoint.read("b", "weight").view(8, 8), VALUES["b"])


@pytest.mark.parametrize("left", [0, 7, 100, 131_072, -1])
def test_a_truncated_file_is_refused_with_both_sizes(folder: Path, left: int) -> None:
    """A copy that stopped midway."""
    path = data_file(folder)
    size = path.stat().st_size
    os.truncate(path, left if left >= 0 else size - 1)
    with pytest.raises(CheckpointError, match=rf"{path.name}: has {path.stat().st_size} bytes, .* says {size}"):
        Checkpoint(folder).verify()
    with pytest.raises(CheckpointError, match=path.name):
        Checkpoint(folder).read("a", "weight")
    with pytest.raises(CheckpointError, match=path.name):
        Checkpoint(folder).check_sizes()


@pytest.mark.parametrize("position", [3, 60, 131_000, 131_080 + 2001, -1])
def test_a_flipped_byte_is_refused_with_both_hashes(folder: Path, position: int) -> None:
    """One bit of a weight turned over on the disk trains on, unseen, without a hash."""
    path, expected = data_file(folder), Checkpoint(folder).manifest.files[data_file(folder).name].sha256
    flip(path, position)
    with pytest.raises(CheckpointError, match=rf"{path.name}: has SHA-256 [0-9a-f]+, the manifest says {expected}"):
        Checkpoint(folder).verify()
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(folder).read("b", "weight")


def test_a_file_that_changes_after_its_verification_is_verified_again(folder: Path) -> None:
    """A file replaced between the check and the read would be used unchecked."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    path = data_file(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.read("b", "weight")


def test_only_the_files_that_are_read_are_verified(tmp_path: Path) -> None:
    """A rank of a large run must not hash what other ranks own."""
    writes = [write_rank_files(tmp_path, rank, simple_items(VALUES, rank, 2)) for rank in range(2)]
    shapes = {("weight", name): tuple(value.shape) for name, value in VALUES.items()}
    Manifest.from_records([record for part in writes for record in part], shapes, {}).save(tmp_path)
    flip(tmp_path / "rank-00001-000.safetensors", -1)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a", "weight", stop=500), VALUES["a"][:500])
    checkpoint.verify(["rank-00000-000.safetensors"])
    with pytest.raises(CheckpointError, match="rank-00001-000"):
        checkpoint.read("a", "weight", start=499)


def test_a_missing_file_is_named(folder: Path) -> None:
    path = data_file(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be opened: No such file"):
        Checkpoint(folder).verify()


@pytest.mark.parametrize("target", ["data", "manifest"])
@pytest.mark.parametrize("disguise", ["link", "fifo", "folder"])
def test_only_regular_files_are_opened(folder: Path, tmp_path: Path, target: str, disguise: str) -> None:
    """A link leads out of the checkpoint, a FIFO blocks for ever."""
    path = data_file(folder) if target == "data" else folder / "manifest.json"
    moved = tmp_path / "moved"
    path.rename(moved)
    {"link": lambda: path.symlink_to(moved), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir}[disguise]()
    with pytest.raises(CheckpointError, match=rf"{path.name}: is a {'FIFO' if disguise == 'fifo' else disguise}"):
        Checkpoint(folder).verify()


def test_a_pickle_beside_the_files_is_never_opened(folder: Path) -> None:
    """Unpickling runs code: a planted file must stay unread."""

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    (folder / "planted.pt").write_bytes(pickle.dumps(Planted()))
    os.mkfifo(folder / "planted.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    checkpoint.read("a", "weight")
    assert not (folder / "ran").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """A quota or size limit cuts a write short: what could not be written must not be recorded."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (133_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"rank-00000-000.safetensors: cannot be written: File too large"):
            write_rank_files(tmp_path, 0, simple_items(VALUES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may cut any write short; the rest must follow."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    write_simple(tmp_path, VALUES)
    monkeypatch.undo()
    Checkpoint(tmp_path).verify()
    assert torch.equal(Checkpoint(tmp_path).read("a", "weight"), VALUES["a"])


@pytest.mark.parametrize(
    ("place", "corrupt", "message"),
    [
        ("data", lambda data: data[:-1], "bytes after writing"),
        ("data", lambda data: bytes([data[0] ^ 4, *data[1:]]), "reads back other bytes than were written"),
        ("header", lambda data: bytes([*data[:50], data[50] ^ 4, *data[51:]]), "reads back another header"),
    ],
)
def test_bytes_lost_or_changed_on_the_way_to_the_disk_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, corrupt: Callable[[memoryview], bytes], message: str
) -> None:
    """The hash must be of what is on the disk and compared with what was meant, not of memory alone."""
    real, sizes = writer_module.write_fully, {"data": VALUES["a"].numel() * 4, "header": writer_module.OVERHEAD_BYTES}

    def write(fd: int, data: memoryview) -> None:
        real(fd, memoryview(corrupt(data)) if len(data) == sizes[place] else data)

    monkeypatch.setattr(writer_module, "write_fully", write)
    with pytest.raises(CheckpointError, match=message):
        write_rank_files(tmp_path, 0, simple_items({"a": VALUES["a"]}))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
