"""A rank that dies or stands still is named by the others, who do not wait for ever. Real processes, real signals."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.ranks import free_ports
from tests.train.runs import ROOT, curve, environment, prepare_tiny
from train.health import TrainingHealthError
from train.stop import EXIT_STALLED, EXIT_USER_ERROR
from train.watch import RankLost, Watch

LONG = ("training.tokens=51200000", "checkpoints.every_tokens=none", "evaluation.every_tokens=none")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("watch"))


def test_only_failed_collectives_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that all ranks agree on must not be blamed on those that left a moment earlier."""
    watch = Watch(SimpleNamespace(size=1, rank=0), tmp_path, 10, print)  # type: ignore[arg-type]
    monkeypatch.setattr(watch, "missing", lambda: ["rank 1 (process 7 on here)"])
    for error, expected in (
        (RuntimeError("Connection closed by peer"), RankLost),
        (TrainingHealthError("diverged"), TrainingHealthError),
        (ValueError("a mistake"), ValueError),
    ):
        with pytest.raises(expected), watch.naming_the_dead():
            raise error


def start_ranks(workplace: Path, name: str, *overrides: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, as srun starts them, in the middle of training."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    recipe = str(ROOT / "launch" / "recipes" / "tiny.toml")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "train", recipe, f"name={name}", *LONG, *overrides],
            cwd=workplace,
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for _ in range(6000):
        if len(curve(workplace / "runs" / name)) >= 3:
            return ranks
        try:
            ranks[0].wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the ranks never trained: {ranks[0].communicate()[1][-3000:]}")


def end(rank: subprocess.Popen[str], timeout_s: float = 90) -> tuple[int, str]:
    """Exit code and last words; the rank is killed if it does not end."""
    try:
        said = rank.communicate(timeout=timeout_s)[1]
    except subprocess.TimeoutExpired:
        rank.kill()
        raise
    return rank.returncode, said


def test_a_port_that_is_taken_is_named(workplace: Path) -> None:
    """A job beside this one, or one that is ending: a traceback through torch would not say what to change."""
    recipe = str(ROOT / "launch" / "recipes" / "tiny.toml")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "train", recipe, "name=taken"]
        done = subprocess.run(
            command, cwd=workplace, env=environment() | shared, capture_output=True, text=True, timeout=90
        )
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.strip() == (
        f"braid: error: MASTER_PORT: something else listens to {port} on this host; wants a free port, the same for "
        "every rank"
    )


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_is_named(workplace: Path, dies: int) -> None:
    """Fault 17: nobody should have to read a thousand logs to find the rank that died."""
    ranks = start_ranks(workplace, f"killed-{dies}")
    ranks[dies].kill()
    code, said = end(ranks[1 - dies])
    ranks[dies].communicate()
    assert code == EXIT_STALLED
    line = said.strip().splitlines()[-1]
    assert "rank 0" in line if dies == 0 else f"rank 1 (process {ranks[1].pid} on " in line
    assert "Traceback" not in said


def test_a_stopped_rank_is_named_and_the_stacks_are_kept(workplace: Path) -> None:
    """Fault 18: a machine that swaps, a hung driver, a debugger left open."""
    ranks = start_ranks(workplace, "stopped", "parallel.stall_s=5")
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        code, said = end(ranks[0])
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert code == EXIT_STALLED
    line = said.strip().splitlines()[-1]
    assert "has made no progress for 5 s" in line and f"rank 1 (process {ranks[1].pid} on " in line
    stacks = (workplace / "runs" / "stopped" / "stacks" / "rank-00000.txt").read_text()
    assert "loop.py" in stacks and "checkpoint" not in stacks.splitlines()[0]


def test_the_launcher_passes_it_on(workplace: Path) -> None:
    """Under `braid train --nproc`, too, the one line names the dead rank, and no process is left."""
    from tests.train.runs import rank_processes, start, wait_for_step

    process = start("train", "tiny", "--nproc", "2", "name=launched", *LONG, cwd=workplace)
    wait_for_step(process, workplace / "runs" / "launched", 3)
    victims = rank_processes(process.pid)
    os.kill(victims[1], signal.SIGKILL)
    code = process.wait(90)
    assert code in (EXIT_STALLED, 128 + signal.SIGKILL)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in victims)
