"""Training on a CUDA device, one rank with NCCL: every ZeRO stage against plain torch on the CPU, and whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.runs import braid, curve, kill_group, prepare_tiny, start, wait_for_step
from tests.train.tiny import STEPS, reference, start_engine, train_steps

pytestmark = pytest.mark.gpu

STAGES = (0, 1, 2, 3)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 1},
    "accumulate": {"accumulation": 3, "persistent": 20},
    "recompute": {"accumulation": 2, "recompute": True},
    "bfloat16": {"accumulation": 1, "dtype": torch.bfloat16},
}
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
RUN_STEPS = 24


def train_on_the_gpu() -> dict[str, list[dict[str, Any]]]:
    """The weights and the gradient's norm after each step, of every stage and run."""
    from train.parallel import open_mesh

    results = {}
    with open_mesh("cuda", timeout_s=60) as mesh:
        for stage in STAGES:
            for name, options in RUNS.items():
                more = {key: value for key, value in options.items() if key != "accumulation"}
                engine = start_engine(mesh, stage, **more)
                results[f"{stage}/{name}"] = [
                    {"norm": step["norm"], "weights": {key: value.cpu() for key, value in step["weights"].items()}}
                    for step in train_steps(engine, options["accumulation"])
                ]
                engine.close()
    return results


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    return run_ranks(train_on_the_gpu, 1, gpus="0", timeout_s=300)[0]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_the_steps_of_plain_torch(trained: dict, stage: int, name: str) -> None:
    """Gradient norm and weights after each of five steps; NCCL, streams that overlap and fused AdamW included."""
    options = RUNS[name]
    dtype = options.get("dtype", torch.float32)
    for got, want in zip(trained[f"{stage}/{name}"], reference(options["accumulation"], dtype), strict=True):
        assert got["norm"] == pytest.approx(want["norm"], rel=WITHIN[dtype])
        for key, value in want["weights"].items():
            assert error(got["weights"][key], value) <= WITHIN[dtype], f"{key} after {STEPS} steps"


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)).item()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("cuda"))


def arguments(name: str, stage: int, device: str, dtype: str = "float32") -> list[str]:
    return [
        "train",
        "tiny",
        f"name={name}",
        f"parallel.zero_stage={stage}",
        f"parallel.offload_optimizer={'true' if stage else 'false'}",  # without, a rank alone is at ZeRO 0
        f"parallel.device={device}",
        f"training.compute_dtype={dtype}",
        f"training.tokens={RUN_STEPS * 8 * 64}",
        f"checkpoints.every_tokens={5 * 8 * 64}",
    ]


@pytest.fixture(scope="module")
def on_the_cpu(workplace: Path) -> list[dict]:
    braid(*arguments("cpu", 0, "cpu"), cwd=workplace)
    return curve(workplace / "runs" / "cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_and_resumed_has_the_curve_of_the_cpu(workplace: Path, on_the_cpu: list[dict], stage: int) -> None:
    """The same batches, and losses that differ by rounding alone, before and after a SIGKILL."""
    name, folder = f"cuda-{stage}", workplace / "runs" / f"cuda-{stage}"
    process = start(*arguments(name, stage, "cuda"), cwd=workplace, cuda=True)
    wait_for_step(process, folder, 8)
    kill_group(process)
    braid(*arguments(name, stage, "cuda"), cwd=workplace, cuda=True)
    lines = curve(folder)
    assert len(lines) == RUN_STEPS
    for ours, theirs in zip(lines, on_the_cpu, strict=True):
        assert ours["batch_hash"] == theirs["batch_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3), f"step {ours['step']}"


def test_what_is_trained_in_bfloat16_generates_and_is_exported(workplace: Path) -> None:
    """The commands of the README after `train`, on the device."""
    braid(*arguments("half", 0, "cuda", "bfloat16"), cwd=workplace, cuda=True)
    lines = curve(workplace / "runs" / "half")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert braid("generate", "half", "--prompt", "braid", cwd=workplace, cuda=True).stdout.strip()
    braid("export", "half", str(workplace / "published"), cwd=workplace, cuda=True)
    assert (workplace / "published" / "config.json").exists()
