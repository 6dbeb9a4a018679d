"""Saving beside training: what is committed is the state at the save, failures surface, the last save is kept."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights.files import CheckpointError
from model.weights.fragments import fragments_of, whole_layout
from tests.ranks import run_ranks
from tests.train.test_engine import same_bits
from tests.train.tiny import run_step, snapshot, start_engine
from train.checkpoint import store as store_module
from train.checkpoint.background import Commit, Staging
from train.checkpoint.capture import restore
from train.checkpoint.retention import Retention
from train.checkpoint.store import Store
from train.checkpoint.transaction import discover, name_of


def test_staged_values_are_copies_in_memory_that_is_reused():
    """Breaks when an update after the save changes what is written, or every save allocates anew."""
    value = torch.arange(6.0)
    (fragment, _, _), *_ = fragments_of("w", "weight", whole_layout((6,)))
    staging = Staging()
    [(same, first)] = staging.copy([(fragment, value)])
    value += 1
    assert same is fragment and first.tolist() == [0, 1, 2, 3, 4, 5]
    [(_, second)] = staging.copy([(fragment, value)])
    assert second.data_ptr() == first.data_ptr() and second.tolist() == [1, 2, 3, 4, 5, 6]
    [(_, wide)] = staging.copy([(fragment, value.double())])
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("thread", [True, False])
def test_a_commit_gives_its_result_or_its_error(thread: bool):
    """Breaks when an error in the thread is lost."""
    assert Commit(lambda: Path("x"), thread=thread).result() == Path("x")

    def fail() -> Path:
        raise CheckpointError("no room")

    failing = Commit(fail, thread=thread)
    with pytest.raises(CheckpointError, match="no room"):
        failing.result()
    assert failing.done


def train_while_saving(root: Path) -> dict[str, Any]:
    """Two updates while the writer is held up; then a writer that fails on rank 1 alone."""
    from train.parallel import open_mesh

    gate = threading.Event()
    write = store_module.write_rank_files

    def held_up(*arguments: Any) -> Any:
        gate.wait(60)
        return write(*arguments)

    with open_mesh("cpu", timeout_s=60) as mesh:
        said: list[str] = []
        store = Store(root, mesh, keep=Retention(3), say=said.append)
        engine = start_engine(mesh, 1)

        def step(number: int) -> None:
            run_step(engine, number, 1)
            engine.apply(1e-2)

        step(1)
        state = snapshot(engine)
        store_module.write_rank_files = held_up
        assert store.save(engine, 1, 1, {}) is None
        step(2)
        step(3)
        seen = {"early": store.poll(), "found": discover(root)}
        mesh.barrier()
        gate.set()
        seen["late"] = store.settle()

        def broken(*arguments: Any) -> Any:
            if mesh.rank == 1:
                raise OSError(28, "No space left on device")
            return write(*arguments)

        store_module.write_rank_files = broken
        store.save(engine, 3, 3, {})
        polls = 0
        try:
            while store.poll() is None:
                polls += 1
                step(4 + polls)
        except CheckpointError as error:
            seen["error"] = str(error)
        store_module.write_rank_files = write
        store.save(engine, 9, 9, {})
        store.close()
        seen["said"] = said
        checkpoint = Store(root, mesh, keep=Retention(3), say=said.append, aside=False).newest("auto")
        assert checkpoint is not None
        seen["newest"] = checkpoint.folder.name
        from model.weights.reader import Checkpoint

        restore(engine, Checkpoint(root / name_of(1)))
        seen["same"] = same_bits(snapshot(engine), state)
        engine.close()
    return seen


def test_training_goes_on_and_failures_surface_on_all_ranks(tmp_path: Path):
    """Breaks when the checkpoint mixes two steps, is visible too early, or one rank alone notices a failure."""
    for rank, seen in enumerate(run_ranks(train_while_saving, 2, tmp_path)):
        assert seen["early"] is None and seen["found"] == []
        assert seen["late"] == (1, tmp_path / name_of(1))
        assert "rank 1: OSError: [Errno 28] No space left on device" in seen["error"]
        assert seen["same"]
        assert seen["newest"] == name_of(9)
        assert seen["said"] == ([f"checkpoints/{name_of(9)} is committed"] if rank == 0 else [])
