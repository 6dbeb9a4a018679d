"""A layout changes nothing of what is computed: real gloo ranks against one process of plain torch."""

import pytest

from tests.ranks import run_ranks
from tests.train.layouts import Layout, braid, differences, reference, run_layouts

CASES = {
    2: [
        (braid("M-*Wm"), Layout(tensor=2), 3),
        (braid("ME[M*]", groups=1, kv_heads=1), Layout(tensor=2, zero=1, micro=4), 3),
    ],
    3: [(braid("MW-", groups=4), Layout(tensor=3), 3)],
    4: [(braid("M*-mE", groups=1, kv_heads=1), Layout(tensor=2, zero=3), 3)],
}


@pytest.mark.parametrize("world", CASES)
def test_equal(world: int):
    results = run_ranks(run_layouts, world, CASES[world], timeout_s=240)
    for index, (config, layout, steps) in enumerate(CASES[world]):
        found = differences(reference(config, steps), [rank[index] for rank in results])
        for name, value in sorted(found.items(), key=lambda item: -item[1])[:8]:
            print(config.pattern, layout, name, value)
        assert max(found.values()) < 1e-4
