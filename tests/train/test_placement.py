"""Where states lie and when gradients travel changes no number: offload to host memory, hpZ, overlap, bucket sizes.

Each case trains, is judged, saved, loaded and goes on, and is compared with plain torch and with its ZeRO stage alone.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.test_engine import assemble, assert_near, same_bits
from tests.train.tiny import STEPS, Tiny, reference, run_step, snapshot, start_engine, train_steps
from train.engine import Engine, Placement, ZeroOptions
from train.reading import ConfigError

ACCUMULATION, POISON, PERSISTENT = 3, 2, 20
PLAIN = Placement()
OFFLOAD, OVERLAP = Placement(offload_optimizer=True), Placement(overlap=True)
OFFLOAD_OVERLAP = Placement(offload_optimizer=True, overlap=True)
HPZ, EVERYTHING = Placement(hpz_ranks=2), Placement(hpz_ranks=2, offload_optimizer=True, overlap=True)
Case = tuple[int, Placement]
ALONE = [*product((1, 2, 3), (OFFLOAD, OVERLAP))]
TOGETHER = [*product((1, 2, 3), (OFFLOAD, OFFLOAD_OVERLAP)), (3, EVERYTHING)]


def train_placed(cases: list[Case], device: str = "cpu") -> dict[Case, dict[str, Any]]:
    """One rank's records of these cases: of training, after loading what each saved, and of one more step."""
    from train.parallel import open_mesh

    results: dict[Case, dict[str, Any]] = {}
    with open_mesh(device, timeout_s=60) as mesh:
        for stage, placement in cases:
            engine = start_engine(mesh, stage, persistent=PERSISTENT, placement=placement)
            steps = list(train_steps(engine, ACCUMULATION, POISON))
            saved = snapshot(engine)
            sizes = sizes_in_force(engine)
            state = assemble(mesh.gather(on_cpu(saved)))
            run_step(engine, 1, 1)
            engine.apply(1.0)

            def fill(flat: Tensor, name: str, kind: str, start: int, state: dict = state) -> None:
                flat.copy_(state[name][kind][start : start + flat.numel()])

            engine.load(fill, STEPS - 1)
            loaded = snapshot(engine)
            engine.add({"fixed": torch.full((5,), 0.25)})
            run_step(engine, 0, ACCUMULATION)
            copied = elements_kept_twice(engine)
            engine.apply(1e-2, scale=0.5)
            homes = {home.device.type for home in engine.stage.homes()}
            later = snapshot(engine)
            engine.close()
            result = {"steps": steps, "saved": saved, "loaded": loaded, "later": later}
            results[stage, placement] = on_cpu(result) | {"homes": homes, "sizes": sizes, "copied": copied}
    return results


def elements_kept_twice(engine: Engine) -> int:
    copies = [getattr(parameter, "ds_secondary_tensor", None) for parameter in engine.module.parameters()]
    return sum(copy.numel() for copy in copies if copy is not None)


def on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


def sizes_in_force(engine: Engine) -> dict[str, int]:
    """What DeepSpeed uses, by the name of its key in the recipe."""
    inside, stage = engine.deepspeed, engine.zero_stage
    sizes = {"reduce_bucket": engine.stage.zero.reduce_bucket_size}
    if stage < 3:
        return sizes | {"gather_bucket": engine.stage.zero.allgather_bucket_size}
    sizes |= {"prefetch": inside.zero_prefetch_bucket_size(), "persistent": inside.zero_param_persistence_threshold()}
    return sizes | {"live": inside.zero_max_live_parameters(), "sub_group": engine.stage.zero.sub_group_size}


@pytest.fixture(scope="module")
def trained() -> dict[Case, list[dict[str, Any]]]:
    """Of every case on two ranks, the records of all."""
    return records_on(2, [*product((1, 2, 3), (PLAIN,)), *ALONE])


@pytest.fixture(scope="module")
def grouped() -> dict[Case, list[dict[str, Any]]]:
    """On four ranks, in two groups that hold a second copy of the weights."""
    return records_on(4, [(3, PLAIN), (3, HPZ)])


@pytest.fixture(scope="module")
def combined() -> dict[Case, list[dict[str, Any]]]:
    return records_on(4, [*product((1, 2, 3), (PLAIN,)), *TOGETHER])


def records_on(size: int, cases: list[Case]) -> dict[Case, list[dict[str, Any]]]:
    ranks = run_ranks(train_placed, size, cases)
    return {case: [rank[case] for rank in ranks] for case in cases}


