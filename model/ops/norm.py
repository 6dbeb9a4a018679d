"""RMS norms, plain and gated, and the gated activation of SwiGLU, with backwards that recompute.

    rms_norm(x) = w x / sqrt(mean(x^2) + eps)
    gated_rms_norm(y, z) = rms_norm(y silu(z)), per group          (Mamba-2, arXiv 2405.21060)
    swiglu(g, u) = silu(g) u

All of it is elementwise work on rows: in plain torch each op allocates and walks the whole tensor, and keeps it
for backward. Here rows go through in blocks that stay in the cache, norms in float32, and only inputs are saved; on
CUDA in one kernel each way (`norm_triton.py`).

Legend: n rows (all leading dimensions together), D width, M groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.backend import HALVES, Backend, choose, declare
from model.ops.blockwise import rows_at_once, wide_dtype
from model.ops.native import NATIVE_DTYPES, native_ready, run_native, with_rows

for op in ("norm", "activation"):
    declare(
        op,
        Backend(
            "triton",
            frozenset(),
            HALVES | {torch.float32},
            {"width": range(1, 16385)},  # of a group: a program holds a row of it
            module="triton",
            device="cuda",
            capability=(8, 0),
        ),
        Backend("native", frozenset(), NATIVE_DTYPES, device="cpu", ready=native_ready),
        Backend("torch", frozenset()),
    )
BLOCK = 2**18  # elements at a time on a CPU: what stays in a core's cache with its temporaries


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """x: (..., D). weight: (D,). Statistics are float32 (float64 for float64). Returns `dtype`, x's unless given."""
    return _chosen_norm(x, 1, dtype).apply(x, None, weight, eps, 1, False, dtype or x.dtype)


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    *,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y, z: (..., D). weight: (D,). groups: of D/groups neighbours, each with its own mean square.

    norm_before_gate: rms_norm(y) silu(z) instead of rms_norm(y silu(z)). Returns `dtype`, y's unless given.
    """
    assert y.shape[-1] % groups == 0, f"{y.shape[-1]} channels do not divide into {groups} groups"
    z = z.to(y.dtype)
    return _chosen_norm(y, groups, dtype).apply(y, z, weight, eps, groups, norm_before_gate, dtype or y.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, elementwise, both (..., D)."""
    name = _activation(gate)
    if name == "triton":
        from model.ops.norm_triton import TritonSwiGLU

        return TritonSwiGLU.apply(gate, up)
    return (_NativeSwiGLU if name == "native" else _SwiGLU).apply(gate, up)


@dataclass(frozen=True)
class Spread:
    """Where the groups of a norm lie when their channels are spread over tensor ranks, head by head.

    group_of: number of the group of each head that this rank holds. groups: in all. heads_per_group: likewise. total:
    the sum over the tensor ranks, for all of them.
    """

    group_of: Sequence[int]
    groups: int
    heads_per_group: int
    total: Callable[[Tensor], Tensor]


