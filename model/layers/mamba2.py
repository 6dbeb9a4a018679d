"""Mamba-2 (arXiv 2405.21060): a selective state-space mixer by structured state-space duality.

    z, x, B, C, dt = in_proj(u);  x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias);  A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t;  y_t = S_t C_t + D x_t;  out = out_proj(RMSNorm(y * silu(z)))

Layout and defaults follow section 7 of the paper and the public `mamba_ssm` Mamba2 module, also where the state space
has but `d_ssm` of the inner channels: the others are a gated MLP beside it,

    z0, x0, z, x, B, C, dt = in_proj(u);  out = mlp_out(silu(z0) * x0) + out_proj(...)

(`mamba_ssm` has both output projections side by side in one matrix, the MLP's columns first).

On context ranks the chunk's effect on a state (`ssd_summary`) goes round before the scan.

Legend: B batch rows, T tokens, H heads, P head dim, G groups, N state, I = H P width of the state space, E channels of
the MLP, k convolution taps.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context, LayerOutput
from model.layers.base import (
    Costs,
    Dims,
    Message,
    Projection,
    VisibleKeys,
    even_groups,
    inputs_before,
    norm_spec,
    projection_spec,
    require,
)
from model.ops.conv import causal_conv
from model.ops.mamba2 import conv_scan_norm, one_kernel
from model.ops.norm import Spread, gated_rms_norm, spread_gated_rms_norm, swiglu
from model.ops.ssd import ssd
from model.ops.ssd_summary import ssd_summary
from model.params import (
    Block,
    Constant,
    InverseSoftplusLogUniform,
    ParamSpec,
    Split,
    Table,
    Uniform,
    allocate_table,
    local_rows,
    split_evenly,
)


@dataclass(frozen=True)
class Mamba2Config:
    """expand: inner width as a multiple of d_model. head_dim: P. d_state: N. n_groups: G, groups of heads that share B
    and C. d_conv: taps of the causal convolution. chunk: tokens per chunk of the scan (a matter of speed alone).
    dt_min, dt_max, dt_floor: range of the initial step. dt_limit: bounds of the step at run time, None for
    none. A_range: range of the initial -A. d_ssm: inner channels of the state space, None for all; the rest is a gated
    MLP. norm: False for y * silu(z) without norm (Falcon-H1). norm_before_gate: RMSNorm(y) * silu(z)."""

    expand: float = 2.0
    head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1
    d_conv: int = 4
    conv_bias: bool = True
    chunk: int = 128
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] | None = None
    A_range: tuple[float, float] = (1.0, 16.0)
    d_ssm: int | None = None
    norm: bool = True
    norm_before_gate: bool = False
    kind: Literal["mamba2"] = "mamba2"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ("tensor", "context")

    def d_inner(self, d_model: int) -> int:
        return round(self.expand * d_model)

    def ssm_width(self, d_model: int) -> int:
        """Inner channels of the state space, I."""
        return self.d_inner(d_model) if self.d_ssm is None else self.d_ssm

    def mlp_width(self, d_model: int) -> int:
        """Inner channels of the gated MLP beside it, F."""
        return self.d_inner(d_model) - self.ssm_width(d_model)

    def n_heads(self, d_model: int) -> int:
        return self.ssm_width(d_model) // self.head_dim

    def check(self, d_model: int) -> None:
        inner, ssm = self.d_inner(d_model), self.ssm_width(d_model)
        for key in ("expand", "head_dim", "d_state", "n_groups", "d_conv", "chunk", "dt_min", "dt_floor"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")
        require(inner == self.expand * d_model, "expand", self.expand, f"a multiple that makes d_model={d_model} whole")
        require(0 < ssm <= inner, "d_ssm", self.d_ssm, f"a number from 1 to the inner width {inner}, or none")
        name = "the inner width" if self.d_ssm is None else "d_ssm"
        require(ssm % self.head_dim == 0, "head_dim", self.head_dim, f"a divisor of {name} {ssm}")
        heads = self.n_heads(d_model)
        require(heads % self.n_groups == 0, "n_groups", self.n_groups, f"a divisor of the {heads} heads")
        require(self.dt_min <= self.dt_max, "dt_max", self.dt_max, f"at least dt_min={self.dt_min}")
        if self.dt_limit is not None:
            low, high = self.dt_limit
            require(0 <= low < high, "dt_limit", list(self.dt_limit), "0 <= low < high, or none")
        ok = self.norm or not self.norm_before_gate
        require(ok, "norm_before_gate", self.norm_before_gate, "false where norm is false")
        require(0 < self.A_range[0] <= self.A_range[1], "A_range", list(self.A_range), "0 < low <= high")

    def table(self, dims: Dims) -> Table:
        inner, H, G, N = self.ssm_width(dims.d_model), self.n_heads(dims.d_model), self.n_groups, self.d_state
        heads, shared = split_evenly(0, H), Split(0, units=G, leaders=H)
        xBC = (Block("x", inner, heads), Block("B", G * N, shared), Block("C", G * N, shared))
        width = inner + 2 * G * N
        E = self.mlp_width(dims.d_model)
        mlp = (Block("z0", E, split_evenly(0, E)), Block("x0", E, split_evenly(0, E))) if E else ()
        blocks = (*mlp, Block("z", inner, heads), *xBC, Block("dt", H, heads))
        rows = 2 * E + inner + width + H
        tap = 1 / math.sqrt(self.d_conv)
        table = {
            "in_proj.weight": ParamSpec((rows, dims.d_model), dims.matrix(dims.d_model), blocks=blocks),
            "conv_weight": ParamSpec((width, self.d_conv), Uniform(-tap, tap), blocks=xBC, update="convolution"),
            "conv_bias": ParamSpec((width,), Uniform(-tap, tap), blocks=xBC, decay=False, update="vector"),
            "dt_bias": ParamSpec(
                (H,),
                InverseSoftplusLogUniform(self.dt_min, self.dt_max, self.dt_floor),
                split=heads,
                decay=False,
                update="vector",
            ),
            "A_log": ParamSpec((H,), Uniform(*self.A_range, log=True), split=heads, decay=False, update="vector"),
            "D": ParamSpec((H,), Constant(1.0), split=heads, decay=False, update="vector"),
            "norm_weight": norm_spec(inner, split=heads),
            "out_proj.weight": projection_spec(dims, dims.d_model, inner, output=True, split=split_evenly(1, H)),
        }
        if not self.conv_bias:
            del table["conv_bias"]
        if not self.norm:
            del table["norm_weight"]
        if E:
            output = dims.matrix(inner + E, output=True)
            table["out_proj.weight"] = replace(table["out_proj.weight"], init=output)
            table["mlp_out.weight"] = ParamSpec((dims.d_model, E), output, split=split_evenly(1, E))
        return table

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        inner, H, GN = self.ssm_width(dims.d_model), self.n_heads(dims.d_model), self.n_groups * self.d_state
        width, E = inner + 2 * GN, self.mlp_width(dims.d_model)
        projections = 2 * dims.d_model * (inner + width + H) + 2 * inner * dims.d_model + 6 * E * dims.d_model
        chunk_states = inner * self.d_state / self.chunk
        return Costs(
            flops=projections + 2 * self.d_conv * width + 5 * inner * self.d_state,
            saved_compute=dims.d_model + 2 * inner + 2 * width + inner + 3 * E,
            saved_float32=2 * H + chunk_states,
            state_bytes=2 * (self.d_conv - 1) * width + 4 * inner * self.d_state,
        )

    def spreads_norm(self, d_model: int, ranks: int) -> bool:
        """Whether a group of the norm lies on several tensor ranks."""
        heads = self.n_heads(d_model)
        return self.norm and any(heads * rank // ranks % (heads // self.n_groups) for rank in range(ranks))

    def messages(self, dims: Dims) -> list[Message]:
        rows = local_rows(self.table(dims)["in_proj.weight"], dims.place)
        messages = [
            Message("halo", rows["x"] + rows["B"] + rows["C"], reach=self.d_conv - 1),
            Message("prefix", rows["dt"] * (self.head_dim * self.d_state + 1), per="row", dtype="float32"),
        ]
        if self.spreads_norm(dims.d_model, dims.place.size):
            messages.append(Message("sum_over_tensor", self.n_groups, dtype="float32"))
        return messages

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return Mamba2(self, dims, device)


class Mamba2State(NamedTuple):
    """conv: (B, k-1, I + 2 G N), the last inputs of the convolution. ssm: (B, H, P, N) float32."""

    conv: Tensor | None
    ssm: Tensor | None


class Mamba2(nn.Module):
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter | None
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm_weight: nn.Parameter | None

    def __init__(self, config: Mamba2Config, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config, self.eps = config, dims.norm_eps
        H, G, place = config.n_heads(dims.d_model), config.n_groups, dims.place
        rows = local_rows(config.table(dims)["in_proj.weight"], place)
        self.conv_sizes = [rows["x"], rows["B"], rows["C"]]
        beside = [rows[name] for name in ("z0", "x0") if name in rows]
        self.sizes = [*beside, rows["z"], sum(self.conv_sizes), rows["dt"]]
        self.heads_per_group = H // G
        self.groups, self.group_of = even_groups(H, G, place)
        # Of each head, where a group of the norm lies on several tensor ranks.
        first = H * place.rank // place.size
        spread = config.spreads_norm(dims.d_model, place.size)
        self.norm_group_of = [head * G // H for head in range(first, first + rows["dt"])] if spread else None
        self.in_proj, self.out_proj = Projection(), Projection()
        self.mlp_out = Projection() if beside else None
        self.register_parameter("conv_bias", None)
        self.register_parameter("norm_weight", None)
        allocate_table(self, config.table(dims), device, dims.place)

    def forward(self, u: Tensor, ctx: Context, state: Mamba2State | None = None) -> LayerOutput:
        cfg = self.config
        alone = ctx.documents.single and state is None and not ctx.spread
        documents = None if alone else ctx.documents.index
        projected = self.in_proj(u)
        if kernel := self._one_kernel(projected, documents, ctx.spread or state is not None or ctx.carry):
            return LayerOutput(self.out_proj(self._conv_scan_norm(projected, documents, kernel)))
        *beside, z, xBC, dt = projected.split(self.sizes, dim=-1)
        xBC, conv = causal_conv(
            xBC,
            self.conv_weight,
            self.conv_bias,
            documents=documents,
            state=inputs_before(xBC, cfg.d_conv, ctx) if state is None else state.conv,
            activation="silu",
            return_state=ctx.carry,
        )
        x, *BC = xBC.split(self.conv_sizes, dim=-1)
        B, C = (part.unflatten(-1, (self.groups, -1)) for part in BC)
        if self.group_of is not None:
            B, C = B[:, :, self.group_of], C[:, :, self.group_of]
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if cfg.dt_limit is not None:
            dt = dt.clamp(*cfg.dt_limit)
        x, A = x.unflatten(-1, (-1, cfg.head_dim)), -torch.exp(self.A_log)
        entering = None if state is None else state.ssm
        if ctx.spread:
            entering = ctx.mesh.prefix(*ssd_summary(x, dt, A, B, ctx.documents.index))
        y, ssm = ssd(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            documents=documents,
            initial_state=entering,
            chunk=cfg.chunk,
            return_state=ctx.carry,
        )
        y = self.out_proj(self._gate(y.flatten(2), z, ctx))
        if self.mlp_out is not None:
            y = y + self.mlp_out(swiglu(*beside))
        return LayerOutput(y, Mamba2State(conv, ssm) if ctx.carry else None)

    def _one_kernel(self, projected: Tensor, documents: Tensor | None, state: bool) -> str | None:
        channels, taps = self.conv_weight.shape
        return one_kernel(
            projected,
            documents=documents is not None,
            norm=self.norm_weight is not None,
            state=state,
            mlp=self.mlp_out is not None,
            shared=self.group_of is not None or self.norm_group_of is not None,
            head_dim=self.config.head_dim,
            taps=taps,
            channels=channels,
        )

    def _conv_scan_norm(self, projected: Tensor, documents: Tensor | None, kernel: str) -> Tensor:
        return conv_scan_norm(
            projected,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            -torch.exp(self.A_log),
            self.D,
            self.norm_weight,
            self.eps,
            documents=documents,
            head_dim=self.config.head_dim,
            groups=self.groups,
            chunk=self.config.chunk,
            dt_limit=self.config.dt_limit,
            norm_before_gate=self.config.norm_before_gate,
            backend=kernel,
        )

    def _gate(self, y: Tensor, z: Tensor, ctx: Context) -> Tensor:
        if self.norm_weight is None:
            return swiglu(z, y)
        first = self.config.norm_before_gate
        if self.norm_group_of is None:
            return gated_rms_norm(y, z, self.norm_weight, self.eps, self.groups, norm_before_gate=first)
        spread = Spread(self.norm_group_of, self.config.n_groups, self.heads_per_group, ctx.mesh.sum_over_tensor)
        return spread_gated_rms_norm(y, z, self.norm_weight, self.eps, spread, norm_before_gate=first)
