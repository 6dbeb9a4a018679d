"""The state-space dual (SSD) recurrence of Mamba-2 (arXiv 2405.21060, section 6), with documents.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        y_t = S_t C_t + D x_t

Two forms of the same map: `ssd_reference` (token by token, the oracle) and the chunked one (`model/ops/ssd_chunked.py`)
that `ssd` runs; one token after a state, as in decoding, is a step of the recurrence. On CUDA `ssd` takes mamba-ssm's
kernels where they are installed.

Legend: B batch, T tokens, H heads, P head dim, G groups (B and C are shared by the H/G heads of a group), N state.
"""

import torch
from torch import Tensor

from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import wide_dtype
from model.ops.native import NATIVE_DTYPES, native_ready
from model.ops.ssd_chunked import ssd_chunked
from model.ops.ssd_native import ssd_native

_ALL = frozenset({"documents", "initial_state", "final_state"})
declare(
    "ssd",
    Backend(
        "mamba_ssm",
        _ALL,
        HALVES | {torch.float32},
        {"head_dim": range(1, 257)},  # its backward holds whole heads in shared memory: 512 fit no GPU
        module="mamba_ssm",
        device="cuda",
    ),
    Backend("native", _ALL, NATIVE_DTYPES, device="cpu", ready=native_ready),
    Backend("torch", _ALL),
    Backend("reference", _ALL),
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk: int | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SSD over whole rows.

    x: (B, T, H, P), in the compute dtype. dt: (B, T, H) float32, positive (softplus already applied). A: (H,) float32,
    negative. B, C: (B, T, G, N). D: (H,) skip weight. documents: (B, T) int32, non-decreasing: equal index means the
    same document, index 0 continues `initial_state`, a larger one never sees it. initial_state: (B, H, P, N) float32.
    chunk: tokens per chunk; the result does not depend on it. backend: see `model.ops.backend.choose`.

    Decay, cumulative sums and states are float32, matmuls run in x's dtype; everything is float64 for float64 x.
    Returns y (B, T, H, P) in x's dtype, and the state after the last token (that of its document), (B, H, P, N), if
    `return_state`. A change in one document leaves the others' outputs and gradients bit-identical (plain torch).
    """
    _check(x, dt, A, B, C, documents, initial_state)
    given = {
        "documents": documents is not None,
        "initial_state": initial_state is not None,
        "final_state": return_state,
    }
    needs = [name for name, wanted in given.items() if wanted]
    sizes = {"head_dim": x.shape[-1]}
    prefer = "torch" if initial_state is not None and x.shape[1] == 1 else None  # decoding: one token
    name = choose("ssd", backend, needs=needs, sizes=sizes, prefer=prefer, dtype=x.dtype, device=x.device).name
    if name in ("reference", prefer):
        y, state = ssd_reference(x, dt, A, B, C, D=D, documents=documents, initial_state=initial_state)
    elif name == "mamba_ssm":
        return _mamba_ssm(x, dt, A, B, C, D, documents, initial_state, chunk or 256, return_state)
    elif name == "native":
        y, state = ssd_native(x, dt, A, B, C, D, documents, initial_state, chunk)
    else:
        y, state = ssd_chunked(x, dt, A, B, C, D, documents, initial_state, chunk)
    return y, state if return_state else None


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, documents: Tensor | None, state: Tensor | None):
    b, T, H, P = x.shape
    G, N = B.shape[2:]
    assert T > 0, "ssd needs at least one token"
    assert H % G == 0, f"{H} heads do not divide into {G} groups"
    assert dt.shape == (b, T, H), f"dt has shape {tuple(dt.shape)}, x {tuple(x.shape)}"
    assert A.shape == (H,), f"A has shape {tuple(A.shape)} for {H} heads"
    assert B.shape == C.shape == (b, T, G, N), f"B {tuple(B.shape)}, C {tuple(C.shape)}, x {tuple(x.shape)}"
    assert documents is None or documents.shape == (b, T), "documents has another shape than the row"
    assert state is None or state.shape == (b, H, P, N), "initial_state has another shape than (B, H, P, N)"


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    continues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: x (B, H, P), dt (B, H), B and C (B, G, N), state (B, H, P, N) -> (y, new state).

    continues: (B,) bool, False where the token begins a document, which does not see the state.
    """
    wide, (b, G, N) = wide_dtype(x.dtype), B.shape
    dt, xw = dt.to(wide), x.to(wide)
    decay = torch.exp(dt * A.to(wide))
    if continues is not None:
        decay = decay * continues[:, None]
    # The heads of a group are rows of one matmul.
    kept = (decay[..., None, None] * state.to(wide)).reshape(b, G, -1, N)
    dtx = (dt[..., None] * xw).reshape(b, G, -1, 1)
    grouped = kept.addcmul_(dtx, B.to(wide)[:, :, None])
    y = (grouped @ C.to(wide)[..., None]).view(x.shape)
    if D is not None:
        y = y + D.to(wide)[:, None] * xw
    return y.to(x.dtype), grouped.view(state.shape)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: slow and obvious. Arguments and results as in `ssd`."""
    b, T, H, P = x.shape
    state = x.new_zeros(b, H, P, B.shape[-1], dtype=wide_dtype(x.dtype)) if initial_state is None else initial_state
    ys = []
    for t in range(T):
        continues = None if documents is None else documents[:, t] == (documents[:, t - 1] if t else 0)
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state, continues)
        ys.append(y)
    return torch.stack(ys, 1), state


def _mamba_ssm(
    x, dt, A, B, C, D, documents, initial_state, chunk: int, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    # Its seq_idx has our meaning: the state passed in belongs to index 0. Chunks that are no power of two gave NaN, and
    # the result does not depend on them.
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    out = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B.to(x.dtype),
        C.to(x.dtype),
        min(max(1 << chunk.bit_length() - 1, 16), 256),
        D=D,
        initial_states=initial_state,
        seq_idx=None if documents is None else documents.to(torch.int32).contiguous(),
        dt_softplus=False,
        return_final_states=return_state,
    )
    return out if return_state else (out, None)
