"""The SSD op on a GPU, forward and backward at the shape of mamba2-1.3b, beside mamba-ssm's kernels called by
themselves and beside the listing of the paper."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import Tensor

HEADS, HEAD_DIM, STATE = 64, 64, 128
TOKENS, LENGTHS = 4096, (1024, 4096, 32768)
ROUNDS = 20
PEER_CHUNK = 256
"""Of mamba-ssm's own Mamba2 module."""
MINIMAL_CHUNK = 64


def ours(quick: bool) -> Iterator[Reading]:
    """Tokens/s of two rows of 4,096 tokens; the facts hold those of other lengths."""
    from model.ops.ssd import ssd

    def run(x: "Tensor", dt: "Tensor", A: "Tensor", B: "Tensor", C: "Tensor") -> "Tensor":
        return ssd(x, dt, A, B, C)[0]

    return _readings(run)


def kernels(quick: bool) -> Iterator[Reading]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(x: "Tensor", dt: "Tensor", A: "Tensor", B: "Tensor", C: "Tensor") -> "Tensor":
        return mamba_chunk_scan_combined(x, dt, A, B, C, PEER_CHUNK)

    return _readings(run)


def minimal(quick: bool) -> Iterator[Reading]:
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    def run(x: "Tensor", dt: "Tensor", A: "Tensor", B: "Tensor", C: "Tensor") -> "Tensor":
        wide = (*B.shape[:2], HEADS, STATE)
        step = dt.to(x.dtype)
        inputs = (x * step[..., None], step * A.to(x.dtype), B.expand(wide), C.expand(wide))
        return ssd_minimal_discrete(*inputs, MINIMAL_CHUNK)[0]

    return _readings(run, LENGTHS[:2])


def _readings(run: Callable[..., "Tensor"], lengths: tuple[int, ...] = LENGTHS) -> Iterator[Reading]:
    while True:
        speeds = {str(length): _tokens_per_s(run, length) for length in lengths}
        yield Reading(speeds[str(TOKENS)], {"tokens_per_s": speeds})


def _tokens_per_s(run: Callable[..., "Tensor"], length: int) -> float:
    """Of forward and backward in bfloat16, 8,192 tokens or one row of more."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    rows = max(1, 2 * TOKENS // length)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    x, B, C = leaf(rows, length, HEADS, HEAD_DIM), leaf(rows, length, 1, STATE), leaf(rows, length, 1, STATE)
    dt = (torch.rand(rows, length, HEADS, generator=generator, device="cuda") * 0.1).requires_grad_()
    A = (-torch.rand(HEADS, generator=generator, device="cuda") * 15 - 1).requires_grad_()
    slope = torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(ROUNDS + 3):
        if turn == 3:
            begin.record()
        torch.autograd.grad(run(x, dt, A, B, C), (x, dt, A, B, C), slope)
    end.record()
    end.synchronize()
    return ROUNDS * rows * length / (begin.elapsed_time(end) / 1000)


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    """tokens_per_s: by length of the row. flat: the slowest of them over the fastest."""
    speeds = ours.facts["tokens_per_s"]
    theirs = {} if peer is None else {"peer_tokens_per_s": peer.facts["tokens_per_s"]}
    return {"tokens_per_s": speeds, "flat": min(speeds.values()) / max(speeds.values())} | theirs


def _row(name: str, peer: Any, peer_name: str, note: str) -> Row:
    return Row(
        name=name,
        measures="SSD op, forward and backward of two rows of 4,096 tokens, 64 heads of 64, state 128, bfloat16.",
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        needs=("mamba_ssm",),
        note=note,
        derive=derive,
        cuda=True,
    )


ROWS = (
    _row("gpu_ssd", kernels, "mamba-ssm mamba_chunk_scan_combined", f"theirs in chunks of {PEER_CHUNK}, as it is used"),
    _row(
        "gpu_ssd_minimal", minimal, "mamba-ssm ssd_minimal", f"theirs in bfloat16 all through, chunks {MINIMAL_CHUNK}"
    ),
)
