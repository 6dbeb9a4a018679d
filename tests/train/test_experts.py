"""Experts dealt to ranks change nothing of what is computed, saved or resumed: real gloo ranks against one process of
plain torch. One set of processes per world goes through all cases."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision, initialise_model
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from tests.ranks import run_ranks
from tests.train.layouts import (
    OPTIMIZER,
    ROWS,
    Layout,
    assembled,
    braid,
    differences,
    global_batch,
    reference,
    train_layout,
)
from tests.train.runs import ROOT
from train.config import load_recipe
from train.layout import check_layout
from train.parallel import Mesh, Sizes

RECIPE = ROOT / "launch/recipes/tiny-moe-mamba.toml"


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
        Case(braid("ES"), Layout(expert=2, zero=2, micro=1)),
        Case(braid("ESE"), Layout(expert=2, zero=1, micro=4), banned=(2,)),
        Case(braid("ES"), Layout(expert=2, zero=2, micro=2), banned=(0, 1)),
        Case(braid("MES"), Layout(expert=2, zero=1, micro=4), steps=1, precision=LOW, tolerance=2e-2),
    ],
    4: [
        Case(braid("ES"), Layout(expert=4, micro=2, recompute=True)),
        Case(braid("MSE"), Layout(expert=2, zero=2, micro=1)),
        Case(braid("E*S", kv_heads=1), Layout(expert=2, tensor=2, zero=1, micro=2)),
        Case(braid("ES"), Layout(expert=4, zero=1, micro=1), banned=(0, 1, 3)),
    ],
}
MORE = {
    2: [
        Case(braid(pattern), Layout(expert=2, zero=zero, micro=micro, recompute=recompute))
        for pattern in ("ME", "S*", "[ES]-")
        for zero in (0, 1, 2)
        for micro, recompute in ((1, True), (4, False))
    ],
    4: [
        Case(braid(pattern), Layout(expert=expert, tensor=tensor, zero=zero))
        for pattern in ("ME", "S[W-]")
        for zero in (0, 1, 2)
        for expert, tensor in ((4, 1), (2, 1), (2, 2), (1, 2))
    ],
}
SAVED = {2: Layout(expert=2, zero=1), 1: Layout(zero=0), 4: Layout(expert=2, zero=2)}
"""How the state goes round: trained and saved by two ranks, restored and saved by one, restored by four."""


def work(cases: list[Case], source: Path | None, target: Path | None) -> dict:
    """On one rank: every case in turn, the exchange, and the passing on of a checkpoint."""
    from train.parallel import open_mesh

    with open_mesh("cpu", timeout_s=60) as world:
        trained = [
            train_layout(
                Mesh(world.device, case.layout.sizes),
                case.config,
                case.layout,
                case.steps,
                case.precision,
                case.prepare,
            )
            for case in cases
        ]
        exchanged = exchange(Mesh(world.device, Sizes(expert=2))) if world.size == 2 else None
        passed = None if target is None else pass_on(source, target, Mesh(world.device, SAVED[world.size].sizes))
        return {"trained": trained, "exchanged": exchanged, "passed": passed}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What the ranks of each world found; the checkpoint goes from one to the next."""
    folder, found, source = tmp_path_factory.mktemp("experts"), {}, None
    for size in SAVED:
        found[size] = run_ranks(work, size, CASES.get(size, []), source, folder / str(size), timeout_s=300)
        source = folder / str(size)
    return found


def check(cases: list[Case], results: list[dict]) -> None:
    for index, case in enumerate(cases):
        ranks = [rank["trained"][index] for rank in results]
        expected = reference(case.config, case.steps, case.precision, prepare=case.prepare)
        found = differences(expected, ranks)
        for name, value in sorted(found.items(), key=lambda item: -item[1])[:4]:
            print(case.config.pattern, case.layout, case.banned, name, value)
        weights = {name: value for name, value in found.items() if name.startswith(("weights", "last"))}
        assert max(value for name, value in found.items() if name not in weights) < case.tolerance, case
        assert case.steps < 10 or max(weights.values()) < 1e-4, case
        if case.precision == LOW:
            router = assembled(expected[0]["gradients"], [part for rank in ranks for part in rank[0]["gradients"]])[
                "blocks.1.mixer.router.weight"
            ]
            assert not torch.equal(router, router.bfloat16().float()), "a router's gradient was rounded to bfloat16"


