"""Experts dealt to ranks change nothing of what is computed, saved or resumed: real gloo ranks against one process of
plain torch. One set of processes per world goes through all cases."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision
from model.layers.moe import MoEConfig
from tests.ranks import run_ranks
from tests.train.layouts import (
    Layout,
    Leg,
    assembled,
    braid,
    differences,
    merged,
    reference,
    run_leg,
    train_layout,
)
from tests.train.runs import ROOT
from train.config import load_recipe
from train.muon import MuonConfig
from train.parallel import Mesh, Sizes

RECIPE = ROOT / "launch/recipes/tiny-moe-mamba.toml"
PASSED = braid("ES")
OTHERS = ModelConfig(
    vocab_size=61,
    d_model=16,
    pattern="DC",
    init_std=0.1,
    layers={
        "D": MoEConfig(n_experts=6, top_k=1, d_hidden=10, activation="relu", gated=False, balance_weight=0.1),
        "C": MoEConfig(n_experts=4, top_k=2, d_hidden=10, score="sigmoid", renormalise=True, capacity_factor=0.7),
    },
)
MUON = MuonConfig(learning_rate=1e-3, weight_decay=0.1)
FULL, LOW = Precision(), Precision(compute=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """banned: experts that no token may choose. tolerance: of loss, norm and gradients, relative to each tensor's
    largest number."""

    config: ModelConfig
    layout: Layout
    steps: int = 10
    banned: tuple[int, ...] = ()
    precision: Precision = FULL
    tolerance: float = 1e-5

    def prepare(self, model: HybridLM) -> None:
        """A frozen bias decides who is chosen, and nothing else."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias") and self.banned:
                    parameter[list(self.banned)] = -10.0


CASES = {
    2: [
        Case(braid("ME"), Layout(expert=2, micro=4)),
        Case(braid("E[MS]"), Layout(expert=2, zero=1, micro=2, recompute=True)),
        Case(OTHERS, Layout(expert=2, zero=2, micro=1)),
        Case(braid("ESE"), Layout(expert=2, zero=1, micro=4), banned=(2,)),
        Case(braid("ES"), Layout(expert=2, zero=2, micro=2), banned=(0, 1)),
        Case(braid("ME"), Layout(expert=2, micro=4, optimizer=MUON)),
        Case(braid("MES"), Layout(expert=2, zero=1, micro=4), steps=1, precision=LOW, tolerance=2e-2),
    ],
    4: [
        Case(braid("ES"), Layout(expert=4, micro=2, recompute=True)),
        Case(braid("MSE"), Layout(expert=2, zero=2, micro=1)),
        Case(braid("E*S", kv_heads=1), Layout(expert=2, tensor=2, zero=1, micro=2)),
        Case(braid("ES"), Layout(expert=4, zero=1, micro=1), banned=(0, 1, 3)),
        Case(braid("MES"), Layout(expert=2, context=2, zero=1, micro=2, recompute=True)),
    ],
}
MORE = {
    2: [
        Case(braid(pattern), Layout(expert=2, zero=zero, micro=micro, recompute=recompute))
        for pattern in ("ME", "S*", "[ES]-")
        for zero in (0, 1, 2)
        for micro, recompute in ((1, True), (4, False))
    ]
    + [Case(braid("ES"), Layout(expert=2, zero=zero, micro=2, offload=True)) for zero in (1, 2)],
    4: [
        Case(braid(pattern), Layout(expert=expert, tensor=tensor, zero=zero))
        for pattern in ("ME", "S[W-]")
        for zero in (0, 1, 2)
        for expert, tensor in ((4, 1), (2, 1), (2, 2))
    ]
    + [Case(braid("E*"), Layout(expert=2, tensor=tensor, optimizer=MUON)) for tensor in (1, 2)],
}
SAVED = {2: Layout(expert=2, zero=1), 1: Layout(), 4: Layout(expert=4, zero=2)}
"""How the state goes round: trained and saved by two ranks, restored and saved by one, restored by four."""


