"""Bytes on the wire: what is counted on real gloo ranks equals the formulas, by axis and operation.

One set of processes a world; each trains every case for a few steps and counts the last.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.context import NoiseKey
from model.hybrid import HybridLM, Precision, initialise_model
from tests.ranks import run_ranks
from tests.train.layouts import OPTIMIZER, ROWS, Layout, braid, global_batch
from tests.train.runs import braid as braid_command
from tests.train.runs import events, write_corpus
from train.config import Recipe
from train.counter import SETTLED, count_traffic
from train.engine import Engine, Placement, ZeroOptions
from train.health import Health
from train.parallel import Mesh, open_mesh
from train.traffic import Job, control_limit, step_traffic

SMALL = ZeroOptions(reduce_bucket=500, gather_bucket=500, prefetch=400, persistent=0, sub_group=500)


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    layout: Layout
    options: ZeroOptions = SMALL
    recompute: bool = False
    precision: Precision = field(default_factory=Precision)
    reduction: torch.dtype = torch.float32
    length: int = 25
    hpz: int | None = None

    @property
    def placement(self) -> Placement:
        return Placement(self.layout.offload, self.hpz)

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
            recompute=self.recompute,
            options=self.options,
            placement=self.placement,
        )

    def __str__(self) -> str:
        again = " recomputed" if self.recompute else ""
        return f"{self.model.pattern} {self.layout} live={self.options.live} keep={self.options.persistent}{again}"


def count_cases(cases: list[Case]) -> list[dict[str, Any]]:
    with open_mesh("cpu", timeout_s=60) as world:
        return [count_case(Mesh(world.device, case.layout.sizes), case) for case in cases]


def count_case(mesh: Mesh, case: Case) -> dict[str, Any]:
    """What this rank sent in the last step, and how many rows its MoE layers had for each expert, call by call."""
    model = HybridLM(case.model, case.precision, mesh=mesh, recompute=case.recompute)
    initialise_model(model, seed=0)
    stage = case.layout.zero
    engine = Engine(
        model,
        model.table(),
        OPTIMIZER,
        zero_stage=stage,
        mesh=mesh,
        reduce_dtype=case.reduction,
        options=case.options,
        placement=case.placement,
    )
    health = Health(model.table(), mesh, max_skipped=1)
    rows: list[list[int]] = []
    send = mesh.at_experts
    mesh.at_experts = lambda x, counts, run: rows.append(counts.tolist()) or send(x, counts, run)
    for step in range(SETTLED):
        rows.clear()
        with count_traffic(mesh, engine.hpz) as sent:
            train_step(mesh, engine, health, case, step)
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
            found[place] += away / (1 + case.recompute)
    return found


def train_step(mesh: Mesh, engine: Engine, health: Health, case: Case, step: int) -> None:
    share, micro = ROWS // mesh.data.size, case.layout.micro
    batch = global_batch(step, length=case.length).part(slice(mesh.data.rank * share, (mesh.data.rank + 1) * share))
    counts: dict[str, torch.Tensor] = {}
    for start in range(0, share, micro):
        rows = batch.part(slice(start, start + micro))
        out = engine(rows.tokens, rows.starts, rows.targets, noise=NoiseKey(0, step, rows.samples))
        engine.backward(out.nll.sum() + sum(out.losses.values()), last=start + micro >= share)
        counts = {name: counts.get(name, 0) + value for name, value in out.counts.items()}
    assert health.admit(health.norm(engine), step + 1)
    engine.apply(OPTIMIZER.learning_rate)
    counts = {name: mesh.tell(value.clone()) for name, value in counts.items()}
    engine.add(engine.module.adjustments(counts))


BFLOAT16 = Precision(torch.bfloat16, torch.float32)
SAMBA = [Case(braid("M-Wm"), Layout(context=2, micro=4), length=length) for length in (64, 256)]
"""Rows of four windows and of sixteen."""
CASES = {
    2: [
        Case(braid("M-*E"), Layout(zero=0)),
        Case(braid("M-mE"), Layout(zero=1, micro=2), reduction=torch.bfloat16),
        Case(braid("M-*S"), Layout(zero=2, micro=2)),
        Case(braid("M-*S", tie_embeddings=False), Layout(zero=3, micro=2)),
        Case(braid("M-*S"), Layout(zero=3), replace(SMALL, persistent=100)),
        Case(braid("M-*W-m"), Layout(zero=3), replace(SMALL, live=2000, prefetch=300)),
        Case(braid("M-*W-m"), Layout(zero=3), replace(SMALL, live=1, prefetch=1), recompute=True),
        Case(braid("M-*W-m"), Layout(zero=3), replace(SMALL, live=3000, prefetch=300), recompute=True),
        Case(braid("M-*S"), Layout(zero=3, micro=2, offload=True)),
        Case(braid("M-*W-mE"), Layout(tensor=2)),
        Case(braid("M-[M*]mE", groups=1, kv_heads=1), Layout(tensor=2, micro=4), precision=BFLOAT16, recompute=True),
        Case(braid("M-*WmS"), Layout(context=2, micro=2)),
        Case(braid("MmWE"), Layout(context=2, zero=3, micro=4), precision=BFLOAT16, recompute=True),
        *SAMBA,
        Case(braid("M-WE"), Layout(expert=2)),
        Case(braid("ME*S"), Layout(expert=2, zero=2, micro=2), precision=BFLOAT16),
        Case(braid("M-E"), Layout(expert=2, zero=1, micro=2), recompute=True),
    ],
    4: [
        Case(braid("M*-mE", groups=1, kv_heads=1), Layout(tensor=2, zero=1, micro=2), precision=BFLOAT16),
        Case(braid("M*-m", tie_embeddings=False), Layout(tensor=2, zero=3)),
        Case(braid("M-*S"), Layout(zero=3), replace(SMALL, live=1, prefetch=1), recompute=True, hpz=2),
        Case(braid("M-m", groups=1), Layout(tensor=4, zero=2)),
        Case(braid("M*WmS", groups=1, kv_heads=1), Layout(context=2, tensor=2, zero=1, micro=4)),
        Case(braid("M*-W"), Layout(context=4), length=29),
        Case(braid("M-WE"), Layout(context=2, zero=2, micro=2)),
        Case(braid("MES"), Layout(expert=2, zero=2)),
        Case(braid("M-E"), Layout(expert=4, zero=1)),
        Case(braid("M-E"), Layout(expert=2, tensor=2)),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_counted_is_computed(world: int):
    """The planner and the README's tables read these formulas; a byte off, and they are about another program."""
    results = run_ranks(count_cases, world, CASES[world], timeout_s=300)
    wrong = []
    for index, case in enumerate(CASES[world]):
        ranks, job = [rank[index] for rank in results], case.job(world)
        for rank in range(world):
            counted = {axis: dict(found) for axis, found in ranks[rank]["bytes"].items()}
            counted.get("world", {}).pop("control", None)
            computed = step_traffic(job, rank, crossing(case, job, ranks, rank) if case.layout.expert > 1 else None)
            if flat(counted) != pytest.approx(flat(computed), rel=1e-12):
                wrong.append(f"{case}, rank {rank}:\n  counted  {counted}\n  computed {computed}")
    assert not wrong, "\n".join(wrong)
    if world == 2:
        short, long = ([rank[CASES[world].index(case)]["bytes"]["context"] for rank in results] for case in SAMBA)
        assert short == long, "context traffic of a braid without full attention grows with the row"


def test_a_run_notes_what_it_sends(tmp_path: Path):
    """The report's table is of this event: the third step of a real run, and little talk beside its tensors."""
    write_corpus(tmp_path / "corpus")
    braid_command("prepare", "tiny", cwd=tmp_path)
    overrides = ["parallel.zero_stage=2", "parallel.device=cpu", "training.tokens=2048"]
    braid_command("train", "tiny", "name=run", "--nproc", "2", *overrides, cwd=tmp_path)
    (event,) = events(tmp_path / "runs" / "run", "traffic")
    recipe = Recipe.from_json((tmp_path / "runs" / "run" / "recipe.json").read_text())
    job = Job.of(recipe, 2)
    control = event["bytes"]["world"].pop("control")
    assert 0 < control <= control_limit(job) < 4000
    assert flat(event["bytes"]) == pytest.approx(flat(step_traffic(job)))
    assert (event["step"], event["ranks"]) == (3, 2) and event["flops"] > 0


def flat(traffic: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{axis} {operation}": bytes_ for axis, found in traffic.items() for operation, bytes_ in found.items()}
