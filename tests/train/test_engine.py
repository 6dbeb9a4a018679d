"""ZeRO 0-3 on one and two gloo ranks against plain torch: gradients, norms, steps, refusals, saving and loading."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.tiny import (
    STEPS,
    VOCAB,
    WIDTH,
    Tiny,
    reference,
    run_step,
    snapshot,
    start_engine,
    tiny_table,
    train_steps,
)

STAGES, SIZES = (0, 1, 2, 3), (1, 2)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 1},
    "accumulate": {"accumulation": 3, "persistent": 20},
    "recompute": {"accumulation": 2, "recompute": True},
    "poison": {"accumulation": 2, "poison": 2},
    "bfloat16": {"accumulation": 1, "dtype": torch.bfloat16},
    "reduce_bfloat16": {"accumulation": 2, "reduce_dtype": torch.bfloat16},
}
Shards = list[tuple[str, int, int, dict[str, Tensor]]]


def train_everything() -> dict[str, Any]:
    """One rank's records of every stage and run, and what it holds at the end of each."""
    from train.parallel import open_mesh

    results: dict[str, Any] = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for stage in STAGES:
            for name, options in RUNS.items():
                options = dict(options)
                accumulation, poison = options.pop("accumulation"), options.pop("poison", None)
                engine = start_engine(mesh, stage, **options)
                steps = list(train_steps(engine, accumulation, poison))
                results[f"{stage}/{name}"] = {"steps": steps, "owned": snapshot(engine)}
                engine.close()
    return results


def load_everywhere(states: dict[str, dict], steps: int) -> dict[str, Any]:
    """Loads the state saved at every stage into a used engine of every stage; then one more step."""
    from train.parallel import open_mesh

    results = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for saved, state in states.items():
            for stage in STAGES:
                engine = start_engine(mesh, stage, persistent=20)
                run_step(engine, 1, 1)
                engine.apply(1.0)

                def fill(flat: Tensor, name: str, kind: str, start: int, state: dict = state) -> None:
                    flat.copy_(state[name][kind][start : start + flat.numel()])

                engine.load(fill, steps)
                loaded, counter = snapshot(engine), engine.steps
                with engine.gathered(["blocks.0.weight", "fixed"]) as weights:
                    whole = {name: weight.clone() for name, weight in weights.items()}
                run_step(engine, 0, 1)
                engine.apply(1e-3, scale=0.5)
                results[f"{saved}->{stage}"] = (loaded, counter, whole, snapshot(engine))
                engine.close()
    return results


@pytest.fixture(scope="module")
def trained() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(train_everything, size) for size in SIZES}


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict]]:
    return {
        name: reference(options["accumulation"], options.get("dtype", torch.float32), options.get("poison"))
        for name, options in RUNS.items()
    }


def assemble(ranks: list[Shards]) -> dict[str, dict[str, Tensor]]:
    """Whole flat values from the shards of all ranks; fails when an element is missing or owned twice."""
    shapes = {name: parameter.numel() for name, parameter in Tiny().named_parameters()}
    whole: dict[str, dict[str, Tensor]] = {}
    covered: dict[tuple[str, str], Tensor] = {}
    for name, start, stop, values in (shard for shards in ranks for shard in shards):
        for kind, value in values.items():
            flat = whole.setdefault(name, {}).setdefault(kind, torch.zeros(shapes[name]))
            flat[start:stop] = value
            covered.setdefault((name, kind), torch.zeros(shapes[name], dtype=torch.int32))[start:stop] += 1
    assert whole.keys() == shapes.keys()
    for key, count in covered.items():
        assert bool((count == 1).all()), f"{key}: owned {count.tolist()} times"
    return whole


def same_bits(a: Shards, b: Shards) -> bool:
    def equal(x: tuple, y: tuple) -> bool:
        return x[:3] == y[:3] and x[3].keys() == y[3].keys() and all(torch.equal(x[3][k], y[3][k]) for k in x[3])

    return len(a) == len(b) and all(map(equal, a, b))


