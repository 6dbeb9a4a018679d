"""A layout changes nothing of what is computed: real gloo ranks against one process of plain torch."""

import math

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.hybrid import Precision
from tests.ranks import run_ranks
from tests.train.layouts import (
    CLIP,
    Layout,
    Leg,
    assembled,
    braid,
    differences,
    merged,
    reference,
    run_layouts,
    run_legs,
    start_engine,
    train_one,
)

STEPS = 10
BFLOAT16 = Precision(torch.bfloat16, torch.float32)
EVERY_KIND = "M-*WmE[M*]S"
ONE_GROUP = braid("M*m-", groups=1, kv_heads=1)

Case = tuple[ModelConfig, Layout]

CASES: dict[int, list[Case]] = {
    2: [
        (braid(EVERY_KIND), Layout(zero=0, micro=2)),
        (braid("M*E"), Layout(zero=1, micro=2)),
        (braid("M*E"), Layout(zero=2, micro=2)),
        (braid("M*E"), Layout(zero=3, micro=2)),
        (braid(EVERY_KIND), Layout(tensor=2, micro=4)),
        (ONE_GROUP, Layout(tensor=2, zero=1, micro=4, recompute=True, offload=True)),
        (braid("MW", groups=4, tie_embeddings=False), Layout(tensor=2, zero=2, micro=4)),
        (braid("M*E", groups=4, heads=3, kv_heads=1), Layout(tensor=2, zero=3, micro=4)),
        (braid("mMW-"), Layout(context=2, zero=1, micro=2, overlap=True)),
        (braid("MES"), Layout(expert=2, zero=2, overlap=True)),
    ],
    4: [
        (braid("M*E", groups=1, kv_heads=1), Layout(tensor=4, micro=4)),
        (braid("M", groups=2), Layout(tensor=4, zero=2, micro=4)),
        (braid("MW-", groups=4), Layout(tensor=4, zero=1, micro=8)),
        (braid("M*E"), Layout(tensor=2, zero=1, overlap=True)),
        (braid("M*mS"), Layout(tensor=2, zero=3, micro=2, overlap=True)),
        (braid("M*W-", groups=1), Layout(tensor=2, context=2, zero=1, micro=4)),
        (braid("mW"), Layout(context=2, zero=2, micro=2)),
        (braid("MS"), Layout(expert=2, zero=2)),
    ],
    3: [(braid("MW-S", groups=4), Layout(tensor=3)), (braid("MW*-"), Layout(context=3, zero=3))],
}
CASES[8] = [
    (braid(EVERY_KIND, groups=1, kv_heads=1), Layout(tensor=4, zero=1)),
    (braid("MWES"), Layout(expert=2, tensor=2, context=2, zero=1)),
    (braid(EVERY_KIND), Layout(tensor=2, context=2, zero=2)),
]


def check(config: ModelConfig, layout: Layout, ranks: list[list[dict]]) -> None:
    """Loss, norm and gradients within 1e-5, ten steps later weights within 1e-4, clipped on the way."""
    expected = reference(config, len(ranks[0]))
    assert expected[0]["norm"] > CLIP, "nothing was clipped"
    found = differences(expected, ranks)
    limits = {key: 1e-4 if "weights" in key or "last" in key else 1e-5 for key in found}
    wrong = {key: value for key, value in found.items() if not value <= limits[key]}
    assert not wrong, f"{config.pattern} in {layout}: {wrong}"
    initial = assembled(expected[0]["initial"], [part for rank in ranks for part in rank[0]["initial"]])
    for name, value in expected[0]["initial"].items():
        assert torch.equal(initial[name], value), f"{config.pattern} in {layout}: {name} begins with other numbers"


@pytest.mark.parametrize("world", [2, 4, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 8))])
def test_same_training(world: int):
    """A run would learn something else on another cluster, and nobody would see it."""
    cases = CASES[world]
    results = run_ranks(run_layouts, world, [(*case, STEPS) for case in cases], timeout_s=600)
    for index, (config, layout) in enumerate(cases):
        check(config, layout, [rank[index] for rank in results])


