"""A real Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd in a folder of their own.

The nodes are named by loopback addresses, so that a job finds the first one by its name as it does on a cluster.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.ranks import free_ports
from tests.train.runs import environment

NODES = ("127.0.0.1", "127.0.0.2")
CONFIG = """
ClusterName=braid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES
"""
"""cred_expire is also how long a requeued job waits before it starts again; Slurm takes nothing below 5 s."""


def why_not_here() -> str | None:
    """Why no Slurm can be started on this machine, None when it can."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Cluster:
    """A running Slurm. folder: its configuration, state and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Standard output of a command in this cluster's environment."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{' '.join(command)} exited {done.returncode}: {done.stderr}"
        return done.stdout

    def launch(self, *arguments: str, cwd: Path) -> str:
        """Submits with `braid launch slurm ARGUMENTS --submit`, on two nodes; returns the job's id."""
        command = (
            sys.executable,
            "-m",
            "launch",
            "launch",
            "slurm",
            *arguments,
            "--nodes",
            "2",
            "--tasks-per-node",
            "1",
        )
        said = self.run(*command, "--submit", cwd=cwd)
        return next(line.split()[1] for line in said.splitlines() if line.startswith("submitted"))

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says about a job: JobState, Restarts, ExitCode and others."""
        said = self.run("scontrol", "show", "job", number)
        words = dict(word.split("=", 1) for word in said.split() if "=" in word)
        lines = dict(line.strip().split("=", 1) for line in said.splitlines() if "=" in line)
        return words | {key: lines[key] for key in ("StdOut", "Comment") if key in lines}

    def kill_tasks(self, node: str) -> None:
        """Kills the ranks on a node and what watches over them, as a power cut would."""
        here = {"SLURM_CONF": self.environment["SLURM_CONF"], "SLURMD_NODENAME": node}
        tasks = [process for process in psutil.process_iter() if here.items() <= _environ(process).items()]
        assert tasks, f"no job runs on {node}"
        for process in [task.parent() for task in tasks] + tasks:
            process.kill()

    def wait(self, number: str, what: str, ready: Callable[[], bool], timeout_s: float = 120) -> None:
        """Returns when `ready()`; fails, with what the job and Slurm have said, when that takes too long."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                job = self.job(number)
                logs = [Path(job["StdOut"]), self.folder / "slurmctld.log"]
                said = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())
                raise AssertionError(f"job {number} was never {what}: {job}\n{said}")
            time.sleep(0.05)

    def wait_for_end(self, number: str) -> dict[str, str]:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(number, "over", lambda: self.job(number)["JobState"] in over)
        return self.job(number)


@contextmanager
def slurm() -> Iterator[Cluster]:
    """Starts a cluster, and stops and removes all of it at the end, jobs included."""
    with ExitStack() as stack:
        # Not pytest's folder: Slurm keeps sockets there, whose paths may not be longer than 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="braid-slurm-", dir="/tmp")))
        cluster = Cluster(folder)
        stack.callback(_kill_all, cluster.environment["SLURM_CONF"])
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(host=host, folder=folder, nodes=NODES, ports=free_ports(3))
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        # --force: the socket may lie in a folder that only root can enter.
        stack.enter_context(
            _daemon(cluster, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        )
        _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        stack.enter_context(_daemon(cluster, "slurmctld", "-D"))
        for node in NODES:
            stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", node))
        _wait_until(lambda: cluster.run("sinfo", "-h", "-o", "%T %D", check=False).split() == ["idle", "2"], folder)
        yield cluster


@contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    with (cluster.folder / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(ready: Callable[[], bool], folder: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            raise AssertionError(f"Slurm did not start:\n{logs}")
        time.sleep(0.05)


def _kill_all(config: str) -> None:
    """Kills what jobs have left behind: every process that was started for this cluster, and the slurmstepd above it,
    which has no environment of its own any more."""
    left = [process for process in psutil.process_iter() if _environ(process).get("SLURM_CONF") == config]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            parent = process.parent()
            if parent is not None and parent.name() == "slurmstepd":
                parent.kill()
            process.kill()


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}
