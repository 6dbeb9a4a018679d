"""Causal self-attention: full or sliding-window, grouped key/value heads, rotary positions or none.

    q, k, v = qkv(x);  q, k, v = silu(conv(q, k, v));  q, k = RMSNorm(q), RMSNorm(k);  q, k = rotary(q), rotary(k)
    y = out(attention(q, k, v))              (convolution, norms and rotation where the config wants them)

The window counts the current token: a query at position t sees keys t-window+1 ... t of its own document (Samba,
arXiv 2406.07522, appendix and code). Rotary embedding (arXiv 2104.09864) is computed in float32.

On context ranks the keys and values to the left (under a window its last window-1) come first, as cached ones.

Legend: B batch rows, T tokens, D width, H query heads, K key/value heads, P head dim, L cached tokens, k convolution
taps.
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
    even_groups,
    inputs_before,
    norm_spec,
    projection_spec,
    require,
)
from model.ops.attention import Past, attention, rotary
from model.ops.conv import causal_conv
from model.ops.norm import rms_norm
from model.ops.rope import NTKScaling, RopeScaling
from model.params import Block, ParamSpec, Split, Table, Uniform, allocate_table, local_rows, split_evenly


@dataclass(frozen=True)
class AttentionConfig:
    """n_heads: query heads. n_kv_heads: key/value heads, None for as many. head_dim: None for d_model / n_heads.
    window: tokens that a query sees, itself included, None for all of its document. rope_theta: base of the rotary
    embedding, None for no position encoding. rope_fraction: of the head dim, the first dimensions, that turn.
    rope_scaling: other frequencies for contexts longer than the trained one, None for none. qk_norm: RMSNorm over each
    head of q and k before they turn (Qwen 3). logit_cap: bound c of the scores, c tanh(s / c) (Gemma 2).
    scale: of the scores, None for 1/sqrt(P). qkv_conv: taps of a causal depthwise convolution with SiLU and no bias on
    q, k and v before all else, None for none (Samba's ablation, and its public code)."""

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope_theta: float | None = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    logit_cap: float | None = None
    scale: float | None = None
    qkv_conv: int | None = None
    kind: Literal["attention"] = "attention"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ("tensor", "context")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Head dim P."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def turned(self, d_model: int) -> int:
        """How many dimensions of a head turn under rope."""
        return round(self.rope_fraction * self.width(d_model))

    def check(self, d_model: int) -> None:
        require(self.n_heads > 0, "n_heads", self.n_heads, "a positive number")
        require(self.kv_heads > 0, "n_kv_heads", self.n_kv_heads, "a positive number")
        require(self.n_heads % self.kv_heads == 0, "n_kv_heads", self.kv_heads, f"a divisor of n_heads={self.n_heads}")
        require(
            self.head_dim is not None or d_model % self.n_heads == 0,
            "n_heads",
            self.n_heads,
            f"a divisor of d_model={d_model} (or an explicit head_dim)",
        )
        require(self.width(d_model) > 0, "head_dim", self.head_dim, "a positive number")
        require(self.window is None or self.window > 0, "window", self.window, "a positive number of tokens, or none")
        for key in ("logit_cap", "scale", "qkv_conv"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "a positive number, or none")
        self._check_rope(self.width(d_model))

    def _check_rope(self, P: int) -> None:
        scaling = self.rope_scaling
        if self.rope_theta is None:
            require(scaling is None, "rope_scaling", scaling, "none without rope (rope_theta is none)")
            require(self.rope_fraction == 1, "rope_fraction", self.rope_fraction, "1 without rope (rope_theta is none)")
            return
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive base, or none")
        require(P % 2 == 0, "head_dim", P, "an even size under rope")
        require(0 < self.rope_fraction <= 1, "rope_fraction", self.rope_fraction, "a number above 0, at most 1")
        exact = self.rope_fraction * P
        even = round(exact) % 2 == 0 and round(exact) > 0 and abs(exact - round(exact)) < 1e-6 * P
        wants = f"an even number of the {P} dimensions of a head, not {exact:g}"
        require(even, "rope_fraction", self.rope_fraction, wants)
        if scaling is not None:
            require(self.rope_theta > 1, "rope_theta", self.rope_theta, "more than 1 under rope_scaling")
            slowest = round(exact) > 2 or not isinstance(scaling, NTKScaling)
            require(slowest, "rope_scaling.kind", scaling.kind, "more than 2 dimensions that turn")

    def table(self, dims: Dims) -> Table:
        P, H, K = self.width(dims.d_model), self.n_heads, self.kv_heads
        shared = Split(0, units=K, leaders=H)
        blocks = (
            Block("q", H * P, split_evenly(0, H)),
            Block("k", K * P, shared),
            Block("v", K * P, shared),
        )
        table = {"qkv.weight": ParamSpec(((H + 2 * K) * P, dims.d_model), dims.matrix(dims.d_model), blocks=blocks)}
        if self.qkv_conv is not None:
            tap, shape = 1 / math.sqrt(self.qkv_conv), ((H + 2 * K) * P, self.qkv_conv)
            table["conv_weight"] = ParamSpec(shape, Uniform(-tap, tap), blocks=blocks, update="convolution")
        if self.qk_norm:
            table |= {"q_norm_weight": norm_spec(P), "k_norm_weight": norm_spec(P)}
        table["out.weight"] = projection_spec(dims, dims.d_model, H * P, output=True, split=split_evenly(1, H))
        return table

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        P, H, K = self.width(dims.d_model), self.n_heads, self.kv_heads
        projections = 2 * dims.d_model * P * (2 * H + 2 * K)
        cached = length if self.window is None else min(length, self.window - 1)
        taps, convolved = self.qkv_conv or 1, P * (H + 2 * K) if self.qkv_conv is not None else 0
        normed = P * (H + K) if self.qk_norm else 0
        return Costs(
            flops=projections + 2 * taps * convolved + 4 * keys(self.window) * H * P,
            saved_compute=dims.d_model + P * (3 * H + 2 * K) + convolved + normed,
            saved_float32=H + (H + K if self.qk_norm else 0),
            state_bytes=2 * 2 * cached * K * P + 2 * (taps - 1) * convolved,
        )

    def messages(self, dims: Dims) -> list[Message]:
        rows = local_rows(self.table(dims)["qkv.weight"], dims.place)
        messages = []
        if self.qkv_conv is not None:
            messages.append(Message("halo", sum(rows.values()), reach=self.qkv_conv - 1))
        if self.window != 1:
            reach = None if self.window is None else self.window - 1
            messages.append(Message("halo", rows["k"] + rows["v"], reach=reach))
        return messages

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return Attention(self, dims, device)


class AttentionState(NamedTuple):
    """k, v: (B, L, K, P), the newest token last; with a window, L never exceeds window - 1. length: (B,) int64, how
    many of them belong to the row's current document. conv: (B, k-1, (H + 2K) P), the last inputs of the
    convolution, None without one."""

    k: Tensor
    v: Tensor
    length: Tensor
    conv: Tensor | None = None


class Attention(nn.Module):
    conv_weight: nn.Parameter
    q_norm_weight: nn.Parameter
    k_norm_weight: nn.Parameter

    def __init__(self, config: AttentionConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config, self.eps = config, dims.norm_eps
        P = config.width(dims.d_model)
        rows = local_rows(config.table(dims)["qkv.weight"], dims.place)
        self.sizes = [rows[name] // P for name in ("q", "k", "v")]
        _, self.kv_of = even_groups(config.n_heads, config.kv_heads, dims.place)
        self.head_dim, self.turned = P, config.turned(dims.d_model)
        self.qkv, self.out = Projection(), Projection()
        allocate_table(self, config.table(dims), device, dims.place)

    def forward(self, x: Tensor, ctx: Context, state: AttentionState | None = None) -> LayerOutput:
        cfg, packed = self.config, not ctx.documents.single
        continues = state is not None or ctx.spread
        documents = ctx.documents.index if packed or continues else None
        qkv, conv = self.qkv(x), None
        if cfg.qkv_conv is not None:
            qkv, conv = causal_conv(
                qkv,
                self.conv_weight,
                None,
                documents=documents,
                state=inputs_before(qkv, cfg.qkv_conv, ctx) if state is None else state.conv,
                activation="silu",
                return_state=ctx.carry,
            )
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.sizes, dim=2)
        if cfg.qk_norm:
            q, k = rms_norm(q, self.q_norm_weight, self.eps), rms_norm(k, self.k_norm_weight, self.eps)
        if cfg.rope_theta is not None:
            turn = (ctx.documents.positions, cfg.rope_theta, self.turned, cfg.rope_scaling)
            q, k = rotary(q, *turn), rotary(k, *turn)
        past = None if state is None else Past(state.k, state.v, state.length)
        if ctx.spread and cfg.window != 1:
            reach = ctx.row if cfg.window is None else cfg.window - 1
            left, length = ctx.before(torch.cat([k, v], 2), reach)
            past = Past(left[:, :, : k.shape[2]], left[:, :, k.shape[2] :], length)
        y = attention(
            q,
            self._of_heads(k),
            self._of_heads(v),
            window=cfg.window,
            documents=documents,
            bounds=ctx.documents.bounds if documents is not None and state is None else None,
            scale=cfg.scale,
            cap=cfg.logit_cap,
            past=None if past is None else Past(self._of_heads(past.k), self._of_heads(past.v), past.length),
        )
        return LayerOutput(self.out(y.flatten(2)), self._next_state(k, v, conv, ctx, state) if ctx.carry else None)

    def _of_heads(self, kv: Tensor) -> Tensor:
        """Keys or values in the order in which query heads can share them evenly."""
        return kv if self.kv_of is None else kv[:, :, self.kv_of]

    def _next_state(
        self, k: Tensor, v: Tensor, conv: Tensor | None, ctx: Context, state: AttentionState | None
    ) -> AttentionState:
        seen = ctx.documents.positions[:, -1] + 1
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        keep = k.shape[1] if self.config.window is None else min(k.shape[1], self.config.window - 1)
        first = k.shape[1] - keep
        return AttentionState(k[:, first:].contiguous(), v[:, first:].contiguous(), seen.clamp(max=keep), conv)
