"""Bytes on the wire: what is counted on real gloo ranks equals the formulas, by axis and operation.

One set of processes a world; each trains every case for a few steps and counts the last.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.hybrid import Precision
from tests.ranks import run_ranks
from tests.train.layouts import ROWS, SMALL, Layout, braid, start_engine, train_one
from tests.train.runs import events, prepare_tiny, trained
from train.config import Recipe
from train.counter import SETTLED, count_traffic
from train.engine import ZeroOptions
from train.muon import MuonConfig
from train.parallel import Mesh, open_mesh
from train.traffic import Job, control_limit, step_traffic


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    layout: Layout
    options: ZeroOptions = SMALL
    precision: Precision = field(default_factory=Precision)
    reduction: torch.dtype = torch.float32
    length: int = 25

    def job(self, world: int) -> Job:
        return Job(
            self.model,
            world,
            ROWS,
            self.length,
            sizes=self.layout.sizes,
            zero_stage=self.layout.zero,
            micro_batch_rows=self.layout.micro,
            precision=self.precision,
            reduction=self.reduction,
            recompute=self.layout.recompute,
            options=self.options,
            placement=self.layout.placement,
            optimizer=self.layout.optimizer,
        )

    def __str__(self) -> str:
        return f"{self.model.pattern} {self.layout} live={self.options.live} keep={self.options.persistent}"


def count_cases(cases: list[Case]) -> list[dict[str, Any]]:
    with open_mesh("cpu", timeout_s=60) as world:
        return [count_case(Mesh(world.device, case.layout.sizes), case) for case in cases]


def count_case(mesh: Mesh, case: Case) -> dict[str, Any]:
    """What this rank sent in the last step, and how many rows its MoE layers had for each expert, call by call."""
    more = {"options": case.options, "reduce_dtype": case.reduction}
    engine = start_engine(mesh, case.model, case.layout, case.precision, **more)
    rows: list[list[int]] = []
    send = mesh.at_experts
    mesh.at_experts = lambda x, counts, run: rows.append(counts.tolist()) or send(x, counts, run)
    for step in range(SETTLED):
        rows.clear()
        with count_traffic(mesh, engine.hpz) as sent:
            train_one(engine, case.layout, step, case.length)
    engine.close()
    return {"bytes": sent.bytes, "rows": rows}


def crossing(case: Case, job: Job, ranks: list[dict[str, Any]], rank: int) -> dict[int, float]:
    """Choices of this rank for experts of others, and of others for its own, by the layer's place in the stack."""
    axis = job.axis("expert", rank)
    places = [place for place, layer in enumerate(case.model.stacked) if layer.kind == "moe"]
    found = dict.fromkeys(places, 0.0)
    for sender in axis.ranks:
        calls = torch.tensor(ranks[sender]["rows"]).view(-1, len(places), axis.size, 4 // axis.size).sum((0, 3))
        for place, to in zip(places, calls.tolist(), strict=True):
            away = sum(to) - to[axis.rank] if sender == rank else to[axis.rank]
            found[place] += away / (1 + case.layout.recompute)
    return found


BFLOAT16 = Precision(torch.bfloat16, torch.float32)
MUON = MuonConfig(learning_rate=1e-3)
SAMBA = [Case(braid("M-Wm"), Layout(context=2, micro=4), length=length) for length in (64, 256)]
"""Rows of four windows and of sixteen."""
CASES = {
    2: [
        Case(braid("M-*E"), Layout(zero=0)),
        Case(braid("M-mE"), Layout(zero=1, micro=2), reduction=torch.bfloat16),
        Case(braid("M-*S"), Layout(zero=2, micro=2)),
        Case(braid("M-*S", tie_embeddings=False), Layout(zero=3, micro=2)),
        Case(braid("M-*W-m"), Layout(zero=3), replace(SMALL, live=2000, prefetch=300)),
        Case(braid("M-[M*]mE", groups=1, kv_heads=1), Layout(tensor=2, micro=4, recompute=True), precision=BFLOAT16),
        Case(braid("M-*WmS"), Layout(context=2, micro=2)),
        *SAMBA,
        Case(braid("ME*S"), Layout(expert=2, zero=2, micro=2), precision=BFLOAT16),
    ],
    4: [
        Case(braid("M*-mE", groups=1, kv_heads=1), Layout(tensor=2, zero=1, micro=2), precision=BFLOAT16),
        Case(braid("M*-m", tie_embeddings=False), Layout(tensor=2, zero=3)),
        Case(braid("MES"), Layout(expert=2, zero=2)),
    ],
}
EXHAUSTIVE = {
    2: [
        Case(braid("M-*S"), Layout(zero=3), replace(SMALL, persistent=100)),
        Case(braid("M-*W-m"), Layout(zero=3, recompute=True), replace(SMALL, live=1, prefetch=1)),
        Case(braid("M-*W-m"), Layout(zero=3, recompute=True), replace(SMALL, live=3000, prefetch=300)),
        Case(braid("M-*S"), Layout(zero=3, micro=2, offload=True)),
        Case(braid("M-*W-mE"), Layout(tensor=2)),
        Case(braid("MmWE"), Layout(context=2, zero=3, micro=4, recompute=True), precision=BFLOAT16),
        Case(braid("M-E"), Layout(micro=4, optimizer=MUON)),
        Case(braid("M-WE"), Layout(expert=2)),
        Case(braid("M-E"), Layout(expert=2, zero=1, micro=2, recompute=True)),
    ],
    4: [
        Case(braid("M-*S"), Layout(zero=3, recompute=True, hpz=2), replace(SMALL, live=1, prefetch=1)),
        Case(braid("M-m", groups=1), Layout(tensor=4, zero=2)),
        Case(braid("M*WmS", groups=1, kv_heads=1), Layout(context=2, tensor=2, zero=1, micro=4)),
        Case(braid("M*-W"), Layout(context=4), length=29),
        Case(braid("M-WE"), Layout(context=2, zero=2, micro=2)),
        Case(braid("M-*", groups=1), Layout(tensor=2, optimizer=MUON)),
        Case(braid("ME"), Layout(expert=2, tensor=2, optimizer=MUON)),
        Case(braid("M-E"), Layout(expert=4, zero=1)),
        Case(braid("M-E"), Layout(expert=2, tensor=2)),
    ],
}


def check(world: int, cases: list[Case]) -> list[list[dict[str, Any]]]:
    results = run_ranks(count_cases, world, cases, timeout_s=300)
    wrong = []
    for index, case in enumerate(cases):
        ranks, job = [rank[index] for rank in results], case.job(world)
        for rank in range(world):
            counted = {axis: dict(found) for axis, found in ranks[rank]["bytes"].items()}
            counted.get("world", {}).pop("control", None)
            computed = step_traffic(job, rank, crossing(case, job, ranks, rank) if case.layout.expert > 1 else None)
            if flat(counted) != pytest.approx(flat(computed), rel=1e-12):
                wrong.append(f"{case}, rank {rank}:\n  counted  {counted}\n  computed {computed}")
    assert not wrong, "\n".join(wrong)
    return results


@pytest.mark.parametrize("world", CASES)
def test_counted_is_computed(world: int):
    """The planner and the README's tables read these formulas; a byte off, and they are about another program."""
    results = check(world, CASES[world])
    if world == 2:
        short, long = ([rank[CASES[2].index(case)]["bytes"]["context"] for rank in results] for case in SAMBA)
        assert short == long, "context traffic of a braid without full attention grows with the row"


@pytest.mark.slow
@pytest.mark.parametrize("world", EXHAUSTIVE)
def test_counted_is_computed_everywhere(world: int):
    check(world, EXHAUSTIVE[world])


def test_a_run_notes_what_it_sends(tmp_path: Path):
    """The report's table is of this event: the third step of a real run, and little talk beside its tensors."""
    prepare_tiny(tmp_path)
    overrides = ["parallel.zero_stage=2", "parallel.device=cpu", "training.tokens=2048"]
    trained("name=run", *overrides, cwd=tmp_path, ranks=2)
    (event,) = events(tmp_path / "runs" / "run", "traffic")
    recipe = Recipe.from_json((tmp_path / "runs" / "run" / "recipe.json").read_text())
    job = Job.of(recipe, 2)
    control = event["bytes"]["world"].pop("control")
    assert 0 < control <= control_limit(job) < 4000
    assert flat(event["bytes"]) == pytest.approx(flat(step_traffic(job)))
    assert (event["step"], event["ranks"]) == (3, 2) and event["flops"] > 0


def flat(traffic: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{axis} {operation}": bytes_ for axis, found in traffic.items() for operation, bytes_ in found.items()}