def test_bfloat16_differs_by_its_rounding():
    """Gradients of a layout are as near to those of one process as bfloat16 is to float32."""
    cases = [(braid("M*WE"), Layout(tensor=2)), (braid("M*E"), Layout(zero=3))]
    results = run_ranks(run_layouts, 2, [(*case, 1) for case in cases], BFLOAT16, timeout_s=300)
    for index, (config, layout) in enumerate(cases):
        ranks = [rank[index] for rank in results]
        alone = reference(config, 1, BFLOAT16)
        rounding = max(
            (alone[0]["gradients"][name] - exact).abs().max().item() / exact.abs().max().item()
            for name, exact in reference(config, 1)[0]["gradients"].items()
        )
        found = {key: value for key, value in differences(alone, ranks).items() if key.startswith("gradients")}
        wrong = {key: value for key, value in found.items() if not value <= 2 * rounding}
        assert not wrong, f"{config.pattern} in {layout}: {wrong}, bfloat16 itself {rounding}"


def seen_in_forward(config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """What routers and norms find as their weight when they are called, computing in bfloat16."""
    from train.parallel import Mesh, open_mesh

    with open_mesh("cpu", timeout_s=60) as world:
        engine = start_engine(Mesh(world.device, layout.sizes), config, layout, BFLOAT16)
        seen: dict[str, Tensor] = {}
        for path, module in engine.module.named_modules():
            if path.endswith("norm") or path.endswith("router"):
                module.register_forward_pre_hook(
                    lambda module, arguments, path=path: seen.update({f"{path}.weight": module.weight.detach().clone()})
                )
        train_one(engine, layout, 0)
        train_one(engine, layout, 1)
        engine.close()
    return seen


def test_routers_and_norms_are_never_rounded():
    """DeepSpeed's autocast hands a float32 layer its weight rounded to bfloat16 under ZeRO 3; experts would be chosen
    by other numbers than under ZeRO 0."""
    config = braid("M*E")
    weights = reference(config, 1, BFLOAT16)[0]["weights"]
    for seen in run_ranks(seen_in_forward, 2, config, Layout(zero=3)):
        assert len(seen) == 5
        for name, value in seen.items():
            assert value.dtype == torch.float32
            assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded"
            assert torch.allclose(value, weights[name], rtol=1e-3), name


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoints_between_layouts(world: int, tmp_path):
    """From each layout to one process and back, and to another layout, moments and all; there the training goes on as
    if nothing had happened. What several tensor ranks hold is the same on all of them."""
    cases, half = CASES[world], STEPS // 2
    apart, alone = ([tmp_path / f"{part}-{index}" for index in range(len(cases))] for part in ("ranks", "one"))
    first = [Leg(*case, 0, half, save=to) for case, to in zip(cases, apart, strict=True)]
    one = [
        Leg(config, Layout(), half, half, restore=at, save=to)
        for (config, _), at, to in zip(cases, apart, alone, strict=True)
    ]
    back = [Leg(*case, half, half, restore=at, start=case[1].tensor > 1) for case, at in zip(cases, alone, strict=True)]
    moved = {True: Layout(zero=2, micro=2), False: Layout(tensor=2, zero=1, micro=4)}  # by: has it tensor ranks?
    other = [
        Leg(config, moved[layout.tensor > 1], half, STEPS, restore=at)
        for (config, layout), at in zip(cases, apart, strict=True)
    ]
    before = run_ranks(run_legs, world, first, timeout_s=600)
    middle = run_ranks(run_legs, 1, one, timeout_s=600)
    after = run_ranks(run_legs, world, [*back, *other], timeout_s=600)
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
        copies: dict[tuple, Tensor] = {}
        for name, box, value in (copy for rank in before for copy in rank[index]["copies"]):
            assert torch.equal(value, copies.setdefault((name, box), value)), f"{config.pattern} in {layout}: {name}"
