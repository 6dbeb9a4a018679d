"""A run's state through real checkpoint files: saved by two ranks at one stage, restored by one or two at another."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from model.params import Normal
from model.weights.files import CheckpointError
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from tests.ranks import run_ranks
from tests.train.test_engine import assemble, same_bits
from tests.train.tiny import run_step, snapshot, start_engine
from train.checkpoint.capture import restore, saved_fragments, saved_shapes

SAVED, STAGES = (0, 2, 3), (0, 1, 3)


def save(folder: Path) -> dict[int, Any]:
    from train.parallel import open_mesh

    states = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for stage in SAVED:
            engine = start_engine(mesh, stage, persistent=20)
            for step in range(3):
                run_step(engine, step, 1)
                engine.apply(1e-2)
            engine.module.seen.copy_(torch.tensor([3.0, stage]))
            target = folder / str(stage)
            target.mkdir(exist_ok=True)
            records = write_rank_files(target, mesh.rank, saved_fragments(engine))
            gathered = mesh.gather(records)
            if mesh.main:
                Manifest.from_records(chain(*gathered), saved_shapes(engine), {}).save(target)
            states[stage] = snapshot(engine)
            engine.close()
    return states


def load(folder: Path) -> dict[tuple[int, int], Any]:
    from train.parallel import open_mesh

    states = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for saved in SAVED:
            checkpoint = Checkpoint(folder / str(saved))
            for stage in STAGES:
                engine = start_engine(mesh, stage)
                restore(engine, checkpoint)
                states[saved, stage] = (snapshot(engine), engine.steps, engine.module.seen.clone())
                engine.close()
        engine = start_engine(mesh, 1)
        name = "blocks.0.weight"
        before = snapshot(engine)
        engine.table = engine.table | {name: replace(engine.table[name], shape=(6, 6), init=Normal(1.0))}
        try:
            restore(engine, checkpoint)
        except CheckpointError as error:
            states["other shape"] = str(error)
        engine.table = {k: spec for k, spec in engine.table.items() if k != name}
        try:
            restore(engine, checkpoint)
        except CheckpointError as error:
            states["fewer parameters"] = str(error)
        states["unchanged"] = same_bits(before, snapshot(engine))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[dict[int, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(save, 2, folder)


@pytest.mark.parametrize("size", [1, 2])
def test_restores_bit_for_bit_in_another_layout(saved, size):
    """A run could not be resumed on another number of ranks or at another ZeRO stage."""
    folder, ranks = saved
    loaded = run_ranks(load, size, folder)
    for stage in SAVED:
        expected = assemble([rank[stage] for rank in ranks])
        for target in STAGES:
            found = assemble([rank[stage, target][0] for rank in loaded])
            for name, kinds in expected.items():
                for kind, value in kinds.items():
                    assert torch.equal(found[name][kind], value), f"{stage} -> {target}: {kind} of {name}"
            for _, steps, buffer in (rank[stage, target] for rank in loaded):
                assert steps == 3
                assert buffer.tolist() == [3.0, stage]
    for rank in loaded:
        assert "'blocks.0.weight': the checkpoint has shape [7, 6], the model shape [6, 6]" in rank["other shape"]
        assert "'blocks.0.weight': the checkpoint has shape [7, 6], the model nothing" in rank["fewer parameters"]
        assert rank["unchanged"], "a refused checkpoint changed the engine"


def test_frozen_parameters_and_buffers_are_saved(saved):
    """They take no gradient, and would come back as they were drawn."""
    checkpoint = Checkpoint(saved[0] / "3")
    assert "fixed" in checkpoint.names("weight")
    assert "fixed" not in checkpoint.names("optimizer/exp_avg")
    assert checkpoint.names("buffer") == ["seen"]
    assert checkpoint.shape("embedding.weight", "weight") == (11, 6), "padding rows belong to no checkpoint"
