"""Two jobs in one run folder would interleave their metrics and delete each other's checkpoints."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from train import lock as lock_module
from train.lock import Owner, RunLock, RunLocked

PROCESSES = get_context("fork")


def pretend(folder: Path, age_s: float = 0.0, **changes: Any) -> Owner:
    """Writes the lock of another owner, last heard of `age_s` ago."""
    owner = dataclasses.replace(Owner.this_process(), **changes)
    path = folder / "lock.json"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    before = path.stat().st_mtime - age_s
    os.utime(path, (before, before))
    return owner


def hold(folder: Path) -> tuple[Any, Connection]:
    """A process that holds the lock until it is killed or told to end."""
    mine, theirs = PROCESSES.Pipe()

    def work() -> None:
        with RunLock(folder):
            theirs.send("locked")
            theirs.recv()

    child = PROCESSES.Process(target=work, daemon=True)
    child.start()
    assert mine.recv() == "locked"
    return child, mine


def wait_until(condition: Callable[[], bool]) -> None:
    never = threading.Event()
    for _ in range(3000):
        if condition():
            return
        never.wait(0.01)
    raise AssertionError("it never came")


def owner_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lock.json").read_text())


def test_lock_names_its_owner_and_goes_at_the_end(tmp_path: Path) -> None:
    """A lock that stays would block the next run; one without a name could not be argued with."""
    with RunLock(tmp_path / "runs" / "a") as lock:
        found = owner_in(tmp_path / "runs" / "a")
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        assert lock.taken_from is None
    assert list((tmp_path / "runs" / "a").iterdir()) == []


def test_second_job_is_refused_and_told_the_owner(tmp_path: Path) -> None:
    """The second of two live jobs must stop before it writes anything, and the first must not notice."""
    child, pipe = hold(tmp_path)
    before = owner_in(tmp_path)
    with pytest.raises(RunLocked, match=rf"lock.json: in use by process {child.pid} on {socket.gethostname()}; wait"):
        RunLock(tmp_path).acquire()
    assert owner_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    pipe.send("end")
    child.join()
    with RunLock(tmp_path):
        pass


def test_one_process_cannot_take_it_twice(tmp_path: Path) -> None:
    """Two runs started from one notebook."""
    with RunLock(tmp_path), pytest.raises(RunLocked, match="in use"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("reaped", [True, False])
def test_takes_over_at_once_after_kill(tmp_path: Path, reaped: bool) -> None:
    """`braid train` after kill -9 resumes without waiting, also while the dead process still is a zombie."""
    child, _pipe = hold(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    if reaped:
        child.join()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with RunLock(tmp_path) as lock:
        assert lock.taken_from == f"process {child.pid} on {socket.gethostname()} is gone"
        assert owner_in(tmp_path)["pid"] == os.getpid()
    child.join()


def test_reused_process_number_is_another_process(tmp_path: Path) -> None:
    """After a crash the number may belong to a stranger, whose life must not block the run."""
    pretend(tmp_path, started=1)
    with RunLock(tmp_path) as lock:
        assert lock.taken_from is not None


def test_machine_that_was_started_again(tmp_path: Path) -> None:
    """After a power cut nothing of the owner is left, whatever number it had."""
    pretend(tmp_path, boot="another", pid_space="another")
    with RunLock(tmp_path) as lock:
        assert "started again" in str(lock.taken_from)


def test_requeued_job_takes_over_from_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm requeues a preempted job on another node under the same id; waiting for the heartbeat wastes the node."""
    pretend(tmp_path, host="node7", job="42", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(RunLocked, match=r"process \d+ on node7 \(Slurm job 42\)"):
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path) as lock:
        assert "requeued" in str(lock.taken_from)
    pretend(tmp_path, host="node7", job="43", restarts=0)
    with pytest.raises(RunLocked, match="node7"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"pid_space": "pid:[1]"}])
