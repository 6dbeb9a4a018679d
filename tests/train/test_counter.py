"""The counter: every collective of torch, however it is called, by the ring convention."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.collectives import speaking
from train.counter import count_traffic
from train.parallel import Sizes, open_mesh

RANKS = 4
BYTES = 4 * RANKS * 10
"""Of a float32 vector with ten numbers for each rank."""


def talk() -> dict[str, Any]:
    """What each kind of call was counted as, on this rank of four: two tensor ranks, two data ranks."""
    x, part = torch.ones(RANKS * 10), torch.ones(10)
    parts = [torch.ones(10) for _ in range(RANKS)]
    with open_mesh("cpu", Sizes(tensor=2), timeout_s=60) as mesh:
        outside = dist.new_group(list(range(RANKS)))
        right, left = (mesh.rank + 1) % RANKS, (mesh.rank - 1) % RANKS
        calls = {
            "all_reduce": lambda: dist.all_reduce(x),
            "all_reduce later": lambda: dist.all_reduce(x, async_op=True).wait(),
            "all_reduce together": lambda: dist.all_reduce_coalesced([x, x]),
            "all_gather": lambda: dist.all_gather(parts, part),
            "all_gather into one": lambda: dist.all_gather_into_tensor(x, part),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, x),
            "broadcast": lambda: dist.broadcast(x, 0),
            "reduce": lambda: dist.reduce(x, 1),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
            "all_to_all uneven": lambda: uneven(mesh.rank),
            "send": lambda: [
                work.wait()
                for work in dist.batch_isend_irecv(
                    [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, torch.empty_like(x), left)]
                )
            ],
            "tensor": lambda: mesh.sum_over_tensor(x),
            "spoken": lambda: spoken_sum(x),
            "control": lambda: mesh.gather({"rank": mesh.rank}),
            "outside": lambda: dist.all_reduce(x, group=outside),
        }
        found: dict[str, Any] = {}
        for name, call in calls.items():
            with count_traffic(mesh) as sent:
                call()
            dist.all_reduce(x)  # not counted any more
            found[name] = sent.bytes
        return found


def uneven(rank: int) -> None:
    """Rank r sends r + 1 rows of eight bytes to each rank."""
    sizes = [rank + 1] * RANKS
    received = [sender + 1 for sender in range(RANKS)]
    dist.all_to_all_single(torch.empty(sum(received), 2), torch.ones(sum(sizes), 2), received, sizes)


def spoken_sum(x: torch.Tensor) -> None:
    with speaking("replica", "words"):
        dist.all_reduce(x)


def test_every_call_is_counted_once():
    """A call that is missed or counted twice makes the report, and the planner's formulas, about something else."""
    for rank, found in enumerate(run_ranks(talk, RANKS)):
        ring = BYTES * (RANKS - 1) / RANKS
        world = {name: bytes_["world"] for name, bytes_ in found.items() if list(bytes_) == ["world"]}
        control = world.pop("control")
        assert world == {
            "all_reduce": {"all_reduce": 2 * ring},
            "all_reduce later": {"all_reduce": 2 * ring},
            "all_reduce together": {"all_reduce": 4 * ring},
            "all_gather": {"all_gather": ring},
            "all_gather into one": {"all_gather": ring},
            "reduce_scatter": {"reduce_scatter": ring},
            "broadcast": {"broadcast": ring},
            "reduce": {"reduce": ring},
            "all_to_all": {"all_to_all": ring},
            "all_to_all uneven": {"all_to_all": 8.0 * (rank + 1) * (RANKS - 1)},
            "send": {"send": BYTES},
        }
        assert list(control) == ["control"] and 0 < control["control"] < 500
        assert found["tensor"] == {"tensor": {"all_reduce": pytest.approx(BYTES)}}
        assert found["spoken"] == {"replica": {"words": 2 * ring}}
        assert found["outside"] == {}
