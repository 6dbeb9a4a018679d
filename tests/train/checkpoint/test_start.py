"""Starting from another run's weights: what is taken, what is drawn, what is refused. Two real ranks, ZeRO 0 to 3."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipes import find_recipe
from model.config import ModelConfig
from model.hybrid import HybridLM, initialise_model
from model.weights.reader import Checkpoint
from tests.ranks import run_ranks
from tests.train.runs import braid, curve, events, prepare_tiny, trained
from train.checkpoint.start import StartConfig, plan, start_from
from train.config import load_recipe
from train.engine import Engine


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_tiny(tmp_path_factory.mktemp("start"))
    trained("training.tokens=4096", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def old(workplace: Path) -> Checkpoint:
    return Checkpoint(workplace / "runs" / "tiny" / "checkpoints" / "tokens-000000004096")


def wider() -> ModelConfig:
    """Deeper by two layers and with ten more tokens than the old model."""
    model = load_recipe(find_recipe("tiny")).model
    return replace(model, pattern="M-W-MW", vocab_size=330)


DEEPER = StartConfig(
    "runs/tiny",
    rename={"blocks.4": "blocks.0"},
    new=("blocks.5.*",),
    grown=("embedding.weight",),
)


def started(folder: Path, stage: int, config: StartConfig) -> dict[str, Any]:
    """Weights and first moments, whole, of an engine that was started from the checkpoint."""
    from train.parallel import open_mesh

    with open_mesh("cpu", timeout_s=60) as mesh:
        model = HybridLM(wider(), mesh=mesh)
        initialise_model(model, seed=9)
        engine = Engine(model, model.table(), load_recipe(find_recipe("tiny")).optimizer, zero_stage=stage, mesh=mesh)
        start_from(engine, Checkpoint(folder), config)
        parts = [
            (part.name, part.start, {kind: value.clone() for kind, value in part.values.items()})
            for part in engine.owned()
        ]
        with engine.gathered() as whole:
            weights = {name: value.clone() for name, value in whole.items()}
        steps = engine.steps
        engine.close()
    return {"parts": parts, "weights": weights, "steps": steps}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_there_is_taken_and_what_is_new_is_drawn(old: Checkpoint, stage: int):
    """Breaks when a layer starts from the wrong one, a new row is zero, or a new moment is not."""
    ranks = run_ranks(started, 2, old.folder, stage, DEEPER)
    drawn = HybridLM(wider())
    initialise_model(drawn, seed=9)
    moments = {name: torch.full_like(value, torch.nan).flatten() for name, value in drawn.named_parameters()}
    for rank in ranks:
        assert rank["steps"] == 8
        for name, start, values in rank["parts"]:
            moments[name][start : start + len(values["weight"])] = values["optimizer/exp_avg"]
    for name, fresh in drawn.named_parameters():
        source = DEEPER.old_name(name)
        mean, weight = moments[name].view(fresh.shape), ranks[0]["weights"][name]
        assert torch.equal(weight, ranks[1]["weights"][name])
        if name.startswith("blocks.5."):
            assert torch.equal(weight, fresh) and not mean.any()
            continue
        shape = old.shape(source, "weight")
        assert torch.equal(weight[: shape[0]].flatten(), old.read(source, "weight"))
        assert torch.equal(mean[: shape[0]].flatten(), old.read(source, "optimizer/exp_avg"))
        if name == "embedding.weight":
            assert torch.equal(weight[320:330], fresh[320:330]) and not mean[320:330].any()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"new": ()}, "start.new: .* has no 'blocks.5.norm.weight'"),
        ({"grown": ()}, "'embedding.weight' has shape .330, 32., 'embedding.weight' in .* has .320, 32."),
        ({"rename": {"blocks.4": "blocks.1"}}, "has no 'blocks.1.mixer.in_proj.weight'"),
        ({"new": ("blocks.5.*", "blocks.[0-3].*")}, "start.unused: nothing takes 'blocks.1.norm.weight'"),
        ({"unused": ("head.*",)}, "start.unused: nothing matches 'head.\\*'"),
        ({"grown": ("embedding.weight", "x")}, "start.grown: nothing matches 'x'"),
    ],
)
def test_what_is_not_accounted_for_is_refused(old: Checkpoint, change: dict[str, Any], why: str):
    """Breaks when a typo silently trains a layer from scratch."""
    with pytest.raises(ValueError, match=why):
        plan(HybridLM(wider(), device="meta").table(), old, replace(DEEPER, **change))


def test_names_are_renamed_by_their_longest_prefix():
    config = StartConfig("x", rename={"blocks.1": "blocks.7", "blocks.1.norm": "norm"})
    assert config.old_name("blocks.1.mixer.D") == "blocks.7.mixer.D"
    assert config.old_name("blocks.1.norm.weight") == "norm.weight"
    assert config.old_name("blocks.10.norm.weight") == "blocks.10.norm.weight"
    with pytest.raises(ValueError, match="start from"):
        StartConfig(new=("x",))


def test_a_run_starts_from_another_and_resumes_itself(workplace: Path):
    """Breaks when the recipe's section does nothing, or is applied again at every resume."""
    start = ("name=second", "start.checkpoint=runs/tiny", "training.tokens=2048", "checkpoints.every_tokens=512")
    braid("train", "tiny", *start, cwd=workplace)
    run = workplace / "runs" / "second"
    first, last = curve(workplace / "runs" / "tiny"), curve(run)
    assert last[0]["loss"] < first[3]["loss"], "it did not start from trained weights"
    (event,) = events(run, "started")
    assert event["new"] == [] and event["taken"] == 20
    trained(*start, "training.tokens=2560", cwd=workplace)
    assert len(events(run, "started")) == 1 and len(events(run, "resumed")) == 1
    for wrong, said in (("start.checkpoint=nowhere", "holds no checkpoint"), ("start.unused=['x']", "nothing matches")):
        done = braid("train", "tiny", *start, "name=wrong", wrong, cwd=workplace, check=False)
        assert done.returncode == 2 and said in done.stderr
