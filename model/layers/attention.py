"""Causal self-attention: full or sliding-window, grouped key/value heads, rotary positions or none.

The window counts the current token: a query at position t sees keys t-window+1 ... t of its own document (Samba,
arXiv 2406.07522, appendix and code). Rotary embedding (arXiv 2104.09864) is computed in float32.

Legend: B batch rows, T tokens, D width, H query heads, K key/value heads, P head dim, L cached tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.context import Context, LayerOutput
from model.layers.base import Costs, Dims, Projection, VisibleKeys, projection_spec, require
from model.ops.attention import Past, attention, rotary
from model.params import Block, ParamSpec, Split, Table, allocate_table, split_evenly


@dataclass(frozen=True)
class AttentionConfig:
    """n_heads: query heads. n_kv_heads: key/value heads, None for as many. head_dim: None for d_model / n_heads.
    window: tokens that a query sees, itself included, None for all of its document. rope_theta: base of the rotary
    embedding, None for no position encoding."""

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope_theta: float | None = 10_000.0
    kind: Literal["attention"] = "attention"
    residual: ClassVar[str] = "add"

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Head dim P."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

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
        if self.rope_theta is not None:
            require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive base, or none")
            require(self.width(d_model) % 2 == 0, "head_dim", self.width(d_model), "an even size under rope")

    def table(self, dims: Dims) -> Table:
        P, H, K = self.width(dims.d_model), self.n_heads, self.kv_heads
        shared = Split(0, units=K, leaders=H)
        blocks = (
            Block("q", H * P, split_evenly(0, H)),
            Block("k", K * P, shared),
            Block("v", K * P, shared),
        )
        return {
            "qkv.weight": ParamSpec(((H + 2 * K) * P, dims.d_model), dims.matrix(dims.d_model), blocks=blocks),
            "out.weight": projection_spec(dims, dims.d_model, H * P, output=True, split=split_evenly(1, H)),
        }

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        P, H, K = self.width(dims.d_model), self.n_heads, self.kv_heads
        projections = 2 * dims.d_model * P * (2 * H + 2 * K)
        cached = length if self.window is None else min(length, self.window - 1)
        return Costs(
            flops=projections + 4 * keys(self.window) * H * P,
            saved_compute=dims.d_model + P * (3 * H + 2 * K),
            saved_float32=H,
            state_bytes=2 * 2 * cached * K * P,
        )

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return Attention(self, dims, device)


class AttentionState(NamedTuple):
    """k, v: (B, L, K, P), the newest token last; with a window, L never exceeds window - 1. length: (B,) int64, how
    many of them belong to the row's current document."""

    k: Tensor
    v: Tensor
    length: Tensor


class Attention(nn.Module):
    def __init__(self, config: AttentionConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        P = config.width(dims.d_model)
        self.sizes = [config.n_heads, config.kv_heads, config.kv_heads]
        self.head_dim = P
        self.qkv, self.out = Projection(), Projection()
        allocate_table(self, config.table(dims), device)

    def forward(self, x: Tensor, ctx: Context, state: AttentionState | None = None) -> LayerOutput:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(self.sizes, dim=2)
        if self.config.rope_theta is not None:
            q = rotary(q, ctx.documents.positions, self.config.rope_theta)
            k = rotary(k, ctx.documents.positions, self.config.rope_theta)
        past = None if state is None else Past(state.k, state.v, state.length)
        packed = not ctx.documents.single
        y = attention(
            q,
            k,
            v,
            window=self.config.window,
            documents=ctx.documents.index if packed or past is not None else None,
            bounds=ctx.documents.bounds if packed and past is None else None,
            past=past,
        )
        return LayerOutput(self.out(y.flatten(2)), self._next_state(k, v, ctx, state) if ctx.carry else None)

    def _next_state(self, k: Tensor, v: Tensor, ctx: Context, state: AttentionState | None) -> AttentionState:
        seen = ctx.documents.positions[:, -1] + 1
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        keep = k.shape[1] if self.config.window is None else min(k.shape[1], self.config.window - 1)
        first = k.shape[1] - keep
        return AttentionState(k[:, first:].contiguous(), v[:, first:].contiguous(), seen.clamp(max=keep))
