"""Runs with Muon as a user starts them: they learn, survive a kill, and refuse what they cannot go on from."""

import random
from pathlib import Path

import pytest

from tests.train.runs import braid, curve, events, kill_group, prepare_tiny, start, trained, wait_for_step

STEPS = 24
MUON = ('optimizer={kind = "muon", learning_rate = 3e-3}', "parallel.zero_stage=0")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: `one` on one rank, `two` on two."""
    folder = prepare_tiny(tmp_path_factory.mktemp("muon"))
    for name, ranks in (("one", 1), ("two", 2)):
        trained(*settings(name), cwd=folder, ranks=ranks)
    return folder


def settings(name: str) -> list[str]:
    """Muon, saving every fifth step."""
    return [f"name={name}", *MUON, f"training.tokens={STEPS * 8 * 64}", f"checkpoints.every_tokens={5 * 8 * 64}"]


def arguments(name: str, ranks: int, *more: str) -> list[str]:
    """`braid train` on the tiny recipe."""
    return ["train", "tiny", "--nproc", str(ranks), *settings(name), *more]


def facts(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["batch_hash"], line["loss"], line["grad_norm"]) for line in lines]


def test_the_loss_falls_alike_on_any_number_of_ranks(workplace: Path) -> None:
    """The work that ranks share must not change what is computed."""
    one, two = (curve(workplace / "runs" / name) for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    assert one[-1]["loss"] < one[0]["loss"] - 0.5
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-4 * a["loss"], (a["step"], a["loss"], b["loss"])


@pytest.mark.slow
def test_kill_and_rerun_equals_an_uninterrupted_run(workplace: Path) -> None:
    """Momentum of matrices and moments of the rest come back, each to its own, bit for bit."""
    command = arguments("killed", 2)
    run = workplace / "runs" / "killed"
    process = start(*command, cwd=workplace)
    wait_for_step(process, run, random.Random(0).randint(7, STEPS - 6))
    kill_group(process)
    assert len(curve(run)) < STEPS, "the kill came too late to test anything"
    braid(*command, cwd=workplace)
    assert facts(curve(run)) == facts(curve(workplace / "runs" / "two"))
    assert events(run, "resumed"), "it resumed, or nothing was restored"


def test_a_run_goes_on_with_its_own_optimizer_only(workplace: Path) -> None:
    """A moment read as momentum would be a wrong number, not an error."""
    adamw = ("optimizer={learning_rate = 3e-3}", "parallel.zero_stage=0")
    done = braid(*arguments("one", 1, *adamw), cwd=workplace, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "optimizer.kind: got adamw, but " in line and "was saved with muon; wants that, or another name" in line
    begin = ("name=other", "start.checkpoint=runs/one")
    done = braid(*arguments("other", 1, *adamw, *begin), cwd=workplace, check=False)
    assert done.returncode == 2
    assert "start.optimizer: " in done.stderr and " has no optimizer/exp_avg of 'blocks.0.mixer." in done.stderr
    braid(*arguments("other", 1, *adamw, *begin, "start.optimizer=false", "training.tokens=512"), cwd=workplace)
    assert curve(workplace / "runs" / "other")[0]["loss"] < curve(workplace / "runs" / "one")[5]["loss"]


def test_stages_that_cut_matrices_are_refused_in_one_line(workplace: Path) -> None:
    """Before any rank has begun, with what to write instead."""
    done = braid("train", "tiny", "name=cut", "optimizer.kind=muon", cwd=workplace, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "parallel.zero_stage: got 1, wants 0: optimizer.kind muon" in done.stderr
