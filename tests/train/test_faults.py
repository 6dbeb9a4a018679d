"""Faults on the way, in real processes: signals in every phase, a disk that fills up under the last save, another
layout at every resume, a changed recipe, a lock that a dead compiler left."""

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model.weights.reader import Checkpoint
from tests.ranks import run_ranks
from tests.train.runs import ROOT, braid, curve, events, kill_group, prepare_tiny, start, trained, wait_for_step

STEPS = 18
ROW = 64
PER_STEP = 8 * ROW


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("faults"))


def settings(name: str, *overrides: str) -> list[str]:
    return [
        f"name={name}",
        f"training.tokens={STEPS * PER_STEP}",
        f"checkpoints.every_tokens={5 * PER_STEP}",
        f"evaluation.every_tokens={4 * PER_STEP}",
        "evaluation.max_tokens=256",
        *overrides,
    ]


@pytest.fixture(scope="module")
def whole(workplace: Path) -> list[dict]:
    """The curve of an uninterrupted run on one rank."""
    trained(*settings("whole"), cwd=workplace)
    return curve(workplace / "runs" / "whole")


@pytest.fixture(scope="module")
def whole_on_two(workplace: Path) -> list[dict]:
    trained(*settings("whole-on-two"), cwd=workplace, ranks=2)
    return curve(workplace / "runs" / "whole-on-two")


def train_with(folder: str, overrides: list[str], fault: str, step: int) -> str:
    """`train()` with a fault on its way; returns how it ended, in words.

    fault: "stop" sends SIGTERM to rank 0 after `step`; "start", "validation" and "save" send it to the last rank alone
    in that phase; "full" lets every write of the last rank fail from `step` on; "" is none.
    """
    from train import loop
    from train import run as run_module
    from train.checkpoint import store
    from train.config import load_recipe

    os.chdir(folder)
    rank, last = int(os.environ["RANK"]), int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    clean_step, clean_validate, clean_write = loop.train_step, loop.validate, store.write_rank_files
    clean_save, clean_open = run_module.Run.save, run_module._open_stream
    seen = {"step": 0}

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def train_step(run: Any) -> Any:
        record = clean_step(run)
        seen["step"] = record["step"]
        if fault == "stop" and rank == 0 and record["step"] == step:
            terminate()
        return record

    def validate(run: Any) -> Any:
        if fault == "validation" and last and seen["step"] >= step:
            terminate()
        return clean_validate(run)

    def save(run: Any) -> None:
        if fault == "save" and last:
            terminate()
        clean_save(run)

    def open_stream(*arguments: Any) -> Any:
        if fault == "start" and last:
            terminate()
        return clean_open(*arguments)

    def write(*arguments: Any) -> Any:
        if fault == "full" and last and seen["step"] >= step:
            raise OSError(28, "No space left on device")
        return clean_write(*arguments)

    loop.train_step, loop.validate, store.write_rank_files = train_step, validate, write
    run_module.Run.save, run_module._open_stream = save, open_stream
    try:
        return f"exit {loop.train(load_recipe(ROOT / 'launch/recipes/tiny.toml', overrides))}"
    except ValueError as error:
        return str(error)


def facts(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["batch_hash"], line["loss"], line["grad_norm"]) for line in lines]


