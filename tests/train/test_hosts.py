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
from tests.train.runs import ROOT, curve, events, prepare_tiny, trained
from train.network import choose_interface, spans_hosts
from train.stop import EXIT_STALLED, EXIT_STOPPED

STEPS, PER_STEP, PORT, TIMEOUT_S = 60, 8 * 64, 29501, 60


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not_here():
        pytest.skip(f"two hosts: {reason}")
    return prepare_tiny(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def alone(workplace: Path) -> list[tuple]:
    """What two ranks of one host record, never disturbed."""
    trained(*settings("alone"), cwd=workplace, ranks=2)
    return facts(workplace, "alone")


@pytest.fixture
def hosts(workplace: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def settings(name: str, *more: str) -> list[str]:
    return [
        f"name={name}",
        f"training.tokens={STEPS * PER_STEP}",
        f"parallel.timeout_s={TIMEOUT_S}",
        "parallel.zero_stage=3",
        "training.compute_dtype=float32",
        f"checkpoints.every_tokens={4 * PER_STEP}",
        "checkpoints.aside=false",  # saved before the next step, whatever the disk does
        *more,
    ]


def facts(workplace: Path, name: str) -> list[tuple]:
    """What must be equal bit for bit."""
    lines = curve(workplace / "runs" / name)
    return [(line["step"], line["batch_hash"], line["loss"], line["grad_norm"]) for line in lines]


def by_braid(hosts: tuple[Host, Host], workplace: Path, name: str, restarts: int = 0) -> list[subprocess.Popen[bytes]]:
    """The same command on both hosts."""
    command = [sys.executable, "-m", "launch", "train", "tiny", "--nodes", "2", "--restarts", str(restarts)]
    command += ["--rendezvous", f"{hosts[0].address}:{PORT}", *settings(name)]
    return [host.start(command, workplace, workplace / f"{name}-{host.name}.log") for host in hosts]


def by_torchrun(
    hosts: tuple[Host, Host], workplace: Path, name: str, restarts: int = 0
) -> list[subprocess.Popen[bytes]]:
    """One agent a host with one rank each, as a user would start them by hand."""
    agents = []
    for host in hosts:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:{PORT}", f"--rdzv-id={name}"]
        command += [f"--rdzv-conf=is_host={int(host is hosts[0])}", f"--local-addr={host.address}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
        command += ["-m", "train", str(ROOT / "launch/recipes/tiny.toml"), *settings(name)]
        log = workplace / f"{name}-{host.name}.log"
        agents.append(host.start(command, workplace, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    return agents


def wait_for(workplace: Path, name: str, step: int, agents: list[subprocess.Popen[bytes]]) -> None:
    """Returns when the run has recorded `step`."""
    until(lambda: len(curve(workplace / "runs" / name)) >= step, workplace, name, agents)


def until(happened: Callable[[], bool], workplace: Path, name: str, agents: list[subprocess.Popen[bytes]]) -> None:
    for _ in range(6000):
        if happened():
            return
        try:
            agents[0].wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the run ended or took too long: {said(workplace, name, 'host-a')[-4000:]}")


def said(workplace: Path, name: str, host: str) -> str:
    return (workplace / f"{name}-{host}.log").read_text()


def rank_below(agent: subprocess.Popen[bytes]) -> int:
    """The rank that an agent has started."""
    children = psutil.Process(agent.pid).children(recursive=True)
    (rank,) = [child.pid for child in children if "train" in child.cmdline()]
    return rank


def test_a_run_over_two_hosts_trains_as_on_one(workplace: Path, hosts: tuple[Host, Host], alone: list[tuple]) -> None:
    """Host names that no name server knows, and nobody told gloo which interface to take. The same ranks, the same
    bits."""
    agents = by_braid(hosts, workplace, "both")
    assert [agent.wait(240) for agent in agents] == [0, 0], said(workplace, "both", "host-b")[-4000:]
    assert facts(workplace, "both") == alone


@pytest.mark.slow
def test_two_ranks_a_host_with_hpz(workplace: Path, hosts: tuple[Host, Host]) -> None:
    """Each host keeps a second copy of the weights: the same bits as four ranks of one host without it."""
    command = [sys.executable, "-m", "launch", "train", "tiny", "--nodes", "2", "--nproc", "2"]
    command += ["--rendezvous", f"{hosts[0].address}:{PORT}", *settings("four", "parallel.hpz_ranks=2")]
    agents = [host.start(command, workplace, workplace / f"four-{host.name}.log") for host in hosts]
    assert [agent.wait(240) for agent in agents] == [0, 0], said(workplace, "four", "host-b")[-4000:]
    assert "ZeRO 3, weights twice in groups of 2" in said(workplace, "four", "host-a")
    trained(*settings("four-alone"), cwd=workplace, ranks=4)
    assert facts(workplace, "four") == facts(workplace, "four-alone")


@pytest.mark.parametrize(
    "whole", [pytest.param(True, id="host"), pytest.param(False, id="rank", marks=pytest.mark.slow)]
)
def test_who_died_is_named(workplace: Path, hosts: tuple[Host, Host], whole: bool) -> None:
    """A host with all that runs on it, or its rank alone: the other host must not wait for ever, nor leave its
    reader to guess which of a thousand hosts it was."""
    name = "dead-host" if whole else "dead-rank"
    agents = by_torchrun(hosts, workplace, name)
    wait_for(workplace, name, 3, agents)
    victim = rank_below(agents[1])
    if whole:
        os.killpg(agents[1].pid, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    assert agents[0].wait(TIMEOUT_S) != 0
    log = said(workplace, name, "host-a")
    assert f"rank 1 (process {victim} on host-b) died or does not answer" in log, log[-4000:]
    assert f"exitcode  : {EXIT_STALLED}" in log, log[-4000:]
    assert agents[1].wait(TIMEOUT_S) != 0


@pytest.mark.parametrize("launcher", [pytest.param(by_braid, marks=pytest.mark.slow), by_torchrun])
def test_a_dead_rank_is_started_again(
    workplace: Path, hosts: tuple[Host, Host], alone: list[tuple], launcher: Callable[..., Any]
) -> None:
    """--restarts, --max-restarts: all ranks come back from the last checkpoint and go on where an undisturbed run would
    be, to the end. Asked to stop on the way, they stop."""
    name = launcher.__name__
    agents = launcher(hosts, workplace, name, restarts=3)
    wait_for(workplace, name, 5, agents)
    os.kill(rank_below(agents[1]), signal.SIGKILL)
    run = workplace / "runs" / name
    until(lambda: bool(events(run, "resumed")), workplace, name, agents)
    stops = launcher is by_braid
    if stops:
        wait_for(workplace, name, events(run, "resumed")[0]["step"] + 5, agents)
        agents[1].send_signal(signal.SIGTERM)
    wanted = EXIT_STOPPED if stops else 0
    assert [agent.wait(120) for agent in agents] == [wanted] * 2, said(workplace, name, "host-a")[-4000:]
    assert min(event["step"] for event in events(run, "resumed")) >= 4
    recorded = facts(workplace, name)
    assert recorded == alone[: len(recorded)]
    assert stops or len(recorded) == STEPS


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
