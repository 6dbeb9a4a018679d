"""Mamba (arXiv 2312.00752): a selective state-space mixer, each channel with a state and a step of its own.

    x, z = in_proj(u);  x = silu(conv(x));  r, B, C = x_proj(x);  dt = softplus(dt_proj(r) + dt_bias);  A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = <C_t, h_t> + D x_t;  out = out_proj(y * silu(z))

Layout and defaults follow section 3 of the paper and the public `mamba_ssm` Mamba module. Jamba (arXiv 2403.19887) puts
RMSNorms on r, B and C: `inner_norms`.

On context ranks the scan runs twice: from zero, for the chunk's effect on a state, and then with what enters the chunk.

Legend: B batch rows, T tokens, I inner width (channels), N state per channel, R rank of the step, k convolution taps.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.context import Context, LayerOutput
from model.layers.base import (
    Costs,
    Dims,
    Message,
    Projection,
    VisibleKeys,
    inputs_before,
    norm_spec,
    projection_spec,
    require,
)
from model.ops.conv import causal_conv
from model.ops.norm import rms_norm, swiglu
from model.ops.selective_scan import scan_summary, selective_scan
from model.ops.softplus import softplus
from model.params import (
    Block,
    Constant,
    InverseSoftplusLogUniform,
    ParamSpec,
    Table,
    Uniform,
    allocate_table,
    local_rows,
    split_evenly,
)

TOKENS_PER_SAVED_STATE = 16
"""What the blocks of the scan in plain torch have on a CPU, at least."""


@dataclass(frozen=True)
class LogOfColumn:
    """log(n) in column n = 1 .. N: with A = -exp of it, the real S4D spectrum -1 .. -N in every channel."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape).clone()