def test_another_layout_at_every_resume(workplace: Path, whole: list[dict]) -> None:
    """Faults 11 and 15: two ranks, one, two; ZeRO 1, 3 with its optimizer in host memory, 0: the same batches,
    losses up to the order of additions."""
    plan = [(2, 1, "false", "stop", 6), (1, 3, "true", "stop", 12), (2, 0, "false", "", 0)]
    for ranks, stage, offload, fault, step in plan:
        layout = [f"parallel.zero_stage={stage}", f"parallel.offload_optimizer={offload}"]
        overrides = settings("moved", *layout)
        ends = run_ranks(train_with, ranks, str(workplace), overrides, fault, step)
        assert ends == [f"exit {75 if fault else 0}"] * ranks
    run = workplace / "runs" / "moved"
    lines = curve(run)
    assert [line["batch_hash"] for line in lines] == [line["batch_hash"] for line in whole]
    assert [event["step"] for event in events(run, "resumed")] == [6, 12]
    for ours, theirs in zip(lines, whole, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-5 * theirs["loss"], ours["step"]


@pytest.mark.parametrize("phase", ["start", "validation", "save"])
def test_sigterm_to_one_rank_in_every_phase(workplace: Path, whole_on_two: list[dict], phase: str) -> None:
    """Fault 16: all ranks stop at the same step and save, whatever they were doing; the curve goes on unharmed."""
    name = f"signal-{phase}"
    assert run_ranks(train_with, 2, str(workplace), settings(name), phase, 4) == ["exit 75"] * 2
    run = workplace / "runs" / name
    stopped = len(curve(run))
    assert stopped == {"start": 1, "validation": 5, "save": 6}[phase]
    assert (run / "checkpoints" / f"tokens-{stopped * PER_STEP:012d}" / "manifest.json").is_file()
    assert run_ranks(train_with, 2, str(workplace), settings(name), "", 0) == ["exit 0"] * 2
    assert facts(curve(run)) == facts(whole_on_two)


@pytest.mark.parametrize("aside", ["true", "false"])
def test_a_last_save_that_fails_is_no_success(workplace: Path, aside: str) -> None:
    """Fault 4: a run whose last checkpoint could not be written must not exit with 0, nor call itself finished."""
    overrides = settings(f"full-{aside}", f"checkpoints.aside={aside}")
    ends = run_ranks(train_with, 2, str(workplace), overrides, "full", STEPS)
    assert all("rank 1: OSError: [Errno 28] No space left on device" in end for end in ends)
    run = workplace / "runs" / f"full-{aside}"
    assert len(curve(run)) == STEPS and not events(run, "finished")
    names = sorted(path.name for path in (run / "checkpoints").glob("tokens-*"))
    assert names[-1] == f"tokens-{15 * PER_STEP:012d}"
    assert run_ranks(train_with, 2, str(workplace), overrides, "", 0) == ["exit 0"] * 2
    assert len(events(run, "finished")) == 1


def test_what_may_change_between_starts_and_what_may_not(workplace: Path) -> None:
    """Fault 13: another width or row length is refused with what differs; another rate is allowed and logged; another
    batch goes on with the next sample."""
    name = "changed"
    assert run_ranks(train_with, 1, str(workplace), settings(name), "stop", 6) == ["exit 75"]
    run = workplace / "runs" / name
    (end,) = run_ranks(train_with, 1, str(workplace), settings(name, "model.d_model=64"), "", 0)
    assert "model.d_model: got 64, but" in end and "was saved with 32" in end
    (end,) = run_ranks(train_with, 1, str(workplace), settings(name, "training.sequence_length=32"), "", 0)
    assert "sequence_length: got 32, but the run was saved with 64" in end
    changed = settings(name, "optimizer.learning_rate=1e-3", "training.rows_per_step=4")
    assert run_ranks(train_with, 1, str(workplace), changed, "", 0) == ["exit 0"]
    noted = [event["change"] for event in events(run, "recipe_changed")]
    assert "optimizer.learning_rate: 0.003 -> 0.001" in noted and "training.rows_per_step: 8 -> 4" in noted
    newest = sorted((run / "checkpoints").glob("tokens-*"))[-1]
    assert Checkpoint(newest).extra["stream"]["sample"] == STEPS * 8
    lines = curve(run)
    assert [line["step"] for line in lines] == list(range(1, 6 + 24 + 1))
    assert lines[-1]["tokens"] == STEPS * PER_STEP


def test_a_lock_that_a_dead_compiler_left_is_no_obstacle(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: DeepSpeed would build its ops and wait for ever for a lock of a process that is gone; none is built."""
    extensions = workplace / "extensions"
    for version in ("", "py311_cpu"):
        for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm", "cpu_adam", "fused_adam"):
            (extensions / version / name).mkdir(parents=True)
            (extensions / version / name / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    before = {path: path.stat().st_mtime_ns for path in extensions.rglob("*")}
    braid("train", "tiny", "--nproc", "2", *settings("locked", f"training.tokens={2 * PER_STEP}"), cwd=workplace)
    assert {path: path.stat().st_mtime_ns for path in extensions.rglob("*")} == before


@pytest.mark.slow
def test_a_hundred_kills(workplace: Path) -> None:
    """SIGKILL a hundred times at random moments, start-up and saves included: the curve of a run that nobody touched,
    bit for bit."""
    steps = 400
    often = [f"training.tokens={steps * PER_STEP}", f"checkpoints.every_tokens={PER_STEP}", "checkpoints.keep_last=2"]
    trained(*settings("untouched", *often), cwd=workplace)
    command = ["train", "tiny", *settings("battered", *often)]
    run, draw = workplace / "runs" / "battered", random.Random(0)
    for _ in range(100):
        process = start(*command, cwd=workplace)
        if draw.random() < 0.2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 6))
        else:
            wait_for_step(process, run, min(len(curve(run)) + draw.randint(1, 4), steps - 4))
        kill_group(process)
    assert len(curve(run)) < steps, "the run was over before the last kill"
    braid(*command, cwd=workplace)
    assert facts(curve(run)) == facts(curve(workplace / "runs" / "untouched"))
    assert not list((run / "checkpoints").glob(".broken-*"))
