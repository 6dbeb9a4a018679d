"""A job that `braid launch slurm` wrote, in a real Slurm of two nodes."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import NODES, Cluster, slurm
from tests.train.runs import braid, curve, events, prepare_tiny

pytestmark = pytest.mark.slurm

STEPS = 120
RECIPE = ("tiny", f"training.tokens={STEPS * 512}", "checkpoints.every_tokens=10_240", "evaluation.max_tokens=512")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, in a folder whose name has to be quoted."""
    return prepare_tiny(tmp_path_factory.mktemp("it's a 100% cluster"))


def numbers(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["batch_hash"]) for line in curve(run)]


def test_a_job_saves_at_its_time_limit_requeues_itself_and_ends_on_the_same_curve(cluster: Cluster, folder: Path):
    """The signal is the one that Slurm sends before a time limit: SIGUSR1 to the batch shell alone."""
    run = folder / "runs/requeued"
    job = cluster.launch(*RECIPE, "name=requeued", "--time", "1:00:00", cwd=folder)
    cluster.wait(job, "at step 5", lambda: len(curve(run)) >= 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "requeued", lambda: cluster.job(job)["Restarts"] == "1")
    stopped = len(curve(run))
    assert 5 <= stopped < STEPS, "the run was over before the signal came"
    braid("launch", "local", *RECIPE, "name=whole", "--nproc", "2", cwd=folder)
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert [(event["step"], event["ranks"]) for event in events(run, "resumed")] == [(stopped, 2)]
    assert not events(run, "lock_taken"), "the first start left without giving the lock back"
    assert numbers(run) == numbers(folder / "runs/whole")
    log = (run / f"slurm-{job}.out").read_text()
    assert f"start 0 on 127.0.0.[1-2], rank 0 at 127.0.0.1:{20000 + int(job)}, newest checkpoint: none" in log
    assert f"start 1 on 127.0.0.[1-2], rank 0 at 127.0.0.1:{20000 + int(job)}, newest checkpoint: tokens-" in log


def test_scancel_saves_and_ends_the_job_for_good(cluster: Cluster, folder: Path):
    run = folder / "runs/cancelled"
    options = ("name=cancelled", "training.tokens=1_000_000_000", "--sbatch", 'comment=it\'s "mine" # here')
    job = cluster.launch(*RECIPE, *options, cwd=folder)
    assert cluster.job(job)["Comment"] == 'it\'s "mine" # here', "sbatch does not read quotes as the script writes them"
    cluster.wait(job, "at step 5", lambda: len(curve(run)) >= 5)
    cluster.run("scancel", job)
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("CANCELLED", "75:0", "0")
    last = events(run, "saved")[-1]
    assert last["step"] == len(curve(run))
    assert (run / "checkpoints" / last["checkpoint"] / "manifest.json").exists()
    assert not (run / "lock.json").exists()


def test_what_slurm_refuses_is_one_line(cluster: Cluster, folder: Path):
    with pytest.raises(
        AssertionError, match="exited 2: braid: error: sbatch: .*partition.*; the script is "
    ) as refused:
        cluster.launch(*RECIPE, "name=refused", "--partition", "nowhere", cwd=folder)
    assert str(refused.value).count("\n") == 1


@pytest.mark.slow
def test_a_node_that_dies_does_not_end_the_run(cluster: Cluster, folder: Path):
    """Its rank dies, the other one fails; srun holds the job until Slurm knows of the node and requeues the job."""
    run = folder / "runs/failed"
    job = cluster.launch(*RECIPE, "name=failed", "training.tokens=1_000_000_000", cwd=folder)
    cluster.wait(job, "saved", lambda: any((run / "checkpoints").glob("tokens-*")))
    cluster.kill_tasks(NODES[1])
    log = run / f"slurm-{job}.out"
    cluster.wait(job, "failed on the other node", lambda: "task 0: Exited with exit code 74" in log.read_text())
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    cluster.wait(job, "requeued", lambda: cluster.job(job)["Restarts"] == "1")
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume", check=False)  # it may be back already
    cluster.wait(job, "resumed", lambda: bool(events(run, "resumed")))
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job)["JobState"] == "CANCELLED"
    assert events(run, "resumed")[0]["step"] > 0


@pytest.mark.slow
def test_the_time_limit_itself_requeues_the_job(cluster: Cluster, folder: Path):
    """Slurm's own clock, which looks every 30 s and counts in minutes: the signal comes 30 to 60 s after the start."""
    run = folder / "runs/limited"
    job = cluster.launch(
        *RECIPE, "name=limited", "training.tokens=1_000_000_000", "--time", "2", "--signal-before", "60", cwd=folder
    )
    cluster.wait(job, "requeued", lambda: cluster.job(job)["Restarts"] == "1", timeout_s=180)
    cluster.wait(job, "resumed", lambda: bool(events(run, "resumed")))
    assert events(run, "stopping")[0]["signal"] == signal.SIGUSR1
    assert events(run, "resumed")[0]["step"] == events(run, "stopping")[0]["step"]
    cluster.run("scancel", job)
    cluster.wait_for_end(job)
