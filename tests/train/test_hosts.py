"""Two hosts with addresses of their own, torchrun on each, ZeRO 3: the run trains as on one, names a host that dies,
and goes on after a restart."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.train.hosts import Host, two_hosts, why_not_here
from tests.train.runs import ROOT, braid, curve, events, write_corpus
from train.network import choose_interface, spans_hosts
from train.stop import EXIT_STALLED, EXIT_STOPPED

STEPS, PER_STEP, PORT = 12, 8 * 64, 29501


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not_here():
        pytest.skip(f"two hosts: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    write_corpus(folder / "corpus")
    braid("prepare", "tiny", cwd=folder)
    return folder


@pytest.fixture
def hosts(workplace: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def settings(name: str, *overrides: str) -> list[str]:
    return [
        f"name={name}",
        "parallel.zero_stage=3",
        "training.compute_dtype=float32",
        f"checkpoints.every_tokens={2 * PER_STEP}",
        *overrides,
    ]


def by_braid(
    hosts: tuple[Host, Host], workplace: Path, name: str, *overrides: str, restarts: int = 0
) -> list[subprocess.Popen[bytes]]:
    """The same command on both hosts."""
    command = [sys.executable, "-m", "launch", "train", "tiny", "--nodes", "2", "--restarts", str(restarts)]
    command += ["--rendezvous", f"{hosts[0].address}:{PORT}", *settings(name, *overrides)]
    return [host.start(command, workplace, workplace / f"{name}-{host.name}.log") for host in hosts]


def by_torchrun(
    hosts: tuple[Host, Host], workplace: Path, name: str, *overrides: str, restarts: int = 0
) -> list[subprocess.Popen[bytes]]:
    """One agent a host with one rank each, as a user would start them by hand."""
    agents = []
    for host in hosts:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:{PORT}", f"--rdzv-id={name}"]
        command += [f"--rdzv-conf=is_host={int(host is hosts[0])}", f"--local-addr={host.address}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
        command += ["-m", "train", str(ROOT / "launch/recipes/tiny.toml"), *settings(name, *overrides)]
        log = workplace / f"{name}-{host.name}.log"
        agents.append(host.start(command, workplace, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    return agents


def wait_for(workplace: Path, name: str, step: int, agents: list[subprocess.Popen[bytes]]) -> None:
    for _ in range(6000):
        if len(curve(workplace / "runs" / name)) >= step:
            return
        try:
            agents[0].wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the run never recorded step {step}: {said(workplace, name, 'host-a')[-4000:]}")


def said(workplace: Path, name: str, host: str) -> str:
    return (workplace / f"{name}-{host}.log").read_text()


def rank_below(agent: subprocess.Popen[bytes]) -> int:
    """The rank that an agent has started."""
    children = psutil.Process(agent.pid).children(recursive=True)
    (rank,) = [child.pid for child in children if "train" in child.cmdline()]
    return rank


def test_a_run_over_two_hosts_trains_as_on_one(workplace: Path, hosts: tuple[Host, Host]) -> None:
    """Host names that no name server knows, and nobody told gloo which interface to take."""
    tokens = f"training.tokens={STEPS * PER_STEP}"
    agents = by_braid(hosts, workplace, "both", tokens)
    assert [agent.wait(240) for agent in agents] == [0, 0], said(workplace, "both", "host-b")[-4000:]
    whole = ("name=alone", "parallel.zero_stage=3", "training.compute_dtype=float32", tokens)
    braid("train", "tiny", "--nproc", "2", *whole, cwd=workplace)
    ours, theirs = (curve(workplace / "runs" / name) for name in ("both", "alone"))
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs], "the same ranks, the same bits"


def test_a_host_that_dies_is_named(workplace: Path, hosts: tuple[Host, Host]) -> None:
    """The other host must not wait for ever, nor leave its reader to guess which of a thousand hosts it was."""
    agents = by_torchrun(hosts, workplace, "dies", "training.tokens=51200000")
    wait_for(workplace, "dies", 3, agents)
    victim = rank_below(agents[1])
    os.killpg(agents[1].pid, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    assert agents[0].wait(120) != 0
    log = said(workplace, "dies", "host-a")
    assert f"rank 1 (process {victim} on host-b) died or does not answer" in log, log[-4000:]
    assert f"exitcode  : {EXIT_STALLED}" in log, log[-4000:]


@pytest.mark.parametrize("launcher", [by_braid, by_torchrun])
def test_a_dead_rank_is_started_again(workplace: Path, hosts: tuple[Host, Host], launcher: Callable[..., Any]) -> None:
    """--restarts, --max-restarts: all ranks come back from the last checkpoint and finish. Asked to stop, they stop."""
    name = launcher.__name__
    agents = launcher(hosts, workplace, name, "training.tokens=51200000", restarts=3)
    wait_for(workplace, name, 5, agents)
    os.kill(rank_below(agents[1]), signal.SIGKILL)
    run = workplace / "runs" / name
    agents[0].poll()
    wait_for(workplace, name, len(curve(run)) + 20, agents)
    assert min(event["step"] for event in events(run, "resumed")) >= 2
    if launcher is by_braid:
        agents[1].send_signal(signal.SIGTERM)
        assert [agent.wait(120) for agent in agents] == [EXIT_STOPPED] * 2, said(workplace, name, "host-a")[-4000:]
    steps = [line["step"] for line in curve(run)]
    assert steps == list(range(1, len(steps) + 1))


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's own words are "Unable to find address for", after a minute."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError, match=r"parallel\.interface: got 'ib9', but .* has .*lo"):
        choose_interface("ib9")
    choose_interface("lo")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == os.environ.pop("NCCL_SOCKET_IFNAME") == "lo"


@pytest.mark.parametrize(
    ("size", "local", "spans"), [("1", None, False), ("8", "8", False), ("8", "4", True), ("8", None, True)]
)
def test_ranks_of_one_host_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, size: str, local: str | None, spans: bool
) -> None:
    """On one host loopback is right, and what a user has set is never overruled."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert spans_hosts() is spans
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface(None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_interface(None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "loopback needs no choice"
