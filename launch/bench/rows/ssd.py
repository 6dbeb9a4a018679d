"""The SSD op beside mamba-ssm's `ssd_minimal`: the only version of theirs that runs without a GPU."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import Tensor

HEADS, HEAD_DIM, STATE = 16, 64, 128
TOKENS, LENGTHS = 4096, (1024, 4096, 16384)
PEER_CHUNK = 64
"""Tokens per block of theirs: on the CPU as fast as 32, faster than 128 and 256."""
TRIES = 5


def _peer_file() -> Path:
    """`make peers` puts mamba-ssm beside the virtual environment's packages, where transformers does not see it."""
    peers = Path(os.environ.get("BRAID_PEERS") or Path(sys.prefix) / "peers")
    return peers / "mamba_ssm" / "modules" / "ssd_minimal.py"


def absent() -> list[str]:
    return [] if _peer_file().is_file() else ["mamba_ssm (make peers)"]


def ours(quick: bool) -> Iterator[Reading]:
    """Tokens/s at 4,096 tokens; the facts hold those of rows of 1,024 and 16,384."""
    from model.ops.ssd import ssd

    def run(x: "Tensor", dt: "Tensor", A: "Tensor", B: "Tensor", C: "Tensor") -> "Tensor":
        return ssd(x, dt, A, B, C)[0]

    lengths = LENGTHS[:2] if quick else LENGTHS
    while True:
        speeds = {str(length): _tokens_per_s(run, length) for length in lengths}
        yield Reading(speeds[str(TOKENS)], {"tokens_per_s": speeds})


def peer(quick: bool) -> Iterator[Reading]:
    minimal = _ssd_minimal()

    def run(x: "Tensor", dt: "Tensor", A: "Tensor", B: "Tensor", C: "Tensor") -> "Tensor":
        wide = (*B.shape[:2], HEADS, STATE)
        step = dt.to(x.dtype)
        return minimal(x * step[..., None], step * A.to(x.dtype), B.expand(wide), C.expand(wide), PEER_CHUNK)[0]

    while True:
        yield Reading(_tokens_per_s(run, TOKENS))


def _ssd_minimal() -> Callable[..., Any]:
    """Their function, without the Triton module that its file imports for its own test."""
    import importlib.util

    kernels = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    kernels.mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        sys.modules[name] = ModuleType(name)
    sys.modules[kernels.__name__] = kernels
    spec = importlib.util.spec_from_file_location("ssd_minimal", _peer_file())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ssd_minimal_discrete


def _tokens_per_s(run: Callable[..., "Tensor"], length: int) -> float:
    """Of forward and backward of one row, in bfloat16, the best of a few."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, B, C = leaf(1, length, HEADS, HEAD_DIM), leaf(1, length, 1, STATE), leaf(1, length, 1, STATE)
    dt = (torch.rand(1, length, HEADS, generator=generator) * 0.1).requires_grad_()
    A = (-torch.rand(HEADS, generator=generator) * 15 - 1).requires_grad_()
    slope = torch.randn(x.shape, generator=generator).to(x.dtype)
    seconds = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        torch.autograd.grad(run(x, dt, A, B, C), (x, dt, A, B, C), slope)
        seconds.append(time.perf_counter() - begin)
    return length / min(seconds)


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    """tokens_per_s: by length of the row. flat: the slowest of them over the fastest."""
    speeds = ours.facts["tokens_per_s"]
    return {"tokens_per_s": speeds, "flat": min(speeds.values()) / max(speeds.values())}


ROWS = (
    Row(
        name="ssd_4096",
        measures="SSD op, forward and backward of one row of 4,096 tokens, 16 heads of 64, state 128, bfloat16.",
        ours=ours,
        peer=peer,
        peer_name="mamba-ssm ssd_minimal",
        absent=absent,
        note=(
            "theirs is the paper's listing in plain torch, the only version that runs without a GPU; all of it in "
            "bfloat16, decays too, in blocks of 64. Ours keeps decays and sums in float32"
        ),
        derive=derive,
    ),
)
