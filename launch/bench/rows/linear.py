"""A projection beside torch's matmul, forward and backward: whether our loops are chosen, and what they gain."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, INPUTS, OUTPUTS = 4096, 512, 2320
"""Mamba-2's in_proj of `train_mamba2`."""
TIMES = 4


def ours(quick: bool) -> Iterator[Reading]:
    from model.ops.backend import chosen
    from model.ops.linear import linear

    for tokens_per_s in _readings(linear, 1 if quick else TIMES):
        yield Reading(tokens_per_s, {"backend": chosen()["linear"]})


def peer(quick: bool) -> Iterator[Reading]:
    import torch.nn.functional as F

    yield from map(Reading, _readings(lambda x, weight: F.linear(x, weight.to(x.dtype)), 1 if quick else TIMES))


def _readings(run: Callable[["Tensor", "Tensor"], "Tensor"], times: int) -> Iterator[float]:
    """Tokens per second, over `times` of them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = normal(TOKENS, INPUTS).bfloat16().requires_grad_(), normal(OUTPUTS, INPUTS).requires_grad_()
    slope = normal(TOKENS, OUTPUTS).bfloat16()
    while True:
        begin = time.perf_counter()
        for _ in range(times):
            torch.autograd.grad(run(x, weight), (x, weight), slope)
        yield times * TOKENS / (time.perf_counter() - begin)


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    return {"backend": ours.facts["backend"]}


ROWS = (
    Row(
        name="linear_4096",
        measures=f"A projection of {INPUTS} to {OUTPUTS}, forward and backward of 4,096 tokens, weight in float32.",
        ours=ours,
        peer=peer,
        peer_name="torch",
        note="where ours is torch's too (`backend`), the ratio is 1 and noise",
        derive=derive,
    ),
)
