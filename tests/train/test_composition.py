"""Parallel branches, gates and shared weights under ZeRO 0-3, on one and two gloo ranks, against plain torch.

A shared block runs several times in one forward pass: its gradients accumulate, and ZeRO-3 gathers it again each time.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.hybrid import HybridLM, initialise_model
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from tests.contracts.examples import tokens_and_starts
from tests.ranks import run_ranks
from train.optim import AdamWConfig, build_optimizer, parameter_groups

STAGES, SIZES, STEPS, ROWS, ACCUMULATION = (0, 1, 2, 3), (1, 2), 3, 8, 2
OPTIMIZER = AdamWConfig(learning_rate=1e-2, weight_decay=0.1)
LAYERS = {
    "M": Mamba2Config(head_dim=8, d_state=8, d_ssm=32, chunk=8),
    "*": AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True, qkv_conv=3, logit_cap=5.0),
    "S": AttentionConfig(n_heads=4, window=5),
    "-": MLPConfig(d_hidden=40, activation="relu"),
}
CONFIG = ModelConfig(61, 32, "([M*]S-)x3", LAYERS, shared="S-", branch_gates={"*": 0.15})


def made(recompute: bool) -> HybridLM:
    model = HybridLM(CONFIG, recompute=recompute)
    initialise_model(model, seed=0)
    return model


def losses(step: int, rank: int, size: int, model: Any) -> Iterator[Tensor]:
    """This rank's micro-batches of a step, one after the other."""
    tokens, starts = tokens_and_starts([9, 8], rows=ROWS, seed=step)
    targets = tokens.roll(-1, 1)
    for rows in torch.arange(ROWS).view(ACCUMULATION, size, -1)[:, rank]:
        yield model(tokens[rows], starts[rows], targets[rows]).nll.sum() / tokens.numel()


def train_everywhere() -> dict[str, dict[str, Tensor]]:
    """The weights after training under every stage, with and without recomputation."""
    from train.engine import Engine, ZeroOptions
    from train.parallel import open_mesh

    options = ZeroOptions(reduce_bucket=2000, gather_bucket=2000, prefetch=2000, persistent=50, sub_group=5000)
    results = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for stage in STAGES:
            for recompute in (False, True):
                model = made(recompute)
                engine = Engine(model, model.table(), OPTIMIZER, zero_stage=stage, mesh=mesh, options=options)
                for step in range(STEPS):
                    for number, loss in enumerate(losses(step, mesh.rank, mesh.size, engine)):
                        engine.backward(loss, number == ACCUMULATION - 1)
                    engine.apply(OPTIMIZER.learning_rate)
                with engine.gathered() as weights:
                    results[f"{stage}/{recompute}"] = {name: value.clone() for name, value in weights.items()}
                engine.close()
    return results


@pytest.fixture(scope="module")
def trained() -> dict[int, list[dict[str, dict[str, Tensor]]]]:
    return {size: run_ranks(train_everywhere, size) for size in SIZES}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = made(recompute=False)
    optimizer = build_optimizer(OPTIMIZER, parameter_groups(model.named_parameters(), model.table(), 0.1))
    for step in range(STEPS):
        for loss in losses(step, 0, 1, model):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_equal_plain_torch(trained: dict, expected: dict[str, Tensor], stage: int, recompute: bool, size: int):
    """Breaks when a stage loses a use of a shared weight, or a gate."""
    for rank in trained[size]:
        weights = rank[f"{stage}/{recompute}"]
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert (weight - expected[name]).abs().max() <= 1e-5, name
    start = dict(made(False).named_parameters())
    assert all((expected[name] - start[name]).abs().max() > 1e-3 for name in expected)
