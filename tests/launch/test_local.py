"""Local ranks, with small scripts in the place of training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.local import MALLOC, ROOT, Machines, rank_environment, run

LAUNCH = "import sys; from launch.local import run_ranks; sys.exit(run_ranks(sys.argv[1:], 2))"

WAITS = """
import os, signal, sys
from train.rank import die_with_launcher

die_with_launcher()
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(f"rank{os.environ['RANK']}", "w").write(str(os.getpid()))
os.write(1, b"ready\\n")
signal.pause()
"""

FAILS = """
import os, sys
from train.rank import report

report("training.tokens: got 0, wants a positive integer")
sys.exit(2)
"""

ONE_FAILS = """
import os, signal, sys, types
from train import __main__ as rank

if os.environ["RANK"] == "0":
    rank.report("runs/x: in use")
    sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.pause()

def fails(*_):
    raise RuntimeError("connection closed by peer")

sys.modules["train.config"] = types.SimpleNamespace(load_recipe=fails)
sys.modules["train.loop"] = types.SimpleNamespace(train=None)
sys.exit(rank.main(["recipe"]))
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """Two ranks of `script` under a launcher of their own."""
    (folder / "rank.py").write_text(script)
    code = f"import os; os.environ['BRAID_LAUNCHER'] = str(os.getpid()); {LAUNCH}"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", code, "rank.py"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2


def test_a_stop_signal_reaches_the_ranks_and_their_exit_code_comes_back(tmp_path: Path):
    process = start(WAITS, tmp_path)
    wait_until_ready(process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors == ""


def test_the_ranks_die_with_their_launcher(tmp_path: Path):
    process = start(WAITS, tmp_path)
    wait_until_ready(process)
    ranks = [psutil.Process(int((tmp_path / f"rank{rank}").read_text())) for rank in range(2)]
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]


def test_a_mistake_that_every_rank_finds_is_said_once(tmp_path: Path):
    process = start(FAILS, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == "braid: error: training.tokens: got 0, wants a positive integer\n"


def test_a_rank_that_fails_because_another_did_is_silent(tmp_path: Path):
    """Rank 0 alone finds the mistake; rank 1 loses its connection, and its traceback would hide the reason."""
    process = start(ONE_FAILS, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == "braid: error: runs/x: in use\n"


def test_a_killed_rank_ends_the_run_with_the_shells_code(tmp_path: Path):
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


def test_the_environment_of_a_rank_keeps_what_the_user_set():
    environment = rank_environment({"GLIBC_TUNABLES": "mine", "PYTHONPATH": "elsewhere"}, nproc=1)
    assert environment["GLIBC_TUNABLES"] == "mine"
    assert environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"


def test_ranks_share_the_cores_and_get_the_allocator():
    environment = rank_environment({}, nproc=10_000)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["GLIBC_TUNABLES"] == MALLOC


def test_no_ranks_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--nproc: got 0, wants a positive number"):
        run(tmp_path, [], 0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((0,), "--nodes: got 0, wants a positive number"),
        ((2,), "--rendezvous: not given, wants HOST:PORT"),
        ((2, "node1"), "--rendezvous: got 'node1', wants HOST:PORT, such as node1:29500"),
        ((2, "node1:99999"), "--rendezvous: got 'node1:99999'"),
        ((1, None, -1), "--restarts: got -1, wants 0 or more"),
    ],
)
def test_machines_that_cannot_meet_are_refused(arguments: tuple, line: str):
    with pytest.raises(ValueError, match=line):
        Machines(*arguments)


def test_a_mistake_is_no_reason_to_start_again(tmp_path: Path):
    """With restarts, too, a wrong recipe ends the run at once, is said once and exits with 2."""
    command = [sys.executable, "-m", "launch", "train", "tiny", "--nproc", "2", "--restarts", "5", "data.path=nowhere"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("nowhere") == 1 and done.stderr.startswith("braid: error: ")
