"""What stands between the projections of Mamba-2, convolution, scan and gated norm, in one op where that is one kernel.

    x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias);  y = norm(ssd(x, dt, A, B, C) silu(z))

mamba-ssm has it for training on CUDA: its backward computes the convolution again and writes all gradients into that of
the projection, which otherwise torch puts together from slices. "composed" stands for the ops one by one.

Legend: B batch, T tokens, H heads, P head dim, G groups, N state, I = H P.
"""

import torch
from torch import Tensor

from model.ops.backend import HALVES, Backend, choose, declare, requested

declare(
    "mamba2",
    Backend(
        "mamba_ssm",
        frozenset({"documents"}),
        HALVES | {torch.float32},
        {"head_dim": range(1, 257), "taps": range(2, 5), "channels": range(8, 2**31, 8)},
        module="mamba_ssm causal_conv1d",
        device="cuda",
    ),
    Backend("composed", frozenset({"documents", "state", "mlp", "shared"})),
)
PARTS = ("conv", "ssd", "norm", "activation")


def is_one_kernel(
    x: Tensor, *, documents: bool, state: bool, mlp: bool, shared: bool, head_dim: int, taps: int, channels: int
) -> bool:
    """Whether `conv_scan_norm` serves this call, of a projection x; where the recipe names a backend of one of its
    parts, that part is called by itself. state: one comes in or goes out. mlp: a gated one is beside the state space.
    shared: groups of B and C or of the norm lie on several tensor ranks."""
    given = {"documents": documents, "state": state, "mlp": mlp, "shared": shared}
    needs = [name for name, wanted in given.items() if wanted]
    sizes = {"head_dim": head_dim, "taps": taps, "channels": channels}
    named = any(requested(op) != "auto" for op in PARTS) and requested("mamba2") == "auto"
    backend = "composed" if named else None
    return choose("mamba2", backend, needs=needs, sizes=sizes, dtype=x.dtype, device=x.device).name == "mamba_ssm"


def conv_scan_norm(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    *,
    documents: Tensor | None,
    head_dim: int,
    groups: int,
    chunk: int,
    dt_limit: tuple[float, float] | None,
    norm_before_gate: bool,
) -> Tensor:
    """projected: (B, T, 2 I + 2 G N + H), the blocks z, x, B, C and dt. conv_weight: (I + 2 G N, k). dt_bias, A, D:
    (H,) float32. norm_weight: (I,), None for y silu(z) alone. documents: (B, T) int32 as in `ssd`. Returns (B, T, I) in
    projected's dtype."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        projected,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        min(max(1 << chunk.bit_length() - 1, 16), 256),  # see `ssd._mamba_ssm`
        seq_idx=None if documents is None else documents.to(torch.int32).contiguous(),
        dt_limit=(0.0, float("inf")) if dt_limit is None else dt_limit,
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=eps,
        headdim=head_dim,
        ngroups=groups,
        norm_before_gate=norm_before_gate,
    )
