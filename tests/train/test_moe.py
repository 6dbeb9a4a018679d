"""Routed experts in real runs: the balancing bias follows global counts in any layout, and comes back exactly."""

import shutil
from pathlib import Path

import pytest
import torch

from model.weights.reader import Checkpoint
from tests.ranks import run_ranks
from tests.train.runs import curve, events, kill_group, prepare_tiny, start, trained, wait_for_step

STEPS, PER_STEP = 8, 8 * 64
LAYERS = (
    'model.layers={M={kind="mamba2", head_dim=16, d_state=8}, E={kind="moe", n_experts=4, top_k=2, d_hidden=24, '
    'score="sigmoid", bias_rate=0.01, balance_weight=0.01, shared_hidden=16}}'
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("moe"))


def settings(name: str, *overrides: str, stage: int = 0) -> list[str]:
    return [
        *(f"name={name}", f"parallel.zero_stage={stage}", 'model.pattern="ME"', LAYERS),
        *("training.compute_dtype=float32", f"training.tokens={STEPS * PER_STEP}"),
        *(f"checkpoints.every_tokens={3 * PER_STEP}", *overrides),
    ]


def bias(run: Path) -> torch.Tensor:
    newest = sorted((run / "checkpoints").glob("tokens-*"))[-1]
    return Checkpoint(newest).read("blocks.1.mixer.bias", "weight")


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    trained(*settings("whole"), cwd=workplace)
    return workplace / "runs" / "whole"


def test_loads_and_losses_are_recorded(whole: Path):
    for line in curve(whole):
        assert sum(line["layers.1.expert_load"]) == pytest.approx(4, abs=1e-3)
        assert 1 <= line["layers.1.load_max"] <= 4
        assert 0.005 < line["balance"] < 0.04, "per valid token, its weight of 0.01 at uniform routing"
    assert bias(whole).abs().max() > 0.015, "the bias has moved more than once"


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [pytest.param(0, 2, marks=pytest.mark.slow), (1, 2), pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)],
)
def test_no_layout_changes_the_bias(workplace: Path, whole: Path, stage: int, ranks: int):
    """Counts are global: each rank's own would balance its own share of the batch."""
    name = f"stage-{stage}"
    micro = "training.micro_batch_rows=1" if stage == 3 else "training.micro_batch_rows=4"
    trained(*settings(name, micro, stage=stage), cwd=workplace, ranks=ranks)
    run = workplace / "runs" / name
    assert torch.equal(bias(run), bias(whole))
    for ours, theirs in zip(curve(run), curve(whole), strict=True):
        assert ours["layers.1.expert_load"] == theirs["layers.1.expert_load"]
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-5 * theirs["loss"]
        assert abs(ours["balance"] - theirs["balance"]) <= 1e-4 * theirs["balance"]


def test_a_killed_run_goes_on_with_its_bias(workplace: Path):
    again = "training.checkpoint_blocks=true"
    trained(*settings("steady", again, stage=3), cwd=workplace, ranks=2)
    run = workplace / "runs" / "killed"
    process = start("train", "tiny", "--nproc", "2", *settings("killed", again, stage=3), cwd=workplace)
    wait_for_step(process, run, 4)
    kill_group(process)
    trained(*settings("killed", again, stage=3), cwd=workplace, ranks=2)
    steady = workplace / "runs" / "steady"
    for ours, theirs in zip(curve(run), curve(steady), strict=True):
        assert all(ours[key] == theirs[key] for key in ("loss", "grad_norm", "balance", "layers.1.expert_load"))
    assert torch.equal(bias(run), bias(steady))


def train_poisoned(folder: str, overrides: list[str]) -> list[float]:
    """`train()` whose third step has a gradient that is no number; the bias of the first expert after each step."""
    import os

    from tests.train.runs import ROOT
    from train import loop
    from train.config import load_recipe

    os.chdir(folder)
    clean_accumulate, clean_step, seen = loop.accumulate, loop.train_step, []

    def accumulate(run, batches, valid):
        result = clean_accumulate(run, batches, valid)
        if run.clock.step == 2:
            next(iter(run.engine.gradients())).value.fill_(float("nan"))
        return result

    def train_step(run):
        record = clean_step(run)
        seen.append(dict(run.engine.module.named_parameters())["blocks.1.mixer.bias"].tolist())
        return record

    loop.accumulate, loop.train_step = accumulate, train_step
    loop.train(load_recipe(ROOT / "launch/recipes/tiny.toml", overrides))
    return seen


def test_a_skipped_update_moves_no_bias(workplace: Path):
    """What was not applied must leave nothing behind."""
    (seen,) = run_ranks(train_poisoned, 1, str(workplace), settings("poisoned"))
    assert seen[1] == seen[2] != seen[3]
    assert [line["updated"] for line in curve(workplace / "runs" / "poisoned")][:4] == [True, True, False, True]


def test_experts_on_two_ranks_train_as_on_one_process(workplace: Path):
    """The recipe of MoE-Mamba, capacity counted over micro-batches of the same rows: the curve of one process, and a
    run goes on with its experts dealt otherwise."""
    recipe, run = "tiny-moe-mamba", workplace / "runs" / "spread"
    steps = (f"training.tokens={STEPS * PER_STEP}", f"checkpoints.every_tokens={4 * PER_STEP}")
    trained("name=together", *steps, cwd=workplace, recipe=recipe)
    expected = curve(workplace / "runs" / "together")
    spread = ("parallel.expert=2", "parallel.zero_stage=2")
    trained("name=spread", *steps, *spread, cwd=workplace, ranks=2, recipe=recipe)
    first = curve(run)
    shutil.rmtree(sorted((run / "checkpoints").glob("tokens-*"))[-1])  # as if killed after half of the steps
    trained("name=spread", *steps, cwd=workplace, recipe=recipe)
    assert [event["step"] for event in events(run, "resumed")] == [STEPS // 2]
    for ours, resumed, theirs in zip(first, curve(run), expected, strict=True):
        for line in (ours, resumed):
            assert line["batch_hash"] == theirs["batch_hash"]
            assert line["layers.1.expert_load"] == theirs["layers.1.expert_load"]
            assert line["layers.1.dropped"] == theirs["layers.1.dropped"]
            assert abs(line["loss"] - theirs["loss"]) <= 1e-5 * theirs["loss"]
            assert abs(line["grad_norm"] - theirs["grad_norm"]) <= 1e-4 * theirs["grad_norm"]
    assert max(line["layers.1.dropped"] for line in expected) > 0
