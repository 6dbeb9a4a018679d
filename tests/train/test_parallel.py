"""The mesh: what ranks tell each other, and the device of each."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.parallel import choose_device, open_mesh


def talk() -> dict:
    from train.parallel import open_mesh

    with open_mesh("cpu", timeout_s=60) as mesh:
        return {
            "place": (mesh.rank, mesh.size, mesh.main),
            "sum": mesh.sum(0.1 + mesh.rank),
            "any": (mesh.any(mesh.rank == mesh.size - 1), mesh.any(False)),
            "gather": mesh.gather({"rank": mesh.rank, "values": [1] * mesh.rank}),
            "tensor": mesh.sum_(torch.tensor([1.0, mesh.rank])),
            "same": mesh.sum_over_tensor(torch.ones(1)),
        }


def act_on_the_first_rank() -> tuple:
    from train.parallel import open_mesh

    def refuse() -> None:
        raise ValueError(f"refused by rank {mesh.rank}")

    with open_mesh("cpu", timeout_s=60) as mesh:
        done = mesh.first(lambda: f"by rank {mesh.rank}")
        with pytest.raises(ValueError, match="refused") as error:
            mesh.first(refuse)
        return done, str(error.value)


def test_what_the_first_rank_refuses_all_refuse():
    """A rank that does not hear of it waits for the others until the timeout."""
    assert run_ranks(act_on_the_first_rank, 2) == [("by rank 0", "refused by rank 0"), (None, "refused by rank 0")]


def neighbours_and_holders() -> list[bool]:
    from train.parallel import Mesh, Sizes, open_mesh

    with open_mesh("cpu", timeout_s=60) as world:
        meshes = [Mesh(world.device, sizes) for sizes in (Sizes(context=2), Sizes(tensor=2), Sizes(expert=2))]
        states = [{mesh.shard.group, mesh.data.group, mesh.replica.group, dist.group.WORLD} for mesh in meshes]
        return [
            not {mesh.context.group, mesh.tensor.group, mesh.expert.group} & (held - {None})
            for mesh, held in zip(meshes, states, strict=True)
        ]


def test_layers_do_not_queue_behind_gradients():
    """On a GPU the messages of one process group run one after the other: a layer would wait for ZeRO's buckets."""
    assert run_ranks(neighbours_and_holders, 2) == [[True] * 3] * 2


def join_as_slurm_task() -> tuple[int, int, list]:
    import os

    from train.parallel import open_mesh

    place = {"SLURM_PROCID": "RANK", "SLURM_LOCALID": "LOCAL_RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE"}
    os.environ.update({slurm: os.environ.pop(usual) for slurm, usual in place.items()})
    with open_mesh("cpu", timeout_s=60) as mesh:
        return mesh.rank, mesh.size, mesh.gather(mesh.rank)


def test_tasks_of_srun_find_each_other():
    """Without this every task trains alone, and all write into one run folder."""
    assert run_ranks(join_as_slurm_task, 2) == [(0, 2, [0, 1]), (1, 2, [0, 1])]


def test_srun_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch):
    for key in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="MASTER_ADDR: not set, wants the host of task 0"):
        open_mesh("cpu")


def fail_on_one_rank() -> None:
    import os

    assert os.environ["RANK"] == "0", "rank 1 is broken"


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_agree(size):
    """Ranks that disagree about stopping or about counts hang or diverge."""
    for rank, heard in enumerate(run_ranks(talk, size)):
        assert heard["place"] == (rank, size, rank == 0)
        assert heard["sum"] == pytest.approx(sum(0.1 + r for r in range(size)), rel=1e-15)
        assert heard["any"] == (True, False)
        assert heard["gather"] == [{"rank": r, "values": [1] * r} for r in range(size)]
        assert heard["tensor"].tolist() == [size, size * (size - 1) / 2]
        assert heard["same"].item() == 1.0


def test_a_failing_rank_fails_the_test():
    """A helper that swallowed a rank's error would make every multi-process test pass."""
    with pytest.raises(AssertionError, match="rank 1 is broken"):
        run_ranks(fail_on_one_rank, 2)


def fail_alone() -> int:
    from train.parallel import open_mesh

    with pytest.raises(ValueError, match="a mistake"), open_mesh("cpu", timeout_s=60):
        raise ValueError("a mistake")
    with open_mesh("cpu", timeout_s=60) as mesh:
        return mesh.size


def test_a_process_alone_may_go_on_after_a_mistake():
    """A second command in the same process, a notebook's say, would find the first one's process group."""
    assert run_ranks(fail_alone, 1) == [1]


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device: got 'tpu', wants one of auto, cpu, cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_refused():
    with pytest.raises(ValueError, match="device: got 'cuda', but torch finds no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
