"""What stands between the projections of Mamba-2, convolution, scan and gated norm, in one op where that is one kernel.

    x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias);  y = norm(ssd(x, dt, A, B, C) silu(z))

mamba-ssm has it for training on CUDA: its backward computes the convolution again. There as in ours for the CPU it
writes all gradients into that of the projection, which otherwise torch puts together from slices. "composed" stands for
the ops one by one.

Legend: B batch, T tokens, H heads, P head dim, G groups, N state, I = H P.
"""

import torch
from torch import Tensor

from model.ops.backend import HALVES, Backend, choose, declare, requested
from model.ops.native import NATIVE_DTYPES, native_ready

COMPOSED = "composed"
declare(
    "mamba2",
    Backend(
        "mamba_ssm",
        frozenset({"documents", "no norm"}),
        HALVES | {torch.float32},
        {"head_dim": range(1, 257), "taps": range(2, 5), "channels": range(8, 2**31, 8)},
        module="mamba_ssm causal_conv1d",
        device="cuda",
    ),
    Backend(
        "native",
        frozenset({"documents"}),
        NATIVE_DTYPES,
        {"taps": range(1, 17)},
        device="cpu",
        ready=native_ready,
    ),
    Backend(COMPOSED, frozenset({"documents", "no norm", "state", "mlp", "shared"})),
)
PARTS = ("conv", "ssd", "norm", "activation")


def one_kernel(
    x: Tensor,
    *,
    documents: bool,
    norm: bool,
    state: bool,
    mlp: bool,
    shared: bool,
    head_dim: int,
    taps: int,
    channels: int,
) -> str | None:
    """The backend of `conv_scan_norm` for this call, of a projection x; None for none, as where the recipe names a
    backend of one of its parts: that part is called by itself. norm: there is one. state: one comes in or goes out.
    mlp: a gated one is beside the state space. shared: groups of B and C or of the norm lie on several tensor ranks."""
    given = {"documents": documents, "no norm": not norm, "state": state, "mlp": mlp, "shared": shared}
    needs = [name for name, wanted in given.items() if wanted]
    sizes = {"head_dim": head_dim, "taps": taps, "channels": channels}
    named = any(requested(op) != "auto" for op in PARTS) and requested("mamba2") == "auto"
    asked = COMPOSED if named else None
    name = choose("mamba2", asked, needs=needs, sizes=sizes, dtype=x.dtype, device=x.device).name
    return None if name == COMPOSED else name


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
    backend: str,
) -> Tensor:
    """projected: (B, T, 2 I + 2 G N + H), the blocks z, x, B, C and dt. conv_weight: (I + 2 G N, k). dt_bias, A, D:
    (H,) float32. norm_weight: (I,), None for y silu(z) alone. documents: (B, T) int32 as in `ssd`. backend: what
    `one_kernel` says. Returns (B, T, I) in projected's dtype."""
    index = None if documents is None else documents.to(torch.int32).contiguous()
    if backend == "native":
        from model.ops.mamba2_native import NativeMamba2

        options = {"head_dim": head_dim, "groups": groups, "dt_limit": dt_limit, "norm_before_gate": norm_before_gate}
        parameters = conv_weight, conv_bias, dt_bias, A, D, norm_weight
        return NativeMamba2.apply(projected, *parameters, eps, index, options, torch.is_grad_enabled())
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        projected,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        min(max(1 << chunk.bit_length() - 1, 16), 256),  # see `ssd._mamba_ssm`
        seq_idx=index,
        dt_limit=(0.0, float("inf")) if dt_limit is None else dt_limit,
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=eps,
        headdim=head_dim,
        ngroups=groups,
        norm_before_gate=norm_before_gate,
    )
