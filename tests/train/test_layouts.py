"""A layout changes nothing of what is computed: real gloo ranks against one process of plain torch."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.hybrid import Precision, model_table
from tests.ranks import run_ranks
from tests.train.layouts import Layout, Leg, assembled, braid, differences, reference, run_layouts, run_legs

STEPS = 10
EVERY_KIND = "M-*WmE[M*]S"
ONE_GROUP = braid("M*m-", groups=1, kv_heads=1)

Case = tuple[ModelConfig, Layout]

CASES: dict[int, list[Case]] = {
    2: [
        (braid(EVERY_KIND), Layout(zero=0)),
        (braid("M*E"), Layout(zero=1, micro=2)),
        (braid("M*E"), Layout(zero=2, micro=2)),
        (braid("M*E"), Layout(zero=3, micro=2)),
        (braid(EVERY_KIND), Layout(tensor=2, micro=4)),
        (ONE_GROUP, Layout(tensor=2, zero=1, recompute=True, offload=True)),
        (braid("MW", groups=4, tie_embeddings=False), Layout(tensor=2, zero=2)),
        (braid("M*", groups=4, heads=3, kv_heads=1), Layout(tensor=2, zero=3)),
    ],
    4: [
        (braid(EVERY_KIND, groups=1, kv_heads=1), Layout(tensor=4)),
        (braid("MW-", groups=4), Layout(tensor=4, zero=1)),
        (braid("M*WE"), Layout(tensor=2, zero=1)),
        (braid("M*m-", groups=2), Layout(tensor=2, zero=3, offload=True)),
        (braid("M*W-", groups=1), Layout(tensor=2, context=2, zero=1)),
        (braid("mMW-"), Layout(context=2, zero=2)),
        (braid("MWES"), Layout(expert=2, tensor=2, zero=1)),
        (braid("MES"), Layout(expert=2, zero=2)),
    ],
    3: [(braid("MW-S", groups=4), Layout(tensor=3))],
}


def check(config: ModelConfig, layout: Layout, ranks: list[list[dict]], precision: Precision, loose: bool) -> None:
    """Loss, norm and gradients within 1e-5, ten steps later weights within 1e-4; in bfloat16 within its rounding."""
    expected = reference(config, len(ranks[0]), precision)
    found = differences(expected, ranks)
    limits = {key: (3e-2 if loose else 1e-4 if "weights" in key or "last" in key else 1e-5) for key in found}
    wrong = {key: value for key, value in found.items() if not value <= limits[key]}
    assert not wrong, f"{config.pattern} in {layout}: {wrong}"
    initial = assembled(expected[0]["initial"], [part for rank in ranks for part in rank[0]["initial"]])
    for name, value in expected[0]["initial"].items():
        assert torch.equal(initial[name], value), f"{config.pattern} in {layout}: {name} begins with other numbers"


@pytest.mark.parametrize("world", [2, 4, pytest.param(3, marks=pytest.mark.slow)])
def test_same_training(world: int):
    """A run would learn something else on another cluster, and nobody would see it."""
    cases = CASES[world]
    results = run_ranks(run_layouts, world, [(*case, STEPS) for case in cases], timeout_s=600)
    for index, (config, layout) in enumerate(cases):
        check(config, layout, [rank[index] for rank in results], Precision(), loose=False)


def test_same_training_in_bfloat16():
    """Layouts differ by rounding alone where matmuls are bfloat16; routers, norms and decays stay float32."""
    precision = Precision(torch.bfloat16, torch.float32)
    cases = [(braid("M*WE"), Layout(tensor=2)), (braid("M*E"), Layout(zero=3))]
    results = run_ranks(run_layouts, 2, [(*case, 2) for case in cases], precision, timeout_s=300)
    for index, (config, layout) in enumerate(cases):
        check(config, layout, [rank[index] for rank in results], precision, loose=True)


def merged(config: ModelConfig, ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Kind -> logical tensors, from what all ranks save."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for kind, name in dict.fromkeys((f[0], f[1]) for rank in ranks for f in rank["fragments"]):
        if kind != "scalar":
            kinds.setdefault(kind, {})[name] = torch.empty(model_table(config)[name].shape)
    return {
        kind: assembled(like, [f[1:] for rank in ranks for f in rank["fragments"] if f[0] == kind])
        for kind, like in kinds.items()
    }


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoints_between_layouts(world: int, tmp_path):
    """From each layout to one process and to each layout, moments and all, and on with the same training."""
    cases = [case for case in CASES[world] if world == 4 or case[1].tensor > 1 or case[1].zero == 3]
    half = STEPS // 2
    apart, alone = ([tmp_path / f"{part}-{index}" for index in range(len(cases))] for part in ("ranks", "one"))
    first = [Leg(*case, 0, half, save=to) for case, to in zip(cases, apart, strict=True)]
    one = [
        Leg(config, Layout(), half, half, restore=at, save=to)
        for (config, _), at, to in zip(cases, apart, alone, strict=True)
    ]
    second = [Leg(*case, half, STEPS, restore=at) for case, at in zip(cases, alone, strict=True)]
    kept = [Leg(*case, half, half, restore=at) for case, at in zip(cases, alone, strict=True)]
    before = run_ranks(run_legs, world, first, timeout_s=600)
    middle = run_ranks(run_legs, 1, one, timeout_s=600)
    after = run_ranks(run_legs, world, [*kept, *second], timeout_s=600)
    for index, (config, layout) in enumerate(cases):
        saved = merged(config, [rank[index] for rank in before])
        assert {"weight", "optimizer/exp_avg", "optimizer/exp_avg_sq"} <= saved.keys()
        for found in ([rank[index] for rank in middle], [rank[index] for rank in after]):
            for kind, tensors in merged(config, found).items():
                for name, value in tensors.items():
                    assert torch.equal(value, saved[kind][name]), f"{config.pattern} in {layout}: {kind} of {name}"
        weights = merged(config, [rank[len(cases) + index] for rank in after])["weight"]
        for name, value in reference(config, STEPS)[-1]["weights"].items():
            apart_by = (weights[name] - value).abs().max().item() / max(value.abs().max().item(), 1e-30)
            assert apart_by <= 1e-4 and not math.isnan(apart_by), f"{config.pattern} in {layout}: {name}"
