"""The selective scan of Mamba (arXiv 2312.00752, section 3), with documents.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = <C_t, h_t> + D x_t

per channel, h of N numbers. Two forms of the same map: `selective_scan_reference` (token by token, the oracle) and the
blocks of `model/ops/selective_scan_chunked.py` that `selective_scan` runs; one token after a state, as in decoding, is
a step of the recurrence. On CUDA it takes mamba-ssm's kernel where it is installed, or our own in Triton.

Legend: B batch, T tokens, C channels, N state per channel.
"""

import torch
from torch import Tensor

from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import wide_dtype
from model.ops.selective_scan_chunked import selective_scan_chunked

_ALL = frozenset({"documents", "initial_state", "final_state"})
declare(
    "selective_scan",
    Backend(
        "mamba_ssm",
        _ALL,  # by tokens put between the row's own: see `_mamba_ssm`
        HALVES | {torch.float32},
        {"d_state": range(1, 257)},
        module="mamba_ssm",
        device="cuda",
    ),
    Backend("triton", _ALL, HALVES | {torch.float32}, module="triton", device="cuda", capability=(8, 0)),
    Backend("torch", _ALL),
    Backend("reference", _ALL),
)
RESET_DT = 1e10
"""A step after which nothing is left of a state: exp(RESET_DT A) is exactly 0 for every A below -2e-8. The kernel's
backward multiplies gradients by it before it multiplies them by x = 0, so that it must leave them room."""
ENTRY_DT = 2.0**-10
"""The step of the tokens that carry an initial state into a row; what it lets decay is made up for."""