def spread_gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, spread: Spread, *, norm_before_gate: bool = False
) -> Tensor:
    """`gated_rms_norm` of the channels that a tensor rank holds, with the statistics of whole groups. x, z: (B, T, D'),
    weight: (D',)."""
    wide = wide_dtype(x.dtype)
    gate, h = F.silu(z.to(wide)), x.to(wide)
    h = h if norm_before_gate else gate * h
    heads = h.unflatten(-1, (len(spread.group_of), -1))
    group = torch.tensor(spread.group_of, device=x.device)
    squares = heads.square().sum(-1)
    sums = spread.total(squares.new_zeros(*squares.shape[:-1], spread.groups).index_add(-1, group, squares))
    scale = torch.rsqrt(sums / (spread.heads_per_group * heads.shape[-1]) + eps)
    h = (heads * scale.index_select(-1, group)[..., None]).flatten(-2) * weight.to(wide)
    return (h * gate if norm_before_gate else h).to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise, (..., D) (Primer, arXiv 2109.08668)."""
    name = _activation(x)
    if name == "triton":
        from model.ops.norm_triton import TritonReLU2

        return TritonReLU2.apply(x)
    return (_NativeReLU2 if name == "native" else _ReLU2).apply(x)


def _activation(x: Tensor) -> str:
    return choose("activation", sizes={"width": 1}, dtype=x.dtype, device=x.device).name


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """The equation, at once: the oracle."""
    grouped = x.to(wide_dtype(x.dtype)).unflatten(-1, (groups, -1))
    normal = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (normal.flatten(-2) * weight).to(x.dtype)


def _chosen_norm(x: Tensor, groups: int, dtype: torch.dtype | None) -> type[torch.autograd.Function]:
    sizes = {"width": x.shape[-1] // groups}
    name = choose("norm", sizes=sizes, dtype=x.dtype, device=x.device).name
    if name == "triton":
        from model.ops.norm_triton import TritonNorm

        return TritonNorm
    return _NativeNorm if name == "native" and (dtype or x.dtype) in NATIVE_DTYPES else _Norm


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # a view for slices of a wider last dimension, too


def _blocks(rows: Tensor) -> Iterator[slice]:
    n, width = rows.shape
    size = rows_at_once(rows.device, width, BLOCK)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps: float, groups: int, norm_first: bool, dtype: torch.dtype):
        wide, (xs, zs) = wide_dtype(x.dtype), (_rows(x), None if z is None else _rows(z))
        n, D = xs.shape
        w = weight.to(wide).view(groups, -1)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = torch.empty(n, groups, 1, dtype=wide, device=x.device)
        for rows in _blocks(xs):
            h = xs[rows].to(wide)
            if zs is not None and not norm_first:
                h = F.silu(zs[rows].to(wide)).mul_(h)
            h = h.view(-1, *w.shape)
            r = _inverse_rms(h, eps, out=scale[rows])
            y = (h * r).mul_(w).view(-1, D)
            if zs is not None and norm_first:
                y.mul_(F.silu(zs[rows].to(wide)))
            out.view(-1, D)[rows] = y
        ctx.save_for_backward(x, z, weight, scale)
        ctx.norm_first = norm_first
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        wide, xs, zs, dys = wide_dtype(x.dtype), _rows(x), None if z is None else _rows(z), _rows(dy)
        D = xs.shape[1]
        w = weight.to(wide).view(scale.shape[1], -1)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dw = torch.zeros_like(w)
        for rows in _blocks(xs):
            xb, g, r = xs[rows].to(wide), dys[rows].to(wide), scale[rows]
            h = xb
            if zs is not None:
                zb = zs[rows].to(wide)
                gate = F.silu(zb)
                if ctx.norm_first:
                    d_gate, g = g, g * gate
                else:
                    h = xb * gate
            normal = h.view(-1, *w.shape) * r
            g = g.view(-1, *w.shape)
            dw += (g * normal).sum(0)
            if zs is not None and ctx.norm_first:
                d_gate = d_gate * (normal * w).view(-1, D)
            g = g * w
            along = (g * normal).mean(-1, keepdim=True)
            dh = g.addcmul_(normal, along, value=-1).mul_(r).view(-1, D)
            if dz is not None:
                if not ctx.norm_first:
                    d_gate, dh = dh * xb, dh * gate
                dz.view(-1, D)[rows] = torch.ops.aten.silu_backward(d_gate, zb)
            dx.view(-1, D)[rows] = dh
        return dx, dz, dw.view(D).to(weight.dtype), None, None, None, None


def _inverse_rms(h: Tensor, eps: float, out: Tensor) -> Tensor:
    """1 / sqrt(mean square + eps) of h (n, M, D/M), into out (n, M, 1)."""
    torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=out)
    return out.square_().div_(h.shape[-1]).add_(eps).rsqrt_()


class _NativeNorm(torch.autograd.Function):
    """`_Norm` in one pass over the rows each way, see `cpp/rows.cpp`."""

    @staticmethod
    def forward(ctx, x, z, weight, eps: float, groups: int, norm_first: bool, dtype: torch.dtype):
        gate = 0 if z is None else 1 + norm_first
        out, scale = native_norm(x, z, weight, eps, groups, gate, dtype)
        ctx.save_for_backward(x, z, weight, scale)
        ctx.gate = gate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        dx, dz = torch.empty(x.shape, dtype=x.dtype), None if z is None else torch.empty(z.shape, dtype=z.dtype)
        return dx, dz, native_norm_backward(x, z, weight, scale, ctx.gate, dy, dx, dz), None, None, None, None


def native_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int, gate: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm by the loops of `cpp/rows.cpp`, outside autograd; gate: 0 none, 1 before the norm, 2 after it. Returns
    the result in `dtype` and the inverse RMS of each group, (n, G)."""
    xs, zs, w = *_native_rows(x, z), weight.detach().float().contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    scale = torch.empty(len(xs), groups, dtype=torch.float32)
    gated = (xs, xs.stride(0), zs, 0 if zs is None else zs.stride(0), w)
    run_native("norm_forward", x.dtype, *gated, out, scale, *xs.shape, groups, float(eps), gate, to=dtype)
    return out, scale


