"""Triton kernels, ours and mamba-ssm's, without a GPU: run by Triton's interpreter, and compiled for GPUs by name. On a
CUDA device they run as compiled. What each file checks is in `tests/model/ops/kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHECKS = Path(__file__).parent / "kernels"
PEERS = Path(os.environ.get("BRAID_PEERS") or Path(sys.prefix) / "peers")
"""Where `make peers` puts mamba-ssm and a Triton for the CPU."""


def check(name: str, marker: str, cache: Path, *, peers: bool, interpreted: bool) -> None:
    """Runs a file of checks in a process of its own."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": str(int(interpreted))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(PEERS), str(ROOT)] if peers else [str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", marker, str(CHECKS / f"check_{name}.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(done.stdout.strip().splitlines()[-2])
    assert done.returncode == 0, f"{name}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout


FAST = [pytest.param(name, "not slow", id=f"{name}-fast") for name in ("parity", "scan", "conv", "rows")]
SLOW = [pytest.param(name, "slow", id=f"{name}-slow", marks=pytest.mark.slow) for name in ("parity", "scan", "conv")]
COMPILED = [
    pytest.param("compile", "not slow", id="compile-fast"),
    pytest.param("compile", "slow", id="compile-slow", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "marker"), [*FAST, *SLOW, *COMPILED])
def test_without_a_gpu(name: str, marker: str, tmp_path: Path):
    """parity: breaks when our SSD or scan and mamba-ssm's code are no longer the same map. scan, conv, rows: when a
    kernel of ours is wrong. compile: when a GPU's compiler would refuse one."""
    package = "mamba_ssm" if name == "parity" else "triton"
    if not (PEERS / package).is_dir():
        pytest.skip(f"no {package} in {PEERS}: `make peers` puts it there")
    check(name, marker, tmp_path, peers=True, interpreted=name != "compile")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "marker"), [*FAST, *SLOW])
def test_on_this_gpu(name: str, marker: str, tmp_path: Path):
    """Breaks when a compiled kernel differs from the interpreted one; with the machine's own Triton and mamba-ssm."""
    check(name, marker, tmp_path, peers=False, interpreted=False)
