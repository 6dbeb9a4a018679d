"""The lock of a run folder: one job at a time writes into it.

`lock.json` names its owner; its modification time is the heartbeat, moved by a thread however long a step, a validation
or a save takes. It appears by a hard link of a complete file (so it is never half written, and only one job can create
it) and is replaced by a rename while the taker holds a kernel lock on the file that it replaces (so of two takers one
comes second and finds the first).
"""

import errno
import fcntl
import json
import os
import socket
import stat
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from uuid import uuid4

LOCK = "lock.json"
STALE_AFTER_S = 1800.0
"""A job on another machine whose heartbeat is older than this counts as dead."""
BEAT_EVERY_S = 10.0


class RunLocked(ValueError):
    """Another job owns the run folder; the message names it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. boot, pid_space, started: what makes `pid` mean one process for ever. job, restarts: of Slurm,
    "" and 0 outside."""

    host: str
    boot: str
    pid_space: str
    pid: int
    started: int
    job: str
    restarts: int
    token: str

    @staticmethod
    def this_process() -> "Owner":
        return Owner(
            host=socket.gethostname(),
            boot=_boot(),
            pid_space=_pid_space(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            token=uuid4().hex,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


class RunLock:
    """Context manager: entering takes the lock or raises RunLocked, leaving gives it back.

    A lock is taken over when its owner's process is gone from this machine (at once), when this is the same Slurm job
    requeued, or when its heartbeat is older than `stale_after_s` and the owner cannot be looked at from here.
    """

    def __init__(self, folder: Path, stale_after_s: float = STALE_AFTER_S, beat_every_s: float = BEAT_EVERY_S) -> None:
        self.path = folder / LOCK
        self.taken_from: str | None = None
        """Why the previous owner was counted as dead, when there was one: a line for the log."""
        self._stale_after_s, self._beat_every_s = stale_after_s, beat_every_s
        self._me: Owner | None = None
        self._heart: threading.Thread | None = None
        self._released = threading.Event()
        self._lost: str | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock and starts its heartbeat. Raises RunLocked naming the live owner, ValueError when the folder
        cannot hold a lock."""
        me = Owner.this_process()
        fresh = self.path.with_name(f".lock-{me.token}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(fresh, me)
                self._take(me, fresh)
            finally:
                fresh.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be locked: {error.strerror}") from error
        self._me, self._lost = me, None
        self._released = threading.Event()
        # A daemon: it must not keep a process alive that ends without releasing. A forked child does not have it.
        self._heart = threading.Thread(target=self._beat, args=(me, self._released), name="lock heartbeat", daemon=True)
        self._heart.start()

    def confirm(self) -> None:
        """Beats now. Raises RunLocked when the lock is no longer this job's, or once was not."""
        assert self._me is not None, "the lock was not acquired"
        if self._lost is not None:
            raise RunLocked(self._lost)
        self._touch(self._me)

    def release(self) -> None:
        """Stops the heartbeat and gives the lock back; does nothing when it is no longer this process's."""
        me, self._me = self._me, None
        if me is None or me.pid != os.getpid():
            return
        assert self._heart is not None
        self._released.set()
        self._heart.join()
        fd = _open(self.path)
        if fd is None:
            return
        try:
            _flock(fd)
            if _is_at(fd, self.path) and _parse(fd) == me:
                self.path.unlink()
        finally:
            os.close(fd)

    def _beat(self, me: Owner, released: threading.Event) -> None:
        while not released.wait(self._beat_every_s):
            try:
                self._touch(me)
            except RunLocked as error:
                self._lost = str(error)
                return
            except OSError:
                continue  # a network file system may come back, and `confirm` raises what is wrong with it

    def _touch(self, me: Owner) -> None:
        """Moves the heartbeat of our own file, never of one that has replaced it."""
        fd = _open(self.path)
        try:
            found = None if fd is None else _parse(fd)
            if fd is None or found is None or found.token != me.token:
                owner = "was removed" if fd is None else f"was taken over by {found or 'another job'}"
                raise RunLocked(
                    f"{self.path}: {owner} while this job was running; this job must not write here any more"
                )
            os.utime(fd)
        finally:
            if fd is not None:
                os.close(fd)

    def _take(self, me: Owner, fresh: Path) -> None:
        while True:
            try:
                _link(fresh, self.path, me)
                return
            except FileExistsError:
                pass
            fd = _open(self.path)
            if fd is None:
                continue
            try:
                _flock(fd)
                if not _is_at(fd, self.path):
                    continue
                reason = self._why_dead(fd, me, now=fresh.stat().st_mtime)
                os.rename(fresh, self.path)
            finally:
                os.close(fd)
            self.taken_from = reason
            self._confirm_taken(me)
            return

    def _confirm_taken(self, me: Owner) -> None:
        """On a file system without kernel locks two takers can both pass; the one renamed over sees it here or at its
        next beat."""
        found = _read(self.path)
        if found is None or found.token != me.token:
            raise RunLocked(f"{self.path}: another job ({found}) took the run folder over at the same time")

    def _why_dead(self, fd: int, me: Owner, now: float) -> str:
        """The reason to take over. Raises RunLocked when there is none. now: the file system's own clock."""
        owner = _parse(fd)
        age = max(0.0, now - os.fstat(fd).st_mtime)
        who = owner or "a job that its contents do not name"
        if owner is not None:
            if owner.job and owner.job == me.job and owner.restarts < me.restarts:
                return f"{owner} was requeued as this job"
            if owner.host == me.host and owner.boot != me.boot and owner.boot and me.boot:
                return f"{owner}: the machine was started again since"
            if owner.host == me.host and owner.pid_space == me.pid_space:
                if not _is_alive(owner):
                    return f"{owner} is gone"
                raise RunLocked(f"{self.path}: in use by {owner}; wait for it, stop it, or use another run folder")
        if age > self._stale_after_s:
            return f"{who} has not been heard of for {age:.0f} s"
        raise RunLocked(
            f"{self.path}: in use by {who}, last heard of {age:.0f} s ago; it counts as dead after "
            f"{self._stale_after_s:.0f} s, or delete the file when it is"
        )


def _write(path: Path, owner: Owner) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write((json.dumps(asdict(owner), indent=1) + "\n").encode())
            file.flush()
            os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)  # half a lock would name nobody and block until it is old
        raise


def _link(fresh: Path, path: Path, owner: Owner) -> None:
    """Raises FileExistsError when there is a lock. Where hard links are not allowed the file is created in place."""
    try:
        os.link(fresh, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _write(path, owner)


def _open(path: Path) -> int | None:
    """None when it is not there (any more). Raises RunLocked when it is no regular file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise RunLocked(f"{path}: is no regular file, delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RunLocked(f"{path}: is no regular file, delete it")
    return fd


def _read(path: Path) -> Owner | None:
    fd = _open(path)
    if fd is None:
        return None
    try:
        return _parse(fd)
    finally:
        os.close(fd)


def _parse(fd: int) -> Owner | None:
    """None when the contents name no owner (damaged, or of another program)."""
    try:
        found = json.loads(os.pread(fd, 1 << 16, 0))
    except ValueError:
        return None
    wants = {field.name: field.type for field in fields(Owner)}
    if not isinstance(found, dict) or found.keys() != wants.keys():
        return None
    return Owner(**found) if all(type(found[name]) is kind for name, kind in wants.items()) else None


def _flock(fd: int) -> None:
    """Held until the descriptor is closed. A file system without kernel locks goes without (see `_confirm_taken`)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` still is the file that was opened."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _is_alive(owner: Owner) -> bool:
    """Of this machine and process space. A process that has ended but was not waited for counts as gone."""
    started = _started(owner.pid)
    if started is not None:
        return started == owner.started
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None when it is gone, a zombie, or unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
