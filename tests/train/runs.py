"""Real training runs for tests: a tiny corpus, a tiny braid, `braid train` as a user starts it, and what to compare it
with."""

import atexit
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def environment(cuda: bool = False) -> dict[str, str]:
    """One thread a rank, no GPU unless asked for, nothing inherited from an outer launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE"))}
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    hidden = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | hidden


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Small text files of unequal length made of a few words, so that a tiny model can learn from them."""
    words = ["braid", "state", "space", "model", "token", "layer", "window", "scan", "gate", "norm", "head", "loss"]
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        lines = [
            " ".join(generator.choice(words) for _ in range(generator.randint(2, 9)))
            for _ in range(generator.randint(1, 40))
        ]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@functools.cache
def _prepared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="braid-prepared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_corpus(folder / "corpus")
    braid("prepare", "tiny", cwd=folder)
    return folder


def prepare_tiny(folder: Path) -> Path:
    """Makes `folder` one where `braid prepare tiny` has run."""
    return shutil.copytree(_prepared(), folder, dirs_exist_ok=True)


def train_here(folder: str, recipe: str, overrides: list[str]) -> int:
    """On one rank: what `braid train` runs on each."""
    from train.config import load_recipe
    from train.loop import train

    os.chdir(folder)
    return train(load_recipe(ROOT / f"launch/recipes/{recipe}.toml", overrides))


def trained(*overrides: str, cwd: Path, ranks: int = 1, recipe: str = "tiny") -> None:
    """The same training as `braid train RECIPE OVERRIDES`, without the time that starting each rank takes: for runs
    whose start from the command line is not what a test is about."""
    assert run_ranks(train_here, ranks, str(cwd), recipe, list(overrides), timeout_s=600) == [0] * ranks


def braid(*arguments: str, cwd: Path, check: bool = True, cuda: bool = False) -> subprocess.CompletedProcess[str]:
    """`braid ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "launch", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(cuda), capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, f"{' '.join(arguments)} exited {done.returncode}:\n{done.stderr[-4000:]}"
    return done


def start(*arguments: str, cwd: Path, cuda: bool = False) -> subprocess.Popen[bytes]:
    """`braid ARGUMENTS` in a process group of its own, so that all its ranks can be killed at once."""
    with (cwd / "started.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments],
            cwd=cwd,
            env=environment(cuda),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, timeout_s: float = 300) -> None:
    """Returns when the run has recorded `step`; fails when it ends or the time is over first."""
    for _ in range(int(timeout_s / 0.02)):
        if len(curve(run)) >= step:
            return
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    log = (run.parents[1] / "started.log").read_text()
    raise AssertionError(f"the run never recorded step {step} (exit {process.poll()}):\n{log[-4000:]}")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process of the run, without warning."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rank_processes(pid: int) -> list[int]:
    """The training ranks below a `braid train` process: those that run `-m train`, in the order of their start."""
    import psutil

    return [
        child.pid
        for child in sorted(psutil.Process(pid).children(recursive=True), key=lambda child: child.create_time())
        if any(pair == ("-m", "train") for pair in zip(child.cmdline(), child.cmdline()[1:], strict=False))
        and "torch.distributed.run" not in child.cmdline()
    ]


def curve(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
