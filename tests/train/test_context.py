"""Context parallelism changes nothing of what is computed: real gloo ranks against one process of plain torch."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.context import Context, Documents, chunk_bounds
from model.hybrid import HybridLM, Precision, initialise_model
from tests.ranks import run_ranks
from tests.train.layouts import (
    LENGTH,
    ROWS,
    Layout,
    assembled,
    braid,
    differences,
    global_batch,
    reference,
    train_layout,
)
from train.parallel import Mesh, Sizes, open_mesh


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
        (braid("M*SE"), Layout(context=2, expert=2, zero=1, micro=2), FULL_STEPS),
        (braid("[M*]m*"), Layout(context=4, zero=3, micro=4, recompute=True), FULL_STEPS),
    ],
}


BFLOAT16 = Precision(torch.bfloat16, torch.float32)


def work(cases: list[tuple[ModelConfig, Layout, int]]) -> tuple[list[list[dict]], list[str], list[list[dict]]]:
    """On one rank: the cases, what is wrong otherwise, and a step in bfloat16."""
    with open_mesh("cpu", timeout_s=60) as world:
        context = Layout(context=world.size, micro=ROWS)
        trained = [train_layout(Mesh(world.device, at.sizes), config, at, n, Precision()) for config, at, n in cases]
        mesh = Mesh(world.device, Sizes(context=world.size))
        wrong = [leak for config in (EVERY, FAR) for leak in leaking(config, mesh)]
        wrong += [where for config in (EVERY, BESIDE) for where in wrong_on_short_rows(config, mesh)]
        return trained, wrong, [train_layout(mesh, IN_BFLOAT16, context, 1, BFLOAT16)]


IN_BFLOAT16 = braid("Mm*W-")


def wrong_on_short_rows(config: ModelConfig, mesh: Mesh) -> list[str]:
    """The parameters whose gradient is another than on one process, where chunks have a token or two, so that ranks may
    go different ways through the ops."""
    found = []
    for length in (mesh.size, 2 * mesh.size - 1):
        batch, gradients = global_batch(0, length=length), []
        for model in (HybridLM(config), HybridLM(config, mesh=mesh, recompute=True)):
            initialise_model(model, seed=0)
            out = model(batch.tokens, batch.starts, batch.targets)
            sum(out.losses.values(), out.nll.sum()).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for name, alone in gradients[0].items():
            total = mesh.sum_(gradients[1][name].clone())
            if not (total - alone).abs().max() <= 1e-5 * alone.abs().max():
                found.append(f"rows of {length}: {name}")
    return found


def leaking(config: ModelConfig, mesh: Mesh) -> list[str]:
    """The blocks in which other documents change a document's outputs, or the gradients of its inputs: of mixers by a
    bit, of experts by more than rounding."""
    model = HybridLM(config, mesh=mesh)
    initialise_model(model, seed=0)
    rows, lengths = 2, (7, 11, 7)
    starts = torch.zeros(rows, LENGTH, dtype=torch.bool)
    starts[:, [0, lengths[0], LENGTH - lengths[2]]] = True
    low, high = chunk_bounds(LENGTH, mesh.context_rank, mesh.context_size)
    documents = Documents.from_starts(starts)
    own = documents.index[:, low:high] == 2
    ctx = Context(documents.chunk(mesh.context_rank, mesh.context_size), mesh=mesh, row=LENGTH)
    x = torch.randn(rows, LENGTH, config.d_model, generator=torch.Generator().manual_seed(0))
    other = torch.where((documents.index == 2)[..., None], x, 2 - 3 * x)
    found = []
    for place, block in enumerate(model.blocks):
        seen = []
        for whole in (x, other):
            case = whole[:, low:high].clone().requires_grad_()
            y = block(case, ctx).y
            torch.where(own[..., None], y, 0).square().sum().backward()
            gradient = case.grad
            if gradient[~own].any():
                found.append(f"{place}: gradients of other documents' inputs")
            seen.append((y.detach()[own], gradient[own]))
        routed = getattr(config.stacked[place], "routed", False)
        for name, a, b in zip(("outputs", "gradients"), *seen, strict=True):
            if not torch.allclose(a, b, rtol=1e-6, atol=1e-6) if routed else not torch.equal(a, b):
                found.append(f"{place}: {name}")
    return found


def check(world: int, cases: list[tuple[ModelConfig, Layout, int]], ranks: list[list[list[dict]]]) -> None:
    for index, (config, layout, steps) in enumerate(cases):
        found = differences(reference(config, steps), [rank[index] for rank in ranks])
        limits = {name: 1e-4 if name.startswith(("weights", "last")) else 1e-5 for name in found}
        wrong = {name: value for name, value in found.items() if not value < limits[name]}
        assert not wrong, f"{config.pattern} in {layout}: {wrong}"


def check_bfloat16(ranks: list[list[dict]]) -> None:
    exact = reference(IN_BFLOAT16, 1)[0]["gradients"]
    alone = reference(IN_BFLOAT16, 1, BFLOAT16)[0]["gradients"]
    spread = assembled(exact, [part for rank in ranks for part in rank[0]["gradients"]])
    ratios = {}
    for name, gradient in exact.items():
        rounding = (alone[name] - gradient).norm()
        ratios[name] = ((spread[name] - gradient).norm() / rounding).item()
    assert max(ratios.values()) < 2, ratios


def verify(world: int, cases: list[tuple[ModelConfig, Layout, int]]) -> None:
    results = run_ranks(work, world, cases, timeout_s=1500)
    check(world, cases, [trained for trained, _, _ in results])
    assert [wrong for _, wrong, _ in results] == [[]] * world
    check_bfloat16([halves[0] for _, _, halves in results])


@pytest.mark.parametrize("world", CASES)
def test_equal(world: int) -> None:
    """Loss, norm and every gradient of the first step, and the weights after the last; documents stay apart; rows may
    be as short as there are ranks; bfloat16 is as near to float32 as on one process."""
    verify(world, CASES[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", EXHAUSTIVE)
def test_equal_in_every_layout(world: int) -> None:
    verify(world, EXHAUSTIVE[world])
