"""A checkpoint is whole or absent, whatever is killed, full, slow or broken."""

import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.weights import writer
from model.weights.files import CheckpointError
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from tests.model.weights.layouts import simple_items
from tests.train.checkpoint.groups import die_at, on_threads, on_two_processes, save, values_at
from train.checkpoint.retention import sweep
from train.checkpoint.transaction import (
    Alone,
    Group,
    discover,
    leftovers,
    name_of,
    open_newest,
    set_aside,
)

SHARED = ["preflight", "folder", "write", "written"]
LEAD_ONLY = ["manifest", "rename", "renamed", "pointer"]


def check(root: Path, tokens: int) -> None:
    """The newest checkpoint is that of `tokens`, with its values."""
    checkpoint = open_newest(root)
    assert checkpoint is not None
    assert checkpoint.extra == {"tokens": tokens}
    for name, value in values_at(tokens).items():
        assert torch.equal(checkpoint.read(name, "weight"), value.flatten())


def test_two_ranks_commit_one_checkpoint(tmp_path: Path) -> None:
    """The plain case, on threads: both ranks get the path, nothing partial is left, the pointer names it."""
    root = tmp_path / "run" / "checkpoints"
    for tokens in (5, 1000):
        assert on_threads(2, partial(save, root, tokens)) == [root / name_of(tokens)] * 2
    assert sorted(path.name for path in root.iterdir()) == ["latest", "tokens-000000000005", "tokens-000000001000"]
    assert (root / "latest").read_text() == "tokens-000000001000\n"
    assert discover(root) == [root / name_of(1000), root / name_of(5)]
    check(root, 1000)


