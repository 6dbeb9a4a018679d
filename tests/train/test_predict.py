"""The cost model: it reads the traffic formulas, leaves out what does not fit, and the README says what it says."""

from dataclasses import replace
from pathlib import Path

import pytest

from train.config import load_recipe
from train.parallel import Sizes
from train.predict import RECIPE, Machine, predict, table
from train.traffic import Job

README = Path(__file__).parents[2] / "train/README.md"


@pytest.fixture(scope="module")
def job() -> Job:
    return Job.of(load_recipe(RECIPE), 64)


def test_the_readme_shows_what_is_computed():
    """A table that was true once misleads whoever buys machines by it. `python -m train.predict` prints the new one."""
    text = README.read_text()
    assert "predicted, never run" in text
    assert table() in text


def test_what_does_not_fit_is_left_out(job: Job):
    """8B parameters with all their states on one GPU are 139 GB."""
    replicated = predict(replace(job, zero_stage=0))
    assert replicated.memory_bytes > 130e9 > Machine().memory_bytes
    assert predict(replace(job, zero_stage=3)).memory_bytes < Machine().memory_bytes
    assert "| 0 |" not in table()


def test_rings_that_cross_nodes_share_their_ports():
    """Eight ranks of a node have eight ports, a lone one has one; within a node there is NVLink."""
    machine = Machine(link_efficiency=1.0)
    assert machine.bandwidth(tuple(range(8))) == machine.nvlink
    assert machine.bandwidth(tuple(range(16))) == 8 * machine.infiniband
    assert machine.bandwidth((0, 8, 16)) == machine.infiniband
    assert machine.latency(tuple(range(1024)), "all_gather") > 10 * machine.latency(tuple(range(64)), "all_gather")


def test_a_slower_network_makes_steps_longer(job: Job):
    """Breaks when communication is not part of the step, or hides without limit."""
    layouts = [replace(job, sizes=Sizes(tensor=4), zero_stage=1), replace(job, world=1024, zero_stage=3)]
    slow = Machine(infiniband=5e9, nvlink=45e9)
    for layout in layouts:
        fast = predict(layout)
        assert 0 < fast.exposed < predict(layout, slow).exposed
        assert predict(layout, slow).compute == fast.compute


def test_context_ranks_wait_for_the_last(job: Job):
    """Full attention over contiguous chunks: the last rank sees the most keys."""
    even, split = predict(job), predict(replace(job, sizes=Sizes(context=2)))
    assert even.compute < split.compute < 1.1 * even.compute