def test_job_out_of_sight_is_dead_when_its_heart_stops(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """Another machine's process, or another container's, cannot be looked up: only silence tells."""
    pretend(tmp_path, age_s=100, **elsewhere)
    with pytest.raises(RunLocked, match=r"last heard of 1\d\d s ago; it counts as dead after 200 s"):
        RunLock(tmp_path, stale_after_s=200).acquire()
    with RunLock(tmp_path, stale_after_s=50) as lock:
        assert "has not been heard of" in str(lock.taken_from)


def test_heartbeat_moves_while_the_job_does_something_else(tmp_path: Path) -> None:
    """A validation of an hour must not make a live job on another machine look dead."""
    path = tmp_path / "lock.json"
    with RunLock(tmp_path, beat_every_s=0.001):
        for _ in range(2):
            os.utime(path, (0, 0))
            wait_until(lambda: path.stat().st_mtime > 1e9)
    assert "lock heartbeat" not in [thread.name for thread in threading.enumerate()]


def test_heartbeat_outlives_a_failing_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server that restarts costs a beat, not the heart."""
    path, real = tmp_path / "lock.json", lock_module._open
    failures: list[Path] = []

    def fail_once(path: Path) -> int | None:
        if not failures:
            failures.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    with RunLock(tmp_path, beat_every_s=0.001) as lock:
        monkeypatch.setattr(lock_module, "_open", fail_once)
        wait_until(lambda: bool(failures))
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 1e9)
        lock.confirm()


def test_confirm_beats_at_once(tmp_path: Path) -> None:
    """What follows it is a commit, which nobody may take for that of a dead job."""
    with RunLock(tmp_path, beat_every_s=3600) as lock:
        os.utime(tmp_path / "lock.json", (0, 0))
        lock.confirm()
        assert (tmp_path / "lock.json").stat().st_mtime > 1e9


@pytest.mark.parametrize("fate", ["taken", "removed", "damaged"])
def test_job_that_lost_its_lock_stops(tmp_path: Path, fate: str) -> None:
    """A job suspended for an hour wakes up: the run is another's now, it must neither write, release nor beat."""
    lock = RunLock(tmp_path, beat_every_s=3600)
    lock.acquire()
    (tmp_path / "lock.json").unlink()
    if fate == "taken":
        pretend(tmp_path, age_s=100, host="node7", token="new")
    if fate == "damaged":
        (tmp_path / "lock.json").write_text("{}")
    words = {"taken": "taken over by process .* on node7", "removed": "was removed", "damaged": "by another job"}
    before = os.stat(tmp_path / "lock.json").st_mtime if fate == "taken" else None
    with pytest.raises(RunLocked, match=words[fate]):
        lock.confirm()
    assert before is None or os.stat(tmp_path / "lock.json").st_mtime == before
    lock.release()
    assert (tmp_path / "lock.json").exists() == (fate != "removed")


def test_a_loss_is_remembered(tmp_path: Path) -> None:
    """The other job came and went between two commits: what it committed must not be overwritten."""
    path = tmp_path / "lock.json"
    with RunLock(tmp_path, beat_every_s=0.001) as lock:
        path.rename(tmp_path / "kept")
        wait_until(lambda: "lock heartbeat" not in [thread.name for thread in threading.enumerate()])
        (tmp_path / "kept").rename(path)
        with pytest.raises(RunLocked, match="was removed while this job was running"):
            lock.confirm()


def test_heartbeat_does_not_keep_a_process_alive(tmp_path: Path) -> None:
    """A job that ends without releasing would otherwise hold its GPUs, and the run, for ever."""
    lock = RunLock(tmp_path)
    child = PROCESSES.Process(target=lock.acquire, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    with RunLock(tmp_path) as lock:
        assert "is gone" in str(lock.taken_from)


@pytest.mark.parametrize("write", [1, 2])
def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Half a lock would block the next start, and files of failed starts would gather. The second write is the one
    in place, on a file system without hard links."""
    real, writes = os.fsync, []

    def fsync(fd: int) -> None:
        writes.append(fd)
        if len(writes) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ValueError, match=r"lock.json: cannot be locked: No space left on device"):
        RunLock(tmp_path).acquire()
    assert len(writes) == write
    assert list(tmp_path.iterdir()) == []


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    """An array of jobs started at once on a dead run: two winners would train into one folder."""
    takers = 8
    for _ in range(5):
        pretend(tmp_path, started=1)
        begin, end = PROCESSES.Barrier(takers), PROCESSES.Barrier(takers)

        def work(begin: Any = begin, end: Any = end) -> None:
            lock, code = RunLock(tmp_path), 0
            begin.wait(30)
            try:
                lock.acquire()
            except RunLocked:
                code = 3
            end.wait(30)
            lock.release()
            os._exit(code)

        children = [PROCESSES.Process(target=work, daemon=True) for _ in range(takers)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert sorted(child.exitcode or 0 for child in children) == [0] + [3] * (takers - 1)
        assert list(tmp_path.iterdir()) == []


def test_a_taker_that_is_overtaken_finds_the_new_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race step by step: we read a dead owner, another job takes the lock first, then we go on."""
    pretend(tmp_path, started=1)
    real: Callable[[int], None] = lock_module._flock
    children: list[Any] = []

    def overtaken(fd: int) -> None:
        if not children:
            children.append(None)
            monkeypatch.setattr(lock_module, "_flock", real)
            children.append(hold(tmp_path))
        real(fd)

    monkeypatch.setattr(lock_module, "_flock", overtaken)
    with pytest.raises(RunLocked, match="in use by process"):
        RunLock(tmp_path).acquire()
    child, pipe = children[1]
    assert owner_in(tmp_path)["pid"] == child.pid
    pipe.send("end")
    child.join()


def test_a_second_taker_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the verdict that the owner is dead and the rename, nobody else may come to the same verdict."""
    pretend(tmp_path, started=1)
    real = RunLock._why_dead

    def observed(self: RunLock, fd: int, me: Owner, now: float) -> str:
        with (tmp_path / "lock.json").open() as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return real(self, fd, me, now)

    monkeypatch.setattr(RunLock, "_why_dead", observed)
    with RunLock(tmp_path) as lock:
        assert lock.taken_from is not None


def test_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network and cloud file systems refuse them."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path):
        assert owner_in(tmp_path)["pid"] == os.getpid()
        with pytest.raises(RunLocked, match="in use"):
            RunLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_damaged_lock_counts_by_its_age(tmp_path: Path) -> None:
    """A lock emptied by a power cut must not block for ever, nor be ignored while it is fresh."""
    path = tmp_path / "lock.json"
    for text in ("", "{}", "[1]", '{"host": 3}', "\x00" * 50):
        path.write_text(text)
        with pytest.raises(RunLocked, match="a job that its contents do not name"):
            RunLock(tmp_path).acquire()
        os.utime(path, (1, 1))
        with RunLock(tmp_path):
            pass


@pytest.mark.parametrize("disguise", ["link", "dangling", "fifo", "folder"])
def test_only_a_regular_file_is_a_lock(tmp_path: Path, disguise: str) -> None:
    """A FIFO would hang the start; a link would lock, or overwrite, something else."""
    path, other = tmp_path / "lock.json", tmp_path / "other"
    other.write_text("kept")
    {
        "link": lambda: path.symlink_to(other),
        "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[disguise]()
    with pytest.raises(RunLocked, match="is no regular file, delete it"):
        RunLock(tmp_path).acquire()
    assert other.read_text() == "kept"


def test_folder_that_cannot_hold_a_lock(tmp_path: Path) -> None:
    """One clear line instead of a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"lock.json: cannot be locked: (Not a directory|File exists)"):
        RunLock(tmp_path / "file").acquire()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    """A data worker that exits must not open the run to another job, nor wait for a thread that it does not have."""
    with RunLock(tmp_path, beat_every_s=0.001) as lock:
        child = PROCESSES.Process(target=lock.release, daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert (tmp_path / "lock.json").exists()
