"""Starts the ranks of a training run on this machine, alone or as one of several that do the same.

One rank replaces this process. Several run under torchrun's elastic agent, in this process: signals that ask a run to
stop are passed on to the ranks, the agent's own reports are silent, and the exit code is that of the rank that failed
first. A rank dies with its launcher, however that ends.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from train.network import address_towards, is_here
from train.rank import VERDICT, read_verdict

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
RENDEZVOUS_S = 600
"""How long machines wait for each other."""
ROOT = Path(__file__).parents[1]

# Tensors up to 8 GiB from a heap that is kept and backed by huge pages: glibc would map, zero and unmap each one.
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
RANK_DEFAULTS = {"GLIBC_TUNABLES": MALLOC, "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}
"""Environment of every rank, on this machine and on a cluster, where the user has set nothing else."""


@dataclass(frozen=True)
class Machines:
    """Of a run. count: how many start it, each with the same command. rendezvous: HOST:PORT where they find each other,
    on one of them. restarts: how often the ranks are started again after one of them has failed."""

    count: int = 1
    rendezvous: str | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--nodes: got {self.count}, wants a positive number of machines")
        if self.restarts < 0:
            raise ValueError(f"--restarts: got {self.restarts}, wants 0 or more")
        if self.rendezvous is None and self.count > 1:
            raise ValueError("--rendezvous: not given, wants HOST:PORT, the same on every machine and HOST one of them")
        host, _, port = (self.rendezvous or "localhost:0").rpartition(":")
        if not host or not port.isdecimal() or int(port) >= 1 << 16:
            raise ValueError(f"--rendezvous: got {self.rendezvous!r}, wants HOST:PORT, such as node1:29500")

    @property
    def host(self) -> str:
        return "localhost" if self.rendezvous is None else self.rendezvous.rpartition(":")[0].strip("[]")


def run(recipe: Path, overrides: Sequence[str], nproc: int, machines: Machines = Machines()) -> int:
    """Trains `recipe` on `nproc` ranks of this machine; returns the exit code. A single rank in all replaces this
    process."""
    if nproc < 1:
        raise ValueError(f"--nproc: got {nproc}, wants a positive number of ranks")
    command = ["-m", "train", str(recipe), *overrides]
    environment = rank_environment(os.environ, nproc)
    if nproc == 1 and machines == Machines():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *command], environment)
    return launch(command, nproc, machines, recipe.stem)


def launch(command: Sequence[str], nproc: int, machines: Machines = Machines(), name: str = "") -> int:
    """`run_ranks` for a program of Braid, whose ranks die with this process and leave their errors to it."""
    os.environ.update(rank_environment(os.environ, nproc) | {"BRAID_LAUNCHER": str(os.getpid())})
    return run_ranks(command, nproc, machines, name)


def rank_environment(inherited: Mapping[str, str], nproc: int) -> dict[str, str]:
    """What must be set before a rank starts; what the user has set stays.

    The rank imports Braid from where this file lies, whatever the current directory holds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // nproc)), **RANK_DEFAULTS}
    paths = [str(ROOT), inherited.get("PYTHONPATH", "")]
    return defaults | dict(inherited) | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_ranks(command: Sequence[str], nproc: int, machines: Machines = Machines(), name: str = "") -> int:
    """Runs `python COMMAND` as `nproc` ranks, beside those of the other machines, to their end; returns the exit code.
    name: of the job, the same on all machines."""
    if machines.restarts:  # in a store that outlives them, ranks would find each other's old addresses
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with _forwarded_signals(), tempfile.TemporaryDirectory(prefix="braid-ranks-") as logs:
        os.environ[VERDICT] = str(Path(logs) / "verdict")
        logging.disable(logging.CRITICAL)
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=machines.count,
            max_nodes=machines.count,
            nproc_per_node=nproc,
            run_id=uuid4().hex if machines.rendezvous is None else f"braid {name}",
            rdzv_backend="c10d",
            rdzv_endpoint=machines.rendezvous or "localhost:0",
            rdzv_configs={"is_host": is_here(machines.host), "timeout": RENDEZVOUS_S},
            local_addr=address_towards(machines.host) or "localhost",
            max_restarts=machines.restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return _report(error.failures.values(), quiet=machines.restarts > 0)
        except RendezvousError as error:
            raise ValueError(
                f"--rendezvous: {machines.rendezvous}: {' '.join(str(error).split())}; "
                f"wants the same command on {machines.count} machines within {RENDEZVOUS_S} s"
            ) from error
        return read_verdict()


def _report(failures: Any, quiet: bool) -> int:
    """Prints the one line of the first rank that explained itself, unless it has printed it; returns the exit code of
    the first that failed."""
    first = min(failures, key=_blame)
    if isinstance(first.message, dict) and not quiet:
        print(first.message["message"], file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _blame(failure: Any) -> tuple[bool, bool, int, int]:
    """Orders failures: explained ones first, ranks that the agent terminated because of another's failure last."""
    explained = isinstance(failure.message, dict)
    return not explained, failure.exitcode == -signal.SIGTERM, failure.timestamp, failure.local_rank


@contextmanager
def _forwarded_signals() -> Iterator[None]:
    """Passes stop signals on to the ranks while active; before there are any, a stop signal ends this process."""
    import psutil

    def forward(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:
            sys.exit(128 + number)

    heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