@pytest.mark.parametrize(
    ("stage", "rank"), [(stage, 0) for stage in SHARED + LEAD_ONLY] + [(stage, 1) for stage in SHARED]
)
def test_kill_at_every_step(tmp_path: Path, stage: str, rank: int) -> None:
    """SIGKILL of either process at any step: the old checkpoint or the new one is there, whole, and a rerun saves."""
    save(tmp_path, 1, Alone())
    codes = on_two_processes(
        lambda group: save(tmp_path, 2, group, stage=die_at(stage if group.rank == rank else "never"))
    )
    assert codes[rank] == -signal.SIGKILL
    committed = stage in ("renamed", "pointer")
    assert codes[1 - rank] == (0 if stage == "pointer" else 1), "the other rank must not believe that it saved"
    check(tmp_path, 2 if committed else 1)
    if stage in ("write", "written", "manifest", "rename"):
        assert leftovers(tmp_path) == [tmp_path / ".partial-tokens-000000000002"]
    sweep(tmp_path)
    assert leftovers(tmp_path) == []
    assert on_two_processes(lambda group: save(tmp_path, 2, group)) == [0, 0]
    check(tmp_path, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_between_two_fragments(tmp_path: Path, rank: int) -> None:
    """SIGKILL in the middle of a file."""
    save(tmp_path, 1, Alone())

    def work(group: Group) -> None:
        def items() -> Iterator:
            for index, item in enumerate(simple_items(values_at(2), group.rank, group.size)):
                if index == 1 and group.rank == rank:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

        save(tmp_path, 2, group, write=lambda folder: write_rank_files(folder, group.rank, items()))

    codes = on_two_processes(work)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    check(tmp_path, 1)
    assert sweep(tmp_path) == [".partial-tokens-000000000002: removed (partial checkpoint of a killed save)"]


@pytest.mark.parametrize("stage", ["rename", "replaced", "renamed", "pointer"])
def test_kill_while_saving_the_same_tokens_again(tmp_path: Path, stage: str) -> None:
    """The one checkpoint of this name must survive its own replacement."""
    save(tmp_path, 2, Alone())
    assert on_two_processes(lambda group: save(tmp_path, 2, group, stage=die_at(stage)))[0] == -signal.SIGKILL
    sweep(tmp_path)
    check(tmp_path, 2)
    assert leftovers(tmp_path) == []


def test_nothing_is_committed_before_the_slowest_rank(tmp_path: Path) -> None:
    """Rank 0 done, rank 1 still writing: a commit record now would name files that do not exist yet."""
    waiting, go = threading.Event(), threading.Event()

    def slow(group: Group) -> Path:
        def write(folder: Path) -> list:
            records = write_rank_files(folder, group.rank, simple_items(values_at(3), group.rank, group.size))
            if group.rank == 1:
                waiting.set()
                assert go.wait(30)
            return records

        return save(tmp_path, 3, group, write=write)

    results: list = []
    saving = threading.Thread(target=lambda: results.extend(on_threads(2, slow)))
    saving.start()
    assert waiting.wait(30)
    assert discover(tmp_path) == []
    assert not list(tmp_path.rglob("manifest.json"))
    assert not (tmp_path / "latest").exists()
    go.set()
    saving.join(60)
    assert results == [tmp_path / name_of(3)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_fails_the_save_on_all(tmp_path: Path, rank: int) -> None:
    """Ranks that disagree on whether a save succeeded resume from different checkpoints."""
    save(tmp_path, 1, Alone())

    def work(group: Group) -> None:
        def write(folder: Path) -> list:
            if group.rank == rank:
                raise RuntimeError("the disk is on fire")
            return write_rank_files(folder, group.rank, simple_items(values_at(2), group.rank, group.size))

        save(tmp_path, 2, group, write=write)

    first, second = on_threads(2, work)
    assert isinstance(first, CheckpointError)
    assert str(first) == str(second) == f"checkpoint {name_of(2)}: rank {rank}: RuntimeError: the disk is on fire"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", name_of(1)]
    check(tmp_path, 1)


def test_a_rank_that_forgets_its_share_fails_the_save(tmp_path: Path) -> None:
    """A gap must be found while the weights are still in memory."""
    faults = on_threads(
        2,
        lambda group: save(
            tmp_path,
            2,
            group,
            write=lambda folder: [] if group.rank else write_rank_files(folder, 0, simple_items(values_at(2), 0, 2)),
        ),
    )
    assert all(
        "rank 0: weight 'w': box ((0, 16), (0, 4)) ends at element 64, found owners up to 32" in str(fault)
        for fault in faults
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    """A run folder on a node's own disk: rank 0 commits files that it cannot see."""

    def work(group: Group) -> None:
        def write(folder: Path) -> list:
            records = write_rank_files(folder, group.rank, simple_items(values_at(2), group.rank, group.size))
            if group.rank == 1:
                (folder / records[0].name).unlink()
            return records

        save(tmp_path, 2, group, write=write)

    assert all("do all ranks share this file system?" in str(fault) for fault in on_threads(2, work))


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path) -> None:
    """Rank 1 needs more than there is: all ranks say so in one line, and nothing is touched."""
    faults = on_threads(2, lambda group: save(tmp_path, 2, group, bytes_needed=group.rank * 2**60))
    assert str(faults[0]) == str(faults[1])
    assert "MiB free, the checkpoint needs 1,099,511,627,776.2 MiB; make room or keep fewer checkpoints" in str(
        faults[0]
    )
    assert list(tmp_path.iterdir()) == []


def test_the_free_space_counts_all_ranks_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's share fits, both do not; one byte more and they do."""
    needed = 2 * (1_000_000 + writer.OVERHEAD_BYTES)
    save(tmp_path, 1, Alone())
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(os, "statvfs", lambda path, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        first, second = on_threads(2, lambda group: save(tmp_path, 2, group, bytes_needed=1_000_000))
        assert str(first) == str(second)
        assert isinstance(first, CheckpointError) == (not fits)
        if not fits:
            assert "2.2 MiB free, the checkpoint needs 2.2 MiB; make room or keep fewer" in str(first)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", name_of(1)]
    check(tmp_path, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """ENOSPC in spite of the preflight (another program took the room): the old checkpoint stays, all ranks agree."""
    save(tmp_path, 1, Alone())
    create, real, full = writer.create_file, writer.write_fully, []

    def create_file(path: Path) -> int:
        fd = create(path)
        if path.name.startswith(f"rank-{rank:05d}"):
            full.append(os.fstat(fd).st_ino)
        return fd

    def write_fully(fd: int, data: memoryview) -> None:
        if os.fstat(fd).st_ino in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, data)

    monkeypatch.setattr(writer, "create_file", create_file)
    monkeypatch.setattr(writer, "write_fully", write_fully)
    first, second = on_threads(2, lambda group: save(tmp_path, 2, group))
    assert str(first) == str(second)
    assert f"rank {rank}: " in str(first)
    assert "cannot be written: No space left on device" in str(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", name_of(1)]
    check(tmp_path, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_midway(small_disk: Path) -> None:
    """The same with a real disk, where part of a file was written."""
    save(small_disk, 1, Alone())

    def work(group: Group) -> None:
        large = simple_items({"w": torch.zeros(250_000)}, group.rank, group.size)
        save(small_disk, 2, group, write=lambda folder: write_rank_files(folder, group.rank, large))

    first, second = on_threads(2, work)
    assert str(first) == str(second)
    assert "cannot be written: No space left on device" in str(first)
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", name_of(1)]
    check(small_disk, 1)


def test_missing_or_empty_pointer_changes_nothing(tmp_path: Path) -> None:
    """The pointer is a hint: a run must not start over because a small file is empty."""
    save(tmp_path, 1, Alone())
    save(tmp_path, 2, Alone())
    (tmp_path / "latest").write_text("")
    check(tmp_path, 2)
    (tmp_path / "latest").unlink()
    check(tmp_path, 2)
    (tmp_path / "latest").write_text("tokens-000000000001\n")
    check(tmp_path, 2)


def test_no_checkpoint_is_none_and_a_damaged_only_one_is_an_error(tmp_path: Path) -> None:
    """`None` starts a run from nothing: it must mean that there is nothing."""
    assert open_newest(tmp_path / "absent") is None
    assert open_newest(tmp_path) is None
    save(tmp_path, 1, Alone())
    (tmp_path / name_of(1) / "manifest.json").unlink()
    seen: list[Path] = []
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be opened"):
        open_newest(tmp_path, damaged=lambda path, error: seen.append(path))
    assert seen == [tmp_path / name_of(1)]


def test_damage_is_refused_or_told_and_passed_over(tmp_path: Path) -> None:
    """Strict by default; falling back to an older checkpoint is the caller's decision, and all ranks take the same."""
    for tokens in (1, 2, 3):
        on_threads(2, partial(save, tmp_path, tokens))
    os.truncate(tmp_path / name_of(3) / "rank-00001-000.safetensors", 1000)
    path = tmp_path / name_of(2) / "rank-00001-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    faults = on_threads(2, lambda group: open_newest(tmp_path, group))
    assert str(faults[0]) == str(faults[1])
    assert "has 1000 bytes" in str(faults[0])
    told: list[str] = []
    found = on_threads(2, lambda group: open_newest(tmp_path, group, damaged=lambda p, e: told.append(str(e))))
    assert [checkpoint.folder for checkpoint in found] == [tmp_path / name_of(1)] * 2
    assert sum("SHA-256" in line for line in told) == 2
    assert set_aside(tmp_path / name_of(3)).name == ".broken-tokens-000000000003"
    save(tmp_path, 3, Alone())
    check(tmp_path, 3)


def test_the_ranks_share_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 ranks that each hash everything would resume for hours; each file is hashed once."""
    on_threads(2, lambda group: save(tmp_path, 1, group))
    hashed: list[str] = []
    real = Checkpoint._verify_file

    def counted(self: Checkpoint, name: str, file) -> None:
        if self._verified.get(name) != file.identity:
            hashed.append(name)
        real(self, name, file)

    monkeypatch.setattr(Checkpoint, "_verify_file", counted)
    for checkpoint in on_threads(2, lambda group: open_newest(tmp_path, group)):
        assert torch.equal(checkpoint.read("w", "weight"), values_at(1)["w"].flatten())
    assert sorted(hashed) == ["rank-00000-000.safetensors", "rank-00001-000.safetensors"]


def test_discovery_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Partial folders, links, files and other names are never resumed from; they are not deleted either."""
    save(tmp_path / "elsewhere", 9, Alone())
    root = tmp_path / "checkpoints"
    save(root, 1, Alone())
    (root / name_of(9)).symlink_to(tmp_path / "elsewhere" / name_of(9))
    (root / name_of(8)).write_text("")
    shutil.copytree(root / name_of(1), root / ".partial-tokens-000000000007")
    shutil.copytree(root / name_of(1), root / "tokens-6")
    shutil.copytree(root / name_of(1), root / "best")
    assert discover(root) == [root / name_of(1)]
    assert leftovers(root) == [root / ".partial-tokens-000000000007"]


def test_names_sort_beyond_twelve_digits(tmp_path: Path) -> None:
    """15 trillion tokens take 14 digits: sorting names as text would resume from the wrong one."""
    for tokens in (15_000_000_000_000, 999_999_999_999):
        save(tmp_path, tokens, Alone())
    newest = open_newest(tmp_path)
    assert newest is not None and newest.folder == tmp_path / "tokens-15000000000000"
