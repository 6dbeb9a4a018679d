"""Context parallelism changes nothing of what is computed: real gloo ranks against one process of plain torch."""

import functools
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.hybrid import Precision
from tests.ranks import run_ranks
from tests.train.layouts import ROWS, Layout, braid, differences, reference, run_layouts


def changed(config: ModelConfig, letter: str, **fields: object) -> ModelConfig:
    """The braid with other fields in a layer."""
    return replace(config, layers=config.layers | {letter: replace(config.layers[letter], **fields)})


FULL_STEPS = 10
EVERY = braid("Mm*W-E")
FEW_GROUPS = changed(braid("M*S", groups=1, kv_heads=1), "M", d_ssm=16, norm_before_gate=True)
NO_NORM = changed(braid("MmW", groups=4), "M", norm=False, conv_bias=False)
BESIDE = braid("[M*]-[WE]")
FAR = changed(braid("WmM"), "W", window=20)  # a query sees keys of three ranks to the left
BATCH = changed(braid("MS"), "S", scope="batch", top_k=2)
CASES = {
    2: [
        (EVERY, Layout(context=2, micro=4), FULL_STEPS),
        (FEW_GROUPS, Layout(context=2, zero=1, micro=ROWS), 3),
        (BESIDE, Layout(context=2, micro=4, recompute=True), 3),
    ],
    3: [
        (braid("mWS*M"), Layout(context=3, zero=2, micro=4), 3),
        (BATCH, Layout(context=3, micro=ROWS), 3),
    ],
    4: [
        (FAR, Layout(context=4, micro=ROWS), FULL_STEPS),
        (FEW_GROUPS, Layout(tensor=2, context=2, zero=1, micro=4, recompute=True), 3),
        (EVERY, Layout(context=2, zero=1, micro=4), 3),
    ],
}
EXHAUSTIVE = {
    2: [
        (EVERY, Layout(context=2, zero=3, micro=4, recompute=True), FULL_STEPS),
        (NO_NORM, Layout(context=2, micro=2), FULL_STEPS),
        (BATCH, Layout(context=2, micro=ROWS), FULL_STEPS),
    ],
    3: [(config, Layout(context=3, micro=4), FULL_STEPS) for config in (EVERY, FEW_GROUPS, NO_NORM, BESIDE, FAR)],
    4: [
        *((config, Layout(context=4, micro=4), FULL_STEPS) for config in (EVERY, FEW_GROUPS, NO_NORM, BESIDE)),
        *((config, Layout(context=2, zero=2, micro=2), FULL_STEPS) for config in (FEW_GROUPS, BESIDE)),
        *((config, Layout(tensor=2, context=2, micro=4), FULL_STEPS) for config in (EVERY, NO_NORM, BESIDE)),
        (braid("[M*]m*"), Layout(context=4, zero=3, micro=4, recompute=True), FULL_STEPS),
    ],
}
plain = functools.cache(lambda config, steps, micro: reference(config, steps, micro=micro))


def check(world: int, cases: list[tuple[ModelConfig, Layout, int]]) -> None:
    results = run_ranks(run_layouts, world, cases, timeout_s=600)
    for index, (config, layout, steps) in enumerate(cases):
        found = differences(plain(config, steps, ROWS), [rank[index] for rank in results])
        for name, value in sorted(found.items(), key=lambda item: -item[1])[:4]:
            print(config.pattern, layout, name, value)
        after = {name: value for name, value in found.items() if name.startswith(("weights", "last"))}
        assert max(after.values()) < 1e-4
        assert max(value for name, value in found.items() if name not in after) < 1e-5


@pytest.mark.parametrize("world", CASES)
def test_equal(world: int) -> None:
    """Loss, norm and every gradient of the first step, and the weights after the last."""
    check(world, CASES[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", EXHAUSTIVE)
def test_equal_in_every_layout(world: int) -> None:
    check(world, EXHAUSTIVE[world])
