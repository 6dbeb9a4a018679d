"""RMS norms, plain and gated, SwiGLU and squared ReLU as Triton kernels: each tensor read and written once each way.

The equations are those of `model/ops/norm.py`. All is float32 inside. A program of the norm's backward goes through
many rows and leaves the sum of their shares of the weight's gradient; torch adds those up: no atomics, the same bits in
every run.

Legend: n rows, D width, M groups of D/M neighbours; a program takes R rows of W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_GATE, GATE_FIRST, NORM_FIRST = 0, 1, 2
ELEMENTS = 2048  # of a tile
PROGRAMS = 528  # of the norm's backward at most: each leaves a row of partial sums
MAX_WIDTH = 16384  # of a group: a program holds a row


@triton.jit
def _norm_forward(
    x, z, weight, y, scale, n, width, x_row, z_row, eps,
    GATE: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(1), tl.num_programs(1)
    rows, c = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    inside, column = (rows < n)[:, None] & (c < width)[None, :], (group * width + c)[None, :]
    h = tl.load(x + rows[:, None] * x_row + column, mask=inside, other=0).to(tl.float32)
    gate = h
    if GATE:
        gate = tl.load(z + rows[:, None] * z_row + column, mask=inside, other=0).to(tl.float32)
        gate *= tl.sigmoid(gate)
    if GATE == 1:
        h *= gate
    r = tl.rsqrt(tl.sum(h * h, 1) / width + eps)
    w = tl.load(weight + group * width + c, mask=c < width, other=0).to(tl.float32)
    out = h * r[:, None] * w[None, :]
    if GATE == 2:
        out *= gate
    tl.store(y + rows[:, None] * (groups * width) + column, out.to(y.dtype.element_ty), mask=inside)
    tl.store(scale + rows * groups + group, r, mask=rows < n)


@triton.jit
def _norm_backward(
    x, z, weight, scale, dy, dx, dz, d_weight, n, width, x_row, z_row, dy_row,
    GATE: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """d_weight: (programs, D)."""
    group, groups, programs = tl.program_id(1), tl.num_programs(1), tl.num_programs(0)
    c = tl.arange(0, W)
    column, width_all = group * width + c, groups * width
    w = tl.load(weight + column, mask=c < width, other=0).to(tl.float32)[None, :]
    total = tl.zeros((W,), tl.float32)
    for start in range(tl.program_id(0) * R, n, programs * R):
        rows = start + tl.arange(0, R)
        inside, far = (rows < n)[:, None] & (c < width)[None, :], rows.to(tl.int64)[:, None]
        v = tl.load(x + far * x_row + column[None, :], mask=inside, other=0).to(tl.float32)
        g = tl.load(dy + far * dy_row + column[None, :], mask=inside, other=0).to(tl.float32)
        r = tl.load(scale + rows.to(tl.int64) * groups + group, mask=rows < n, other=0)[:, None]
        u, share, gate = v, v, v
        if GATE:
            u = tl.load(z + far * z_row + column[None, :], mask=inside, other=0).to(tl.float32)
            share = tl.sigmoid(u)
            gate = u * share
        h = v * gate if GATE == 1 else v
        normal = h * r
        slope = g * gate if GATE == 2 else g
        total += tl.sum(slope * normal, 0)
        slope *= w
        along = tl.sum(slope * normal, 1) / width
        dh = (slope - normal * along[:, None]) * r
        if GATE:
            d_gate = dh * v if GATE == 1 else g * normal * w
            du = d_gate * share * (1 + u * (1 - share))
            tl.store(dz + far * width_all + column[None, :], du.to(dz.dtype.element_ty), mask=inside)
        if GATE == 1:
            dh *= gate
        tl.store(dx + far * width_all + column[None, :], dh.to(dx.dtype.element_ty), mask=inside)
    tl.store(d_weight + tl.program_id(0) * width_all + column, total, mask=c < width)


@triton.jit
def _swiglu_forward(gate, up, out, n, width, gate_row, up_row, W: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    g = tl.load(gate + row * gate_row + c, mask=c < width, other=0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=c < width, other=0).to(tl.float32)
    tl.store(out + row * width + c, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _swiglu_backward(gate, up, dy, d_gate, d_up, n, width, gate_row, up_row, dy_row, W: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    g = tl.load(gate + row * gate_row + c, mask=c < width, other=0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=c < width, other=0).to(tl.float32)
    d = tl.load(dy + row * dy_row + c, mask=c < width, other=0).to(tl.float32)
    share = tl.sigmoid(g)
    dg = d * u * share * (1 + g * (1 - share))
    tl.store(d_gate + row * width + c, dg.to(d_gate.dtype.element_ty), mask=c < width)
    tl.store(d_up + row * width + c, (d * g * share).to(d_up.dtype.element_ty), mask=c < width)


@triton.jit
def _relu2_forward(x, out, n, width, x_row, W: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    v = tl.maximum(tl.load(x + row * x_row + c, mask=c < width, other=0).to(tl.float32), 0)
    tl.store(out + row * width + c, (v * v).to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _relu2_backward(x, dy, dx, n, width, x_row, dy_row, W: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    v = tl.maximum(tl.load(x + row * x_row + c, mask=c < width, other=0).to(tl.float32), 0)
    d = tl.load(dy + row * dy_row + c, mask=c < width, other=0).to(tl.float32)
    tl.store(dx + row * width + c, (2 * v * d).to(dx.dtype.element_ty), mask=c < width)


class TritonNorm(torch.autograd.Function):
    """Arguments as of `norm._Norm`; x in float32, bfloat16 or float16."""

    @staticmethod
    def forward(ctx, x, z, weight, eps: float, groups: int, norm_first: bool, dtype: torch.dtype):
        xs, zs = _rows(x), None if z is None else _rows(z)
        (n, D), gate = xs.shape, NO_GATE if z is None else NORM_FIRST if norm_first else GATE_FIRST
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = torch.empty(n, groups, dtype=torch.float32, device=x.device)
        tile = _tile(D // groups)
        with torch.cuda.device_of(x):
            _norm_forward[triton.cdiv(n, tile["R"]), groups](
                xs, zs, weight, out, scale, n, D // groups, *_strides(xs, zs), eps, GATE=gate, **tile
            )
        ctx.save_for_backward(x, z, weight, scale)
        ctx.gate = gate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        xs, zs, dys = _rows(x), None if z is None else _rows(z), _rows(dy)
        (n, D), groups, tile = xs.shape, scale.shape[1], _tile(xs.shape[1] // scale.shape[1])
        programs = max(1, min(triton.cdiv(n, tile["R"]), PROGRAMS // groups))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _norm_backward[programs, groups](
                xs, zs, weight, scale, dys, dx, dz, parts, n, D // groups, *_strides(xs, zs), dys.stride(0),
                GATE=ctx.gate, **tile,
            )  # fmt: skip
        return dx, dz, parts.sum(0).to(weight.dtype), None, None, None, None


class TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        gates, ups = _rows(gate), _rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        with torch.cuda.device_of(gate):
            grid, columns = _grid(gates)
            _swiglu_forward[grid](gates, ups, out, *gates.shape, gates.stride(0), ups.stride(0), W=columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        gates, ups, dys = _rows(gate), _rows(up), _rows(dy)
        d_gate, d_up = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (gate, up))
        with torch.cuda.device_of(dy):
            grid, columns = _grid(dys)
            strides = (gates.stride(0), ups.stride(0), dys.stride(0))
            _swiglu_backward[grid](gates, ups, dys, d_gate, d_up, *dys.shape, *strides, W=columns)
        return d_gate, d_up


class TritonReLU2(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        xs, out = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            grid, columns = _grid(xs)
            _relu2_forward[grid](xs, out, *xs.shape, xs.stride(0), W=columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        xs, dys, dx = _rows(x), _rows(dy), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            grid, columns = _grid(xs)
            _relu2_backward[grid](xs, dys, dx, *xs.shape, xs.stride(0), dys.stride(0), W=columns)
        return dx


def _rows(x: Tensor) -> Tensor:
    """(n, D), its columns next to each other; rows may lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _strides(xs: Tensor, zs: Tensor | None) -> tuple[int, int]:
    return xs.stride(0), 0 if zs is None else zs.stride(0)


def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    columns = triton.next_power_of_2(width)
    return {"R": max(1, ELEMENTS // columns), "W": columns, "num_warps": min(16, max(4, columns // 512))}


def _grid(rows: Tensor) -> tuple[tuple[int, int], int]:
    """One program a row and block of columns, and the width of the block."""
    columns = min(ELEMENTS, triton.next_power_of_2(rows.shape[1]))
    return (rows.shape[0], triton.cdiv(rows.shape[1], columns)), columns
