"""A run survives a kill, and its curve depends on neither the ZeRO stage nor the number of ranks.

One uninterrupted run and one killed and resumed run on one rank, and for each ZeRO stage on two. What is killed and
resumed is `braid train` itself.
"""

import os
import random
import signal
from pathlib import Path

import pytest

from data.mixture import Mixture, WeightedShards
from data.shards import ShardSet
from data.stream import BatchStream
from tests.train.runs import (
    braid,
    curve,
    events,
    kill_group,
    prepare_tiny,
    rank_processes,
    start,
    trained,
    wait_for_step,
)

STEPS = 24
ALONE = (1, 1)
LAYOUTS = [ALONE, *((stage, 2) for stage in (0, 1, 2, 3))]
USUAL = {ALONE, (1, 2), (3, 2)}
layouts = pytest.mark.parametrize(
    ("stage", "ranks"),
    [layout if layout in USUAL else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared corpus; runs are made beside it."""
    return prepare_tiny(tmp_path_factory.mktemp("resume"))


def arguments(name: str, stage: int, ranks: int, *overrides: str) -> list[str]:
    """`braid train` on the tiny recipe with `settings`."""
    return ["train", "tiny", "--nproc", str(ranks), *settings(name, stage), *overrides]


def settings(name: str, stage: int) -> list[str]:
    """float32, saving every fifth step."""
    return [
        f"name={name}",
        f"parallel.zero_stage={stage}",
        "training.compute_dtype=float32",
        f"training.tokens={STEPS * 8 * 64}",
        f"checkpoints.every_tokens={5 * 8 * 64}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> dict[tuple[int, int], list[dict]]:
    """The curve of every layout, asked for once."""
    curves = {}
    for stage, ranks in LAYOUTS:
        name = f"whole-{stage}-{ranks}"
        trained(*settings(name, stage), cwd=workplace, ranks=ranks)
        curves[stage, ranks] = curve(workplace / "runs" / name)
        assert len(curves[stage, ranks]) == STEPS
    return curves


def facts(lines: list[dict]) -> list[tuple]:
    """What must be equal bit for bit."""
    return [
        (line["step"], line["batch_hash"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines
    ]


@layouts
def test_kill_and_rerun_equals_an_uninterrupted_run(
    workplace: Path, uninterrupted: dict, stage: int, ranks: int
) -> None:
    """SIGKILL to all ranks at a random step, the same command again: batches and losses bit for bit the same."""
    name = f"killed-{stage}-{ranks}"
    command = arguments(name, stage, ranks)
    run = workplace / "runs" / name
    process = start(*command, cwd=workplace)
    wait_for_step(process, run, random.Random(10 * stage + ranks).randint(2, STEPS - 6))
    kill_group(process)
    saved = any((run / "checkpoints").glob("tokens-*"))
    assert len(curve(run)) < STEPS, "the kill came too late to test anything"
    braid(*command, cwd=workplace)
    assert facts(curve(run)) == facts(uninterrupted[stage, ranks])
    assert bool(events(run, "resumed")) == saved, "it resumes when there was something to resume from"


def test_losses_do_not_depend_on_stage_or_ranks(uninterrupted: dict) -> None:
    """The same global batch in every layout, and float32 losses within 1e-5. Documents end where they like, so the two
    ranks hold unequal numbers of valid tokens (see the next test but one)."""
    reference = uninterrupted[ALONE]
    for layout in LAYOUTS:
        lines = uninterrupted[layout]
        assert [line["batch_hash"] for line in lines] == [line["batch_hash"] for line in reference]
        for line, expected in zip(lines, reference, strict=True):
            assert abs(line["loss"] - expected["loss"]) <= 1e-5 * max(1.0, expected["loss"]), f"ZeRO, ranks {layout}"
            assert abs(line["grad_norm"] - expected["grad_norm"]) <= 1e-4 * max(1.0, expected["grad_norm"])


def test_the_loss_falls(uninterrupted: dict) -> None:
    losses = [line["loss"] for line in uninterrupted[ALONE]]
    assert losses[-1] < losses[0] - 0.5


def test_ranks_hold_unequal_numbers_of_valid_tokens(workplace: Path) -> None:
    """What makes the comparison above one of sums over a global count and not of means of means."""
    shards = ShardSet(workplace / "prepared" / "tiny", "train")
    mixture = Mixture([WeightedShards(shards, 1.0)], sequence_length=64, seed=0)
    streams = [BatchStream(mixture, rows_per_step=8, micro_rows=2, rank=rank, size=2) for rank in range(2)]
    counts = [[sum(batch.valid for batch in stream.next_step()) for stream in streams] for _ in range(STEPS)]
    assert sum(a != b for a, b in counts) > STEPS // 2


def test_zero_0_and_3_agree_in_bfloat16(workplace: Path) -> None:
    """Explicit casts: what ZeRO-3 gathers is the float32 weight, so only the order of sums differs."""
    curves = []
    for stage in (0, 3):
        name = f"bfloat16-{stage}"
        trained(*settings(name, stage), "training.compute_dtype=bfloat16", cwd=workplace, ranks=2)
        curves.append([line["loss"] for line in curve(workplace / "runs" / name)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 2**-8 * max(curves[0])


def test_sigterm_to_one_rank_saves_and_the_rerun_resumes(workplace: Path, uninterrupted: dict) -> None:
    """All ranks stop at the same step, save and exit with the documented code; the curve goes on unharmed."""
    command = arguments("terminated", 1, 2)
    run = workplace / "runs" / "terminated"
    process = start(*command, cwd=workplace)
    wait_for_step(process, run, 3)
    victim = rank_processes(process.pid)[-1]
    os.kill(victim, signal.SIGTERM)
    assert process.wait(120) == 75
    stopped = len(curve(run))
    assert 3 <= stopped < STEPS
    assert (run / "checkpoints" / f"tokens-{stopped * 8 * 64:012d}" / "manifest.json").exists()
    braid(*command, cwd=workplace)
    assert facts(curve(run)) == facts(uninterrupted[1, 2])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (3, 2)])
def test_many_kills_in_the_precision_of_real_runs(workplace: Path, stage: int, ranks: int) -> None:
    """bfloat16 compute and residual with recomputed blocks, killed again and again at random steps, saves included."""
    dtypes = ["training.compute_dtype=bfloat16", "training.residual_dtype=bfloat16"]
    often = [*dtypes, "training.checkpoint_blocks=true", f"checkpoints.every_tokens={2 * 8 * 64}"]
    trained(*settings(f"steady-{stage}", stage), *often, cwd=workplace, ranks=ranks)
    command = arguments(f"battered-{stage}", stage, ranks, *often)
    run = workplace / "runs" / f"battered-{stage}"
    generator = random.Random(stage)
    for _ in range(6):
        process = start(*command, cwd=workplace)
        wait_for_step(process, run, len(curve(run)) + generator.randint(1, 4))
        kill_group(process)
    braid(*command, cwd=workplace)
    assert facts(curve(run)) == facts(curve(workplace / "runs" / f"steady-{stage}"))