def native_norm_backward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    gate: int,
    dy: Tensor,
    dx: Tensor,
    dz: Tensor | None,
) -> Tensor:
    """Fills dx, contiguous, and dz, of which the rows lie at one distance; returns the gradient of the weight."""
    xs, zs, w = *_native_rows(x, z), weight.detach().float().contiguous()
    dys, dw = with_rows(_rows(dy)), torch.empty_like(w)
    gated = (xs, xs.stride(0), zs, 0 if zs is None else zs.stride(0), w, scale, dys, dys.stride(0))
    into = dx, dz, 0 if dz is None else dz.stride(-2)
    run_native("norm_backward", x.dtype, *gated, *into, dw, *xs.shape, scale.shape[1], gate, to=dy.dtype)
    return dw.to(weight.dtype)


def _native_rows(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return with_rows(_rows(x)), None if z is None else with_rows(_rows(z))


class _NativeSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        gates, ups = (with_rows(_rows(v)) for v in (gate, up))
        out = torch.empty(gate.shape, dtype=gate.dtype)
        run_native("swiglu_forward", gate.dtype, gates, gates.stride(0), ups, ups.stride(0), out, *gates.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gates, ups, dys = (with_rows(_rows(v)) for v in (*ctx.saved_tensors, dy))
        d_gate, d_up = (torch.empty(dy.shape, dtype=dy.dtype) for _ in range(2))
        read = (gates, gates.stride(0), ups, ups.stride(0), dys, dys.stride(0))
        run_native("swiglu_backward", dy.dtype, *read, d_gate, d_up, dys.shape[1], *dys.shape)
        return d_gate, d_up


class _ReLU2(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(dy)


class _NativeReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        xs, out = with_rows(_rows(x)), torch.empty(x.shape, dtype=x.dtype)
        run_native("relu2_forward", x.dtype, xs, xs.stride(0), out, *xs.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        (xs, dys), dx = (with_rows(_rows(v)) for v in (x, dy)), torch.empty(x.shape, dtype=x.dtype)
        run_native("relu2_backward", x.dtype, xs, xs.stride(0), dys, dys.stride(0), dx, *xs.shape)
        return dx


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gates, ups = _rows(gate), _rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        flat = out.view(-1, gate.shape[-1])
        for rows in _blocks(gates):
            torch.mul(F.silu(gates[rows]), ups[rows], out=flat[rows])
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        gates, ups, dys = _rows(gate), _rows(up), _rows(dy)
        d_gate, d_up = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (gate, up))
        d_gates, d_ups = _rows(d_gate), _rows(d_up)
        for rows in _blocks(gates):
            g, d = gates[rows], dys[rows]
            torch.mul(F.silu(g), d, out=d_ups[rows])
            torch.ops.aten.silu_backward(d * ups[rows], g, grad_input=d_gates[rows])
        return d_gate, d_up