@dataclass(frozen=True)
class MambaConfig:
    """expand: inner width as a multiple of d_model. d_state: N. dt_rank: R, None for d_model/16 rounded up. d_conv:
    taps of the causal convolution. dt_min, dt_max, dt_floor: range of the initial step. inner_norms: RMSNorm of the
    step's R numbers, of B and of C. chunk: tokens per block of the scan in plain torch, None for what was measured to
    be fast (a matter of speed and memory alone)."""

    expand: float = 2.0
    d_state: int = 16
    dt_rank: int | None = None
    d_conv: int = 4
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    inner_norms: bool = False
    chunk: int | None = None
    kind: Literal["mamba"] = "mamba"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ("tensor", "context")

    def d_inner(self, d_model: int) -> int:
        return round(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        return self.dt_rank or -(-d_model // 16)

    def check(self, d_model: int) -> None:
        inner = self.d_inner(d_model)
        for key in ("expand", "d_state", "d_conv", "dt_min", "dt_floor"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")
        require(inner == self.expand * d_model, "expand", self.expand, f"a multiple that makes d_model={d_model} whole")
        rank = self.dt_rank
        require(rank is None or 0 < rank <= inner, "dt_rank", rank, f"1 to the inner width {inner}, or none")
        require(self.dt_min <= self.dt_max, "dt_max", self.dt_max, f"at least dt_min={self.dt_min}")
        require(self.chunk is None or self.chunk > 0, "chunk", self.chunk, "a positive number of tokens, or none")

    def table(self, dims: Dims) -> Table:
        inner, N, R = self.d_inner(dims.d_model), self.d_state, self.rank(dims.d_model)
        channels, summed = split_evenly(0, inner), split_evenly(1, inner)
        tap, step = 1 / math.sqrt(self.d_conv), 1 / math.sqrt(R)
        table = {
            "in_proj.weight": ParamSpec(
                (2 * inner, dims.d_model),
                dims.matrix(dims.d_model),
                blocks=(Block("x", inner, channels), Block("z", inner, channels)),
            ),
            "conv_weight": ParamSpec((inner, self.d_conv), Uniform(-tap, tap), split=channels, update="convolution"),
            "conv_bias": ParamSpec((inner,), Uniform(-tap, tap), split=channels, decay=False, update="vector"),
            # Every tensor rank has all rows over its own channels, and the rows' sums are wanted of all ranks.
            "x_proj.weight": ParamSpec(
                (R + 2 * N, inner),
                dims.matrix(inner),
                blocks=(Block("dt", R, summed), Block("B", N, summed), Block("C", N, summed)),
            ),
            "dt_norm_weight": norm_spec(R),
            "B_norm_weight": norm_spec(N),
            "C_norm_weight": norm_spec(N),
            "dt_proj.weight": ParamSpec((inner, R), Uniform(-step, step), split=channels),
            "dt_bias": ParamSpec(
                (inner,),
                InverseSoftplusLogUniform(self.dt_min, self.dt_max, self.dt_floor),
                split=channels,
                decay=False,
                update="vector",
            ),
            "A_log": ParamSpec((inner, N), LogOfColumn(), split=channels, decay=False, update="vector"),
            "D": ParamSpec((inner,), Constant(1.0), split=channels, decay=False, update="vector"),
            "out_proj.weight": projection_spec(dims, dims.d_model, inner, output=True, split=summed),
        }
        absent = {"conv_bias": not self.conv_bias} | dict.fromkeys(NORMS, not self.inner_norms)
        return {name: spec for name, spec in table.items() if not absent.get(name)}

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        inner, N, R = self.d_inner(dims.d_model), self.d_state, self.rank(dims.d_model)
        projections = 2 * inner * (3 * dims.d_model + (R + 2 * N) + R)
        norms = R + 2 * N if self.inner_norms else 0
        return Costs(
            # Of the scan, per number of state: dt A and its exponential, dt x B, state times decay plus that, times C.
            flops=projections + 2 * self.d_conv * inner + 7 * inner * N,
            # in_proj reads u; x and z; convolution's x; r, B and C, before and after norms; y; out_proj's input.
            saved_compute=dims.d_model + 5 * inner + R + 2 * N + norms,
            saved_float32=inner + inner * N / (self.chunk or TOKENS_PER_SAVED_STATE),
            state_bytes=2 * (self.d_conv - 1) * inner + 4 * inner * N,
        )

    def messages(self, dims: Dims) -> list[Message]:
        inner = local_rows(self.table(dims)["in_proj.weight"], dims.place)["x"]
        return [
            Message("halo", inner, reach=self.d_conv - 1),
            Message("sum_over_tensor", self.rank(dims.d_model) + 2 * self.d_state),
            Message("prefix", 2 * inner * self.d_state, per="row", dtype="float32"),  # a decay for each number
        ]

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return Mamba(self, dims, device)


NORMS = ("dt_norm_weight", "B_norm_weight", "C_norm_weight")


class MambaState(NamedTuple):
    """conv: (B, k-1, I), the last inputs of the convolution. ssm: (B, I, N) float32."""

    conv: Tensor | None
    ssm: Tensor | None


class Mamba(nn.Module):
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter | None
    dt_norm_weight: nn.Parameter
    B_norm_weight: nn.Parameter
    C_norm_weight: nn.Parameter
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: MambaConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config, self.eps = config, dims.norm_eps
        self.sizes = [config.rank(dims.d_model), config.d_state, config.d_state]
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = (Projection() for _ in range(4))
        self.register_parameter("conv_bias", None)
        allocate_table(self, config.table(dims), device, dims.place)

    def forward(self, u: Tensor, ctx: Context, state: MambaState | None = None) -> LayerOutput:
        alone = ctx.documents.single and state is None and not ctx.spread
        documents = None if alone else ctx.documents.index
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = causal_conv(
            x,
            self.conv_weight,
            self.conv_bias,
            documents=documents,
            state=inputs_before(x, self.config.d_conv, ctx) if state is None else state.conv,
            activation="silu",
            return_state=ctx.carry,
        )
        r, B, C = ctx.mesh.sum_over_tensor(self.x_proj(x)).split(self.sizes, dim=-1)
        if self.config.inner_norms:
            r = rms_norm(r, self.dt_norm_weight, self.eps)
            B = rms_norm(B, self.B_norm_weight, self.eps)
            C = rms_norm(C, self.C_norm_weight, self.eps)
        dt, A = softplus(self.dt_proj(r), self.dt_bias), -torch.exp(self.A_log)
        entering = None if state is None else state.ssm
        if ctx.spread:
            entering = ctx.mesh.prefix(*scan_summary(x, dt, A, B, ctx.documents.index))
        y, ssm = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            documents=documents,
            initial_state=entering,
            chunk=self.config.chunk,
            return_state=ctx.carry,
        )
        return LayerOutput(self.out_proj(swiglu(z, y)), MambaState(conv, ssm) if ctx.carry else None)