@pytest.mark.parametrize("world", CASES)
def test_equal_to_one_process(worlds: dict, world: int):
    """Loss, norm, every gradient and ten steps' weights: dropless and with capacity, one choice and two, experts that
    no token chooses, ranks that send everything and get nothing."""
    check(CASES[world], worlds[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", MORE)
def test_equal_in_every_combination(world: int):
    check(MORE[world], run_ranks(work, world, MORE[world], None, None, timeout_s=600))


def exchange(mesh: Mesh) -> list[tuple[torch.Tensor, ...]]:
    """On one of two ranks with two experts each, for the counts of `SENT`: the rows that its experts were given, their
    counts, what came back, and the gradient."""
    found = []
    for sent in SENT:
        x = (torch.arange(10.0).view(5, 2) + 100 * mesh.rank).requires_grad_()
        seen: list[torch.Tensor] = []

        def run(rows: torch.Tensor, held: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.extend([rows.detach(), held])
            factors = torch.arange(1.0, 3.0) + 2 * mesh.expert.rank
            return rows * factors.repeat_interleave(held)[:, None]

        y = mesh.at_experts(x, torch.tensor(sent[mesh.rank]), run)
        (y * torch.arange(1.0, 6.0)[:, None]).sum().backward()
        assert x.grad is not None
        found.append((*seen, y.detach(), x.grad))
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
    """Sorted by expert, then by sender; rows of no expert stay and give zeros."""
    for rank, (rows, held, y, d) in enumerate(result["exchanged"][case] for result in worlds[2]):
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


def pass_on(source: Path | None, target: Path, mesh: Mesh) -> dict:
    """On one rank: the initial weights, then what `source` has, or three steps of training, saved to `target`;
    fragments of both, as `(kind and name, box, start, values)`."""
    from train.checkpoint.capture import restore, saved_fragments, saved_shapes
    from train.engine import Engine

    model = HybridLM(braid("ES"), mesh=mesh)
    initialise_model(model, seed=0)
    engine = Engine(model, model.table(), OPTIMIZER, zero_stage=SAVED[mesh.size].zero, mesh=mesh)

    def parts() -> list:
        return [
            (f"{fragment.kind} {fragment.tensor}", fragment.box, fragment.start, value.clone())
            for fragment, value in saved_fragments(engine)
            if fragment.kind != "scalar"
        ]

    initial, share = parts(), ROWS // mesh.data.size
    if source is not None:
        restore(engine, Checkpoint(source))
    for step in range(3 if source is None else 0):
        rows = global_batch(step).part(slice(mesh.data.rank * share, (mesh.data.rank + 1) * share))
        engine.backward(engine(rows.tokens, rows.starts, rows.targets).nll.sum() / 100, last=True)
        engine.apply(1e-2)
    mesh.first(target.mkdir)
    records = mesh.gather(write_rank_files(target, mesh.rank, saved_fragments(engine)))
    mesh.first(lambda: Manifest.from_records(chain(*records), saved_shapes(engine), {}).save(target))
    result = {"initial": initial, "saved": parts(), "steps": engine.steps}
    engine.close()
    return result


def test_weights_and_moments_go_from_layout_to_layout(worlds: dict):
    """Bit for bit, from two ranks of experts to one process to four ranks; initial weights are the same everywhere."""
    model = HybridLM(braid("ES"))
    initialise_model(model, seed=0)
    table, saved = model.table(), {}
    begun = {f"weight {name}": p.detach()[: table[name].shape[0]] for name, p in model.named_parameters()}
    for size, results in worlds.items():
        ranks = [result["passed"] for result in results]
        first = [part for rank in ranks for part in rank["initial"] if part[0] in begun]
        for name, value in assembled(begun, first).items():
            assert torch.equal(value, begun[name]), f"{size} ranks began with another {name}"
        parts = [part for rank in ranks for part in rank["saved"]]
        found = assembled({key: begun[f"weight {key.split()[1]}"] for key, *_ in parts}, parts)
        saved = saved or found
        assert found.keys() == saved.keys()
        assert all(rank["steps"] == 3 for rank in ranks)
        for name, value in found.items():
            assert torch.equal(value, saved[name]), f"{name} changed on the way to {size} ranks"
    assert not torch.equal(saved["weight blocks.0.mixer.up.weight"], begun["weight blocks.0.mixer.up.weight"])
    assert saved["optimizer/exp_avg blocks.1.mixer.down.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("config", "sizes", "stage", "words"),
    [
        (
            braid("ME"),
            Sizes(expert=3),
            0,
            "expert: got 3, wants a divisor of the 4 experts of blocks.1.mixer.up.weight, such as 2",
        ),
        (braid("M-"), Sizes(expert=2), 0, "expert: got 2, wants 1, because no layer of the model has experts"),
        (braid("ME"), Sizes(expert=2), 3, "expert: got 2, wants 1, or parallel.zero_stage of at most 2: DeepSpeed's "),
    ],
)
def test_what_cannot_be_is_refused(config: ModelConfig, sizes: Sizes, stage: int, words: str):
    with pytest.raises(ValueError) as error:
        check_layout(config, sizes, sequence_length=64, zero_stage=stage)
    assert str(error.value).startswith(words)


def test_refusals_name_the_keys_of_the_recipe():
    with pytest.raises(ValueError, match=r"parallel\.expert: got 3, wants a divisor of the 4 experts"):
        load_recipe(RECIPE, ["parallel.expert=3"])
    with pytest.raises(ValueError, match=r"parallel\.expert: got 2, wants 1, or parallel\.zero_stage of at most 2"):
        load_recipe(RECIPE, ["parallel.expert=2", "parallel.zero_stage=3"])
    recipe = load_recipe(RECIPE, ["parallel.expert=4"])
    with pytest.raises(ValueError, match=r"parallel\.expert: got 4, which does not divide the 6 data ranks; wants 3"):
        recipe.check_ranks(6)
