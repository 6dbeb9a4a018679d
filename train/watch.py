"""Dead and stalled ranks: every rank says that it is alive, and none waits for ever for one that is not.

A thread of each rank counts up a number in the store through which the ranks found each other. When a collective fails,
or a step takes too long, a survivor looks whose number stands still and names it.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from train.health import TrainingHealthError
from train.parallel import Mesh
from train.stop import EXIT_STALLED

BEAT_S = 1.0
STILL_S = 3.5
"""A rank whose number stands still for so long is not alive."""


class RankLost(RuntimeError):
    """Another rank died or does not answer; the message names it."""


class Watch:
    """Context manager; its thread runs while it is active.

    folder: where stacks are written. stall_s: seconds without progress after which this rank writes its stacks and
    exits with EXIT_STALLED. report: told why, before that.
    """

    def __init__(self, mesh: Mesh, folder: Path, stall_s: float, report: Callable[[str], None]) -> None:
        self.mesh, self.folder, self.stall_s, self.report = mesh, folder, stall_s, report
        self._store = _open_store() if mesh.size > 1 else None
        self._prefix = f"braid/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._what: str | None = None
        self._since, self._unwatched = time.monotonic(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._store is not None:
            self._store.set(self._key("who", self.mesh.rank), f"process {os.getpid()} on {socket.gethostname()}")
            self._beat(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self, what: str) -> None:
        """This rank begins `what` ("step 12"): its clock starts anew. Before the first time nothing is a stall."""
        self._what, self._since = what, time.monotonic()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """For what may take longer than a step, and has a timeout of its own."""
        self._unwatched += 1
        try:
            yield
        finally:
            self._unwatched -= 1
            self._since = time.monotonic()

    @contextmanager
    def naming_the_dead(self) -> Iterator[None]:
        """Turns a failed collective into RankLost when another rank is not alive."""
        try:
            yield
        except TrainingHealthError:  # all ranks agreed on it
            raise
        except RuntimeError as error:
            missing = self.missing()
            if not missing:
                raise
            raise RankLost(f"{self._what or 'start'}: {', '.join(missing)} died or does not answer") from error

    def missing(self) -> list[str]:
        """Ranks that are not alive, with their process and host: those whose number stands still."""
        if self._store is None:
            return []
        try:
            before = self._numbers()
            time.sleep(STILL_S)
            still = [rank for rank, number in enumerate(self._numbers()) if number == before[rank]]
            return [self._named(rank) for rank in still if rank != self.mesh.rank]
        except (RuntimeError, ValueError):  # the store is gone with the process that kept it
            return ["rank 0 (or the launcher, which keeps the ranks' addresses)"]

    def _named(self, rank: int) -> str:
        assert self._store is not None
        key = self._key("who", rank)
        who = self._store.get(key).decode() if self._store.check([key]) else "never started"
        return f"rank {rank} ({who})"

    def _numbers(self) -> list[bytes]:
        assert self._store is not None
        keys = [self._key("beat", rank) for rank in range(self.mesh.size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _key(self, name: str, rank: int) -> str:
        return f"{self._prefix}/{name}/{rank}"

    def _beat(self, number: int) -> None:
        if self._store is not None:
            self._store.set(self._key("beat", self.mesh.rank), str(number))

    def _run(self) -> None:
        number = 0
        while not self._ended.wait(min(BEAT_S, self.stall_s / 4)):
            number += 1
            try:
                self._beat(number)
            except (RuntimeError, ValueError):
                return  # nobody is left to hear it; the next collective fails and says so
            watched = self._what is not None and not self._unwatched
            if watched and time.monotonic() - self._since > self.stall_s:
                self._give_up()

    def _give_up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.mesh.rank:05d}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        missing = self.missing()
        who = f"; {', '.join(missing)} does not answer" if missing else "; all ranks are alive"
        self.report(f"{self._what} has made no progress for {self.stall_s:g} s{who}; stacks are in {path}")
        os._exit(EXIT_STALLED)


def _open_store() -> dist.TCPStore:
    """A connection of our own to the store of torchrun, or of rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