def assert_near(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
    assert error <= tolerance, f"{what}: off by {error:.2e}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
class TestTraining:
    @pytest.mark.parametrize("run", ["plain", "accumulate", "recompute"])
    def test_equals_plain_torch(self, trained, references, stage, size, run):
        """Gradients, norm and weights of five steps depend on neither stage, ranks nor micro-batches."""
        ranks = [rank[f"{stage}/{run}"]["steps"] for rank in trained[size]]
        for step, expected in enumerate(references[run]):
            for rank in ranks:
                for name, start, stop, value in rank[step]["gradients"]:
                    wanted = expected["gradients"][name].view(-1)[start:stop]
                    assert_near(value, wanted, 1e-6, f"gradient of {name} at step {step}")
                for name, weight in rank[step]["weights"].items():
                    assert_near(weight, expected["weights"][name], 1e-6, f"{name} after step {step}")
                assert rank[step]["norm"] == pytest.approx(expected["norm"], rel=1e-6)
                assert rank[step]["norm"] == ranks[0][step]["norm"]

    def test_recomputation_leaves_nothing_behind(self, trained, stage, size):
        """ZeRO-3 remembers each module that it enters; a long run would fill the memory with them."""
        assert {record["entered"] for record in trained[size][0][f"{stage}/recompute"]["steps"]} <= {0, 1}

    def test_gradient_elements_are_owned_once(self, trained, stage, size):
        """The norm would count an element twice, or not at all."""
        covered = {n: torch.zeros(p.numel()) for n, p in Tiny().named_parameters() if p.requires_grad}
        for rank in trained[size]:
            for name, start, stop, value in rank[f"{stage}/plain"]["steps"][0]["gradients"]:
                assert value.shape == (stop - start,)
                covered[name][start:stop] += 1
        assert all(bool((count == 1).all()) for count in covered.values())

    def test_saved_elements_are_owned_once(self, trained, references, stage, size):
        """A checkpoint would lack elements, or hold them twice; frozen parameters included."""
        whole = assemble([rank[f"{stage}/plain"]["owned"] for rank in trained[size]])
        for name, weight in references["plain"][-1]["weights"].items():
            assert_near(whole[name]["weight"].view_as(weight), weight, 1e-6, name)
            kinds = {"weight"} if name == "fixed" else {"weight", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
            assert whole[name].keys() == kinds

    def test_nan_on_one_rank_changes_nothing(self, trained, references, stage, size):
        """Weights, moments and step counter stay bit for bit on every rank, and training goes on as if skipped."""
        for rank in trained[size]:
            steps = rank[f"{stage}/poison"]["steps"]
            assert [record["admitted"] for record in steps] == [True, True, False, True, True]
            assert math.isnan(steps[2]["norm"])
            assert same_bits(steps[2]["before"], steps[2]["after"])
            assert [record["steps"] for record in steps] == [1, 2, 2, 3, 4]
            for name, weight in references["poison"][-1]["weights"].items():
                assert_near(steps[-1]["weights"][name], weight, 1e-6, name)

    def test_bfloat16_compute(self, trained, references, stage, size):
        """The model's own casts decide the precision, also where ZeRO-3 gathers the weights."""
        record = trained[size][0][f"{stage}/bfloat16"]["steps"][0]
        for name, start, stop, value in record["gradients"]:
            wanted = references["bfloat16"][0]["gradients"][name].view(-1)[start:stop]
            assert value.dtype == torch.float32
            assert_near(value, wanted, 1e-2, name)

    def test_reduction_dtype_of_each_parameter(self, trained, references, stage, size):
        """Sums over ranks are rounded to the recipe's dtype; a parameter whose table says float32 is not rounded."""
        rounded = 0.0
        for record in (rank[f"{stage}/reduce_bfloat16"]["steps"][0] for rank in trained[size]):
            for name, start, stop, value in record["gradients"]:
                wanted = references["reduce_bfloat16"][0]["gradients"][name].view(-1)[start:stop]
                assert_near(value, wanted, 1e-6 if name == "rare" else 2e-2, name)
                rounded = max(rounded, (value - wanted).abs().max().item())
        assert size == 1 or rounded > 1e-4, "nothing was reduced in bfloat16"


@pytest.mark.parametrize("size", SIZES)
def test_stages_agree_in_bfloat16(trained, size):
    """ZeRO 0 and ZeRO 3 compute the same thing in bfloat16, within its rounding."""
    first, *others = [trained[size][0][f"{stage}/bfloat16"]["steps"] for stage in STAGES]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a["norm"] == pytest.approx(b["norm"], rel=1e-2)


@pytest.mark.parametrize("size", SIZES)
def test_loads_at_any_stage_and_size(trained, size):
    """What any stage saved on two ranks is restored bit for bit at any stage, on one rank and on two."""
    states = {str(s): assemble([rank[f"{s}/plain"]["owned"] for rank in trained[2]]) for s in STAGES}
    ranks = run_ranks(load_everywhere, size, states, STEPS)
    for saved, state in states.items():
        after = []
        for stage in STAGES:
            key = f"{saved}->{stage}"
            whole = assemble([rank[key][0] for rank in ranks])
            for name, kinds in state.items():
                assert all(torch.equal(whole[name][kind], value) for kind, value in kinds.items()), f"{key}: {name}"
            for _, counter, weights, _ in (rank[key] for rank in ranks):
                assert counter == STEPS
                assert all(torch.equal(w.view(-1), state[name]["weight"]) for name, w in weights.items()), key
            after.append(assemble([rank[key][3] for rank in ranks]))
        for a, b in pairwise(after):
            for name, kinds in a.items():
                for kind, value in kinds.items():
                    assert_near(value, b[name][kind], 1e-6, f"{kind} of {name} one step after loading")


def test_padding_of_the_vocabulary_takes_no_gradient():
    """The tiny model has padded rows, or the tests above would not see them counted."""
    assert dict(Tiny().named_parameters())["embedding.weight"].shape == (12, WIDTH)
    assert tiny_table()["embedding.weight"].shape == (VOCAB, WIDTH)
