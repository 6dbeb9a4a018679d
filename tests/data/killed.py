"""Kills a preparation at every file that it commits, and lets the next one finish: run as a program by a test.

    python -m tests.data.killed CORPUS FOLDER

Each attempt is a child that dies by SIGKILL just before or just after its n-th rename, n = 1, 2, ... until an attempt
survives. After each death one child prepares without being killed. Prints the number of deaths.
"""

import os
import signal
import sys
from pathlib import Path

from data.prepare import prepare
from tests.data.corpus import config, quiet

SHARD_BYTES = 13_000


def child(corpus: Path, out: Path, die_at: int | None, before: bool) -> int:
    """Prepares in a process of its own; the signal that ended it, 0 when it came to its end."""
    pid = os.fork()
    if pid == 0:
        if die_at is not None:
            arm(die_at, before)
        prepare(config(corpus, out, shard_bytes=SHARD_BYTES), log=quiet)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a preparation failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def arm(die_at: int, before: bool) -> None:
    rename, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == die_at and before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def main(corpus: Path, folder: Path) -> None:
    deaths = 0
    while True:
        out = folder / f"{deaths:03d}"
        if not child(corpus, out, die_at=deaths // 2 + 1, before=deaths % 2 == 0):
            break
        deaths += 1
        assert child(corpus, out, die_at=None, before=False) == 0
    print(deaths)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