def selective_scan(
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
    """The selective scan over whole rows.

    x: (B, T, C), in the compute dtype. dt: (B, T, C) float32, positive (softplus already applied). A: (C, N) float32,
    negative. B, C: (B, T, N), shared by the channels. D: (C,) skip weight. documents: (B, T) int32, non-decreasing:
    equal index means the same document, index 0 continues `initial_state`, a larger one never sees it. initial_state:
    (B, C, N) float32. chunk: tokens per block in plain torch, None for what was measured to be fast; the result does
    not depend on it. backend: see `model.ops.backend.choose`.

    All arithmetic is float32, float64 for float64 x. Returns y (B, T, C) in x's dtype, and the state after the last
    token (that of its document), (B, C, N), if `return_state`. A change in one document leaves the others' outputs and
    gradients bit-identical (plain torch).
    """
    _check(x, dt, A, B, C, documents, initial_state)
    given = {
        "documents": documents is not None,
        "initial_state": initial_state is not None,
        "final_state": return_state,
    }
    needs = [name for name, wanted in given.items() if wanted]
    sizes = {"d_state": A.shape[1]}
    prefer = "torch" if initial_state is not None and x.shape[1] == 1 else None  # decoding: one token
    name = choose(
        "selective_scan", backend, needs=needs, sizes=sizes, prefer=prefer, dtype=x.dtype, device=x.device
    ).name
    state: Tensor | None
    if name in ("reference", prefer):
        y, state = selective_scan_reference(x, dt, A, B, C, D=D, documents=documents, initial_state=initial_state)
    elif name == "mamba_ssm":
        y, state = _mamba_ssm(x, dt, A, B, C, D, documents, initial_state, return_state)
    elif name == "triton":
        from model.ops.selective_scan_triton import selective_scan_triton

        y, state = selective_scan_triton(x, dt, A, B, C, D, documents, initial_state)
    else:
        y, state = selective_scan_chunked(x, dt, A, B, C, D, documents, initial_state, chunk)
    return y, state if return_state else None


def scan_summary(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """What a run of tokens does to the state, h -> through h + state, both (B, C, N): arguments as in `selective_scan`.
    through is 0 where a document begins in the run."""
    through = torch.where((documents[:, -1] == 0)[:, None, None], (dt.sum(1)[..., None] * A).exp(), 0)
    _, state = selective_scan(x, dt, A, B, torch.zeros_like(B), documents=documents, return_state=True)
    assert state is not None
    return through, state


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, documents: Tensor | None, state: Tensor | None):
    b, T, c = x.shape
    N = A.shape[1]
    assert T > 0, "selective_scan needs at least one token"
    assert dt.shape == x.shape, f"dt has shape {tuple(dt.shape)}, x {tuple(x.shape)}"
    assert A.shape == (c, N), f"A has shape {tuple(A.shape)} for {c} channels"
    assert B.shape == C.shape == (b, T, N), f"B {tuple(B.shape)}, C {tuple(C.shape)}, x {tuple(x.shape)}, N {N}"
    assert documents is None or documents.shape == (b, T), "documents has another shape than the row"
    assert state is None or state.shape == (b, c, N), "initial_state has another shape than (B, C, N)"


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    continues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: x and dt (B, C), B and C (B, N), state (B, C, N) -> (y, new state).

    continues: (B,) bool, False where the token begins a document, which does not see the state.
    """
    wide = wide_dtype(x.dtype)
    dt, xw = dt.to(wide), x.to(wide)
    decay = torch.exp(dt[..., None] * A.to(wide))
    if continues is not None:
        decay = decay * continues[:, None, None]
    state = (decay * state.to(wide)).addcmul((dt * xw)[..., None], B.to(wide)[:, None])
    y = (state @ C.to(wide)[..., None]).squeeze(-1)
    if D is not None:
        y = y + D.to(wide) * xw
    return y.to(x.dtype), state


def selective_scan_reference(
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
    """The recurrence, token by token: slow and obvious. Arguments and results as in `selective_scan`."""
    b, T, c = x.shape
    state = x.new_zeros(b, c, A.shape[1], dtype=wide_dtype(x.dtype)) if initial_state is None else initial_state
    ys = []
    for t in range(T):
        continues = None if documents is None else documents[:, t] == (documents[:, t - 1] if t else 0)
        y, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state, continues)
        ys.append(y)
    return torch.stack(ys, 1), state


def _mamba_ssm(x, dt, A, B, C, D, documents, initial_state, return_state: bool) -> tuple[Tensor, Tensor | None]:
    """mamba-ssm's kernel knows neither documents nor an initial state, and gives no gradient to the final one. All
    three are said in tokens between the row's own:

    - before a document begins, a token with x = 0 and a step so long that the decay is exactly 0;
    - for the initial state, N tokens before the row, which write its N numbers one by one;
    - for the final state, N tokens after the row with x = 0, a step of 0 (nothing decays) and C a unit vector each, so
      that their outputs are its N numbers.

    Its inputs have one dtype, which is float32 here: a step rounded to bfloat16 would be another one.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    T, N = x.shape[1], A.shape[1]
    A = A.float()
    row = [v.float() for v in (x, dt, B, C)]
    begun = None
    if documents is not None:
        row, begun = _with_resets(row, documents)
    before = 0
    if initial_state is not None:
        row, before = [torch.cat(pair, 1) for pair in zip(_entry(initial_state.float(), A), row, strict=True)], N
    if return_state:
        row = [torch.cat(pair, 1) for pair in zip(row, _readout(row, N), strict=True)]
    u, delta, b, c = (v.transpose(1, 2).contiguous() for v in row)
    y = selective_scan_fn(u, delta, A.contiguous(), b, c).transpose(1, 2)
    state = y[:, -N:].transpose(1, 2) if return_state else None
    y = y[:, before:]
    y = y[:, :T] if begun is None else y.gather(1, begun[..., None].expand(-1, -1, x.shape[2]))
    if D is not None:
        y = y + D.float() * x.float()
    return y.to(x.dtype), state


def _with_resets(row: list[Tensor], documents: Tensor) -> tuple[list[Tensor], Tensor]:
    """x, dt, B, C with a resetting token before each document, and (B, T) int64, where the tokens went. Rows with fewer
    documents end in tokens that do nothing."""
    begins = torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
    begun = begins.cumsum(1)
    place = begun + torch.arange(begins.shape[1], device=begins.device)
    length = begins.shape[1] + int(begun[:, -1].max())
    wider = []
    for v in row:
        out = v.new_zeros(v.shape[0], length, v.shape[2])
        wider.append(out.scatter(1, place[..., None].expand_as(v), v))
    rows, tokens = begins.nonzero(as_tuple=True)
    reset = torch.zeros(begins.shape[0], length, dtype=torch.bool, device=begins.device)
    reset[rows, place[rows, tokens] - 1] = True
    wider[1] = wider[1].masked_fill(reset[..., None], RESET_DT)
    return wider, place


def _entry(state: Tensor, A: Tensor) -> list[Tensor]:
    """x, dt, B, C of the N tokens after which the state is `state` (B, C, N). Number n is written by token n and decays
    over the N - 1 - n tokens after it, so that it is written as much larger."""
    b, _, N = state.shape
    after = torch.arange(N - 1, -1, -1, device=A.device, dtype=A.dtype)
    x = (state * torch.exp(-ENTRY_DT * after * A) / ENTRY_DT).transpose(1, 2)
    unit = torch.eye(N, dtype=A.dtype, device=A.device).expand(b, N, N)
    return [x, torch.full_like(x, ENTRY_DT), unit, torch.zeros_like(unit)]


def _readout(row: list[Tensor], N: int) -> list[Tensor]:
    """x, dt, B, C of the N tokens whose outputs are the state before them."""
    nothing = row[0].new_zeros(row[0].shape[0], N, row[0].shape[2])
    unit = torch.eye(N, dtype=nothing.dtype, device=nothing.device).expand(len(nothing), N, N)
    return [nothing, nothing, torch.zeros_like(unit), unit]