def check_equals_plain_torch(ranks: list[dict[str, Any]]) -> None:
    for step, expected in enumerate(reference(ACCUMULATION, skip=POISON)):
        for rank in (rank["steps"][step] for rank in ranks):
            assert rank["admitted"] == (step != POISON)
            for name, weight in rank["weights"].items():
                assert_near(weight, expected["weights"][name], 1e-6, f"{name} after step {step}")
            if step == POISON:
                assert same_bits(rank["before"], rank["after"]), "a refused update changed something"
                continue
            assert rank["norm"] == pytest.approx(expected["norm"], rel=1e-6)
            for name, start, stop, value in rank["gradients"]:
                wanted = expected["gradients"][name].view(-1)[start:stop]
                assert_near(value, wanted, 1e-6, f"gradient of {name} at step {step}")


def check_equals_its_stage(ranks: list[dict[str, Any]], plain: list[dict[str, Any]], exact: bool) -> None:
    """What is owned by whom, saved, loaded and computed afterwards."""
    for ours, theirs in zip(ranks, plain, strict=True):
        assert same_bits(ours["loaded"], ours["saved"])
        for key in ("saved", "later"):
            assert not exact or same_bits(ours[key], theirs[key]), key
            for one, other in zip(ours[key], theirs[key], strict=True):
                assert one[:3] == other[:3]
                for kind, value in one[3].items():
                    assert_near(value, other[3][kind], 1e-6, f"{key}: {kind} of {one[0]}")


@pytest.mark.parametrize(("stage", "placement"), ALONE)
def test_offload_and_overlap_change_no_number(trained, stage: int, placement: Placement):
    """Gradients, norm, refusal, update, saving and loading; with a parameter that the first, the last or no micro-batch
    uses. Offload to the bit; overlap may add up in another order."""
    check_equals_plain_torch(trained[stage, placement])
    check_equals_its_stage(trained[stage, placement], trained[stage, PLAIN], exact=placement == OFFLOAD)


def test_hpz_changes_no_bit(grouped):
    """The second copy of the weights is never older than the first: after a step, after loading, after a frozen
    parameter was changed. And nobody saves it: each element keeps one owner."""
    check_equals_plain_torch(grouped[3, HPZ])
    check_equals_its_stage(grouped[3, HPZ], grouped[3, PLAIN], exact=True)
    assemble([rank["saved"] for rank in grouped[3, HPZ]])
    half = sum(parameter.numel() for parameter in Tiny().parameters() if parameter.numel() > PERSISTENT) / 2
    assert all(half <= rank["copied"] <= half + 20 for rank in grouped[3, HPZ]), "half of each weight, padded"
    assert all(rank["copied"] == 0 for rank in grouped[3, PLAIN])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "placement"), TOGETHER)
def test_together_they_change_no_number(combined, stage: int, placement: Placement):
    check_equals_plain_torch(combined[stage, placement])
    check_equals_its_stage(combined[stage, placement], combined[stage, PLAIN], exact=placement == OFFLOAD)


def test_every_size_reaches_deepspeed(trained):
    """A bucket that the recipe names and nobody reads would be tuned in vain."""
    given = {"reduce_bucket": 60, "gather_bucket": 50, "prefetch": 40, "persistent": PERSISTENT, "live": 1_000_000_000}
    given |= {"sub_group": 50}
    assert given.keys() == vars(ZeroOptions()).keys()
    found = trained[1, PLAIN][0]["sizes"] | trained[2, PLAIN][0]["sizes"] | trained[3, PLAIN][0]["sizes"]
    assert found == given


@pytest.mark.parametrize(
    ("placement", "size", "message"),
    [
        (Placement(hpz_ranks=4), 6, "parallel.hpz_ranks: got 4, wants a divisor of the 6 ranks: 3"),
        (Placement(hpz_ranks=2), 7, "parallel.hpz_ranks: got 2, wants a divisor of the 7 ranks: none"),
    ],
)
def test_groups_that_do_not_fill_the_ranks_are_refused(placement: Placement, size: int, message: str):
    """DeepSpeed would stop all ranks with an assertion."""
    with pytest.raises(ConfigError, match=message):
        placement.check_ranks(size)


def test_a_recipe_for_hosts_runs_on_less():
    """Eight ranks a group, tried out on four: one group holds all, and no second copy is kept."""
    placement = Placement(hpz_ranks=8)
    placement.check_ranks(4)
    assert [placement.group_size(size) for size in (1, 4, 8, 16)] == [1, 1, 1, 8]
    assert placement.words(8) == "" and placement.words(16) == ", weights twice in groups of 8"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu():
    """The copies between host and device are asynchronous there, and what is read too early is wrong."""
    placements = (PLAIN, OFFLOAD, Placement(overlap=False))
    (records,) = run_ranks(train_placed, 1, [*product((1, 2, 3), placements)], "cuda", gpus="0")
    for (stage, placement), record in records.items():
        check_equals_plain_torch([record])
        check_equals_its_stage([record], [records[stage, PLAIN]], exact=False)
        assert record["homes"] == {"cpu" if placement.offload_optimizer else "cuda"}