def work(cases: list[Case], legs: list[Leg]) -> dict:
    """On one rank: every case in turn, the exchanges, and the passing on of a checkpoint."""
    from train.parallel import open_mesh

    with open_mesh("cpu", timeout_s=60) as world:
        trained = []
        for case in cases:
            mesh = Mesh(world.device, case.layout.sizes)
            trained.append(train_layout(mesh, case.config, case.layout, case.steps, case.precision, case.prepare))
        exchanged = exchange(Mesh(world.device, Sizes(expert=2))) if world.size == 2 else None
        passed = [run_leg(Mesh(world.device, leg.layout.sizes), leg) for leg in legs]
        return {"trained": trained, "exchanged": exchanged, "passed": passed, "left": left_in_deepspeed()}


def left_in_deepspeed() -> list[str]:
    """Names of experts' groups in DeepSpeed's registries."""
    from deepspeed.utils import groups

    return [*groups._EXPERT_PARALLEL_GROUP, *groups._EXPERT_DATA_PARALLEL_GROUP]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What the ranks of each world found; the checkpoint goes from one to the next."""
    folder, found, source = tmp_path_factory.mktemp("experts"), {}, None
    for size, layout in SAVED.items():
        target = folder / str(size)
        leg = Leg(PASSED, layout, 0 if source is None else 3, 3, restore=source, save=target)
        found[size] = run_ranks(work, size, CASES.get(size, []), [leg], timeout_s=300)
        source = target
    return found


def check(cases: list[Case], results: list[dict]) -> None:
    for index, case in enumerate(cases):
        ranks = [rank["trained"][index] for rank in results]
        expected = reference(
            case.config, case.steps, case.precision, prepare=case.prepare, chosen=case.layout.optimizer
        )
        found = differences(expected, ranks)
        later = 1e-4 if case.steps >= 10 else math.inf
        limits = {name: later if name.startswith(("weights", "last")) else case.tolerance for name in found}
        wrong = {name: value for name, value in found.items() if not value < limits[name]}
        assert not wrong, f"{case}: {wrong}"
        initial = assembled(expected[0]["initial"], [part for rank in ranks for part in rank[0]["initial"]])
        assert all(torch.equal(initial[name], value) for name, value in expected[0]["initial"].items()), case
        if case.precision == LOW:
            router = assembled(expected[0]["gradients"], [part for rank in ranks for part in rank[0]["gradients"]])[
                "blocks.1.mixer.router.weight"
            ]
            assert not torch.equal(router, router.bfloat16().float()), "a router's gradient was rounded to bfloat16"


@pytest.mark.parametrize("world", CASES)
def test_equal_to_one_process(worlds: dict, world: int):
    """Initial weights, loss, norm, every gradient and ten steps' weights: dropless and with capacity, one choice and
    two, experts that no token chooses, ranks that send everything and get nothing."""
    check(CASES[world], worlds[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", MORE)
def test_equal_in_every_combination(world: int):
    check(MORE[world], run_ranks(work, world, MORE[world], [], timeout_s=900))


def exchange(mesh: Mesh) -> list[tuple[Any, ...]]:
    """On one of two ranks with two experts each, for the counts of `SENT`: the rows that its experts were given, their
    counts, what came back, the gradient, and how many bytes left the rank."""
    found, left, real = [], [], dist.all_to_all_single

    def counted(
        output: torch.Tensor, x: torch.Tensor, received: Any = None, sent: Any = None, group: Any = None
    ) -> None:
        kept = len(x) // 2 if sent is None else sent[mesh.expert.rank]
        left.append((len(x) - kept) * x[:1].nbytes if len(x) else 0)
        real(output, x, received, sent, group=group)

    for sent in SENT:
        left.clear()
        x = (torch.arange(10.0).view(5, 2) + 100 * mesh.rank).requires_grad_()
        seen: list[torch.Tensor] = []

        def run(rows: torch.Tensor, held: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.extend([rows.detach(), held])
            factors = torch.arange(1.0, 3.0) + 2 * mesh.expert.rank
            return rows * factors.repeat_interleave(held)[:, None]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", counted)
            y = mesh.at_experts(x, torch.tensor(sent[mesh.rank]), run)
            (y * torch.arange(1.0, 6.0)[:, None]).sum().backward()
        assert x.grad is not None
        found.append((*seen, y.detach(), x.grad, sum(left)))
    return found


SENT = [
    [[0, 0, 2, 1], [3, 0, 0, 0]],  # all to the other rank
    [[2, 1, 1, 1], [0, 0, 0, 0]],  # nothing at all from one
    [[0, 0, 0, 0], [0, 0, 0, 0]],
    [[1, 1, 1, 1], [1, 2, 0, 2]],
]
"""Rows of five, of each rank for each of four experts."""


@pytest.mark.parametrize("case", range(len(SENT)))
def test_rows_go_to_their_experts_and_back(worlds: dict, case: int):
    """Sorted by expert, then by sender; rows of no expert stay and give zeros. What a rank sends is what the formula of
    `at_experts` says."""
    for rank, (rows, held, y, d, bytes_left) in enumerate(result["exchanged"][case] for result in worlds[2]):
        mine = [(e, sender) for e in (2 * rank, 2 * rank + 1) for sender in range(2)]
        assert held.tolist() == [sum(SENT[case][sender][e] for sender in range(2)) for e in (2 * rank, 2 * rank + 1)]
        x = torch.arange(10.0).view(5, 2)
        firsts = {(e, s): sum(SENT[case][s][:e]) for e, s in mine}
        parts = [x[firsts[e, s] : firsts[e, s] + SENT[case][s][e]] + 100 * s for e, s in mine]
        assert torch.equal(rows, torch.cat(parts))
        factor = torch.arange(1.0, 5.0).repeat_interleave(torch.tensor(SENT[case][rank]))
        factor = torch.cat([factor, torch.zeros(5 - len(factor))])[:, None]
        assert torch.equal(y, (x + 100 * rank) * factor)
        assert torch.equal(d, (factor * torch.arange(1.0, 6.0)[:, None]).expand(5, 2))
        away, others = (sum(SENT[case][r][2 - 2 * r : 4 - 2 * r]) for r in (rank, 1 - rank))
        assert bytes_left == 2 * (away + others) * 2 * 4 + 8 * 4 // 2


def test_weights_and_moments_go_from_layout_to_layout(worlds: dict):
    """Bit for bit, from two ranks of experts to one process to four."""
    saved, *moved = (merged(PASSED, [rank["passed"][0] for rank in worlds[size]]) for size in SAVED)
    assert saved["optimizer/exp_avg"]["blocks.1.mixer.down.weight"].abs().max() > 0
    for found in moved:
        assert found.keys() == saved.keys()
        for kind, tensors in saved.items():
            for name, value in tensors.items():
                assert torch.equal(found[kind][name], value), f"{kind} of {name} changed on the way"


@pytest.mark.parametrize("world", CASES)
def test_closed_engines_leave_no_groups(worlds: dict, world: int):
    """DeepSpeed's registries live as long as the process: the next engine would find groups of ranks long gone."""
    assert [rank["left"] for rank in worlds[world]] == [[]] * world


def test_refusals_name_the_keys_of_the_recipe():
    """What is not refused at once dies in a collective of the cluster."""
    with pytest.raises(ValueError, match=r"parallel\.expert: got 3, wants a divisor of the 4 experts .*, such as 2"):
        load_recipe(RECIPE, ["parallel.expert=3"])
    with pytest.raises(ValueError, match=r"parallel\.expert: got 2, wants 1 under zero_stage = 3, or zero_stage = 2"):
        load_recipe(RECIPE, ["parallel.expert=2", "parallel.zero_stage=3"])
    with pytest.raises(ValueError, match=r"parallel\.expert: got 2, wants 1, because no layer .* has experts"):
        load_recipe(RECIPE, ["parallel.expert=2", 'model.pattern="M"'])
    recipe = load_recipe(RECIPE, ["parallel.expert=4"])
    with pytest.raises(ValueError, match=r"parallel\.expert: got 4, which does not divide the 6 data ranks; wants 3"):
        recipe.check_ranks(6)
