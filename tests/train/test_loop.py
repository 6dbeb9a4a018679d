"""The loop under a fault: a gradient that is not finite, on one rank of two, through the whole of `train()`."""

import os
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.runs import ROOT, braid, curve, events, prepare_tiny

STEPS = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("loop"))


def train_poisoned(folder: str, name: str, poisoned: list[int], overrides: list[str]) -> str:
    """`train()` with the loss of rank 1 made NaN at some steps; returns how it ended."""
    from train import loop
    from train.config import load_recipe
    from train.health import TrainingHealthError

    os.chdir(folder)
    clean = loop.forward

    def forward(run, batch):
        out = clean(run, batch)
        spoil = run.mesh.rank == 1 and run.clock.step + 1 in poisoned and run.engine.module.training
        return out._replace(nll=out.nll * float("nan")) if spoil else out

    loop.forward = forward
    recipe = load_recipe(
        ROOT / "launch/recipes/tiny.toml", [f"name={name}", f"training.tokens={STEPS * 512}", *overrides]
    )
    try:
        return f"exit {loop.train(recipe)}"
    except TrainingHealthError as error:
        return str(error)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_skips_the_step_on_all(workplace: Path, stage: int) -> None:
    """The step is logged and skipped, and training goes on; no weight has seen the NaN, or every later loss would."""
    name = f"poisoned-{stage}"
    ends = run_ranks(train_poisoned, 2, str(workplace), name, [3], [f"parallel.zero_stage={stage}"])
    assert ends == ["exit 0", "exit 0"]
    lines = curve(workplace / "runs" / name)
    assert [line["updated"] for line in lines] == [True, True, False, True, True, True]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    assert lines[2]["grad_norm"] is None
    assert lines[5]["loss"] < lines[0]["loss"]
    (event,) = events(workplace / "runs" / name, "update_skipped")
    assert (event["step"], event["grad_norm"]) == (3, "nan")


def test_too_many_in_a_row_end_the_run(workplace: Path) -> None:
    """Going on would only burn the budget; the message says at which step and where to look."""
    limit = "training.nonfinite_limit=3"
    ends = run_ranks(train_poisoned, 2, str(workplace), "hopeless", [2, 3, 4, 5, 6], [limit])
    assert ends[0] == ends[1]
    assert ends[0].startswith("step 4: gradient norm is nan, and 3 updates in a row were skipped")
    run = workplace / "runs" / "hopeless"
    assert [line["updated"] for line in curve(run)] == [True, False, False]
    assert [event["step"] for event in events(run, "update_skipped")] == [2, 3, 4]


def test_an_unhealthy_run_exits_with_its_own_code(workplace: Path) -> None:
    """A job script must be able to tell "resume me" (75) from "look at me" (76)."""
    wild = ["optimizer.learning_rate=1e30", "training.clip_norm=0", "training.nonfinite_limit=2"]
    done = braid("train", "tiny", "name=wild", "schedule.warmup_fraction=0.0", *wild, cwd=workplace, check=False)
    assert done.returncode == 76, done.stderr
    assert "2 updates in a row were skipped" in done.stderr
    assert "Traceback" not in done.stderr


BAD = range(24 * 8, 28 * 8)
"""Samples that spoil the loss: those of steps 25 to 28."""


def train_spoiled(folder: str, name: str, overrides: list[str]) -> str:
    """`train()` on data of which some samples have five times the loss; returns how it ended."""
    from train import loop
    from train.config import load_recipe
    from train.health import TrainingHealthError

    os.chdir(folder)
    clean = loop.forward

    def forward(run, batch):
        out = clean(run, batch)
        bad = (batch.samples >= BAD.start) & (batch.samples < BAD.stop)
        spoil = bad & run.engine.module.training
        return out._replace(nll=out.nll * (1 + 4 * spoil[:, None].to(out.nll)))

    loop.forward = forward
    settings = ["spikes.window=16", "spikes.warmup=8", "spikes.patience=3", "checkpoints.every_tokens=5120"]
    recipe = load_recipe(
        ROOT / "launch/recipes/tiny.toml", [f"name={name}", f"training.tokens={40 * 512}", *settings, *overrides]
    )
    try:
        return f"exit {loop.train(recipe)}"
    except TrainingHealthError as error:
        return str(error)


def test_a_spike_is_rolled_back_and_its_samples_are_left_out(workplace: Path) -> None:
    """The run goes back to the checkpoint of step 20, never reads the bad samples again, and ends as if nothing had
    been: one line a step, in order, without the high losses."""
    ends = run_ranks(train_spoiled, 2, str(workplace), "spoiled", ["spikes.action=rollback"])
    assert ends == ["exit 0", "exit 0"]
    run = workplace / "runs" / "spoiled"
    (spike,) = events(run, "spike")
    assert (spike["first"], spike["last"], spike["start"], spike["stop"]) == (25, 27, BAD.start, BAD.start + 24)
    (back,) = events(run, "rolled_back")
    assert (back["step"], back["checkpoint"]) == (20, "tokens-000000010240")
    lines = curve(run)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert sum(line["loss"] > 1.5 * lines[23]["loss"] for line in lines[24:]) == 1, "one bad step is no spike"
    assert ends == run_ranks(train_spoiled, 2, str(workplace), "spoiled", ["spikes.action=rollback"]), "a rerun"


def test_a_spike_can_be_logged_alone(workplace: Path) -> None:
    """By default nothing is changed behind the user's back; too many rollbacks end a run that asked for them."""
    assert run_ranks(train_spoiled, 1, str(workplace), "logged", []) == ["exit 0"]
    assert len(events(workplace / "runs" / "logged", "spike")) == 1
    (end,) = run_ranks(train_spoiled, 1, str(workplace), "limited", ["spikes.action=rollback", "spikes.rollbacks=0"])
    assert "spiked again after 0 rollbacks" in end
